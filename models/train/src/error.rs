//! What can go wrong in a run.

use std::io;
use std::path::{Path, PathBuf};

/// A run that could not start or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A value that cannot work.
    #[error("{option} is {found}; wanted {wanted}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// Its value.
        found: String,
        /// What would do.
        wanted: String,
    },
    /// No file of the corpus folder qualified.
    #[error("{dir}: no training text found ({looked_at} files seen, wanted extensions: {extensions})", dir = dir.display())]
    EmptyCorpus {
        /// The folder.
        dir: PathBuf,
        /// Files seen and not taken.
        looked_at: usize,
        /// The extensions asked for.
        extensions: String,
    },
    /// The corpus cannot fill the vocabulary.
    #[error(
        "the corpus ({corpus_bytes} bytes) yields only {found} vocabulary entries; wanted {wanted}: \
         add text or lower vocab_size"
    )]
    SmallCorpus {
        /// Bytes of training text.
        corpus_bytes: u64,
        /// Vocabulary entries found.
        found: usize,
        /// Vocabulary entries asked for.
        wanted: usize,
    },
    /// The tokenizer cannot be used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The output folder holds something that is not ours.
    #[error("{dir} is not empty and holds no checkpoint of this trainer; name another output folder", dir = dir.display())]
    ForeignOutput {
        /// The folder.
        dir: PathBuf,
    },
    /// The output folder holds an interrupted run and resuming was not asked for.
    #[error("{dir} holds an unfinished run; resume it or name another output folder", dir = dir.display())]
    OutputExists {
        /// The folder.
        dir: PathBuf,
    },
    /// There is nothing to resume.
    #[error("{dir} holds a finished run; there is nothing to resume", dir = dir.display())]
    Finished {
        /// The folder.
        dir: PathBuf,
    },
    /// The checkpoint was made with other options.
    #[error("{path}: checkpoint was made with {key} = {found}, this run has {wanted}; resume needs equal options", path = path.display())]
    Mismatch {
        /// The checkpoint.
        path: PathBuf,
        /// Which option differs.
        key: String,
        /// Its value in the checkpoint.
        found: String,
        /// Its value now.
        wanted: String,
    },
    /// A checkpoint that cannot be read back.
    #[error("{path}: {problem}", path = path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The loss stopped being a number.
    #[error(
        "loss is {loss} at step {step}; the last good checkpoint ({last_good}) is kept: \
         resume with a lower learning rate"
    )]
    Diverged {
        /// The step.
        step: u64,
        /// NaN or infinity.
        loss: f32,
        /// The step of the last checkpoint, in words.
        last_good: String,
    },
    /// The stop flag was set; a checkpoint was written.
    #[error("interrupted after step {step}; a checkpoint is in {dir}", dir = dir.display())]
    Interrupted {
        /// Steps done.
        step: u64,
        /// The output folder.
        dir: PathBuf,
    },
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The target could not be loaded.
    #[error(transparent)]
    Model(#[from] tandem_models::ModelError),
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl TrainError {
    /// Wraps an I/O error with the path it concerns.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }
}
