//! EAGLE-3 heads as their trainers write them: EAGLE's own form and SpecForge's (`midlayer.*`, all keys in
//! one object), and that of the speculators library (`layers.0.*`, the layer's keys in
//! `transformer_layer_config`).
//! Source: SafeAILab/EAGLE `eagle/model/cnets.py`; vLLM `llama_eagle3.py` and SGLang `llama_eagle3.py`, for
//! which the two forms are written.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Features, Head, HeadKind, Input, MAX_CONFIG_BYTES, mismatch};
use crate::checkpoint::name_of;
use crate::family::{self, CONFIG_FILE, NameTable, Role, WeightNames, describe};
use crate::files::read_json;
use crate::generation::GenerationConfig;
use crate::weights::{SafetensorsStore, WeightStore};
use crate::{Checkpoint, ModelError, RopeOverride};

/// What both forms share.
const COMMON: NameTable = &[
    (Role::DraftFeatures, "fc.weight"),
    (Role::FinalNorm, "norm.weight"),
    (Role::Embed, EMBED),
    (Role::LmHead, LM_HEAD),
];
const EMBED: &str = "embed_tokens.weight";
const LM_HEAD: &str = "lm_head.weight";

/// The names of the layer's tensors, which begin with `$layer`.
macro_rules! layer_names {
    ($layer:literal) => {
        &[
            (Role::DraftTokenNorm, concat!($layer, ".input_layernorm.weight")),
            (Role::DraftHiddenNorm, concat!($layer, ".hidden_norm.weight")),
            (Role::Q, concat!($layer, ".self_attn.q_proj.weight")),
            (Role::K, concat!($layer, ".self_attn.k_proj.weight")),
            (Role::V, concat!($layer, ".self_attn.v_proj.weight")),
            (Role::O, concat!($layer, ".self_attn.o_proj.weight")),
            (Role::FfnNorm, concat!($layer, ".post_attention_layernorm.weight")),
            (Role::Gate, concat!($layer, ".mlp.gate_proj.weight")),
            (Role::Up, concat!($layer, ".mlp.up_proj.weight")),
            (Role::Down, concat!($layer, ".mlp.down_proj.weight")),
        ]
    };
}

const MIDLAYER: NameTable = layer_names!("midlayer");
const LAYERS: NameTable = layer_names!("layers.0");

/// Which token of the target an output is: so many ids on.
const OFFSETS: &str = "d2t";

/// The object of the layer's keys in the speculators library's form.
const LAYER_CONFIG: &str = "transformer_layer_config";

/// Keys that are the head's and not its layer's.
const DRAFT_VOCAB: &str = "draft_vocab_size";
const LAYER_IDS: &str = "eagle_aux_hidden_state_layer_ids";
const TARGET_HIDDEN: &str = "target_hidden_size";
const NORMED_RESIDUAL: &str = "norm_before_residual";
const EAGLE_CONFIG: &str = "eagle_config";

/// Keys about how it was trained and is to be run elsewhere. (Files based on Qwen's have the first without
/// `use_sliding_window`, which would be refused.)
const HARMLESS: [&str; 7] = [
    "max_window_layers",
    "architectures",
    "speculators_config",
    "speculators_model_type",
    "speculators_version",
    "target_model_type",
    "embed_requires_grad",
];

/// Names of classes that hold other kinds of heads.
const OTHERS: [&str; 4] = ["LlamaForCausalLMEagle", "EagleModel", "EAGLEModel", "EagleSpeculator"];

fn architectures(json: &Map<String, Value>) -> impl Iterator<Item = &str> {
    json.get("architectures").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

/// True if `json`, a `config.json`, is that of a head: of EAGLE-3, or of one that `open` refuses.
pub(super) fn is_head(json: &Map<String, Value>) -> bool {
    let is_named = architectures(json).any(|name| name.to_lowercase().contains("eagle"));
    json.contains_key(DRAFT_VOCAB) || json.contains_key("speculators_model_type") || is_named
}

/// See [`Head::open`].
pub(super) fn open(dir: &Path, target: &Checkpoint, rope: Option<&RopeOverride>) -> Result<Head, ModelError> {
    let path = dir.join(CONFIG_FILE);
    let json: Map<String, Value> = read_json(&path, MAX_CONFIG_BYTES)?;
    let keys = Keys { path: &path, json: &json };
    keys.check_kind()?;
    let name = name_of(dir);
    let (mut config, _) = family::read_with(&path, &keys.layer()?, rope)?;
    if config.num_layers != 1 {
        let wanted = "1: a head of several layers is not supported";
        return Err(keys.layer_error("num_hidden_layers", config.num_layers, wanted));
    }
    let target_config = &target.config;
    if config.vocab_size != target_config.vocab_size {
        let reason = format!(
            "the head was made for a target of {} tokens (`vocab_size`), this one has {}",
            config.vocab_size, target_config.vocab_size
        );
        return Err(mismatch(target, &name, reason));
    }
    let target_hidden = keys.size(TARGET_HIDDEN)?.unwrap_or(config.hidden_size);
    if target_hidden != target_config.hidden_size {
        let reason = format!(
            "the head was made for a target whose hidden states are {target_hidden} wide, this one's are {}",
            target_config.hidden_size
        );
        return Err(mismatch(target, &name, reason));
    }
    let features = Features::Layers(keys.layers(target_config.num_layers)?);
    let normed_residual = keys.bool(NORMED_RESIDUAL)?;

    let store = SafetensorsStore::open(dir)?;
    let num_outputs = keys.size(DRAFT_VOCAB)?.unwrap_or(config.vocab_size);
    if num_outputs > config.vocab_size {
        let wanted = format!("at most the target's tokens, which are {}", config.vocab_size);
        return Err(keys.layer_error(DRAFT_VOCAB, num_outputs, &wanted));
    }
    let to_target = to_target(&store, dir, num_outputs, config.vocab_size)?;
    let layer = if store.contains("midlayer.hidden_norm.weight") { MIDLAYER } else { LAYERS };
    let is_as_wide = config.hidden_size == target_hidden;
    let has_embedding = store.contains(EMBED);
    if !has_embedding && !is_as_wide {
        let reason = format!(
            "the head is {} wide and has no embedding of its own; the target's is {target_hidden} wide",
            config.hidden_size
        );
        return Err(mismatch(target, &name, reason));
    }
    // Then the target's would not do, and it is an error that there are none.
    let has_outputs = store.contains(LM_HEAD) || to_target.is_some() || !is_as_wide;
    // Where features are, tokens are: a head has the positions of its target, whatever it was trained with.
    config.max_position_embeddings = target_config.max_position_embeddings;
    let checkpoint = Checkpoint {
        dir: dir.to_owned(),
        name,
        config,
        names: WeightNames::of(COMMON).with(layer),
        generation: GenerationConfig::default(),
        weights: Box::new(store),
        json,
        packing: None,
        quantize: None,
    };
    let input = Input::Attention { normed_residual };
    let kind = HeadKind::Eagle3;
    Ok(Head { kind, checkpoint, features, input, to_target, layer: 0, has_embedding, has_outputs })
}

/// The target's token of every output; `None` if they are the same.
fn to_target(
    store: &SafetensorsStore,
    dir: &Path,
    num_outputs: usize,
    vocab_size: usize,
) -> Result<Option<Vec<u32>>, ModelError> {
    let Some(offsets) = store.integers(OFFSETS)? else {
        return match num_outputs == vocab_size {
            true => Ok(None),
            false => Err(ModelError::weights(
                dir,
                format!(
                    "has no tensor `{OFFSETS}`, which says what the head's {num_outputs} outputs are among the \
                     target's {vocab_size} tokens"
                ),
            )),
        };
    };
    if offsets.len() != num_outputs {
        let reason = format!("`{OFFSETS}` has {} elements; {DRAFT_VOCAB} is {num_outputs}", offsets.len());
        return Err(ModelError::weights(dir, reason));
    }
    let id = |(output, &offset): (usize, &i64)| {
        let id = (output as i64).checked_add(offset).and_then(|id| u32::try_from(id).ok());
        id.filter(|&id| (id as usize) < vocab_size).ok_or_else(|| {
            let reason = format!(
                "`{OFFSETS}` puts output {output} {offset} ids on, which is none of the target's {vocab_size} tokens"
            );
            ModelError::weights(dir, reason)
        })
    };
    offsets.iter().enumerate().map(id).collect::<Result<_, _>>().map(Some)
}

/// A head's `config.json`.
struct Keys<'a> {
    path: &'a Path,
    json: &'a Map<String, Value>,
}

impl Keys<'_> {
    fn error(&self, key: &str, found: Option<&Value>, wanted: impl Into<String>) -> ModelError {
        ModelError::Config {
            path: self.path.to_owned(),
            key: key.to_owned(),
            found: describe(found),
            wanted: wanted.into(),
        }
    }

    fn layer_error(&self, key: &str, found: usize, wanted: &str) -> ModelError {
        self.error(key, Some(&found.into()), wanted)
    }

    /// Refuses heads of other kinds by name.
    fn check_kind(&self) -> Result<(), ModelError> {
        let wanted = "an EAGLE-3 head, which is \"LlamaForCausalLMEagle3\" or \"Eagle3Speculator\"";
        if architectures(self.json).any(|name| OTHERS.contains(&name)) {
            return Err(self.error("architectures", self.json.get("architectures"), wanted));
        }
        match self.json.get("speculators_model_type") {
            None => Ok(()),
            Some(kind) if kind == "eagle3" => Ok(()),
            kind => Err(self.error("speculators_model_type", kind, "\"eagle3\"")),
        }
    }

    /// The layer's own keys, in the words of a Llama's `config.json`.
    fn layer(&self) -> Result<Map<String, Value>, ModelError> {
        let mut layer = self.json.clone();
        match layer.remove(LAYER_CONFIG) {
            None => {}
            Some(Value::Object(inner)) => layer.extend(inner),
            found => return Err(self.error(LAYER_CONFIG, found.as_ref(), "an object")),
        }
        for key in [DRAFT_VOCAB, LAYER_IDS, TARGET_HIDDEN, NORMED_RESIDUAL, EAGLE_CONFIG] {
            layer.remove(key);
        }
        HARMLESS.iter().for_each(|key| drop(layer.remove(*key)));
        match layer.get("model_type").and_then(Value::as_str) {
            Some("llama") => Ok(layer),
            _ => {
                let wanted = "\"llama\": the layer of an EAGLE-3 head is a Llama's";
                Err(self.error("model_type", layer.get("model_type"), wanted))
            }
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn bool(&self, key: &str) -> Result<bool, ModelError> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.error(key, Some(value), "true or false"))
    }

    fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|&size| size > 0);
        size.map(Some).ok_or_else(|| self.error(key, Some(value), "a positive integer"))
    }

    /// After which layers hidden states are taken. In `eagle_config` they are layers whose outputs those are,
    /// as SGLang reads it; at the top, layers whose inputs they are, as vLLM does.
    fn layers(&self, num_layers: usize) -> Result<Vec<usize>, ModelError> {
        let nested =
            self.get(EAGLE_CONFIG).and_then(|config| config.get(LAYER_IDS)).filter(|ids| !ids.is_null());
        if let Some(Value::Bool(false)) =
            self.get(EAGLE_CONFIG).and_then(|config| config.get("use_aux_hidden_state"))
        {
            let wanted =
                "`use_aux_hidden_state` true: a head of the last hidden state alone is not supported";
            return Err(self.error(EAGLE_CONFIG, self.get(EAGLE_CONFIG), wanted));
        }
        let (value, after) = match (self.get(LAYER_IDS), nested) {
            (Some(ids), _) => (ids, 0),
            (None, Some(ids)) => (ids, 1),
            (None, None) if num_layers >= 5 => return Ok(vec![2, num_layers / 2, num_layers - 3]),
            (None, None) => {
                let wanted =
                    format!("a list of layers: the usual three are not in a target of {num_layers} layers");
                return Err(self.error(LAYER_IDS, None, wanted));
            }
        };
        let id = |id: &Value| id.as_u64().map(|id| (id as usize).saturating_add(after));
        let ids: Option<Vec<usize>> = value.as_array().and_then(|ids| ids.iter().map(id).collect());
        ids.filter(|ids| !ids.is_empty() && ids.is_sorted() && ids.iter().all(|&id| id <= num_layers))
            .filter(|ids| ids.len() <= MAX_LAYERS)
            .ok_or_else(|| {
                let most = num_layers - after;
                let wanted = format!(
                    "an ascending list of at most {MAX_LAYERS} layers, none above {most}, as the target has {num_layers}"
                );
                self.error(LAYER_IDS, Some(value), wanted)
            })
    }
}

/// Three are usual.
const MAX_LAYERS: usize = 16;
