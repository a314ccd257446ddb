//! `tandem train`: a tokenizer and a model from scratch.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use tandem_train::{ModelShape, TrainOptions};

use super::training::{CorpusArgs, MixArgs, RunArgs, ShapeArgs, describe_corpus, stop_on_ctrl_c};

const LONG_ABOUT: &str = "\
Train a tokenizer and a model from scratch on a folder of source files.

First a byte-level BPE vocabulary is made from the files (or taken from --tokenizer), then a decoder in \
Llama's layout is trained on them, part of the samples rearranged as fill-in-the-middle. Everything runs \
on this machine's CPUs; nothing is downloaded or sent. The folder written holds config.json, \
model.safetensors, tokenizer.json, a chat template and a model card, and is a target (or a draft) for \
`tandem serve` as it is.

A run can be stopped with Ctrl-C and continued with --resume. RAYON_NUM_THREADS limits its threads.";

const EXAMPLES: &str = "\
Examples:
  # The shape of the demo target: 5 million parameters, about three hours on two CPU cores
  tandem train --corpus ~/src --out models/mine

  # Larger, Python only
  tandem train --corpus ~/src --extensions py --hidden 512 --layers 8 --heads 8 --kv-heads 2 \\
      --ffn 1376 --tokens 100M --out models/mine

  # Then make a draft for it and serve the pair
  tandem distill --corpus ~/src --target models/mine --out models/mine-draft
  tandem serve --target models/mine --draft models/mine-draft";

/// Arguments of `tandem train`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    corpus: CorpusArgs,

    /// A tokenizer.json, or a folder that holds one, to use instead of training a vocabulary
    #[arg(long, value_name = "PATH", help_heading = "Shape")]
    tokenizer: Option<PathBuf>,

    /// Entries of the vocabulary, special tokens included
    #[arg(long, value_name = "N", help_heading = "Shape", default_value_t = ModelShape::small_target().vocab_size)]
    vocab_size: usize,

    #[command(flatten)]
    shape: ShapeArgs,
    #[command(flatten)]
    mix: MixArgs,
    #[command(flatten)]
    run: RunArgs,
}

pub(super) fn run(args: &TrainArgs) -> anyhow::Result<ExitCode> {
    let options = TrainOptions {
        corpus: args.corpus.options(),
        out: args.run.out().to_owned(),
        tokenizer: args.tokenizer.clone(),
        shape: ModelShape { vocab_size: args.vocab_size, ..args.shape.shape(ModelShape::small_target()) },
        mix: args.mix.mix(),
        run: args.run.options(stop_on_ctrl_c()?),
    };
    let report = match tandem_train::train(&options) {
        Err(tandem_train::TrainError::Interrupted { step, dir }) => {
            eprintln!(
                "stopped after step {step}; continue with the same command and --resume ({})",
                dir.display()
            );
            return Ok(ExitCode::from(130));
        }
        outcome => outcome?,
    };
    println!("{} holds the model", report.out.display());
    println!("  parameters  {}", super::terminal::count(report.parameters as u64));
    println!("  corpus      {}", describe_corpus(&report.corpus));
    println!(
        "  run         {} steps, {} tokens, {:.0} tokens/s",
        report.steps,
        super::terminal::count(report.tokens),
        report.tokens_per_second
    );
    println!("  loss        {:.4} nats a token", report.final_loss);
    if let Some(bits) = report.held_out_bits_per_byte {
        println!("  held out    {bits:.4} bits per byte");
    }
    println!("serve it:  tandem serve --target {}", report.out.display());
    Ok(ExitCode::SUCCESS)
}
