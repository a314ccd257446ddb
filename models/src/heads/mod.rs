//! Drafting heads: small models that draft for one target, and for no other, from its hidden states. How
//! their files name and shape things; the maths is `decoder/head.rs`, once, for all of them.
//!
//! [`Head::open`] reads an EAGLE-3 head from a folder of its own, [`Head::of_target`] the layer for multi-token
//! prediction (MTP) that some targets carry. Either is checked against its target before any weight is
//! loaded.

mod eagle3;
mod mtp;

use std::fmt;
use std::path::Path;

use serde_json::{Map, Value};

use crate::family::CONFIG_FILE;
use crate::files::read_json;
use crate::{Checkpoint, ModelError, RopeOverride};

/// Real ones are a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// A head, checked against its target; nothing is loaded yet.
#[derive(Debug)]
pub struct Head {
    /// How it was made.
    pub kind: HeadKind,
    /// Its decoder layer, as a decoder of one, with the files that have its weights.
    pub checkpoint: Checkpoint,
    /// What the target leaves for it.
    pub features: Features,
    /// How it takes that.
    pub input: Input,
    /// The target's token of every output; `None`: outputs are the target's tokens.
    pub to_target: Option<Vec<u32>>,
    /// The number that its layer goes by in its files.
    pub(crate) layer: usize,
    /// It has an embedding of its own, and outputs; otherwise they are its target's.
    pub(crate) has_embedding: bool,
    pub(crate) has_outputs: bool,
}

/// How a head was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadKind {
    /// Trained beside a target that was there before (arXiv 2503.01840).
    Eagle3,
    /// Trained with its target, for multi-token prediction (DeepSeek-V3, arXiv 2412.19437).
    Mtp,
}

impl HeadKind {
    /// "EAGLE-3 head"
    pub fn name(self) -> &'static str {
        match self {
            HeadKind::Eagle3 => "EAGLE-3 head",
            HeadKind::Mtp => "multi-token-prediction layer",
        }
    }
}

/// What a head reads of its target, of every token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Features {
    /// The residual stream after so many layers, ascending; 0 is the embedding. Side by side, then projected to
    /// the head's width.
    Layers(Vec<usize>),
    /// What the output matrix reads.
    FinalNorm,
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Features::FinalNorm => f.write_str("the target's final hidden state"),
            Features::Layers(layers) => {
                let layers: Vec<String> = layers.iter().map(usize::to_string).collect();
                write!(f, "the target's hidden states after layers {}", layers.join(", "))
            }
        }
    }
}

/// What a head makes of a token's embedding and the features before it, each normed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Queries, keys and values are made of both, side by side. The residual stream begins with the features,
    /// and what it ends with is the guess of the next.
    Attention {
        /// The stream begins with the normed features.
        normed_residual: bool,
    },
    /// One projection makes the residual stream of both. The final norm of what it ends with is the guess
    /// of the next features.
    Projection {
        /// Features, then embedding.
        hidden_first: bool,
    },
}

impl Input {
    /// There is a projection, and the layer is like any other.
    pub fn is_projected(self) -> bool {
        matches!(self, Input::Projection { .. })
    }
}

impl Head {
    /// True if the folder `dir` holds a drafting head rather than a model.
    pub fn is_in(dir: &Path) -> bool {
        let json = read_json::<Map<String, Value>>(&dir.join(CONFIG_FILE), MAX_CONFIG_BYTES);
        json.is_ok_and(|json| eagle3::is_head(&json))
    }

    /// Reads the head in the folder `dir`, which drafts for `target`; with another rotary scaling than that of its
    /// files if there is one.
    ///
    /// # Errors
    /// If a file is missing, damaged, or asks for something this crate does not do, or if the head was made
    /// for another target.
    pub fn open(dir: &Path, target: &Checkpoint, rope: Option<&RopeOverride>) -> Result<Self, ModelError> {
        eagle3::open(dir, target, rope)
    }

    /// The layer for multi-token prediction that `target` carries.
    ///
    /// # Errors
    /// If it carries none, or one whose form is not known.
    pub fn of_target(target: &Checkpoint) -> Result<Self, ModelError> {
        mtp::open(target)
    }

    /// Tokens that it can propose.
    pub fn num_outputs(&self) -> usize {
        self.to_target.as_ref().map_or(self.checkpoint.config.vocab_size, Vec::len)
    }
}

/// The error that `target` and the head called `name` do not belong together.
fn mismatch(target: &Checkpoint, name: &str, reason: String) -> ModelError {
    ModelError::Pair { target: target.name.clone(), draft: name.to_owned(), reason }
}
