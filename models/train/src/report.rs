//! What a finished run tells its caller; also written as `report.json` beside the model.

use std::path::PathBuf;

use serde::Serialize;

/// Result of pretraining.
#[derive(Clone, Debug, Serialize)]
pub struct TrainReport {
    /// The folder written.
    pub out: PathBuf,
    /// Trainable parameters.
    pub parameters: usize,
    /// Optimiser steps in the whole run, resumed parts included.
    pub steps: u64,
    /// Tokens in the whole run.
    pub tokens: u64,
    /// Files and bytes trained on and held out.
    pub corpus: CorpusSummary,
    /// Mean loss of the last steps, in nats a token.
    pub final_loss: f32,
    /// Tokens a second over this process's share of the run.
    pub tokens_per_second: f64,
    /// Bits per byte on held-out files; `None` where nothing was held out.
    pub held_out_bits_per_byte: Option<f64>,
}

/// Result of distillation.
#[derive(Clone, Debug, Serialize)]
pub struct DistillReport {
    /// The folder written.
    pub out: PathBuf,
    /// The target's folder.
    pub target: PathBuf,
    /// Trainable parameters of the draft.
    pub parameters: usize,
    /// Optimiser steps in the whole run, resumed parts included.
    pub steps: u64,
    /// Tokens in the whole run.
    pub tokens: u64,
    /// Files and bytes trained on and held out.
    pub corpus: CorpusSummary,
    /// Mean weighted loss of the last steps.
    pub final_loss: f32,
    /// Tokens a second over this process's share of the run.
    pub tokens_per_second: f64,
    /// How the pair does on held-out files; `None` where nothing was held out.
    pub held_out: Option<PairReport>,
}

/// How a draft follows its target on held-out text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PairReport {
    /// The target's bits per byte.
    pub target_bits_per_byte: f64,
    /// The draft's bits per byte.
    pub draft_bits_per_byte: f64,
    /// Share of positions where both choose the same most likely token.
    pub greedy_agreement: f64,
    /// Mean tokens a verification pass yields with four drafted, the target's own token included
    /// (1 to 5). Teacher-forced: both see the held-out text, so it is an estimate.
    pub mean_accepted_length: f64,
    /// Positions looked at.
    pub positions: usize,
}

/// What was read of the corpus folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CorpusSummary {
    /// Files trained on.
    pub train_files: usize,
    /// Their bytes.
    pub train_bytes: u64,
    /// Files held out.
    pub held_out_files: usize,
    /// Their bytes.
    pub held_out_bytes: u64,
    /// Files seen and not taken (extension, size, binary, generated).
    pub skipped_files: usize,
}
