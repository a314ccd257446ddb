//! GLM-4-0414 (9B and 32B): norms before and after each sublayer, half of a head rotated in
//! neighbouring pairs, gate and up in one tensor.
//! Source: transformers, `configuration_glm4.py`, `modeling_glm4.py`.

use super::options::Options;
use super::{DecoderConfig, Family, ModelError, NameTable, Role, WeightNames};
use crate::config::{NormPlacement, Rope};

pub(super) const FAMILY: Family = Family {
    model_type: "glm4",
    architecture: "Glm4ForCausalLM",
    config,
    names: || WeightNames::hugging_face().with(NAMES),
    text_config: None,
};

const NAMES: NameTable = &[
    (Role::AttnPostNorm, "model.layers.{layer}.post_self_attn_layernorm.weight"),
    (Role::FfnNorm, "model.layers.{layer}.post_attention_layernorm.weight"),
    (Role::FfnPostNorm, "model.layers.{layer}.post_mlp_layernorm.weight"),
    (Role::GateUp, "model.layers.{layer}.mlp.gate_up_proj.weight"),
];

fn config(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    let base = options.decoder_config()?;
    let partial = match options.rope_object()? {
        Some(rope) if rope.has("partial_rotary_factor") => true,
        _ => options.has("partial_rotary_factor"),
    };
    if !partial {
        return Err(options.error("partial_rotary_factor", "the share of a head that turns, usually 0.5"));
    }
    Ok(DecoderConfig {
        norm_placement: NormPlacement::Both,
        rope: Rope { interleaved: true, ..base.rope },
        qkv_bias: options.bool("attention_bias", true)?,
        ..base
    })
}
