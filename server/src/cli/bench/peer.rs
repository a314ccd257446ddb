//! `tandem bench peer`: passes of Tandem and of llama.cpp over the same GGUF file, in turns.
//!
//! A pass computes `rows` tokens of one sequence behind a context and the logits of the last, which is what
//! `llama-bench -p ROWS -d CONTEXT` times. One row is a decode step, a few are a verification, many a
//! prefill. In each round llama.cpp runs all passes in a process of its own, then Tandem in this one; a
//! ratio compares the two of one round, and the median over the rounds is shown with its ends. Without a
//! llama.cpp Tandem's passes are timed alone.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::report::{self, Machine};
use super::stats::{Spread, median};
use crate::cli::passes::{LEAST_PASSES, Passes};
use crate::runtime;

const LONG_ABOUT: &str = "\
Compare passes of Tandem with those of llama.cpp over the same GGUF file on this machine.

Runs llama-bench, built outside this repository (or ik_llama.cpp's), and Tandem's own passes in turns: the \
milliseconds of a pass over so many tokens behind a context, keys and values in f16 on both sides. The \
ratios are llama.cpp's time over Tandem's within one round, so above 1 Tandem is faster; `to 1` is a pass's \
time over that of a pass of one row. Other work on the machine disturbs both sides: see the spread. Without \
--llama-bin only Tandem's passes are timed.";

const EXAMPLES: &str = "\
Examples:
  tandem synth --like qwen2.5-coder-1.5b --format q4_k_m --out model.gguf
  tandem bench peer --llama-bin ~/llama.cpp/build/bin --model model.gguf
  tandem bench peer --llama-bin ~/llama.cpp/build/bin --model model.gguf --context 16384 --rows 1,4
  tandem bench peer --llama-bin ~/ik_llama.cpp/build/bin --model model.gguf --context 0 --peer-arg=-rtr --peer-arg=1";

/// Arguments of `tandem bench peer`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(in crate::cli) struct PeerArgs {
    /// Folder that holds llama-bench; without it Tandem is timed alone
    #[arg(long, value_name = "DIR")]
    llama_bin: Option<PathBuf>,

    /// The GGUF file
    #[arg(long, value_name = "FILE")]
    model: PathBuf,

    /// Tokens of a pass, comma-separated
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,2,4,5,8,16,512", value_parser = clap::value_parser!(u16).range(1..=4096))]
    rows: Vec<u16>,

    /// One more argument for llama-bench; may be given again (ik_llama.cpp: -rtr 1 repacks weights)
    #[arg(long, value_name = "ARG", allow_hyphen_values = true, requires = "llama_bin")]
    peer_arg: Vec<String>,

    /// Tokens of context before a pass; ik_llama.cpp's llama-bench has only 0
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(0..=1_048_576))]
    context: u32,

    /// Times that both sides take their turn
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Threads of both sides [default: the CPUs of this machine]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=512))]
    threads: Option<u16>,

    /// Write the report to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What llama-bench says of a test.
#[derive(Deserialize)]
struct LlamaTest {
    n_prompt: u32,
    samples_ns: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Row {
    rows: u16,
    tandem_ms: Spread,
    tandem_to_one_row: Option<f64>,
    peer: Option<PeerRow>,
}

#[derive(Debug, Serialize)]
struct PeerRow {
    ms: Spread,
    to_one_row: Option<f64>,
    /// The peer's time over Tandem's.
    ratio: Spread,
}

/// Milliseconds of a pass in one round.
#[derive(Clone, Copy, Debug)]
struct Times {
    tandem: f64,
    peer: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    model: String,
    context: u32,
    rounds: u32,
    rows: Vec<Row>,
}

pub(super) fn run(args: &PeerArgs) -> anyhow::Result<ExitCode> {
    let threads = args
        .threads
        .map_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get), usize::from);
    let most = args.rows.iter().copied().max().map_or(1, usize::from);
    let pool = runtime::thread_pool(threads)?;
    let mut passes = Passes::load(&args.model, pool, args.context as usize, most)?;
    let llama_bench = args.llama_bin.as_ref().map(|folder| folder.join("llama-bench"));
    let bar = report::progress_bar(args.rounds as usize, "rounds");
    let mut times: Vec<Vec<Times>> = vec![Vec::new(); args.rows.len()];
    for _ in 0..args.rounds {
        let peer = llama_bench.as_deref().map(|path| peer_times(path, args, threads)).transpose()?;
        for (index, &rows) in args.rows.iter().enumerate() {
            let tandem = median(passes.times_ms(usize::from(rows), 1)?);
            times[index].push(Times { tandem, peer: peer.as_ref().map(|peer| peer[index]) });
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let report = Report {
        machine: Machine::this(threads),
        model: args.model.display().to_string(),
        context: args.context,
        rounds: args.rounds,
        rows: summarise(&args.rows, &times),
    };
    report.print();
    if let Some(path) = &args.json {
        report::write_json(path, &report)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Milliseconds of the peer's passes, in the order of `args.rows`.
fn peer_times(llama_bench: &Path, args: &PeerArgs, threads: usize) -> anyhow::Result<Vec<f64>> {
    let rows: Vec<String> = args.rows.iter().map(u16::to_string).collect();
    let mut command = Command::new(llama_bench);
    command
        .arg("-m")
        .arg(&args.model)
        .args(["-p", &rows.join(","), "-n", "0"])
        .args(["-t", &threads.to_string(), "-r", &LEAST_PASSES.to_string(), "-o", "json"])
        .args(&args.peer_arg);
    if args.context > 0 {
        command.args(["-d", &args.context.to_string()]);
    }
    let output = command.output().with_context(|| {
        format!("cannot run {}; --llama-bin names the folder that holds it", llama_bench.display())
    })?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().last().unwrap_or("and said nothing");
        bail!("{} ended with {}: {last}", llama_bench.display(), output.status);
    }
    let tests: Vec<LlamaTest> = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{} wrote no JSON that this knows", llama_bench.display()))?;
    args.rows
        .iter()
        .map(|&rows| {
            let test = tests.iter().find(|test| test.n_prompt == u32::from(rows));
            let samples = test.map(|test| test.samples_ns.clone()).filter(|samples| !samples.is_empty());
            let samples = samples.with_context(|| format!("llama-bench gave no time for {rows} rows"))?;
            Ok(median(samples) / 1e6)
        })
        .collect()
}

fn summarise(rows: &[u16], times: &[Vec<Times>]) -> Vec<Row> {
    let one_row = rows.iter().position(|&rows| rows == 1);
    // A round's pass over that round's pass of one row.
    let to_one = |index: usize, side: &dyn Fn(&Times) -> Option<f64>| {
        let ones = &times[one_row?];
        let ratios: Option<Vec<f64>> =
            times[index].iter().zip(ones).map(|(time, one)| Some(side(time)? / side(one)?)).collect();
        ratios.map(median)
    };
    let peer = |index: usize| {
        let of = |value: &dyn Fn(&Times) -> Option<f64>| Spread::of(times[index].iter().filter_map(value));
        Some(PeerRow {
            ms: of(&|t| t.peer)?,
            to_one_row: to_one(index, &|t| t.peer),
            ratio: of(&|t| Some(t.peer? / t.tandem))?,
        })
    };
    rows.iter()
        .enumerate()
        .map(|(index, &rows)| Row {
            rows,
            tandem_ms: Spread::of(times[index].iter().map(|t| t.tandem))
                .expect("there is at least one round: this is a bug"),
            tandem_to_one_row: to_one(index, &|t| Some(t.tandem)),
            peer: peer(index),
        })
        .collect()
}

impl Report {
    fn print(&self) {
        println!("{}, context {}, {} rounds; medians", self.model, self.context, self.rounds);
        println!("{}", self.machine);
        let has_peer = self.rows.iter().any(|row| row.peer.is_some());
        let header = ["tokens", "tandem ms", "to 1", "peer ms", "to 1", "peer / tandem", "min..max"];
        let rows = self.rows.iter().map(|row| {
            let mut cells = vec![
                row.rows.to_string(),
                format!("{:.2}", row.tandem_ms.median),
                report::number(row.tandem_to_one_row, 2),
            ];
            if let Some(peer) = &row.peer {
                cells.push(format!("{:.2}", peer.ms.median));
                cells.push(report::number(peer.to_one_row, 2));
                cells.push(format!("{:.2}", peer.ratio.median));
                cells.push(format!("{:.2}..{:.2}", peer.ratio.min, peer.ratio.max));
            }
            cells
        });
        let header = if has_peer { &header[..] } else { &header[..3] };
        println!("{}", report::table(header, 1, rows));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_compare_passes_of_one_round() {
        let times =
            |all: [[f64; 2]; 3]| all.map(|[tandem, peer]| Times { tandem, peer: Some(peer) }).to_vec();
        let mut times =
            [times([[1.0, 2.0], [10.0, 40.0], [2.0, 6.0]]), times([[2.0, 8.0], [10.0, 20.0], [3.0, 6.0]])];
        let rows = summarise(&[1, 4], &times);
        let peers: Vec<&PeerRow> = rows.iter().flat_map(|row| &row.peer).collect();
        assert_eq!((peers[0].ratio.median, peers[0].ratio.max), (3.0, 4.0));
        assert_eq!((peers[1].ratio.median, peers[1].ratio.min), (2.0, 2.0));
        assert_eq!(rows[1].tandem_to_one_row, Some(1.5));
        assert_eq!(peers[1].to_one_row, Some(1.0));
        assert_eq!(summarise(&[4], &times[1..])[0].tandem_to_one_row, None);
        times.iter_mut().flatten().for_each(|time| time.peer = None);
        let alone = summarise(&[1, 4], &times);
        assert!(alone.iter().all(|row| row.peer.is_none()) && alone[1].tandem_to_one_row == Some(1.5));
    }
}
