//! What `train` and `distill` share on the command line: corpus, shape, sample mix and run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Args, ValueEnum};
use tandem_train::{
    Budget, CorpusOptions, CorpusSummary, ModelShape, OptimizerKind, RunOptions, SampleMix, Schedule,
    WeightDtype,
};

/// Which files are training text.
#[derive(Args, Debug)]
pub(super) struct CorpusArgs {
    /// Folder of source files, walked recursively; links are not followed
    #[arg(long, value_name = "DIR")]
    corpus: PathBuf,

    /// File extensions to read, comma-separated, without dots; '*' reads every text file
    /// [default: the usual programming languages]
    #[arg(long, value_name = "EXT,...", value_delimiter = ',', help_heading = "Corpus")]
    extensions: Vec<String>,

    /// Skip files shorter than this many bytes
    #[arg(long, value_name = "BYTES", help_heading = "Corpus", default_value_t = CorpusOptions::default().min_file_bytes)]
    min_file_bytes: u64,

    /// Skip files longer than this many bytes (generated code, data)
    #[arg(long, value_name = "BYTES", help_heading = "Corpus", default_value_t = CorpusOptions::default().max_file_bytes)]
    max_file_bytes: u64,

    /// Share of files kept out of training, to judge the result by; chosen by a hash of the path, so
    /// the same files every time
    #[arg(long, value_name = "SHARE", help_heading = "Corpus", default_value_t = CorpusOptions::default().held_out)]
    held_out: f64,
}

impl CorpusArgs {
    pub(super) fn options(&self) -> CorpusOptions {
        let mut options = CorpusOptions {
            dir: self.corpus.clone(),
            min_file_bytes: self.min_file_bytes,
            max_file_bytes: self.max_file_bytes,
            held_out: self.held_out,
            ..CorpusOptions::default()
        };
        match self.extensions.as_slice() {
            [] => {}
            [all] if all == "*" => options.extensions.clear(),
            named => {
                options.extensions =
                    named.iter().map(|e| e.trim().trim_start_matches('.').to_owned()).collect()
            }
        }
        options
    }
}

/// Shape of the decoder; what is not given comes from the command's own default shape.
#[derive(Args, Debug)]
pub(super) struct ShapeArgs {
    /// Width of the residual stream [default: 256 for train, 128 for distill]
    #[arg(long, value_name = "N", help_heading = "Shape")]
    hidden: Option<usize>,

    /// Transformer blocks [default: 6 for train, 2 for distill]
    #[arg(long, value_name = "N", help_heading = "Shape")]
    layers: Option<usize>,

    /// Query heads [default: 4 for train, 2 for distill]
    #[arg(long, value_name = "N", help_heading = "Shape")]
    heads: Option<usize>,

    /// Key/value heads; must divide --heads. Fewer need less KV cache [default: 2 for train, 1 for
    /// distill]
    #[arg(long, value_name = "N", help_heading = "Shape")]
    kv_heads: Option<usize>,

    /// Width of a head, an even number [default: 64]
    #[arg(long, value_name = "N", help_heading = "Shape")]
    head_dim: Option<usize>,

    /// Width of the feed-forward layer [default: 688 for train, 384 for distill]
    #[arg(long, value_name = "N", help_heading = "Shape")]
    ffn: Option<usize>,

    /// Give query, key and value projections a bias (writes the Qwen2 layout instead of Llama's)
    #[arg(long, help_heading = "Shape")]
    qkv_bias: bool,

    /// Longest context the model claims, in tokens; at least --seq-len [default: 2048]
    #[arg(long, value_name = "TOKENS", help_heading = "Shape")]
    max_position_embeddings: Option<usize>,

    /// Base of the rotary position frequencies [default: 10000]
    #[arg(long, value_name = "BASE", help_heading = "Shape")]
    rope_theta: Option<f32>,

    /// Added to the mean square in RMSNorm [default: 1e-6]
    #[arg(long, value_name = "EPS", help_heading = "Shape")]
    rms_norm_eps: Option<f32>,
}

impl ShapeArgs {
    pub(super) fn shape(&self, default: ModelShape) -> ModelShape {
        ModelShape {
            vocab_size: default.vocab_size,
            hidden: self.hidden.unwrap_or(default.hidden),
            layers: self.layers.unwrap_or(default.layers),
            heads: self.heads.unwrap_or(default.heads),
            kv_heads: self.kv_heads.unwrap_or(default.kv_heads),
            head_dim: self.head_dim.unwrap_or(default.head_dim),
            ffn: self.ffn.unwrap_or(default.ffn),
            qkv_bias: self.qkv_bias || default.qkv_bias,
            max_position_embeddings: self.max_position_embeddings.unwrap_or(default.max_position_embeddings),
            rope_theta: self.rope_theta.unwrap_or(default.rope_theta),
            rms_norm_eps: self.rms_norm_eps.unwrap_or(default.rms_norm_eps),
        }
    }
}

/// How samples are cut from files.
#[derive(Args, Debug)]
pub(super) struct MixArgs {
    /// Share of samples rearranged as fill-in-the-middle, 0 to 1
    #[arg(long, value_name = "SHARE", help_heading = "Samples", default_value_t = SampleMix::default().fim_rate)]
    fim_rate: f64,

    /// Share of those in suffix-prefix-middle order; the others are prefix-suffix-middle
    #[arg(long, value_name = "SHARE", help_heading = "Samples", default_value_t = SampleMix::default().spm_rate)]
    spm_rate: f64,

    /// Share of samples that are chats made from documented Python functions
    #[arg(long, value_name = "SHARE", help_heading = "Samples", default_value_t = SampleMix::default().chat_rate)]
    chat_rate: f64,
}

impl MixArgs {
    pub(super) fn mix(&self) -> SampleMix {
        SampleMix { fim_rate: self.fim_rate, spm_rate: self.spm_rate, chat_rate: self.chat_rate }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Optimizer {
    /// Orthogonalised momentum for matrices, AdamW for the rest: learns faster per token
    Muon,
    /// AdamW for everything
    Adamw,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Decay {
    /// Half a cosine
    Cosine,
    /// Constant for the first 30 % of the run, then a straight line
    Linear,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    /// 16 bits a weight
    Bf16,
    /// 32 bits a weight
    F32,
}

/// Length, learning rate, checkpoints.
#[derive(Args, Debug)]
pub(super) struct RunArgs {
    /// Folder to write; the server loads it as it is
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Length of the run in tokens seen, such as 20M or 1.5B [default: 20M]
    #[arg(long, value_name = "TOKENS", value_parser = token_count, conflicts_with = "steps", help_heading = "Run")]
    tokens: Option<u64>,

    /// Length of the run in optimiser steps of --batch rows of --seq-len tokens
    #[arg(long, value_name = "N", help_heading = "Run")]
    steps: Option<u64>,

    /// Tokens in a row
    #[arg(long, value_name = "TOKENS", help_heading = "Run", default_value_t = RunOptions::default().seq_len)]
    seq_len: usize,

    /// Rows in a step
    #[arg(long, value_name = "ROWS", help_heading = "Run", default_value_t = RunOptions::default().batch)]
    batch: usize,

    /// The optimiser
    #[arg(long, value_enum, help_heading = "Run", default_value_t = Optimizer::Muon)]
    optimizer: Optimizer,

    /// Peak learning rate of AdamW (with muon: of embeddings and norms only)
    #[arg(long, value_name = "RATE", help_heading = "Run", default_value_t = RunOptions::default().lr)]
    lr: f64,

    /// Peak learning rate of muon's matrices
    #[arg(long, value_name = "RATE", help_heading = "Run", default_value_t = RunOptions::default().muon_lr)]
    muon_lr: f64,

    /// How the learning rate falls to a hundredth of its peak
    #[arg(long, value_enum, help_heading = "Run", default_value_t = Decay::Cosine)]
    schedule: Decay,

    /// Steps over which the learning rate rises from zero
    #[arg(long, value_name = "STEPS", help_heading = "Run", default_value_t = RunOptions::default().warmup_steps)]
    warmup_steps: u64,

    /// Decay of matrices each step, relative to the learning rate
    #[arg(long, value_name = "RATE", help_heading = "Run", default_value_t = RunOptions::default().weight_decay)]
    weight_decay: f64,

    /// Scale gradients down to this norm; 0 switches it off
    #[arg(long, value_name = "NORM", help_heading = "Run", default_value_t = RunOptions::default().clip_norm)]
    clip_norm: f64,

    /// Equal options and equal seed give equal weights, bit for bit
    #[arg(long, value_name = "SEED", help_heading = "Run", default_value_t = 0)]
    seed: u64,

    /// Number format of the weights written; training itself is in f32
    #[arg(long, value_enum, help_heading = "Run", default_value_t = Dtype::Bf16)]
    dtype: Dtype,

    /// Steps between checkpoints; 0 writes only the final one
    #[arg(long, value_name = "STEPS", help_heading = "Run", default_value_t = RunOptions::default().checkpoint_interval)]
    checkpoint_interval: u64,

    /// Continue from the last checkpoint in --out, where there is one
    #[arg(long, help_heading = "Run")]
    resume: bool,

    /// Steps between evaluations on the held-out files; 0 evaluates only at the end
    #[arg(long, value_name = "STEPS", help_heading = "Run", default_value_t = RunOptions::default().eval_interval)]
    eval_interval: u64,

    /// Most held-out tokens read for an evaluation
    #[arg(long, value_name = "TOKENS", help_heading = "Run", default_value_t = RunOptions::default().eval_tokens)]
    eval_tokens: usize,

    /// No progress bar
    #[arg(long, short, help_heading = "Run")]
    quiet: bool,
}

impl RunArgs {
    pub(super) fn out(&self) -> &Path {
        &self.out
    }

    pub(super) fn options(&self, stop: Arc<AtomicBool>) -> RunOptions {
        RunOptions {
            seq_len: self.seq_len,
            batch: self.batch,
            budget: match (self.steps, self.tokens) {
                (Some(steps), _) => Budget::Steps(steps),
                (None, Some(tokens)) => Budget::Tokens(tokens),
                (None, None) => RunOptions::default().budget,
            },
            lr: self.lr,
            muon_lr: self.muon_lr,
            weight_decay: self.weight_decay,
            clip_norm: self.clip_norm,
            optimizer: match self.optimizer {
                Optimizer::Muon => OptimizerKind::Muon,
                Optimizer::Adamw => OptimizerKind::AdamW,
            },
            schedule: match self.schedule {
                Decay::Cosine => Schedule::Cosine,
                Decay::Linear => Schedule::Linear,
            },
            warmup_steps: self.warmup_steps,
            seed: self.seed,
            checkpoint_interval: self.checkpoint_interval,
            resume: self.resume,
            eval_interval: self.eval_interval,
            eval_tokens: self.eval_tokens,
            progress: !self.quiet,
            dtype: match self.dtype {
                Dtype::Bf16 => WeightDtype::Bf16,
                Dtype::F32 => WeightDtype::F32,
            },
            command_line: command_line(std::env::args()),
            stop: Some(stop),
        }
    }
}

/// `20M`, `1.5B`, `300k` or a plain number.
fn token_count(text: &str) -> Result<u64, String> {
    let wanted = "wanted a number of tokens such as 20M, 1.5B, 300k or 4000000";
    let (number, factor) = match text.char_indices().last() {
        Some((end, 'k' | 'K')) => (&text[..end], 1e3),
        Some((end, 'm' | 'M')) => (&text[..end], 1e6),
        Some((end, 'b' | 'B' | 'g' | 'G')) => (&text[..end], 1e9),
        _ => (text, 1.0),
    };
    let number: f64 = number.trim().parse().map_err(|_| wanted.to_owned())?;
    let tokens = (number * factor).round();
    if (1.0..1e15).contains(&tokens) { Ok(tokens as u64) } else { Err(wanted.to_owned()) }
}

/// The command line as one could paste it into a shell, for the model card.
fn command_line(arguments: impl Iterator<Item = String>) -> String {
    let quoted = arguments.enumerate().map(|(i, argument)| match i {
        // The path of the binary says something about this machine and nothing about the model.
        0 => "tandem".to_owned(),
        _ if argument.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./=,:+".contains(&b))
            && !argument.is_empty() =>
        {
            argument
        }
        _ => format!("'{}'", argument.replace('\'', r"'\''")),
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// A flag that the first Ctrl-C sets, so that the run ends with a checkpoint; the second ends the process.
pub(super) fn stop_on_ctrl_c() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            if tokio::signal::ctrl_c().await.is_ok() {
                flag.store(true, Ordering::Relaxed);
                eprintln!("\nstopping after this step; press Ctrl-C again to stop at once");
                if tokio::signal::ctrl_c().await.is_ok() {
                    std::process::exit(130);
                }
            }
        });
    })?;
    Ok(stop)
}

/// One line about what was read.
pub(super) fn describe_corpus(corpus: &CorpusSummary) -> String {
    format!(
        "{} files, {} trained on; {} files, {} held out; {} skipped",
        corpus.train_files,
        super::terminal::bytes(corpus.train_bytes),
        corpus.held_out_files,
        super::terminal::bytes(corpus.held_out_bytes),
        corpus.skipped_files
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_counts_have_suffixes() {
        assert_eq!(token_count("20M"), Ok(20_000_000));
        assert_eq!(token_count("1.5B"), Ok(1_500_000_000));
        assert_eq!(token_count("300k"), Ok(300_000));
        assert_eq!(token_count("7"), Ok(7));
        for wrong in ["", "M", "0", "-3k", "inf", "nan", "12q"] {
            assert!(token_count(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_command_line_can_be_pasted() {
        let words = ["/opt/bin/tandem", "train", "--corpus", "my code", "--extensions", "*", "--out", "it's"];
        assert_eq!(
            command_line(words.iter().map(|w| (*w).to_owned())),
            r"tandem train --corpus 'my code' --extensions '*' --out 'it'\''s'"
        );
    }
}
