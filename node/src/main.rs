//! The `ringmain` program. Everything is in the library; see `ringmain --help`.

use std::process::ExitCode;

/// Small, quick, and gives memory back after a crowd has left.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // First of all: what is touched before keeps its huge pages.
    ringmain::io::refuse_huge_pages();
    ringmain::control::cli::main()
}
