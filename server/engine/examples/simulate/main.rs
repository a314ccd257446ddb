//! Runs random scenarios against the engine; see `sim.rs`.

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "sim.rs"]
mod sim;

use std::process::ExitCode;
use std::time::Instant;

const USAGE: &str = "usage: simulate [--seed N] [--count M] [--verbose]
  --seed N     the first seed (0)
  --count M    how many seeds from there on (1000)
  --verbose    print what happens, step by step";

struct Args {
    seed: u64,
    count: u64,
    verbose: bool,
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Args, String> {
    let mut parsed = Args { seed: 0, count: 1_000, verbose: false };
    while let Some(name) = args.next() {
        let number = |value: Option<String>| {
            let value = value.ok_or_else(|| format!("{name} needs a number"))?;
            value.parse().map_err(|_| format!("{name} is {value}; it must be a whole number"))
        };
        match name.as_str() {
            "--seed" => parsed.seed = number(args.next())?,
            "--count" => parsed.count = number(args.next())?,
            "--verbose" => parsed.verbose = true,
            _ => return Err(format!("there is no option {name}")),
        }
    }
    Ok(parsed)
}

fn main() -> ExitCode {
    let args = match parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(fault) => {
            eprintln!("{fault}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let start = Instant::now();
    let mut total = sim::Summary::default();
    for seed in args.seed..args.seed.saturating_add(args.count) {
        match sim::simulate(seed, args.verbose) {
            Ok(summary) => total.add(&summary),
            Err(violation) => {
                println!("{violation}");
                println!("again, with every step: simulate --seed {seed} --count 1 --verbose");
                return ExitCode::FAILURE;
            }
        }
    }
    println!("{} seeds from {} on, no violation, {:.1?}", args.count, args.seed, start.elapsed());
    println!("{total}");
    ExitCode::SUCCESS
}
