//! Qwen2, Qwen2.5, Qwen2.5-Coder and MiMo: Llama with a bias on query, key and value. Qwen3: norms on queries
//! and keys instead. Qwen3-MoE (Qwen3-Coder-30B-A3B): experts besides.
//! Source: transformers, `configuration_qwen{2,3,3_moe}.py` and their `modeling_*.py`.

use super::options::{MAX_EXPERTS, MAX_INTERMEDIATE, Options};
use super::{DecoderConfig, Family, ModelError, NameTable, Role, WeightNames};
use crate::config::{Experts, LayerConfig, QkNorm};

pub(super) const QWEN2: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    config: qwen2,
    names: WeightNames::hugging_face,
    text_config: None,
};

pub(super) const QWEN3: Family =
    Family { model_type: "qwen3", architecture: "Qwen3ForCausalLM", config: qwen3, ..QWEN2 };

/// MiMo: Qwen2 with a layer for multi-token prediction, which [`crate::Head`] reads.
pub(super) const MIMO: Family =
    Family { model_type: "mimo", architecture: "MiMoForCausalLM", config: mimo, ..QWEN2 };

pub(super) const QWEN3_MOE: Family = Family {
    model_type: "qwen3_moe",
    architecture: "Qwen3MoeForCausalLM",
    config: qwen3_moe,
    names: || WeightNames::hugging_face().with(EXPERTS),
    text_config: None,
};

const EXPERTS: NameTable = &[
    (Role::Router, "model.layers.{layer}.mlp.gate.weight"),
    (Role::ExpertGate, "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"),
    (Role::ExpertUp, "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"),
    (Role::ExpertDown, "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"),
];

fn qwen2(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    if !options.bool("attention_bias", true)? {
        return Err(options.error("attention_bias", "true or absent: the family has biases on q, k and v"));
    }
    Ok(DecoderConfig { qkv_bias: true, ..common(options)? })
}

fn mimo(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    options.ignore(&["num_nextn_predict_layers"]);
    qwen2(options)
}

fn qwen3(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    let attention_bias = options.bool("attention_bias", false)?;
    let base = common(options)?;
    Ok(DecoderConfig { qkv_bias: attention_bias, o_bias: attention_bias, qk_norm: QkNorm::PerHead, ..base })
}

fn qwen3_moe(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    let base = qwen3(options)?;
    // Written by newer versions of transformers as Mixtral calls it.
    let key = if options.has("num_experts") { "num_experts" } else { "num_local_experts" };
    options.ignore(&["num_experts", "num_local_experts"]);
    let num_experts = options.size(key, None, MAX_EXPERTS)?;
    let experts = Experts {
        num_experts,
        num_experts_per_token: options.size("num_experts_per_tok", None, num_experts)?,
        intermediate_size: options.size("moe_intermediate_size", None, MAX_INTERMEDIATE)?,
        renormalise: options.bool("norm_topk_prob", false)?,
        ..Experts::default()
    };
    let step = options.size("decoder_sparse_step", Some(1), usize::MAX)?;
    let plain = options.indices("mlp_only_layers", base.num_layers)?;
    let is_dense = |layer: usize| plain.contains(&layer) || !(layer + 1).is_multiple_of(step);
    let layers =
        (0..base.num_layers).map(|layer| LayerConfig { dense: is_dense(layer), ..base.layer(layer) });
    Ok(DecoderConfig { layers: layers.collect(), experts: Some(experts), ..base })
}

fn common(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    let base = options.decoder_config()?;
    Ok(DecoderConfig { layers: windows(options, base.num_layers)?, ..base })
}

/// `sliding_window` is set in every file; `use_sliding_window` says whether it is used, from layer
/// `max_window_layers` on.
fn windows(options: &Options<'_>, num_layers: usize) -> Result<Vec<LayerConfig>, ModelError> {
    options.ignore(&["sliding_window", "max_window_layers"]);
    let slides = options.bool("use_sliding_window", false)?;
    let first = if slides { options.count("max_window_layers", 28)? } else { num_layers };
    if !slides && options.strings("layer_types")?.contains(&"sliding_attention") {
        return Err(options.error("use_sliding_window", "true, as `layer_types` has windows"));
    }
    options.windows(num_layers, |layer| layer >= first)
}
