//! The keys of a `config.json`, read with checks. The file is untrusted: every size has a range, so
//! that products of two of them fit a usize and a lying file cannot make us allocate without bound;
//! an option that we do not implement is an error, never ignored.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{DecoderConfig, ModelError, RopeScaling};

/// Ranges of sizes: several times the largest published model, small enough for any product of two.
const MAX_VOCAB: usize = 1 << 24;
const MAX_HIDDEN: usize = 1 << 20;
const MAX_INTERMEDIATE: usize = 1 << 22;
const MAX_LAYERS: usize = 1 << 12;
const MAX_HEADS: usize = 1 << 12;
const MAX_POSITIONS: usize = 1 << 28;

/// A JSON object with the file it came from.
pub(super) struct Options<'a> {
    path: &'a Path,
    /// "rope_scaling." for the keys inside that object.
    prefix: &'static str,
    json: &'a Map<String, Value>,
}

impl<'a> Options<'a> {
    pub(super) fn new(path: &'a Path, json: &'a Map<String, Value>) -> Self {
        Options { path, prefix: "", json }
    }

    /// The value of `key`; null counts as absent.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// The error that `key` is not `wanted`.
    pub(super) fn error(&self, key: &str, wanted: impl Into<String>) -> ModelError {
        ModelError::Config {
            path: self.path.to_owned(),
            key: format!("{}{key}", self.prefix),
            found: describe(self.get(key)),
            wanted: wanted.into(),
        }
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.error(key, "a string")),
        }
    }

    /// A list of strings; empty if absent.
    pub(super) fn strings(&self, key: &str) -> Result<Vec<&'a str>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(vec![]) };
        let items = value.as_array().ok_or_else(|| self.error(key, "a list of strings"))?;
        items.iter().map(|item| item.as_str().ok_or_else(|| self.error(key, "a list of strings"))).collect()
    }

    pub(super) fn bool(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.error(key, "true or false")),
        }
    }

    /// An integer in `1..=max`.
    pub(super) fn size(&self, key: &str, default: Option<usize>, max: usize) -> Result<usize, ModelError> {
        let size = match (self.get(key), default) {
            (None, Some(default)) => Some(default),
            (None, None) => None,
            (Some(value), _) => value.as_u64().and_then(|value| usize::try_from(value).ok()),
        };
        size.filter(|size| (1..=max).contains(size))
            .ok_or_else(|| self.error(key, format!("an integer from 1 to {max}")))
    }

    /// A positive number that fits f32.
    fn positive(&self, key: &str, default: Option<f32>) -> Result<f32, ModelError> {
        let number = match self.get(key) {
            None => default,
            Some(value) => value.as_f64().map(|value| value as f32),
        };
        number
            .filter(|number| number.is_finite() && *number > 0.0)
            .ok_or_else(|| self.error(key, "a positive number"))
    }

    /// Fails unless `key` is absent or null.
    pub(super) fn require_absent(&self, key: &str, wanted: &str) -> Result<(), ModelError> {
        match self.get(key) {
            None => Ok(()),
            Some(_) => Err(self.error(key, wanted)),
        }
    }

    /// Refuses the options that change the forward pass in ways that no family here implements.
    pub(super) fn refuse_unsupported(&self) -> Result<(), ModelError> {
        self.require_absent(
            "quantization_config",
            "absent: quantised checkpoints are not supported, use one in f32, f16 or bf16",
        )?;
        if self.string("hidden_act")?.is_some_and(|act| act != "silu") {
            return Err(self.error("hidden_act", "\"silu\""));
        }
        if self.positive("partial_rotary_factor", Some(1.0))? != 1.0 {
            return Err(self.error("partial_rotary_factor", "1: partial rotation is not supported"));
        }
        if self.strings("layer_types")?.iter().any(|kind| *kind != "full_attention") {
            return Err(self.error("layer_types", "\"full_attention\" for every layer"));
        }
        Ok(())
    }

    /// The keys that all families here share; no biases, `head_dim` from `hidden_size`.
    pub(super) fn decoder_config(&self) -> Result<DecoderConfig, ModelError> {
        let hidden_size = self.size("hidden_size", None, MAX_HIDDEN)?;
        let num_heads = self.size("num_attention_heads", None, MAX_HEADS)?;
        let num_kv_heads = self.size("num_key_value_heads", Some(num_heads), MAX_HEADS)?;
        if num_heads % num_kv_heads != 0 {
            return Err(self.error(
                "num_key_value_heads",
                format!("a divisor of `num_attention_heads`, which is {num_heads}"),
            ));
        }
        let head_dim = match self.get("head_dim") {
            Some(_) => self.size("head_dim", None, MAX_HIDDEN / num_heads)?,
            None if hidden_size % num_heads == 0 => hidden_size / num_heads,
            None => {
                let wanted = format!("a multiple of `num_attention_heads`, which is {num_heads}");
                return Err(self.error("hidden_size", wanted));
            }
        };
        if head_dim % 2 != 0 {
            return Err(self.error("head_dim", format!("even for rotary embeddings, not {head_dim}")));
        }
        let max_position_embeddings = self.size("max_position_embeddings", None, MAX_POSITIONS)?;
        let (rope_theta, rope_scaling) = self.rope(max_position_embeddings)?;
        Ok(DecoderConfig {
            vocab_size: self.size("vocab_size", None, MAX_VOCAB)?,
            hidden_size,
            intermediate_size: self.size("intermediate_size", None, MAX_INTERMEDIATE)?,
            num_layers: self.size("num_hidden_layers", None, MAX_LAYERS)?,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: self.positive("rms_norm_eps", Some(1e-6))?,
            rope_theta,
            rope_scaling,
            max_position_embeddings,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            tie_word_embeddings: self.bool("tie_word_embeddings", false)?,
        })
    }

    /// The rotary base and scaling: `rope_theta` and `rope_scaling`, or both in `rope_parameters` as
    /// transformers 5 writes them. As there, `rope_scaling` wins where a file has both.
    fn rope(&self, max_position_embeddings: usize) -> Result<(f32, RopeScaling), ModelError> {
        const DEFAULT_THETA: f32 = 10_000.0;
        let outer_theta = self.positive("rope_theta", Some(DEFAULT_THETA))?;
        let Some(rope) = self
            .object("rope_scaling", "rope_scaling.")?
            .map_or_else(|| self.object("rope_parameters", "rope_parameters."), |rope| Ok(Some(rope)))?
        else {
            return Ok((outer_theta, RopeScaling::None));
        };
        let theta = rope.positive("rope_theta", Some(outer_theta))?;
        if rope.positive("partial_rotary_factor", Some(1.0))? != 1.0 {
            return Err(rope.error("partial_rotary_factor", "1: partial rotation is not supported"));
        }
        // Files older than transformers 4.45 say `type`.
        let key = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
        let scaling = match rope.string(key)? {
            None if rope.json.keys().any(|key| key != "rope_theta") => {
                return Err(rope.error("rope_type", "\"default\", \"linear\" or \"llama3\""));
            }
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear { factor: rope.positive("factor", None)? },
            Some("llama3") => rope.llama3(max_position_embeddings)?,
            Some(_) => return Err(rope.error(key, "\"default\", \"linear\" or \"llama3\"")),
        };
        Ok((theta, scaling))
    }

    fn llama3(&self, max_position_embeddings: usize) -> Result<RopeScaling, ModelError> {
        let low_freq_factor = self.positive("low_freq_factor", None)?;
        let high_freq_factor = self.positive("high_freq_factor", None)?;
        if high_freq_factor <= low_freq_factor {
            let wanted = format!("more than `low_freq_factor`, which is {low_freq_factor}");
            return Err(self.error("high_freq_factor", wanted));
        }
        Ok(RopeScaling::Llama3 {
            factor: self.positive("factor", None)?,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: self.size(
                "original_max_position_embeddings",
                Some(max_position_embeddings),
                MAX_POSITIONS,
            )?,
        })
    }

    /// The object at `key`; an empty one counts as absent.
    fn object(&self, key: &str, prefix: &'static str) -> Result<Option<Options<'a>>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(json)) if json.is_empty() => Ok(None),
            Some(Value::Object(json)) => Ok(Some(Options { path: self.path, prefix, json })),
            Some(_) => Err(self.error(key, "an object or null")),
        }
    }
}

/// A value for an error message: short, whatever the file holds.
pub(crate) fn describe(value: Option<&Value>) -> String {
    const MAX_CHARS: usize = 60;
    let Some(value) = value else { return "absent".to_owned() };
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
