//! An opened model folder: configuration read and checked, weights mapped, nothing loaded yet.

use std::path::{Path, PathBuf};

use crate::family::{self, WeightNames};
use crate::generation::GenerationConfig;
use crate::weights::{self, WeightStore};
use crate::{DecoderConfig, ModelError};

/// A model folder in the Hugging Face layout.
pub struct Checkpoint {
    /// The folder.
    pub dir: PathBuf,
    /// What to call the model where the user gave no other name: the folder's own name, or the hub
    /// id if the folder lies in a hub cache.
    pub name: String,
    /// The decoder's shape.
    pub config: DecoderConfig,
    /// What the family calls its tensors.
    pub names: WeightNames,
    /// Defaults for sampling and the tokens that end a sequence.
    pub generation: GenerationConfig,
    /// The tensors.
    pub weights: Box<dyn WeightStore>,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`: `config.json`, `generation_config.json` if there is one, and
    /// `model.safetensors` or its shards.
    ///
    /// # Errors
    /// If a file is missing, damaged, or asks for something this crate does not do.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let family = family::read_config(dir)?;
        let generation = GenerationConfig::read(dir, &family.json, family.config.vocab_size)?;
        let weights = weights::open(dir)?;
        Ok(Checkpoint {
            dir: dir.to_owned(),
            name: name_of(dir),
            config: family.config,
            names: family.names,
            generation,
            weights,
        })
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint")
            .field("dir", &self.dir)
            .field("name", &self.name)
            .field("config", &self.config)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

fn name_of(dir: &Path) -> String {
    let full = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    // A hub cache keeps a snapshot in models--org--name/snapshots/<commit>.
    let hub_id = full
        .ancestors()
        .nth(2)
        .and_then(|repo| repo.file_name()?.to_str()?.strip_prefix("models--"))
        .filter(|_| full.parent().is_some_and(|parent| parent.ends_with("snapshots")));
    match hub_id {
        Some(id) => id.replacen("--", "/", 1),
        None => {
            full.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
        }
    }
}
