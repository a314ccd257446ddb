//! SmolLM3: Llama in which every fourth layer does not rotate. (SmolLM 1 and 2 are Llama.)
//! Source: transformers, `configuration_smollm3.py`, `modeling_smollm3.py`.

use super::options::{MAX_POSITIONS, Options};
use super::{DecoderConfig, Family, ModelError, WeightNames};
use crate::config::{LayerConfig, Positions};

pub(super) const FAMILY: Family = Family {
    model_type: "smollm3",
    architecture: "SmolLM3ForCausalLM",
    config,
    names: WeightNames::hugging_face,
    text_config: None,
};

fn config(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    let attention_bias = options.bool("attention_bias", false)?;
    let base = options.decoder_config()?;
    let interval = options.size("no_rope_layer_interval", Some(4), MAX_POSITIONS)?;
    // Despite its name 1 says that the layer rotates.
    let stated = options.flags("no_rope_layers", base.num_layers)?;
    let rotates =
        |layer: usize| stated.as_ref().map_or(!(layer + 1).is_multiple_of(interval), |stated| stated[layer]);
    options.ignore(&["max_window_layers"]);
    let slides = options.bool("use_sliding_window", false)? && options.has("sliding_window");
    let windows = match slides {
        true => options.windows(base.num_layers, |layer| !rotates(layer))?,
        false => {
            options.ignore(&["layer_types", "sliding_window"]);
            Vec::new()
        }
    };
    let layer = |layer: usize| LayerConfig {
        positions: if rotates(layer) { Positions::Rope } else { Positions::None },
        ..windows.get(layer).copied().unwrap_or_default()
    };
    Ok(DecoderConfig {
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: options.bool("mlp_bias", false)?,
        tie_word_embeddings: options.bool("tie_word_embeddings", true)?,
        layers: (0..base.num_layers).map(layer).collect(),
        ..base
    })
}
