//! The `ringmain` program. Everything is in the library; see `ringmain --help`.

use std::process::ExitCode;

/// Small, quick, and gives memory back after a crowd has left.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    ringmain::control::cli::main()
}
