//! The `tandem` binary: command line and settings. Serving itself is the library's.

mod cli;
mod config;
mod drafter;
mod runtime;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cli::run()
}
