//! gpt-oss: experts with a clamped SwiGLU and biases, attention sinks, a window in every other layer.
//! Source: transformers, `configuration_gpt_oss.py`, `modeling_gpt_oss.py`.

use super::options::{MAX_EXPERTS, Options};
use super::{DecoderConfig, ExpertLayout, Family, ModelError, NameTable, Role, WeightNames};
use crate::config::{Activation, Experts};

pub(super) const FAMILY: Family = Family {
    model_type: "gpt_oss",
    architecture: "GptOssForCausalLM",
    config,
    names: || WeightNames { expert_layout: ExpertLayout::Columns, ..WeightNames::hugging_face().with(NAMES) },
    text_config: None,
};

const NAMES: NameTable = &[
    (Role::Sinks, "model.layers.{layer}.self_attn.sinks"),
    (Role::Router, "model.layers.{layer}.mlp.router.weight"),
    (Role::ExpertGateUp, "model.layers.{layer}.mlp.experts.gate_up_proj"),
    (Role::ExpertDown, "model.layers.{layer}.mlp.experts.down_proj"),
];

fn config(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    let attention_bias = options.bool("attention_bias", true)?;
    let base = options.decoder_config()?;
    let num_experts = options.size("num_local_experts", None, MAX_EXPERTS)?;
    let num_experts_per_token = options.size("num_experts_per_tok", None, num_experts)?;
    // The published files say these again in other words.
    options.ignore(&["experts_per_token", "initial_context_length"]);
    Ok(DecoderConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        attn_sinks: true,
        activation: Activation::ClampedSwiglu {
            alpha: options.positive("swiglu_alpha", Some(1.702))?,
            limit: options.positive("swiglu_limit", Some(7.0))?,
        },
        experts: Some(Experts {
            num_experts,
            num_experts_per_token,
            intermediate_size: base.intermediate_size,
            renormalise: true,
            bias: true,
            ..Experts::default()
        }),
        layers: options.windows(base.num_layers, |layer| layer % 2 == 0)?,
        ..base
    })
}
