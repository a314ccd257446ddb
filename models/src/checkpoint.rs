//! An opened model, a folder or a GGUF file: configuration read and checked, weights mapped, nothing
//! loaded yet.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::family::{self, RopeOverride, WeightNames};
use crate::generation::GenerationConfig;
use crate::model::WeightMemory;
use crate::weights::gguf::{self, FileType, GgufStore};
use crate::weights::{self, Packing, WeightStore};
use crate::{DecoderConfig, ModelError};

/// A model folder in the Hugging Face layout, or a GGUF file.
pub struct Checkpoint {
    /// The folder or the file; what it was opened by.
    pub dir: PathBuf,
    /// What to call the model where the user gave no other name: the folder's own name, or the hub
    /// id if the folder lies in a hub cache; of a GGUF file its name without the ending.
    pub name: String,
    /// The decoder's shape.
    pub config: DecoderConfig,
    /// What the family calls its tensors.
    pub names: WeightNames,
    /// Defaults for sampling and the tokens that end a sequence.
    pub generation: GenerationConfig,
    /// The tensors.
    pub weights: Box<dyn WeightStore>,
    /// The configuration in the words of a `config.json`.
    pub(crate) json: Map<String, Value>,
    /// How the file has its matrices packed, where it does.
    pub packing: Option<Packing>,
    /// What loading makes of matrices that the file has as floats: what a file of that kind would hold, bit
    /// for bit. Matrices that are quantised already stay as they are. `None`: all do.
    pub quantize: Option<FileType>,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`: `config.json`, `generation_config.json` if there is one, and
    /// `model.safetensors` or its shards. `dir` may be a GGUF file instead, which holds all of that; a
    /// `generation_config.json` beside it is read too.
    ///
    /// # Errors
    /// If a file is missing, damaged, or asks for something this crate does not do.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        Self::open_with(dir, None)
    }

    /// As [`Checkpoint::open`], with another rotary scaling than that of the files if there is one: what its
    /// `config.json` would be with that scaling in it.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and if the scaling does not fit the model.
    pub fn open_with(dir: &Path, rope: Option<&RopeOverride>) -> Result<Self, ModelError> {
        if gguf::is_gguf(dir) {
            return Self::open_gguf(dir, rope);
        }
        let family = family::read_config(dir, rope)?;
        let config_path = dir.join(family::CONFIG_FILE);
        let vocab_size = family.config.vocab_size;
        let generation = GenerationConfig::read(dir, &config_path, &family.json, vocab_size)?;
        let weights = weights::open(dir, family.packing)?;
        Ok(Checkpoint {
            dir: dir.to_owned(),
            name: name_of(dir),
            config: family.config,
            names: family.names,
            generation,
            weights,
            json: family.json,
            packing: family.packing,
            quantize: None,
        })
    }

    /// What loading made of the weights, for a log; `None` if they are as they were in the file.
    pub fn repacking(&self, memory: &WeightMemory) -> Option<String> {
        if self.packing.is_none() && self.quantize.is_none() {
            return None;
        }
        let packed =
            self.packing.map_or_else(String::new, |packing| format!("{} in the file; ", packing.name()));
        let asked = self.quantize.map_or_else(String::new, |kind| format!("quantised to {}; ", kind.name()));
        let mut types = memory.types.clone();
        types.sort_by_key(|(.., bytes)| std::cmp::Reverse(*bytes));
        let types: Vec<String> = types
            .iter()
            .map(|(dtype, _, bytes)| {
                format!("{:.2} GiB {}", *bytes as f64 / f64::from(1 << 30), dtype.name())
            })
            .collect();
        Some(format!("weights: {packed}{asked}in memory {}", types.join(", ")))
    }

    fn open_gguf(path: &Path, rope: Option<&RopeOverride>) -> Result<Self, ModelError> {
        let file = Arc::new(gguf::open_first_part(path)?);
        let weights = GgufStore::open(Arc::clone(&file))?;
        let family = family::gguf::read(&file, &weights, rope)?;
        let folder = path.parent().unwrap_or(path);
        let vocab_size = family.config.vocab_size;
        let generation = GenerationConfig::read(folder, path, &family.json, vocab_size)?;
        Ok(Checkpoint {
            dir: path.to_owned(),
            name: path
                .file_stem()
                .map_or_else(|| "model".to_owned(), |stem| stem.to_string_lossy().into_owned()),
            config: family.config,
            names: family.names,
            generation,
            weights: Box::new(weights),
            json: family.json,
            packing: None,
            quantize: None,
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

pub(crate) fn name_of(dir: &Path) -> String {
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
