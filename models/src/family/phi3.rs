//! Phi-3, Phi-3.5 and Phi-4 (mini too): Llama with fused projections, LongRoPE and, in Phi-4-mini, a
//! partial rotation.
//! Source: transformers, `configuration_phi3.py`, `modeling_phi3.py`.

use super::options::Options;
use super::{DecoderConfig, Family, ModelError, NameTable, Role, WeightNames};

pub(super) const FAMILY: Family = Family {
    model_type: "phi3",
    architecture: "Phi3ForCausalLM",
    config,
    names: || WeightNames::hugging_face().with(NAMES),
    text_config: None,
};

const NAMES: NameTable = &[
    (Role::Qkv, "model.layers.{layer}.self_attn.qkv_proj.weight"),
    (Role::GateUp, "model.layers.{layer}.mlp.gate_up_proj.weight"),
];

fn config(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    // Beside a plain rotation it says nothing.
    options.ignore(&["original_max_position_embeddings"]);
    let slides = options.has("sliding_window");
    let base = options.decoder_config()?;
    // Set in files of models that never slide: a window of the whole context is none.
    let slides = slides && options.size("sliding_window", None, usize::MAX)? < base.max_position_embeddings;
    Ok(DecoderConfig { layers: options.windows(base.num_layers, |_| slides)?, ..base })
}
