//! The keys of a `config.json`, read with checks. The file is untrusted: every size has a range, so
//! that products of two of them fit a usize and a lying file cannot make us allocate without bound;
//! an option that we do not implement is an error, never ignored: every key of the file must have been
//! read by its family, be known to leave the forward pass alone, or say nothing (null, false, empty).

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use crate::config::{Activation, LayerConfig};
use crate::{DecoderConfig, ModelError};

/// Ranges of sizes: several times the largest published model, small enough for any product of two.
const MAX_VOCAB: usize = 1 << 24;
pub(super) const MAX_HIDDEN: usize = 1 << 20;
pub(super) const MAX_INTERMEDIATE: usize = 1 << 22;
/// The widest that attention takes. Rotary frequencies are made for it before any tensor is looked at.
const MAX_HEAD_DIM: usize = tandem_kernels::attention::MAX_HEAD_DIM;
const MAX_LAYERS: usize = 1 << 12;
pub(super) const MAX_HEADS: usize = 1 << 12;
pub(super) const MAX_POSITIONS: usize = 1 << 28;
pub(super) const MAX_EXPERTS: usize = 1 << 12;

/// Keys that say nothing about the forward pass: training, generation, bookkeeping.
const HARMLESS: &[&str] = &[
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token",
    "cache_implementation",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "do_sample",
    "diversity_penalty",
    "dtype",
    "early_stopping",
    "eos_token",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "model_type",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "pad_token",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "seq_length",
    "task_specific_params",
    "temperature",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
    "use_flash_attn",
    "use_return_dict",
];
/// The same by how they begin or end.
const HARMLESS_PREFIXES: &[&str] = &["_", "unsloth_"];
const HARMLESS_SUFFIXES: &[&str] = &["_dropout", "_pdrop", "_token_id", "_token_ids", "_token_index"];

/// A JSON object with the file it came from.
pub(super) struct Options<'a> {
    path: &'a Path,
    /// "rope_scaling." for the keys inside that object.
    prefix: &'static str,
    json: &'a Map<String, Value>,
    /// Keys that somebody has asked for.
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Options<'a> {
    pub(super) fn new(path: &'a Path, json: &'a Map<String, Value>) -> Self {
        Self::with_prefix(path, "", json)
    }

    pub(super) fn with_prefix(path: &'a Path, prefix: &'static str, json: &'a Map<String, Value>) -> Self {
        Options { path, prefix, json, read: RefCell::default() }
    }

    /// The value of `key`; null counts as absent.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.json.get(key).filter(|value| !value.is_null())
    }

    /// True if `key` is there and not null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// The keys that are there.
    pub(super) fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.json.keys().map(String::as_str)
    }

    /// True if `key` is there and does not say that something is off.
    pub(super) fn switches(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| !says_nothing(value))
    }

    /// True if there is nothing but what belongs to a rotary embedding without scaling.
    pub(super) fn is_plain(&self) -> bool {
        self.json.keys().all(|key| ["rope_theta", "partial_rotary_factor"].contains(&key.as_str()))
    }

    /// Says that `keys` are understood and change nothing here.
    pub(super) fn ignore(&self, keys: &[&str]) {
        self.read.borrow_mut().extend(keys.iter().map(|key| (*key).to_owned()));
    }

    /// The keys that nobody has read and that may mean something.
    pub(super) fn unread(&self) -> Vec<&'a str> {
        let unread = self.json.iter().filter(|(key, value)| {
            let harmless = HARMLESS.contains(&key.as_str())
                || HARMLESS_PREFIXES.iter().any(|prefix| key.starts_with(prefix))
                || HARMLESS_SUFFIXES.iter().any(|suffix| key.ends_with(suffix));
            !harmless && !says_nothing(value) && !self.read.borrow().contains(key.as_str())
        });
        unread.map(|(key, _)| key.as_str()).collect()
    }

    /// Refuses a key that nobody has read and that may mean something.
    pub(super) fn refuse_unread(&self) -> Result<(), ModelError> {
        match self.unread().first() {
            None => Ok(()),
            Some(key) => Err(self.error(
                key,
                "absent: this option is not supported for this family (remove the key if it does not change \
                 what the model computes)",
            )),
        }
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
    pub(super) fn positive(&self, key: &str, default: Option<f32>) -> Result<f32, ModelError> {
        let number = match self.get(key) {
            None => default,
            Some(value) => value.as_f64().map(|value| value as f32),
        };
        number
            .filter(|number| number.is_finite() && *number > 0.0)
            .ok_or_else(|| self.error(key, "a positive number"))
    }

    /// A positive number if `key` is there.
    pub(super) fn positive_or_none(&self, key: &str) -> Result<Option<f32>, ModelError> {
        if self.has(key) { self.positive(key, None).map(Some) } else { Ok(None) }
    }

    /// A finite number if `key` is there.
    pub(super) fn number(&self, key: &str) -> Result<Option<f32>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().map(|value| value as f32).filter(|number| number.is_finite());
        number.map(Some).ok_or_else(|| self.error(key, "a number"))
    }

    /// A list of positive numbers.
    pub(super) fn positives(&self, key: &str) -> Result<Vec<f32>, ModelError> {
        let wanted = || self.error(key, "a list of positive numbers");
        let items = self.get(key).and_then(Value::as_array).ok_or_else(wanted)?;
        items
            .iter()
            .map(|item| item.as_f64().map(|item| item as f32).filter(|x| x.is_finite() && *x > 0.0))
            .collect::<Option<_>>()
            .ok_or_else(wanted)
    }

    /// An integer from 0 on.
    pub(super) fn count(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        let count = value.as_u64().and_then(|count| usize::try_from(count).ok());
        count.ok_or_else(|| self.error(key, "an integer from 0 on"))
    }

    /// A list of integers below `end`; empty if absent.
    pub(super) fn indices(&self, key: &str, end: usize) -> Result<Vec<usize>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(vec![]) };
        let wanted = || self.error(key, format!("a list of integers below {end}"));
        let items = value.as_array().ok_or_else(wanted)?;
        let index = |item: &Value| Some(item.as_u64()? as usize).filter(|index| *index < end);
        items.iter().map(index).collect::<Option<_>>().ok_or_else(wanted)
    }

    /// A list of at least `len` zeros and ones, or of booleans, if `key` is there.
    pub(super) fn flags(&self, key: &str, len: usize) -> Result<Option<Vec<bool>>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wanted = || self.error(key, format!("a list of {len} zeros and ones"));
        let items = value.as_array().filter(|items| items.len() >= len).ok_or_else(wanted)?;
        let flag = |item: &Value| item.as_bool().or_else(|| Some(item.as_u64().filter(|&i| i < 2)? == 1));
        items.iter().map(flag).collect::<Option<_>>().map(Some).ok_or_else(wanted)
    }

    /// The nonlinearity named by `key`; SiLU if absent.
    pub(super) fn activation(&self, key: &str) -> Result<Activation, ModelError> {
        self.activation_or(key, Activation::Silu)
    }

    /// The nonlinearity named by `key`, or `default`.
    pub(super) fn activation_or(&self, key: &str, default: Activation) -> Result<Activation, ModelError> {
        match self.string(key)? {
            None => Ok(default),
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::GeluTanh),
            Some(_) => Err(self.error(key, "\"silu\" or \"gelu_pytorch_tanh\"")),
        }
    }

    /// The keys that all families here share; no biases, `head_dim` from `hidden_size`.
    pub(super) fn decoder_config(&self) -> Result<DecoderConfig, ModelError> {
        let shape = self.shape()?;
        let (rope, max_position_embeddings) = self.rope(shape.head_dim, shape.max_position_embeddings)?;
        Ok(DecoderConfig { rope, max_position_embeddings, ..shape })
    }

    /// As [`Options::decoder_config`] without the rotary embedding.
    pub(super) fn shape(&self) -> Result<DecoderConfig, ModelError> {
        // See `quantization.rs`.
        self.ignore(&["quantization_config"]);
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
            Some(_) => self.size("head_dim", None, MAX_HEAD_DIM.min(MAX_HIDDEN / num_heads))?,
            None if hidden_size % num_heads == 0 => hidden_size / num_heads,
            None => {
                let wanted = format!("a multiple of `num_attention_heads`, which is {num_heads}");
                return Err(self.error("hidden_size", wanted));
            }
        };
        if head_dim > MAX_HEAD_DIM {
            let wanted = format!("at most {MAX_HEAD_DIM} times `num_attention_heads`, which is {num_heads}");
            return Err(self.error("hidden_size", wanted));
        }
        if head_dim % 2 != 0 {
            return Err(self.error("head_dim", format!("even for rotary embeddings, not {head_dim}")));
        }
        Ok(DecoderConfig {
            vocab_size: self.size("vocab_size", None, MAX_VOCAB)?,
            hidden_size,
            intermediate_size: self.size("intermediate_size", None, MAX_INTERMEDIATE)?,
            num_layers: self.size("num_hidden_layers", None, MAX_LAYERS)?,
            num_heads,
            num_kv_heads,
            head_dim,
            max_position_embeddings: self.size("max_position_embeddings", None, MAX_POSITIONS)?,
            norm_eps: self.positive("rms_norm_eps", Some(1e-6))?,
            activation: self.activation("hidden_act")?,
            tie_word_embeddings: self.bool("tie_word_embeddings", false)?,
            ..DecoderConfig::default()
        })
    }

    /// One entry a layer: those that `layer_types` (or, where the file has none, `slides`) says slide
    /// see `sliding_window` keys. Empty if no layer does.
    pub(super) fn windows(
        &self,
        num_layers: usize,
        slides: impl Fn(usize) -> bool,
    ) -> Result<Vec<LayerConfig>, ModelError> {
        let kinds = self.strings("layer_types")?;
        if !kinds.is_empty() && kinds.len() != num_layers {
            return Err(self.error("layer_types", format!("a list of {num_layers}, one a layer")));
        }
        if kinds.iter().any(|kind| !["full_attention", "sliding_attention"].contains(kind)) {
            return Err(
                self.error("layer_types", "\"full_attention\" or \"sliding_attention\" for every layer")
            );
        }
        let slides =
            |layer: usize| kinds.get(layer).map_or_else(|| slides(layer), |kind| kind.starts_with('s'));
        // Before a vector of the file's size is made, the size is in range; see MAX_LAYERS.
        let slides: Vec<bool> = (0..num_layers).map(slides).collect();
        if !slides.contains(&true) {
            self.ignore(&["sliding_window"]);
            return Ok(Vec::new());
        }
        let window = self.size("sliding_window", None, MAX_POSITIONS)?;
        let layer = |slides: bool| LayerConfig { window: slides.then_some(window), ..LayerConfig::default() };
        Ok(slides.into_iter().map(layer).collect())
    }

    /// The object at `key`; an empty one counts as absent.
    pub(super) fn object(&self, key: &str, prefix: &'static str) -> Result<Option<Options<'a>>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(json)) if json.is_empty() => Ok(None),
            Some(Value::Object(json)) => Ok(Some(Options::with_prefix(self.path, prefix, json))),
            Some(_) => Err(self.error(key, "an object or null")),
        }
    }
}

/// A list of keys for an error message: the first few, and how many more there are.
pub(super) fn list_of_keys(keys: &[&str]) -> String {
    const MAX_LISTED: usize = 12;
    const MAX_CHARS: usize = 40;
    let short = |key: &&str| format!("`{}`", key.chars().take(MAX_CHARS).collect::<String>());
    let listed: Vec<String> = keys.iter().take(MAX_LISTED).map(short).collect();
    let more = match keys.len().saturating_sub(MAX_LISTED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{}{more}", listed.join(", "))
}

/// A value that switches nothing on.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
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
