//! `ringmain-bench`: load generator and reports for Ringmain.
//!
//! The way of a run: [`cli`] → [`command`] makes a workload → [`run`] starts load processes ([`load`]) and samples the
//! server ([`measure`], [`server`]) → [`report`]. `bare` holds the TCP servers that are the limit. `wire` is what is
//! said on a connection. `io` has the `unsafe`. Nothing here may depend on the node: it is judged from outside.

mod bare;
mod cli;
mod command;
mod io;
mod load;
mod measure;
mod plan;
mod report;
mod run;
mod server;
mod wire;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match command::execute(cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringmain-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
