//! StarCoder2: LayerNorm, a plain feed-forward layer with GELU, biases everywhere, a sliding window.
//! Source: transformers, `configuration_starcoder2.py`, `modeling_starcoder2.py`.

use super::options::Options;
use super::{DecoderConfig, Family, ModelError, NameTable, Role, WeightNames};
use crate::config::{Activation, NormKind};

pub(super) const FAMILY: Family = Family {
    model_type: "starcoder2",
    architecture: "Starcoder2ForCausalLM",
    config,
    names: || WeightNames::hugging_face().with(NAMES),
    text_config: None,
};

const NAMES: NameTable = &[
    (Role::Up, "model.layers.{layer}.mlp.c_fc.weight"),
    (Role::Down, "model.layers.{layer}.mlp.c_proj.weight"),
];

fn config(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    for (key, only) in [("norm_type", "layer_norm"), ("mlp_type", "default")] {
        if options.string(key)?.is_some_and(|found| found != only) {
            return Err(options.error(key, format!("{only:?}")));
        }
    }
    let bias = options.bool("use_bias", true)?;
    let slides = options.has("sliding_window");
    let base = options.decoder_config()?;
    Ok(DecoderConfig {
        norm: NormKind::Layer,
        norm_eps: options.positive("norm_epsilon", Some(1e-5))?,
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: bias,
        activation: options.activation_or("hidden_act", Activation::GeluTanh)?,
        gated: false,
        tie_word_embeddings: options.bool("tie_word_embeddings", true)?,
        layers: options.windows(base.num_layers, |_| slides)?,
        ..base
    })
}
