//! Model families: how each writes its `config.json` and names its tensors. A family is a short file
//! and a line in `FAMILIES`; the maths is `decoder.rs`, once, for all of them.

mod llama;
mod options;
mod qwen2;

use std::path::Path;

use serde_json::{Map, Value};

use crate::files::read_json;
use crate::{DecoderConfig, ModelError};
use options::Options;
pub(crate) use options::describe;

/// The file that describes a checkpoint.
pub(crate) const CONFIG_FILE: &str = "config.json";
/// Real ones are a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

struct Family {
    /// `model_type` in config.json.
    model_type: &'static str,
    /// The one of `architectures` that we run.
    architecture: &'static str,
    config: fn(&Options<'_>) -> Result<DecoderConfig, ModelError>,
}

const FAMILIES: &[Family] = &[llama::FAMILY, qwen2::FAMILY];

/// What `config.json` says.
pub(crate) struct ModelDescription {
    pub(crate) config: DecoderConfig,
    pub(crate) names: WeightNames,
    /// The file as it stands, for keys that are not the decoder's.
    pub(crate) json: Map<String, Value>,
}

/// Reads `config.json` of the checkpoint folder `dir`.
pub(crate) fn read_config(dir: &Path) -> Result<ModelDescription, ModelError> {
    let path = dir.join(CONFIG_FILE);
    let json: Map<String, Value> = read_json(&path, MAX_CONFIG_BYTES)?;
    let options = Options::new(&path, &json);
    let family = find_family(&options)?;
    options.refuse_unsupported()?;
    let config = (family.config)(&options)?;
    Ok(ModelDescription { config, names: WeightNames::hugging_face(), json })
}

fn find_family(options: &Options<'_>) -> Result<&'static Family, ModelError> {
    let model_type = options.string("model_type")?;
    let architectures = options.strings("architectures")?;
    let known = |describe: fn(&Family) -> &str| {
        let names: Vec<&str> = FAMILIES.iter().map(describe).collect();
        format!("one of the supported: {}", names.join(", "))
    };
    let family = match model_type {
        Some(wanted) => FAMILIES
            .iter()
            .find(|family| family.model_type == wanted)
            .ok_or_else(|| options.error("model_type", known(|family| family.model_type)))?,
        None => FAMILIES
            .iter()
            .find(|family| architectures.contains(&family.architecture))
            .ok_or_else(|| options.error("architectures", known(|family| family.architecture)))?,
    };
    if !architectures.is_empty() && !architectures.contains(&family.architecture) {
        return Err(options.error("architectures", family.architecture));
    }
    Ok(family)
}

/// What a checkpoint calls its tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightNames {
    /// `[vocab_size, hidden_size]`
    pub embed: String,
    /// `[hidden_size]`
    pub final_norm: String,
    /// `[vocab_size, hidden_size]`; absent from the checkpoint where the head is the embedding.
    pub lm_head: String,
    layer_prefix: &'static str,
}

/// The names of one layer's tensors. Projections are `[out_features, in_features]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerNames {
    /// `[hidden_size]`: the norm before attention.
    pub attn_norm: String,
    /// Query projection.
    pub q: String,
    /// Key projection.
    pub k: String,
    /// Value projection.
    pub v: String,
    /// Attention output projection.
    pub o: String,
    /// `[hidden_size]`: the norm before the feed-forward layer.
    pub ffn_norm: String,
    /// Gate projection of the feed-forward layer.
    pub gate: String,
    /// Up projection of the feed-forward layer.
    pub up: String,
    /// Down projection of the feed-forward layer.
    pub down: String,
}

impl WeightNames {
    /// The names that Hugging Face transformers gives to Llama and all that copied it.
    pub fn hugging_face() -> Self {
        WeightNames {
            embed: "model.embed_tokens.weight".to_owned(),
            final_norm: "model.norm.weight".to_owned(),
            lm_head: "lm_head.weight".to_owned(),
            layer_prefix: "model.layers",
        }
    }

    /// The names of layer `index`.
    pub fn layer(&self, index: usize) -> LayerNames {
        let name = |role: &str| format!("{}.{index}.{role}.weight", self.layer_prefix);
        LayerNames {
            attn_norm: name("input_layernorm"),
            q: name("self_attn.q_proj"),
            k: name("self_attn.k_proj"),
            v: name("self_attn.v_proj"),
            o: name("self_attn.o_proj"),
            ffn_norm: name("post_attention_layernorm"),
            gate: name("mlp.gate_proj"),
            up: name("mlp.up_proj"),
            down: name("mlp.down_proj"),
        }
    }

    /// The name of the bias that belongs to `weight`: "x.q_proj.weight" to "x.q_proj.bias".
    pub fn bias(weight: &str) -> String {
        format!("{}.bias", weight.strip_suffix(".weight").unwrap_or(weight))
    }
}
