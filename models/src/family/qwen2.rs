//! Qwen2, Qwen2.5 and Qwen2.5-Coder: Llama with a bias on query, key and value.
//! Source: transformers, `configuration_qwen2.py`, `modeling_qwen2.py`.

use super::options::Options;
use super::{DecoderConfig, Family, ModelError};

pub(super) const FAMILY: Family = Family { model_type: "qwen2", architecture: "Qwen2ForCausalLM", config };

fn config(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    // `sliding_window` is set in every Qwen2 file; this switch says whether it is used.
    if options.bool("use_sliding_window", false)? {
        return Err(options.error("use_sliding_window", "false: sliding-window attention is not supported"));
    }
    Ok(DecoderConfig { qkv_bias: true, ..options.decoder_config()? })
}
