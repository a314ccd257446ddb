//! Granite 3: Llama with factors on embedding, attention scores, residual stream and logits.
//! Source: transformers, `configuration_granite.py`, `modeling_granite.py`.

use super::options::Options;
use super::{DecoderConfig, Family, ModelError, WeightNames};

pub(super) const FAMILY: Family = Family {
    model_type: "granite",
    architecture: "GraniteForCausalLM",
    config,
    names: WeightNames::hugging_face,
    text_config: None,
};

fn config(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    let attention_bias = options.bool("attention_bias", false)?;
    Ok(DecoderConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: options.bool("mlp_bias", false)?,
        embed_scale: options.positive("embedding_multiplier", Some(1.0))?,
        attn_scale: Some(options.positive("attention_multiplier", Some(1.0))?),
        residual_scale: options.positive("residual_multiplier", Some(1.0))?,
        logits_scale: options.positive("logits_scaling", Some(1.0))?.recip(),
        ..options.decoder_config()?
    })
}
