//! What can go wrong between a model's name and its logits. Every message names the file or tensor,
//! what was found and what was wanted, because the reader has only the message.

use std::path::{Path, PathBuf};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file could not be opened, read or mapped.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file does not parse, or a part of it has the wrong type.
    #[error("{}: not valid JSON of the expected form: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A key of a configuration file has a value that cannot be used.
    #[error("{}: `{key}` is {found}; wanted {wanted}", path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// The key in it.
        key: String,
        /// Its value, or "absent".
        found: String,
        /// What would be right.
        wanted: String,
    },
    /// A rotary scaling that was asked for does not fit the model.
    #[error("with the rotary scaling that was asked for, {asked}: {error}")]
    RopeOverride {
        /// As it was asked for.
        asked: String,
        /// What is wrong with the model's options when they have it.
        error: Box<ModelError>,
    },
    /// A weight file is damaged or lies about its contents.
    #[error("{}: {reason}", path.display())]
    Weights {
        /// The weight file.
        path: PathBuf,
        /// What is wrong with it and what would be right.
        reason: String,
    },
    /// The checkpoint lacks a tensor that the configuration asks for.
    #[error("{}: no tensor `{name}` among its {num_tensors} tensors; is config.json this checkpoint's own?", path.display())]
    MissingTensor {
        /// The weight file, or the folder of a sharded checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// How many tensors there are.
        num_tensors: usize,
    },
    /// A tensor does not have the shape that the configuration implies.
    #[error("tensor `{name}` has shape {found:?}; config.json implies {wanted:?}")]
    TensorShape {
        /// The tensor.
        name: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// The shape the configuration implies.
        wanted: Vec<usize>,
    },
    /// The forward pass was asked for something it cannot do, or its backend failed.
    #[error("{context}: {reason}")]
    Backend {
        /// The operation.
        context: &'static str,
        /// What went wrong.
        reason: String,
    },
    /// A model name leads nowhere.
    #[error("model `{spec}`: {reason}")]
    Source {
        /// The name as given.
        spec: String,
        /// What was looked for, where, and what to do.
        reason: String,
    },
    /// The tokenizer cannot be loaded or used.
    #[error("{}: tokenizer: {reason}", path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// The chat template does not compile.
    #[error("{}: chat template: {reason}", path.display())]
    Template {
        /// The file the template is in.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// Target and draft do not speak of the same tokens.
    #[error("target `{target}` and draft `{draft}` cannot be a pair: {reason}")]
    Pair {
        /// The target's name.
        target: String,
        /// The draft's name.
        draft: String,
        /// How their vocabularies differ.
        reason: String,
    },
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        ModelError::Io { path: path.to_owned(), source }
    }

    pub(crate) fn json(path: &Path, source: serde_json::Error) -> Self {
        ModelError::Json { path: path.to_owned(), source }
    }

    pub(crate) fn weights(path: &Path, reason: impl Into<String>) -> Self {
        ModelError::Weights { path: path.to_owned(), reason: reason.into() }
    }
}
