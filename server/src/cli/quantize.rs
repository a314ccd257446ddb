//! `tandem quantize`: a GGUF model in f32, f16 or bf16 as one with smaller weights.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use tandem_models::weights::gguf::{FileType, convert};

use super::terminal;

const LONG_ABOUT: &str = "\
Write a GGUF model with smaller weights.

The input is a GGUF file in f32, f16 or bf16 (or the first of several parts); one that is quantised already \
is refused, because quantising twice loses more than the format says. Norms and biases stay as they are. \
The output appears only when it is complete.";

const EXAMPLES: &str = "\
Examples:
  tandem quantize model-f16.gguf model-q8.gguf --format q8_0       half of the bytes, hardly a difference
  tandem quantize model-f16.gguf model-q4.gguf --format q4_k_m     less than a third";

/// Arguments of `tandem quantize`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(super) struct QuantizeArgs {
    /// The GGUF file to read
    #[arg(value_name = "IN")]
    input: PathBuf,

    /// The GGUF file to write
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// What weights become: f32, f16, bf16, q8_0, q6_k, q4_k_m or q4_0
    #[arg(long, value_name = "FORMAT", value_parser = parse_format)]
    format: FileType,
}

pub(super) fn run(args: &QuantizeArgs) -> anyhow::Result<ExitCode> {
    let (before, after) = write_then_rename(&args.output, |file| {
        Ok(convert(&args.input, args.format, BufWriter::with_capacity(1 << 20, file))?)
    })?;
    println!("{}  {} -> {}", args.output.display(), terminal::bytes(before), terminal::bytes(after));
    Ok(ExitCode::SUCCESS)
}

/// The file type of that name.
pub(super) fn parse_format(name: &str) -> Result<FileType, String> {
    FileType::parse(name).ok_or_else(|| {
        let known: Vec<&str> = FileType::ALL.iter().map(|(_, name, _)| *name).collect();
        format!("wanted one of {}", known.join(", "))
    })
}

/// Lets `work` write a file beside `path` and moves it there when all went well.
pub(super) fn write_then_rename<T>(
    path: &std::path::Path,
    work: impl FnOnce(File) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let file = File::create(&partial).with_context(|| partial.display().to_string())?;
    let result = work(file).and_then(|value| {
        std::fs::rename(&partial, path).with_context(|| path.display().to_string())?;
        Ok(value)
    });
    if result.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    result
}
