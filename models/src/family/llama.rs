//! Llama 1 to 3.3, and what was made in its image (Code Llama, TinyLlama, DeepSeek-Coder 1, Yi, ...).
//! Source: transformers, `configuration_llama.py`.

use super::options::Options;
use super::{DecoderConfig, Family, ModelError};

pub(super) const FAMILY: Family = Family { model_type: "llama", architecture: "LlamaForCausalLM", config };

fn config(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    options.require_absent("sliding_window", "null: sliding-window attention is not supported")?;
    let attention_bias = options.bool("attention_bias", false)?;
    let base = options.decoder_config()?;
    Ok(DecoderConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: options.bool("mlp_bias", false)?,
        ..base
    })
}
