//! Mistral, Codestral and Devstral: Llama, in early versions with a sliding window; the newer ones stand
//! inside a model that also sees images, which is not used.
//! Source: transformers, `configuration_mistral.py`, `configuration_mistral3.py`.

use serde_json::json;

use super::options::Options;
use super::{DecoderConfig, Family, ModelError, WeightNames};

pub(super) const MISTRAL: Family = Family {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    config,
    names: WeightNames::hugging_face,
    text_config: None,
};

pub(super) const MISTRAL3: Family = Family {
    model_type: "mistral3",
    architecture: "Mistral3ForConditionalGeneration",
    names: || WeightNames { prefix: "language_model.", ..WeightNames::hugging_face() },
    text_config: Some(|| json!({"model_type": "mistral"})),
    ..MISTRAL
};

fn config(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    if options.string("model_type")?.is_some_and(|kind| kind != "mistral") {
        return Err(options.error("model_type", "\"mistral\""));
    }
    let base = options.decoder_config()?;
    let slides = options.has("sliding_window");
    Ok(DecoderConfig { layers: options.windows(base.num_layers, |_| slides)?, ..base })
}
