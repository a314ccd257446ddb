//! Layers for multi-token prediction, which lie in their target's own files. Of several the first alone is used,
//! again and again: it was trained for the next token but one, and published files rarely have more.
//! Source: DeepSeek-V3 (arXiv 2412.19437) and vLLM `deepseek_mtp.py`; XiaomiMiMo/MiMo `modeling_mimo.py` and vLLM
//! `mimo_mtp.py`. Features are those after the final norm, as both vLLM and SGLang hand them on.

use super::{Features, Head, HeadKind, Input, mismatch};
use crate::config::DecoderConfig;
use crate::family::{NameTable, Role, WeightNames};
use crate::{Checkpoint, ModelError};

/// MiMo's.
const MIMO: NameTable = &[
    (Role::DraftTokenNorm, "model.mtp_layers.0.token_layernorm.weight"),
    (Role::DraftHiddenNorm, "model.mtp_layers.0.hidden_layernorm.weight"),
    (Role::DraftInput, "model.mtp_layers.0.input_proj.weight"),
    (Role::AttnNorm, "model.mtp_layers.0.input_layernorm.weight"),
    (Role::Q, "model.mtp_layers.0.self_attn.q_proj.weight"),
    (Role::K, "model.mtp_layers.0.self_attn.k_proj.weight"),
    (Role::V, "model.mtp_layers.0.self_attn.v_proj.weight"),
    (Role::O, "model.mtp_layers.0.self_attn.o_proj.weight"),
    (Role::FfnNorm, "model.mtp_layers.0.post_attention_layernorm.weight"),
    (Role::Gate, "model.mtp_layers.0.mlp.gate_proj.weight"),
    (Role::Up, "model.mtp_layers.0.mlp.up_proj.weight"),
    (Role::Down, "model.mtp_layers.0.mlp.down_proj.weight"),
    (Role::FinalNorm, "model.mtp_layers.0.final_layernorm.weight"),
];

/// DeepSeek-V3's, with its own number; the layer's other tensors are named as those of the layers before it.
const DEEPSEEK: NameTable = &[
    (Role::DraftTokenNorm, "model.layers.{layer}.enorm.weight"),
    (Role::DraftHiddenNorm, "model.layers.{layer}.hnorm.weight"),
    (Role::DraftInput, "model.layers.{layer}.eh_proj.weight"),
    (Role::FinalNorm, "model.layers.{layer}.shared_head.norm.weight"),
];

/// See [`Head::of_target`].
pub(super) fn open(target: &Checkpoint) -> Result<Head, ModelError> {
    let (layer, names, hidden_first) = layout(target)?;
    // The files are mapped a second time, which costs next to nothing.
    let again = Checkpoint::open(&target.dir)?;
    let checkpoint = Checkpoint {
        name: format!("{} (mtp)", target.name),
        config: DecoderConfig { num_layers: 1, layers: Vec::new(), ..target.config.clone() },
        quantize: target.quantize,
        ..again
    };
    Ok(Head {
        kind: HeadKind::Mtp,
        checkpoint: Checkpoint { names, ..checkpoint },
        features: Features::FinalNorm,
        input: Input::Projection { hidden_first },
        to_target: None,
        layer,
        // Files may hold them a second time; they are the same.
        has_embedding: false,
        has_outputs: false,
    })
}

/// The layer's number in the files, the names of its tensors, and whether features come before embeddings.
fn layout(target: &Checkpoint) -> Result<(usize, WeightNames, bool), ModelError> {
    let num_layers = target.config.num_layers;
    let deepseek = target.names.clone().with(DEEPSEEK);
    let mimo = WeightNames { tables: vec![MIMO], ..target.names.clone() };
    for (layer, names, hidden_first) in [(num_layers, deepseek, false), (0, mimo, true)] {
        if target.weights.contains(&names.layer(Role::DraftInput, layer)) {
            return Ok((layer, names, hidden_first));
        }
    }
    let reason = format!(
        "it carries no layer for multi-token prediction whose form is known: neither model.mtp_layers.0 (MiMo) nor \
         model.layers.{num_layers} with an eh_proj (DeepSeek); name a draft model or an EAGLE-3 head instead"
    );
    Err(mismatch(target, "mtp", reason))
}
