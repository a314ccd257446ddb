//! OLMo 2: norms after the sublayers only, and on all queries and all keys of a token together.
//! Source: transformers, `configuration_olmo2.py`, `modeling_olmo2.py`.

use super::options::Options;
use super::{DecoderConfig, Family, ModelError, NameTable, Role, WeightNames};
use crate::config::{NormPlacement, QkNorm};

pub(super) const FAMILY: Family = Family {
    model_type: "olmo2",
    architecture: "Olmo2ForCausalLM",
    config,
    names: || WeightNames::hugging_face().with(NAMES),
    text_config: None,
};

const NAMES: NameTable = &[
    (Role::AttnPostNorm, "model.layers.{layer}.post_attention_layernorm.weight"),
    (Role::FfnPostNorm, "model.layers.{layer}.post_feedforward_layernorm.weight"),
];

fn config(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    let attention_bias = options.bool("attention_bias", false)?;
    Ok(DecoderConfig {
        norm_placement: NormPlacement::Post,
        qk_norm: QkNorm::AllHeads,
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        ..options.decoder_config()?
    })
}
