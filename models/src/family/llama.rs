//! Llama 1 to 3.3, and what was made in its image: Code Llama, TinyLlama, SmolLM 1 and 2, DeepSeek-Coder 1,
//! Yi and Yi-Coder, Seed-Coder, Granite-Code of Llama's architecture.
//! Source: transformers, `configuration_llama.py`.

use super::options::Options;
use super::{DecoderConfig, Family, ModelError, WeightNames};

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    config,
    names: WeightNames::hugging_face,
    text_config: None,
};

fn config(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    let attention_bias = options.bool("attention_bias", false)?;
    let base = options.decoder_config()?;
    Ok(DecoderConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: options.bool("mlp_bias", false)?,
        layers: options.windows(base.num_layers, |_| false)?,
        ..base
    })
}
