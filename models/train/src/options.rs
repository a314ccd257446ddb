//! What a run is asked to do: plain structs with defaults, filled by the command line or a test.
//!
//! The structs hold no policy: every value is checked once, when the run starts, by
//! [`TrainOptions::check`] or [`DistillOptions::check`].

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::TrainError;

/// Pretraining from scratch: a corpus folder becomes a tokenizer and a model.
#[derive(Clone, Debug, Default)]
pub struct TrainOptions {
    /// Where the source files are and which of them count.
    pub corpus: CorpusOptions,
    /// Folder that receives the model; the server loads it as it is.
    pub out: PathBuf,
    /// A `tokenizer.json` (or a folder that holds one) to reuse; `None` trains one on the corpus.
    pub tokenizer: Option<PathBuf>,
    /// Shape of the decoder.
    pub shape: ModelShape,
    /// How samples are cut from the corpus.
    pub mix: SampleMix,
    /// Steps, learning rate, checkpoints, progress.
    pub run: RunOptions,
}

/// Distillation: a small draft learns the output distribution of a target.
#[derive(Clone, Debug)]
pub struct DistillOptions {
    /// Where the source files are and which of them count.
    pub corpus: CorpusOptions,
    /// Folder of the target: any Llama or Qwen2 checkpoint the server loads. Its tokenizer is used.
    pub target: PathBuf,
    /// Folder that receives the draft.
    pub out: PathBuf,
    /// Shape of the draft; vocabulary size and longest context are taken from the target.
    pub shape: ModelShape,
    /// How samples are cut from the corpus.
    pub mix: SampleMix,
    /// Steps, learning rate, checkpoints, progress.
    pub run: RunOptions,
    /// Weight of the forward KL divergence from the target's distribution.
    pub kl_weight: f64,
    /// Weight of the cross-entropy with the text itself.
    pub ce_weight: f64,
    /// Share of rows that hold text which the target itself generated, 0 to 1. Speculation is
    /// judged on exactly such text; 0 means corpus text only.
    pub from_outputs: f64,
    /// Temperature at which the target generates that text.
    pub output_temperature: f64,
}

impl Default for DistillOptions {
    fn default() -> Self {
        Self {
            corpus: CorpusOptions::default(),
            target: PathBuf::new(),
            out: PathBuf::new(),
            shape: ModelShape::small_draft(),
            mix: SampleMix::default(),
            run: RunOptions::default(),
            kl_weight: 0.9,
            ce_weight: 0.1,
            from_outputs: 0.0,
            output_temperature: 0.8,
        }
    }
}

/// Which files of a folder are training text.
#[derive(Clone, Debug)]
pub struct CorpusOptions {
    /// The folder, walked recursively; links are not followed.
    pub dir: PathBuf,
    /// File name extensions without the dot; an empty list takes every text file.
    pub extensions: Vec<String>,
    /// Shorter files are skipped.
    pub min_file_bytes: u64,
    /// Longer files are skipped.
    pub max_file_bytes: u64,
    /// Share of the files, chosen by a hash of their relative path, that is never trained on and
    /// serves the report.
    pub held_out: f64,
}

impl Default for CorpusOptions {
    fn default() -> Self {
        let extensions = [
            "c", "cc", "cpp", "cs", "css", "go", "h", "hpp", "html", "java", "js", "jsx", "kt", "lua", "md",
            "php", "pl", "py", "rb", "rs", "scala", "sh", "sql", "swift", "toml", "ts", "tsx", "yaml", "yml",
        ];
        Self {
            dir: PathBuf::new(),
            extensions: extensions.map(String::from).to_vec(),
            min_file_bytes: 64,
            max_file_bytes: 256 * 1024,
            held_out: 0.02,
        }
    }
}

/// Shape of a Llama/Qwen2-style decoder with a tied head.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// Entries of the vocabulary, special tokens included; a tokenizer that is given decides itself.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Width of the gated feed-forward layer.
    pub ffn: usize,
    /// Biases on query, key and value (Qwen2 layout); otherwise the Llama layout is written.
    pub qkv_bias: bool,
    /// Longest context written to `config.json`; at least the sequence length of training.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
}

impl ModelShape {
    /// The demo target: about 5 M parameters.
    pub fn small_target() -> Self {
        Self {
            vocab_size: 4096,
            hidden: 256,
            layers: 6,
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            ffn: 688,
            qkv_bias: false,
            max_position_embeddings: 2048,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-6,
        }
    }

    /// The demo draft: about 0.9 M parameters.
    pub fn small_draft() -> Self {
        Self { hidden: 128, layers: 2, heads: 2, kv_heads: 1, ffn: 384, ..Self::small_target() }
    }
}

impl Default for ModelShape {
    fn default() -> Self {
        Self::small_target()
    }
}

/// How training samples are cut from files.
#[derive(Clone, Debug)]
pub struct SampleMix {
    /// Share of samples rearranged as fill-in-the-middle, 0 to 1.
    pub fim_rate: f64,
    /// Share of those in suffix-prefix-middle order (the others: prefix-suffix-middle), 0 to 1.
    pub spm_rate: f64,
    /// Share of samples that are chats made from documented Python functions, 0 to 1; ignored
    /// where the corpus has none.
    pub chat_rate: f64,
}

impl Default for SampleMix {
    fn default() -> Self {
        Self { fim_rate: 0.5, spm_rate: 0.3, chat_rate: 0.05 }
    }
}

/// How long a run lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// Optimiser steps.
    Steps(u64),
    /// Tokens seen, rounded up to whole steps.
    Tokens(u64),
}

/// The optimiser.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OptimizerKind {
    /// Momentum orthogonalised by Newton-Schulz iteration for the hidden matrices, AdamW for
    /// embeddings, norms and biases. Learns faster per token.
    #[default]
    Muon,
    /// AdamW for everything.
    AdamW,
}

/// How the learning rate falls after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Schedule {
    /// Half a cosine down to a hundredth.
    #[default]
    Cosine,
    /// Constant for the first 30 % of the run, then a straight line down to a hundredth.
    Linear,
}

/// Number format of the weights written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum WeightDtype {
    /// 16 bits a weight; training itself is always in f32.
    #[default]
    Bf16,
    /// 32 bits a weight: exactly the trained values.
    F32,
}

/// Everything about a run that pretraining and distillation share.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Tokens in a row.
    pub seq_len: usize,
    /// Rows in a step.
    pub batch: usize,
    /// When to stop.
    pub budget: Budget,
    /// Peak learning rate of AdamW (of embeddings and norms only, with Muon).
    pub lr: f64,
    /// Peak learning rate of Muon's matrices.
    pub muon_lr: f64,
    /// Decay per step relative to the learning rate; matrices only.
    pub weight_decay: f64,
    /// Gradients whose global L2 norm exceeds this are scaled down to it; 0 switches it off.
    pub clip_norm: f64,
    /// The optimiser.
    pub optimizer: OptimizerKind,
    /// How the learning rate falls.
    pub schedule: Schedule,
    /// Steps over which the learning rate rises from zero.
    pub warmup_steps: u64,
    /// Two runs with equal options and equal seed give equal weights, bit for bit.
    pub seed: u64,
    /// Steps between checkpoints; 0 writes only the final one.
    pub checkpoint_interval: u64,
    /// Continue from the last checkpoint in the output folder, where there is one.
    pub resume: bool,
    /// Steps between evaluations on held-out files; 0 evaluates only at the end.
    pub eval_interval: u64,
    /// Most held-out tokens read for an evaluation.
    pub eval_tokens: usize,
    /// Show a progress bar on standard error.
    pub progress: bool,
    /// Number format of the weights written.
    pub dtype: WeightDtype,
    /// The command line, quoted on the model card; empty leaves it out.
    pub command_line: String,
    /// Set to true from elsewhere (a Ctrl-C handler), the run writes a checkpoint after the
    /// step in hand and returns [`TrainError::Interrupted`].
    pub stop: Option<Arc<AtomicBool>>,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            seq_len: 512,
            batch: 8,
            budget: Budget::Tokens(20_000_000),
            lr: 0.003,
            muon_lr: 0.012,
            weight_decay: 0.05,
            clip_norm: 1.0,
            optimizer: OptimizerKind::default(),
            schedule: Schedule::default(),
            warmup_steps: 100,
            seed: 0,
            checkpoint_interval: 200,
            resume: false,
            eval_interval: 500,
            eval_tokens: 65_536,
            progress: true,
            dtype: WeightDtype::default(),
            command_line: String::new(),
            stop: None,
        }
    }
}

impl RunOptions {
    /// Steps in the whole run.
    pub fn total_steps(&self) -> u64 {
        match self.budget {
            Budget::Steps(steps) => steps,
            Budget::Tokens(tokens) => tokens.div_ceil((self.seq_len * self.batch).max(1) as u64),
        }
    }
}

fn invalid(option: &'static str, found: impl ToString, wanted: impl ToString) -> TrainError {
    TrainError::Option { option, found: found.to_string(), wanted: wanted.to_string() }
}

fn share(option: &'static str, value: f64) -> Result<(), TrainError> {
    if (0.0..=1.0).contains(&value) { Ok(()) } else { Err(invalid(option, value, "a share from 0 to 1")) }
}

impl ModelShape {
    /// Checks that the sizes fit together.
    ///
    /// # Errors
    /// [`TrainError::Option`] naming the size, its value and what would do.
    pub fn check(&self) -> Result<(), TrainError> {
        let sizes = [
            ("vocab_size", self.vocab_size, 1 << 20),
            ("hidden", self.hidden, 1 << 16),
            ("layers", self.layers, 1 << 10),
            ("heads", self.heads, 1 << 10),
            ("kv_heads", self.kv_heads, 1 << 10),
            ("head_dim", self.head_dim, 1 << 10),
            ("ffn", self.ffn, 1 << 18),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 22),
        ];
        for (name, value, limit) in sizes {
            if value == 0 || value > limit {
                return Err(invalid(name, value, format!("1 to {limit}")));
            }
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(invalid("head_dim", self.head_dim, "an even number (rotary pairs)"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(invalid("kv_heads", self.kv_heads, format!("a divisor of heads = {}", self.heads)));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
            return Err(invalid("rope_theta", self.rope_theta, "a finite number above 1"));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return Err(invalid("rms_norm_eps", self.rms_norm_eps, "a number between 0 and 1"));
        }
        Ok(())
    }
}

impl RunOptions {
    fn check(&self, shape: &ModelShape) -> Result<(), TrainError> {
        if self.seq_len < 16 || self.seq_len > shape.max_position_embeddings {
            let wanted = format!("16 to max_position_embeddings = {}", shape.max_position_embeddings);
            return Err(invalid("seq_len", self.seq_len, wanted));
        }
        if self.batch == 0 || self.batch > 1 << 16 {
            return Err(invalid("batch", self.batch, "1 to 65536"));
        }
        if self.total_steps() == 0 {
            return Err(invalid("steps", 0, "at least 1"));
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if !positive(self.lr) {
            return Err(invalid("lr", self.lr, "a positive number"));
        }
        if !positive(self.muon_lr) {
            return Err(invalid("muon_lr", self.muon_lr, "a positive number"));
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return Err(invalid("weight_decay", self.weight_decay, "0 or more"));
        }
        if !(self.clip_norm.is_finite() && self.clip_norm >= 0.0) {
            return Err(invalid("clip_norm", self.clip_norm, "0 (off) or a positive number"));
        }
        Ok(())
    }
}

impl SampleMix {
    fn check(&self) -> Result<(), TrainError> {
        share("fim_rate", self.fim_rate)?;
        share("spm_rate", self.spm_rate)?;
        share("chat_rate", self.chat_rate)
    }
}

impl TrainOptions {
    /// Checks every value before any work is done.
    ///
    /// # Errors
    /// [`TrainError::Option`] for the first value that cannot work.
    pub fn check(&self) -> Result<(), TrainError> {
        self.shape.check()?;
        self.mix.check()?;
        share("held_out", self.corpus.held_out)?;
        self.run.check(&self.shape)
    }
}

impl DistillOptions {
    /// Checks every value before any work is done.
    ///
    /// # Errors
    /// [`TrainError::Option`] for the first value that cannot work.
    pub fn check(&self) -> Result<(), TrainError> {
        self.shape.check()?;
        self.mix.check()?;
        share("held_out", self.corpus.held_out)?;
        share("from_outputs", self.from_outputs)?;
        let weight = |value: f64| value.is_finite() && value >= 0.0;
        if !weight(self.kl_weight) {
            return Err(invalid("kl_weight", self.kl_weight, "0 or more"));
        }
        if !weight(self.ce_weight) || self.kl_weight + self.ce_weight == 0.0 {
            return Err(invalid("ce_weight", self.ce_weight, "0 or more, and not 0 together with kl_weight"));
        }
        if !(self.output_temperature.is_finite() && self.output_temperature >= 0.0) {
            return Err(invalid("output_temperature", self.output_temperature, "0 or more"));
        }
        self.run.check(&self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_pass() {
        TrainOptions::default().check().expect("train defaults");
        DistillOptions::default().check().expect("distill defaults");
    }

    #[test]
    fn errors_name_the_option() {
        let mut options = TrainOptions::default();
        options.shape.kv_heads = 3;
        let message = options.check().expect_err("4 heads over 3").to_string();
        assert!(message.contains("kv_heads") && message.contains("heads = 4"), "{message}");
        let options = DistillOptions { kl_weight: f64::NAN, ..Default::default() };
        assert!(options.check().expect_err("NaN").to_string().contains("kl_weight"));
        let run = RunOptions { budget: Budget::Tokens(4097), ..Default::default() };
        assert_eq!(run.total_steps(), 2);
    }
}
