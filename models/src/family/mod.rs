//! Model families: how each writes its `config.json` and names its tensors. A family is a short file
//! and a line in `FAMILIES`; the maths is `decoder.rs`, once, for all of them.

mod deepseek;
mod gemma;
pub(crate) mod gguf;
pub(crate) mod gguf_write;
mod glm4;
mod gpt_oss;
mod granite;
mod llama;
mod mistral;
pub mod names;
mod olmo2;
mod options;
mod phi3;
mod quantization;
mod qwen;
mod rope;
pub mod rope_override;
mod smollm3;
mod starcoder2;

use std::path::Path;

use serde_json::{Map, Value};

use crate::files::read_json;
use crate::weights::Packing;
use crate::{DecoderConfig, ModelError};
pub use names::{ExpertLayout, NameTable, Role, WeightNames};
pub(crate) use options::describe;
use options::{Options, list_of_keys};
pub use rope_override::RopeOverride;

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
    names: fn() -> WeightNames,
    /// Where the file has its text model's options in an object of their own: what the object may leave
    /// out, and it takes for granted.
    text_config: Option<fn() -> Value>,
}

const FAMILIES: &[Family] = &[
    llama::FAMILY,
    qwen::QWEN2,
    qwen::QWEN3,
    qwen::QWEN3_MOE,
    qwen::MIMO,
    mistral::MISTRAL,
    mistral::MISTRAL3,
    starcoder2::FAMILY,
    granite::FAMILY,
    phi3::FAMILY,
    gemma::GEMMA2,
    gemma::GEMMA3_TEXT,
    gemma::GEMMA3,
    olmo2::FAMILY,
    smollm3::FAMILY,
    glm4::FAMILY,
    gpt_oss::FAMILY,
    deepseek::V2,
    deepseek::V3,
];

/// What `config.json` says.
pub(crate) struct ModelDescription {
    pub(crate) config: DecoderConfig,
    pub(crate) names: WeightNames,
    /// How matrices are packed, where they are.
    pub(crate) packing: Option<Packing>,
    /// The file as it stands, for keys that are not the decoder's.
    pub(crate) json: Map<String, Value>,
}

/// Reads `config.json` of the checkpoint folder `dir`, with another rotary scaling if there is one.
pub(crate) fn read_config(dir: &Path, rope: Option<&RopeOverride>) -> Result<ModelDescription, ModelError> {
    let path = dir.join(CONFIG_FILE);
    let json: Map<String, Value> = read_json(&path, MAX_CONFIG_BYTES)?;
    let (config, mut names) = read_with(&path, &json, rope)?;
    let packing = quantization::read(&path, &json)?;
    if packing == Some(Packing::Mxfp4) {
        // Packed, the experts' matrices are not transposed.
        names.expert_layout = ExpertLayout::PairedRows;
    }
    Ok(ModelDescription { config, names, packing, json })
}

/// As [`read_options`], with another rotary scaling if there is one.
pub(crate) fn read_with(
    path: &Path,
    json: &Map<String, Value>,
    rope: Option<&RopeOverride>,
) -> Result<(DecoderConfig, WeightNames), ModelError> {
    let own = read_options(path, json)?;
    let Some(rope) = rope else { return Ok(own) };
    let mut json = json.clone();
    // The text model's options stand in an object of their own where its family has that.
    let text = find_family(&Options::new(path, &json))?.text_config.map(|_| text_options(&json));
    let changed = match text {
        None => rope.apply(path, &mut json),
        Some(mut text) => {
            let changed = rope.apply(path, &mut text);
            text.remove("model_type");
            json.insert("text_config".to_owned(), text.into());
            changed
        }
    };
    changed.and_then(|()| read_options(path, &json)).map_err(|error| rope.fault(error))
}

/// The decoder that `json`, in the words of a `config.json`, describes, and what Hugging Face
/// checkpoints of its family call their tensors. `path` is for messages only.
pub(crate) fn read_options(
    path: &Path,
    json: &Map<String, Value>,
) -> Result<(DecoderConfig, WeightNames), ModelError> {
    let options = Options::new(path, json);
    let family = find_family(&options)?;
    let config = match family.text_config {
        None => {
            let config = (family.config)(&options)?;
            options.refuse_unread()?;
            config
        }
        // What stands around the object is about images.
        Some(defaults) => {
            let Value::Object(mut text) = defaults() else {
                unreachable!("defaults are an object: this is a bug")
            };
            let stated = json.get("text_config").and_then(Value::as_object);
            let stated = stated.ok_or_else(|| options.error("text_config", "an object"))?;
            // Some are in both places, some in one.
            let shared = ["tie_word_embeddings"];
            text.extend(shared.into_iter().filter_map(|key| Some((key.to_owned(), json.get(key)?.clone()))));
            text.extend(stated.clone());
            let text = Options::with_prefix(path, "text_config.", &text);
            let config = (family.config)(&text)?;
            text.refuse_unread()?;
            config
        }
    };
    Ok((config, (family.names)()))
}

/// What an unknown model has that the plainest of the known ones has not: a hint at what would have to be
/// written, and at whether another name for a known family would do.
fn not_understood(options: &Options<'_>) -> String {
    // What `Options::decoder_config` and the family of Llama read.
    options.ignore(&[
        "attention_bias",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "mlp_bias",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "partial_rotary_factor",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "vocab_size",
    ]);
    match options.unread().as_slice() {
        [] => "; but for that it reads like a llama".to_owned(),
        keys => format!("; read as a llama, these of its keys are not understood: {}", list_of_keys(keys)),
    }
}

/// The options of the text model in `json`, which may have them in an object of their own.
pub(crate) fn text_options(json: &Map<String, Value>) -> Map<String, Value> {
    let model_type = json.get("model_type").and_then(Value::as_str);
    let family = FAMILIES.iter().find(|family| Some(family.model_type) == model_type);
    let Some(Value::Object(mut text)) =
        family.and_then(|family| family.text_config).map(|defaults| defaults())
    else {
        return json.clone();
    };
    text.extend(
        json.get("text_config")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .map(|(k, v)| (k.clone(), v.clone())),
    );
    text.insert("model_type".to_owned(), model_type.into());
    text
}

fn find_family(options: &Options<'_>) -> Result<&'static Family, ModelError> {
    let model_type = options.string("model_type")?;
    let architectures = options.strings("architectures")?;
    let known = |describe: fn(&Family) -> &str| {
        let names: Vec<&str> = FAMILIES.iter().map(describe).collect();
        format!("one of the supported: {}{}", names.join(", "), not_understood(options))
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
