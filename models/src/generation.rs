//! `generation_config.json`: which tokens end a sequence, and the sampling defaults its authors chose.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::ModelError;
use crate::family::describe;
use crate::files::read_json;

/// The file's name in a checkpoint folder; optional there.
pub(crate) const GENERATION_FILE: &str = "generation_config.json";
const MAX_GENERATION_BYTES: u64 = 1 << 20;

/// A checkpoint's generation defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a sequence; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// The token that begins a sequence.
    pub bos_token_id: Option<u32>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Nucleus mass.
    pub top_p: Option<f32>,
    /// Number of candidates.
    pub top_k: Option<u32>,
    /// Divisor of the logits of tokens already seen.
    pub repetition_penalty: Option<f32>,
}

#[derive(Default, Deserialize)]
struct File {
    eos_token_id: Option<Value>,
    bos_token_id: Option<Value>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` in `dir` if there is one. Token ids that it lacks are taken from
    /// `config_json`, the content of `config_path` in the words of a `config.json`.
    ///
    /// # Errors
    /// If the file is damaged, or names a token that is not below `vocab_size`.
    pub(crate) fn read(
        dir: &Path,
        config_path: &Path,
        config_json: &Map<String, Value>,
        vocab_size: usize,
    ) -> Result<Self, ModelError> {
        let path = dir.join(GENERATION_FILE);
        let file = if path.exists() { read_json(&path, MAX_GENERATION_BYTES)? } else { File::default() };
        let token_ids = |key: &str, value: &Option<Value>| match value {
            Some(value) => token_ids(&path, key, value, vocab_size),
            None => token_ids(config_path, key, config_json.get(key).unwrap_or(&Value::Null), vocab_size),
        };
        Ok(GenerationConfig {
            eos_token_ids: token_ids("eos_token_id", &file.eos_token_id)?,
            bos_token_id: token_ids("bos_token_id", &file.bos_token_id)?.first().copied(),
            temperature: file.temperature,
            top_p: file.top_p,
            top_k: file.top_k,
            repetition_penalty: file.repetition_penalty,
        })
    }
}

/// One id, a list of ids, or null.
fn token_ids(path: &Path, key: &str, value: &Value, vocab_size: usize) -> Result<Vec<u32>, ModelError> {
    let items = match value {
        Value::Null => &[],
        Value::Array(items) => items.as_slice(),
        single => std::slice::from_ref(single),
    };
    items
        .iter()
        .map(|item| {
            let id = item.as_u64().filter(|id| *id < vocab_size as u64);
            id.map(|id| id as u32).ok_or_else(|| ModelError::Config {
                path: path.to_owned(),
                key: key.to_owned(),
                found: describe(Some(value)),
                wanted: format!("a token id below `vocab_size`, which is {vocab_size}, or a list of them"),
            })
        })
        .collect()
}
