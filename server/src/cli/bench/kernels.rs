//! `tandem bench kernels`: what the kernels make of this machine.
//!
//! For every operation, format and number of rows: the time, bytes and operations a second, and their shares
//! of what the machine allows, measured in turns in the same run ([`tandem_kernels::roof`]).

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use serde::Serialize;
use tandem_kernels::ThreadPool;
use tandem_kernels::kv::KvType;
use tandem_kernels::pack::WeightType;
use tandem_kernels::quant::BlockFormat;
use tandem_kernels::roof::{Measured, ReadRoof, WORKING_SET_BYTES, attention, products};

use super::report::{self, Machine};

const LONG_ABOUT: &str = "\
Measure the kernels against what this machine allows.

Products at the shapes of Qwen2.5-Coder, and its attention over a long context: the milliseconds of an \
operation over so many rows, the bytes it reads and the operations it does in a second, and their shares of \
the machine's roofs: reading from memory in large pages, and dot products of bytes (of f32 for attention and \
for weights that are not quantised). Operands come from memory, not from a cache. Operations and roofs take \
turns, and of each the fastest round counts.";

const EXAMPLES: &str = "\
Examples:
  tandem bench kernels
  tandem bench kernels --models 7B --ops gate_up,head --formats Q4_K,Q6_K --rows 1,4,8
  tandem bench kernels --ops attention --formats f16,q8 --context 32768 --rows 1,4";

/// The operation that is no product.
const ATTENTION: &str = "attention";

/// Arguments of `tandem bench kernels`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(in crate::cli) struct KernelsArgs {
    /// Models whose shapes are measured, comma-separated: 0.5B, 1.5B, 7B
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', default_value = "0.5B,1.5B")]
    models: Vec<String>,

    /// Operations, comma-separated: qkv, o, gate_up, down, head, attention
    #[arg(
        long,
        value_name = "NAME,...",
        value_delimiter = ',',
        default_value = "gate_up,down,head,attention"
    )]
    ops: Vec<String>,

    /// Types of weights (Q4_0, Q4_K, .., bf16, f16, f32) and of attention's keys and values (f16, q8, f32),
    /// comma-separated
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', default_value = "Q4_0,Q8_0,Q4_K,Q6_K,f16")]
    formats: Vec<String>,

    /// Rows of activations, or tokens, comma-separated
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,2,3,4,5,6,8,16,64,512", value_parser = clap::value_parser!(u16).range(1..=4096))]
    rows: Vec<u16>,

    /// Context of attention
    #[arg(long, value_name = "N", default_value_t = 16384, value_parser = clap::value_parser!(u32).range(4096..=1_048_576))]
    context: u32,

    /// Times that everything takes its turn
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,

    /// Threads [default: the CPUs of this machine]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=512))]
    threads: Option<u16>,

    /// Write the report to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Row {
    op: String,
    format: String,
    rows: usize,
    ms: f64,
    /// Over the time of the first number of rows.
    to_first: f64,
    gb_per_s: f64,
    gops: f64,
    /// 0 to 1
    of_read_roof: f64,
    /// 0 to 1
    of_compute_roof: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    rounds: u16,
    rows: Vec<Row>,
}

/// What the names in the arguments stand for.
struct Selection {
    weight_types: Vec<WeightType>,
    kv_types: Vec<KvType>,
    rows: Vec<usize>,
}

impl Selection {
    fn of(args: &KernelsArgs) -> anyhow::Result<Self> {
        let known_models = attention::SHAPES.map(|shape| shape.model);
        check("--models", &args.models, &known_models)?;
        check("--ops", &args.ops, &["qkv", "o", "gate_up", "down", "head", ATTENTION])?;
        let weight_types: Vec<WeightType> = [WeightType::F32, WeightType::Bf16, WeightType::F16]
            .into_iter()
            .chain(BlockFormat::ALL.map(WeightType::Quantized))
            .collect();
        let names: Vec<String> = weight_types.iter().map(WeightType::to_string).collect();
        let known: Vec<&str> =
            names.iter().map(String::as_str).chain(KvType::ALL.map(KvType::name)).collect();
        check("--formats", &args.formats, &known)?;
        let is_wanted = |name: &str| args.formats.iter().any(|format| format == name);
        Ok(Selection {
            weight_types: weight_types
                .into_iter()
                .filter(|weight_type| is_wanted(&weight_type.to_string()))
                .collect(),
            kv_types: KvType::ALL.into_iter().filter(|kv_type| is_wanted(kv_type.name())).collect(),
            rows: args.rows.iter().map(|&rows| usize::from(rows)).collect(),
        })
    }
}

fn check(option: &str, names: &[String], known: &[&str]) -> anyhow::Result<()> {
    match names.iter().find(|name| !known.contains(&name.as_str())) {
        Some(name) => bail!("{option}: {name:?} is none of {}", known.join(", ")),
        None => Ok(()),
    }
}

pub(super) fn run(args: &KernelsArgs) -> anyhow::Result<ExitCode> {
    let selection = Selection::of(args)?;
    let threads = args
        .threads
        .map_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get), usize::from);
    let pool = ThreadPool::new(threads);
    let report = Report {
        machine: Machine::this(threads),
        rounds: args.rounds,
        rows: measure(args, &selection, &pool),
    };
    print(&report);
    if let Some(path) = &args.json {
        report::write_json(path, &report)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(args: &KernelsArgs, selection: &Selection, pool: &ThreadPool) -> Vec<Row> {
    let read = ReadRoof::new(WORKING_SET_BYTES);
    let wanted = |names: &[String], name: &str| names.iter().any(|wanted| wanted == name);
    let rounds = usize::from(args.rounds);
    let shapes: Vec<_> = products::SHAPES
        .into_iter()
        .filter(|shape| wanted(&args.models, shape.model) && wanted(&args.ops, shape.op))
        .collect();
    let attentions: Vec<_> = attention::SHAPES
        .into_iter()
        .filter(|shape| wanted(&args.models, shape.model) && wanted(&args.ops, ATTENTION))
        .collect();
    let steps = shapes.len() * selection.weight_types.len() + attentions.len() * selection.kv_types.len();
    let bar = report::progress_bar(steps, "measurements");
    let mut rows = Vec::new();
    for shape in shapes {
        for &weight_type in &selection.weight_types {
            let measured = products::measure(pool, &read, shape, weight_type, &selection.rows, rounds);
            let op = format!("{} {}", shape.model, shape.op);
            rows.extend(lines(&op, &weight_type.to_string(), &measured.unwrap_or_default()));
            bar.inc(1);
        }
    }
    for shape in attentions {
        for &kv_type in &selection.kv_types {
            let kv = (kv_type, args.context as usize);
            let measured = attention::measure(pool, &read, shape, kv, &selection.rows, rounds);
            let op = format!("{} {ATTENTION} {}", shape.model, args.context);
            rows.extend(lines(&op, kv_type.name(), &measured));
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    rows
}

fn lines(op: &str, format: &str, measured: &[Measured]) -> impl Iterator<Item = Row> {
    let first = measured.first().map_or(f64::NAN, |first| first.seconds);
    measured.iter().map(move |measured| Row {
        op: op.to_owned(),
        format: format.to_owned(),
        rows: measured.rows,
        ms: measured.seconds * 1e3,
        to_first: measured.seconds / first,
        gb_per_s: measured.bytes / measured.seconds / 1e9,
        gops: measured.operations / measured.seconds / 1e9,
        of_read_roof: measured.read_share(),
        of_compute_roof: measured.compute_share(),
    })
}

fn print(report: &Report) {
    println!("{}", report.machine);
    let header = ["op", "format", "rows", "ms", "to first", "GB/s", "GOPS", "of reading", "of arithmetic"];
    let percent = |share: f64| format!("{:.0} %", 100.0 * share);
    let cells = |row: &Row| {
        vec![
            row.op.clone(),
            row.format.clone(),
            row.rows.to_string(),
            report::number(Some(row.ms), 3),
            report::number(Some(row.to_first), 2),
            report::number(Some(row.gb_per_s), 1),
            report::number(Some(row.gops), 0),
            percent(row.of_read_roof),
            percent(row.of_compute_roof),
        ]
    };
    println!("{}", report::table(&header, 2, report.rows.iter().map(cells)));
    println!("the fastest of {} rounds, in turns with the roofs", report.rounds);
}
