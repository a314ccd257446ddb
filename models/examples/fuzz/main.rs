//! Hostile files by the million: mutates small real ones structurally and holds the loaders to it that they
//! give a model or an error, without a panic and within a memory limit.
//!
//!     cargo run --release -p tandem-models --example fuzz -- [--target NAME] [--count N] [--seed N]
//!
//! Execution `i` of a seed is the same on every machine. A case that fails is written to a folder of its own, and
//! its path and number are printed. `tests/fuzz.rs` runs a few thousand.

#[path = "fuzz.rs"]
mod fuzz;

use std::process::ExitCode;
use std::time::Instant;

use fuzz::{TARGETS, Target};

#[global_allocator]
static ALLOCATOR: fuzz::memory::Counting = fuzz::memory::Counting;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1)
    };
    let number = |name: &str, default: u64| value(name).map_or(Some(default), |text| text.parse().ok());
    let chosen: Vec<&Target> = match value("--target") {
        None => TARGETS.iter().collect(),
        Some(name) => TARGETS.iter().filter(|target| target.name == name).collect(),
    };
    let (Some(count), Some(seed), false) =
        (number("--count", 10_000), number("--seed", 0), chosen.is_empty())
    else {
        let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("usage: fuzz [--target {}] [--count N] [--seed N]", names.join("|"));
        return ExitCode::from(2);
    };
    // What a loader's panic says is in the report, and its trace would drown it; one of the harness is its own fault.
    std::panic::set_hook(Box::new(|panic| {
        if panic.location().is_some_and(|location| location.file().contains("examples/fuzz")) {
            eprintln!("{panic}");
        }
    }));
    let mut failures = 0;
    for target in chosen {
        let started = Instant::now();
        let summary = fuzz::run(target, seed, count, |failure| {
            failures += 1;
            println!("{failure}");
        });
        println!("{}: {summary}, {:.0} s", target.name, started.elapsed().as_secs_f64());
    }
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
