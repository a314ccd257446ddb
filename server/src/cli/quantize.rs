//! `tandem quantize`: a model in f32, f16 or bf16, a folder or a GGUF file, as a GGUF file with smaller weights.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use tandem_models::export::to_gguf;
use tandem_models::weights::gguf::{FileType, convert};

use super::terminal;

const LONG_ABOUT: &str = "\
Write a model as a GGUF file with smaller weights.

The input is a folder (config.json, *.safetensors, tokenizer.json) or a GGUF file in f32, f16 or bf16 (or the \
first of several parts). A GGUF file that is quantised already is refused, because quantising twice loses more \
than the format says; of a folder, matrices that are in blocks (GPTQ, AWQ, MXFP4) are written as these. Norms, \
biases and routers stay as they are. Tokenizer and chat template are in the output, which appears only when it \
is complete and, made of a folder, when it reads as the same model.

`--quantize` of `tandem serve` makes the same of a model as it is loaded.";

const EXAMPLES: &str = "\
Examples:
  tandem quantize ./Qwen2.5-Coder-7B-Instruct model-q8.gguf --format q8_0
  tandem quantize model-f16.gguf model-q8.gguf --format q8_0       half of the bytes, hardly a difference
  tandem quantize model-f16.gguf model-q4.gguf --format q4_k_m     less than a third";

/// Arguments of `tandem quantize`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(super) struct QuantizeArgs {
    /// The folder or GGUF file to read
    #[arg(value_name = "IN")]
    input: PathBuf,

    /// The GGUF file to write
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// What weights become: f32, f16, bf16, q8_0 (or q8), q6_k, q4_k_m or q4_0 (or q4)
    #[arg(long, value_name = "FORMAT", value_parser = parse_format)]
    format: FileType,
}

pub(super) fn run(args: &QuantizeArgs) -> anyhow::Result<ExitCode> {
    let (before, after) = if args.input.is_dir() {
        let mut partial = args.output.as_os_str().to_owned();
        // It is opened by its name.
        partial.push(".partial.gguf");
        let partial = PathBuf::from(partial);
        let written = to_gguf(&args.input, args.format, &partial).map_err(anyhow::Error::from);
        finish(&partial, &args.output, written)?
    } else {
        write_then_rename(&args.output, |file| {
            Ok(convert(&args.input, args.format, BufWriter::with_capacity(1 << 20, file))?)
        })?
    };
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
    finish(&partial, path, work(file))
}

/// Moves what was written to `partial` to `path` if all went well, and else takes it away.
fn finish<T>(
    partial: &std::path::Path,
    path: &std::path::Path,
    written: anyhow::Result<T>,
) -> anyhow::Result<T> {
    let result = written.and_then(|value| {
        std::fs::rename(partial, path).with_context(|| path.display().to_string())?;
        Ok(value)
    });
    if result.is_err() {
        let _ = std::fs::remove_file(partial);
    }
    result
}
