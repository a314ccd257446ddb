//! `tandem synth`: a model of a real one's shape with random weights.

use std::io::BufWriter;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use tandem_models::synth::{SHAPES, Shape, write};
use tandem_models::weights::gguf::FileType;

use super::quantize::{parse_format, write_then_rename};
use super::terminal;

const LONG_ABOUT: &str = "\
Write a model of a real one's shape with random weights, to size hardware with before any weights are there.

The result is a GGUF file of the real size and speed; its text is noise, and a draft agrees with its target \
by chance only. Two models made with the same tokenizer are a pair.";

const EXAMPLES: &str = "\
Examples:
  tandem synth --like qwen2.5-coder-7b --format q4_k_m --out target.gguf
  tandem synth --like qwen2.5-coder-0.5b --format q8_0 --out draft.gguf
  tandem serve --target target.gguf --draft draft.gguf";

/// Arguments of `tandem synth`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(super) struct SynthArgs {
    /// The model whose shape it gets
    #[arg(long, value_name = "MODEL", value_parser = parse_shape)]
    like: Shape,

    /// What weights are stored as: f32, f16, bf16, q8_0, q6_k, q4_k_m or q4_0
    #[arg(long, value_name = "FORMAT", default_value = "q8_0", value_parser = parse_format)]
    format: FileType,

    /// The GGUF file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,

    /// Folder with the tokenizer.json to put in [default: a small one of its own]
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,

    /// Seed of the weights
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

pub(super) fn run(args: &SynthArgs) -> anyhow::Result<ExitCode> {
    write_then_rename(&args.out, |file| {
        let out = BufWriter::with_capacity(1 << 20, file);
        Ok(write(&args.like, args.format, args.tokenizer.as_deref(), args.seed, out)?)
    })?;
    let size_bytes = std::fs::metadata(&args.out)?.len();
    println!("{}  random weights, {}", args.out.display(), terminal::bytes(size_bytes));
    Ok(ExitCode::SUCCESS)
}

fn parse_shape(name: &str) -> Result<Shape, String> {
    Shape::find(name).ok_or_else(|| {
        let known: Vec<&str> = SHAPES.iter().map(|shape| shape.name).collect();
        format!("wanted one of {}", known.join(", "))
    })
}
