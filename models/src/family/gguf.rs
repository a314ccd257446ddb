//! GGUF metadata in the words of a `config.json`. The families keep their decisions: this file only
//! translates keys, and says where converted tensors differ from those they were made of.
//! Source: the converter of llama.cpp, which wrote the files.

use serde_json::{Map, Value as Json, json};

use super::options::list_of_keys;
use super::{ModelDescription, NameTable, Role, RopeOverride, WeightNames, read_with};
use crate::weights::WeightStore;
use crate::weights::gguf::{GgufFile, Value, ValueType};
use crate::{DecoderConfig, ModelError, RopeScaling};

const ARCHITECTURE: &str = "general.architecture";
const EMBEDDING: &str = "token_embd.weight";
/// Divisors of the rotary frequencies: of Llama 3.1's scaling, and LongRoPE's two sets.
const ROPE_FACTORS: &str = "rope_freqs.weight";
const LONG_FACTORS: &str = "rope_factors_long.weight";
const SHORT_FACTORS: &str = "rope_factors_short.weight";

/// How the files of one architecture say what its family reads.
pub(super) struct Architecture {
    /// `general.architecture`.
    pub(super) name: &'static str,
    /// The family's `model_type`.
    pub(super) model_type: &'static str,
    /// Keys (without the architecture before them) that only it has, and what they are in a config.json.
    pub(super) keys: &'static [(&'static str, &'static str)],
    /// What its files take for granted.
    implied: fn(&GgufFile) -> Json,
    /// Options that are on if the first layer has a tensor.
    flags: &'static [(&'static str, &'static str)],
    /// Names that [`NAMES`] does not have, or has otherwise.
    pub(super) names: NameTable,
    /// Rows of query and key were put into the order of a rotation of neighbouring pairs.
    pub(super) permuted: bool,
}

const PLAIN: Architecture = Architecture {
    name: "",
    model_type: "",
    keys: &[],
    implied: |_| json!({}),
    flags: &[],
    names: &[],
    permuted: false,
};

const ATTENTION_BIAS: (&str, &str) = ("blk.0.attn_q.bias", "attention_bias");
const MLP_BIAS: (&str, &str) = ("blk.0.ffn_down.bias", "mlp_bias");
const WINDOW: (&str, &str) = ("attention.sliding_window", "sliding_window");

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "llama",
        model_type: "llama",
        flags: &[ATTENTION_BIAS, MLP_BIAS],
        permuted: true,
        ..PLAIN
    },
    Architecture { name: "qwen2", model_type: "qwen2", ..PLAIN },
    Architecture { name: "qwen3", model_type: "qwen3", flags: &[ATTENTION_BIAS], ..PLAIN },
    Architecture {
        name: "qwen3moe",
        model_type: "qwen3_moe",
        keys: &[
            ("expert_count", "num_experts"),
            ("expert_used_count", "num_experts_per_tok"),
            ("expert_feed_forward_length", "moe_intermediate_size"),
        ],
        implied: |_| json!({"norm_topk_prob": true}),
        flags: &[ATTENTION_BIAS],
        ..PLAIN
    },
    Architecture {
        name: "starcoder2",
        model_type: "starcoder2",
        keys: &[("attention.layer_norm_epsilon", "norm_epsilon")],
        ..PLAIN
    },
    Architecture {
        name: "granite",
        model_type: "granite",
        keys: &[
            ("attention.scale", "attention_multiplier"),
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),
        ],
        flags: &[ATTENTION_BIAS, MLP_BIAS],
        permuted: true,
        ..PLAIN
    },
    Architecture {
        name: "phi3",
        model_type: "phi3",
        keys: &[WINDOW],
        names: &[(Role::Qkv, "blk.{layer}.attn_qkv.weight"), (Role::GateUp, "blk.{layer}.ffn_up.weight")],
        ..PLAIN
    },
    Architecture {
        name: "gemma2",
        model_type: "gemma2",
        keys: &[
            WINDOW,
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ],
        implied: |file| gemma_scale(file, "gemma2", 46),
        names: SANDWICH,
        ..PLAIN
    },
    Architecture {
        name: "gemma3",
        model_type: "gemma3_text",
        keys: &[WINDOW, ("rope.freq_base_swa", "rope_local_base_freq")],
        implied: |file| gemma_scale(file, "gemma3", 62),
        names: SANDWICH,
        ..PLAIN
    },
    Architecture { name: "olmo2", model_type: "olmo2", names: SANDWICH, ..PLAIN },
    Architecture { name: "smollm3", model_type: "smollm3", permuted: true, ..PLAIN },
    Architecture {
        name: "glm4",
        model_type: "glm4",
        flags: &[ATTENTION_BIAS],
        names: &[
            (Role::AttnPostNorm, "blk.{layer}.post_attention_norm.weight"),
            (Role::FfnPostNorm, "blk.{layer}.post_ffw_norm.weight"),
            (Role::GateUp, "blk.{layer}.ffn_up.weight"),
        ],
        ..PLAIN
    },
    Architecture {
        name: "gpt-oss",
        model_type: "gpt_oss",
        keys: &[
            WINDOW,
            ("expert_count", "num_local_experts"),
            ("expert_used_count", "num_experts_per_tok"),
            ("expert_feed_forward_length", "intermediate_size"),
        ],
        names: &[
            (Role::FfnNorm, "blk.{layer}.post_attention_norm.weight"),
            (Role::Sinks, "blk.{layer}.attn_sinks.weight"),
        ],
        ..PLAIN
    },
    Architecture {
        name: DEEPSEEK,
        model_type: "deepseek_v2",
        keys: &[
            ("attention.q_lora_rank", "q_lora_rank"),
            ("attention.kv_lora_rank", "kv_lora_rank"),
            ("leading_dense_block_count", "first_k_dense_replace"),
            ("expert_count", "n_routed_experts"),
            ("expert_used_count", "num_experts_per_tok"),
            ("expert_shared_count", "n_shared_experts"),
            ("expert_feed_forward_length", "moe_intermediate_size"),
            ("expert_weights_scale", "routed_scaling_factor"),
            ("expert_group_count", "n_group"),
            ("expert_group_used_count", "topk_group"),
        ],
        implied: deepseek,
        flags: &[("blk.0.attn_kv_a_mqa.bias", "attention_bias"), MLP_BIAS],
        ..PLAIN
    },
];

const DEEPSEEK: &str = "deepseek2";
/// What `expert_gating_func` says.
pub(super) const SOFTMAX: u64 = 1;
pub(super) const SIGMOID: u64 = 2;

/// What files of DeepSeek-V2 and V3 say in other words than their config.json.
fn deepseek(file: &GgufFile) -> Json {
    let size = |key: &str| file.u64(&format!("{DEEPSEEK}.{key}")).ok().flatten();
    let turning = size("rope.dimension_count").unwrap_or(0);
    // Older files, in which keys and values are made whole, have the widths of these.
    let key = size("attention.key_length_mla").or_else(|| size("attention.key_length"));
    let value = size("attention.value_length_mla").or_else(|| size("attention.value_length"));
    let flag = |key: &str| file.get(&format!("{DEEPSEEK}.{key}")) == Some(Value::Bool(true));
    let (scoring, method) = match size("expert_gating_func") {
        Some(SIGMOID) => ("sigmoid", "noaux_tc"),
        _ if size("expert_group_count").unwrap_or(1) > 1 => ("softmax", "group_limited_greedy"),
        _ => ("softmax", "greedy"),
    };
    json!({
        "qk_rope_head_dim": turning,
        "qk_nope_head_dim": key.unwrap_or(0).saturating_sub(turning),
        "v_head_dim": value,
        "norm_topk_prob": flag("expert_weights_norm"),
        "scoring_func": scoring,
        "topk_method": method,
    })
}

/// Norms after the sublayers.
const SANDWICH: NameTable = &[
    (Role::AttnPostNorm, "blk.{layer}.post_attention_norm.weight"),
    (Role::FfnPostNorm, "blk.{layer}.post_ffw_norm.weight"),
];

/// What GGUF files call their tensors.
pub(super) const NAMES: NameTable = &[
    (Role::Embed, EMBEDDING),
    (Role::FinalNorm, "output_norm.weight"),
    (Role::LmHead, "output.weight"),
    (Role::AttnNorm, "blk.{layer}.attn_norm.weight"),
    (Role::Q, "blk.{layer}.attn_q.weight"),
    (Role::K, "blk.{layer}.attn_k.weight"),
    (Role::V, "blk.{layer}.attn_v.weight"),
    (Role::QNorm, "blk.{layer}.attn_q_norm.weight"),
    (Role::KNorm, "blk.{layer}.attn_k_norm.weight"),
    (Role::O, "blk.{layer}.attn_output.weight"),
    (Role::FfnNorm, "blk.{layer}.ffn_norm.weight"),
    (Role::Gate, "blk.{layer}.ffn_gate.weight"),
    (Role::Up, "blk.{layer}.ffn_up.weight"),
    (Role::Down, "blk.{layer}.ffn_down.weight"),
    (Role::Router, "blk.{layer}.ffn_gate_inp.weight"),
    (Role::QDown, "blk.{layer}.attn_q_a.weight"),
    (Role::QDownNorm, "blk.{layer}.attn_q_a_norm.weight"),
    (Role::QUp, "blk.{layer}.attn_q_b.weight"),
    (Role::KvDown, "blk.{layer}.attn_kv_a_mqa.weight"),
    (Role::KvDownNorm, "blk.{layer}.attn_kv_a_norm.weight"),
    (Role::KvUp, "blk.{layer}.attn_kv_b.weight"),
    (Role::KUp, "blk.{layer}.attn_k_b.weight"),
    (Role::VUp, "blk.{layer}.attn_v_b.weight"),
    (Role::RouterChoiceBias, "blk.{layer}.exp_probs_b.bias"),
    (Role::SharedGate, "blk.{layer}.ffn_gate_shexp.weight"),
    (Role::SharedUp, "blk.{layer}.ffn_up_shexp.weight"),
    (Role::SharedDown, "blk.{layer}.ffn_down_shexp.weight"),
    (Role::ExpertGate, "blk.{layer}.ffn_gate_exps.weight"),
    (Role::ExpertUp, "blk.{layer}.ffn_up_exps.weight"),
    (Role::ExpertDown, "blk.{layer}.ffn_down_exps.weight"),
];

/// Keys that all architectures share, and what they are in a config.json.
pub(super) const KEYS: &[(&str, &str)] = &[
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("rope.freq_base", "rope_theta"),
];

/// What GGUF files call a tensor, whatever the architecture: by this name mixtures of formats go.
pub(crate) fn tensor_name(role: Role, layer: usize) -> String {
    let names = WeightNames::of(NAMES).with(&[
        (Role::Qkv, "blk.{layer}.attn_qkv.weight"),
        (Role::GateUp, "blk.{layer}.ffn_up.weight"),
        (Role::ExpertGateUp, "blk.{layer}.ffn_gate_up_exps.weight"),
        (Role::AttnPostNorm, "blk.{layer}.post_attention_norm.weight"),
        (Role::FfnPostNorm, "blk.{layer}.post_ffw_norm.weight"),
        (Role::Sinks, "blk.{layer}.attn_sinks.weight"),
    ]);
    names.layer(role, layer)
}

/// What `file` says of itself, with the tensors of all its parts in `weights`, and with another rotary scaling
/// if there is one.
///
/// # Errors
/// If its architecture is not known, or its metadata are not what the family wants.
pub(crate) fn read(
    file: &GgufFile,
    weights: &dyn WeightStore,
    rope: Option<&RopeOverride>,
) -> Result<ModelDescription, ModelError> {
    let name = file.string(ARCHITECTURE)?;
    let architecture =
        ARCHITECTURES.iter().find(|architecture| Some(architecture.name) == name).ok_or_else(|| {
            let known: Vec<&str> = ARCHITECTURES.iter().map(|architecture| architecture.name).collect();
            let unknown = not_understood(file, name.unwrap_or_default());
            file.wrong(ARCHITECTURE, &format!("one of the supported: {}{unknown}", known.join(", ")))
        })?;
    let json = translate(file, architecture, weights)?;
    let (config, _) = read_with(file.path(), &json, rope)?;
    let has_factors = weights.contains(ROPE_FACTORS);
    let config = match rope {
        // Their divisors do not say what they were made of.
        Some(rope) if has_factors && !rope.names_original() => {
            return Err(rope.fault(rope.unknown_original(file.path())));
        }
        Some(_) => as_converted(config, architecture),
        None if has_factors => with_factors(as_converted(config, architecture), file, weights)?,
        None => as_converted(config, architecture),
    };
    let names = WeightNames::of(NAMES).with(architecture.names);
    Ok(ModelDescription { config, names, packing: None, json })
}

/// The keys of an unknown architecture that no known one has.
fn not_understood(file: &GgufFile, name: &str) -> String {
    const ROTARY: [&str; 2] = ["rope.dimension_count", "rope.scaling."];
    let known = |key: &str| {
        let own = ARCHITECTURES.iter().flat_map(|architecture| architecture.keys);
        KEYS.iter().chain(own).any(|(known, _)| *known == key)
            || ROTARY.iter().any(|known| key.starts_with(known))
            || ["vocab_size", "attention.value_length"].contains(&key)
    };
    let keys = file.keys();
    let own = keys.iter().filter_map(|key| key.strip_prefix(name)?.strip_prefix('.'));
    match own.filter(|key| !known(key)).collect::<Vec<_>>().as_slice() {
        [] => String::new(),
        keys => format!("; these of its keys are not understood: {}", list_of_keys(keys)),
    }
}

fn translate(
    file: &GgufFile,
    architecture: &Architecture,
    weights: &dyn WeightStore,
) -> Result<Map<String, Json>, ModelError> {
    let Json::Object(mut json) = (architecture.implied)(file) else {
        unreachable!("implied options are an object: this is a bug")
    };
    json.insert("model_type".to_owned(), architecture.model_type.into());
    for (key, name) in KEYS.iter().chain(architecture.keys) {
        let key = format!("{}.{key}", architecture.name);
        if file.get(&key).is_some() {
            json.insert((*name).to_owned(), number(file, &key)?);
        }
    }
    for (tensor, name) in architecture.flags {
        json.insert((*name).to_owned(), weights.contains(tensor).into());
    }
    let embedding = weights.tensor(EMBEDDING)?;
    json.insert("vocab_size".to_owned(), embedding.shape.first().copied().unwrap_or(0).into());
    json.insert("tie_word_embeddings".to_owned(), (!weights.contains("output.weight")).into());
    json.insert("bos_token_id".to_owned(), file.u64("tokenizer.ggml.bos_token_id")?.into());
    json.insert("eos_token_id".to_owned(), end_tokens(file)?.into());
    rotary(file, architecture.name, weights, &mut json)?;
    Ok(json)
}

/// The tokens that end an answer: those that the file names, and those that do so in the chat formats
/// that are in use. Converters name one, and it is often the one that ends a document.
fn end_tokens(file: &GgufFile) -> Result<Vec<u64>, ModelError> {
    const ENDS: [&[u8]; 9] = [
        b"<|endoftext|>",
        b"<|end_of_text|>",
        b"<|eot_id|>",
        b"<|eom_id|>",
        b"<|im_end|>",
        b"<end_of_turn>",
        b"<|EOT|>",
        b"<|return|>",
        b"<|call|>",
    ];
    const PHI_END: &[u8] = b"<|end|>";
    const CONTROL: i128 = 3;
    let mut ids = Vec::new();
    for key in ["eos", "eot", "eom"] {
        ids.extend(file.u64(&format!("tokenizer.ggml.{key}_token_id"))?);
    }
    let tokens = file.array("tokenizer.ggml.tokens", ValueType::String)?;
    let types = file.array("tokenizer.ggml.token_type", ValueType::I32)?;
    if let (Some(tokens), Some(types)) = (tokens, types) {
        // In gpt-oss the same text ends a message, and another may follow.
        let is_phi = file.string(ARCHITECTURE)? == Some("phi3");
        for (id, (token, kind)) in tokens.iter().zip(types.iter()).enumerate() {
            let Value::String(text) = token else { continue };
            if kind == Value::Int(CONTROL) && (ENDS.contains(&text) || is_phi && text == PHI_END) {
                ids.push(id as u64);
            }
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// A number, or a list of one number a layer of which all are the same.
fn number(file: &GgufFile, key: &str) -> Result<Json, ModelError> {
    let json = |value| match value {
        Value::Int(value) => u64::try_from(value).ok().map(Json::from),
        // f32 holds what was written; as the shortest f64 it stays that.
        Value::Float(value) => value.is_finite().then(|| Json::from(value)),
        _ => None,
    };
    let value = match file.get(key) {
        Some(Value::Array(array)) => {
            let first = array.iter().next();
            first.filter(|first| array.iter().all(|value| value == *first)).and_then(json)
        }
        Some(value) => json(value),
        None => None,
    };
    value.ok_or_else(|| file.wrong(key, "a number from 0, the same for every layer"))
}

/// The rotary embedding: how much of a head turns, and how its frequencies are stretched.
fn rotary(
    file: &GgufFile,
    architecture: &str,
    weights: &dyn WeightStore,
    json: &mut Map<String, Json>,
) -> Result<(), ModelError> {
    let key = |name: &str| format!("{architecture}.rope.{name}");
    let size =
        |json: &Map<String, Json>, name: &str| json.get(name).and_then(Json::as_u64).filter(|size| *size > 0);
    let head_dim = size(json, "head_dim")
        .or_else(|| Some(size(json, "hidden_size")? / size(json, "num_attention_heads")?));
    if let Some(dim) = file.u64(&key("dimension_count"))?
        && let Some(head_dim) = head_dim
        && (dim != head_dim || architecture == "glm4")
        && architecture != DEEPSEEK
    {
        json.insert("partial_rotary_factor".to_owned(), (dim as f64 / head_dim as f64).into());
    }
    let mut scaling = Map::new();
    let kind = file.string(&key("scaling.type"))?;
    match kind {
        _ if weights.contains(LONG_FACTORS) => {
            scaling.insert("rope_type".to_owned(), "longrope".into());
            for (name, tensor) in [("long_factor", LONG_FACTORS), ("short_factor", SHORT_FACTORS)] {
                scaling.insert(name.to_owned(), weights.tensor(tensor)?.to_f32().into());
            }
        }
        None | Some("none") => return Ok(()),
        Some(kind @ ("linear" | "yarn")) => {
            scaling.insert("rope_type".to_owned(), kind.into());
        }
        Some(_) => {
            return Err(file.wrong(&key("scaling.type"), "\"none\", \"linear\", \"yarn\" or \"longrope\""));
        }
    }
    for (name, option) in [
        ("scaling.factor", "factor"),
        ("scaling.original_context_length", "original_max_position_embeddings"),
        ("scaling.attn_factor", "attention_factor"),
        ("scaling.yarn_beta_fast", "beta_fast"),
        ("scaling.yarn_beta_slow", "beta_slow"),
    ] {
        if file.get(&key(name)).is_some() {
            scaling.insert(option.to_owned(), number(file, &key(name))?);
        }
    }
    if architecture == DEEPSEEK
        && let Some(Value::Float(product)) = file.get(&key("scaling.yarn_log_multiplier"))
    {
        // As the converter writes it, in f32; for both gains, which are one number of three digits in the
        // published models.
        let gain = (product * 1e7).round() / 1e6;
        scaling.insert("mscale".to_owned(), gain.into());
        scaling.insert("mscale_all_dim".to_owned(), gain.into());
    }
    // gpt-oss was trained so; its files do not say it.
    if architecture == "gpt-oss" && kind == Some("yarn") {
        scaling.insert("truncate".to_owned(), false.into());
    }
    json.insert("rope_scaling".to_owned(), scaling.into());
    Ok(())
}

/// The configuration for tensors as the converter leaves them.
fn as_converted(config: DecoderConfig, architecture: &Architecture) -> DecoderConfig {
    let mut config = config;
    // Gemma's norms are stored with their one.
    config.norm_weight_offset = 0.0;
    config.rope.interleaved |= architecture.permuted;
    config
}

/// The same with the frequencies' divisors that `file` has as a tensor.
fn with_factors(
    mut config: DecoderConfig,
    file: &GgufFile,
    weights: &dyn WeightStore,
) -> Result<DecoderConfig, ModelError> {
    let factors = weights.tensor(ROPE_FACTORS)?.to_f32();
    let good = factors.iter().all(|factor| factor.is_finite() && *factor > 0.0);
    if factors.len() != config.rope.dim / 2 || !good {
        return Err(ModelError::weights(
            file.path(),
            format!(
                "tensor `{ROPE_FACTORS}` has {} numbers; wanted {} positive ones, one for each pair of \
                 rotary channels",
                factors.len(),
                config.rope.dim / 2
            ),
        ));
    }
    config.rope.scaling = RopeScaling::LongRope { factors, attention_factor: 1.0 };
    Ok(config)
}

/// Attention scores are divided by the root of a head's width, but in the largest model (which its number
/// of layers gives away) by that of its share of the embedding. The files do not say so.
fn gemma_scale(file: &GgufFile, name: &str, largest: u64) -> Json {
    let size = |key: &str| file.u64(&format!("{name}.{key}")).ok().flatten().filter(|size| *size > 0);
    match (size("block_count"), size("embedding_length"), size("attention.head_count")) {
        (Some(layers), Some(width), Some(heads)) if layers == largest => {
            json!({"query_pre_attn_scalar": width / heads})
        }
        _ => json!({}),
    }
}
