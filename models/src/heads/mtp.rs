//! Layers for multi-token prediction, which lie in their target's own files.
//! Source: XiaomiMiMo/MiMo `modeling_mimo.py`; vLLM `mimo_mtp.py`.

use super::{Features, Head, HeadKind, Input, mismatch};
use crate::config::DecoderConfig;
use crate::family::{NameTable, Role, WeightNames};
use crate::{Checkpoint, ModelError};

/// MiMo's. Of several layers the first alone is used, again and again; published files have one.
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

/// See [`Head::of_target`].
pub(super) fn open(target: &Checkpoint) -> Result<Head, ModelError> {
    const NAME: &str = "mtp";
    let first_after = format!("model.layers.{}.", target.config.num_layers);
    if target.weights.contains(&format!("{first_after}eh_proj.weight")) {
        let reason = format!(
            "its layer for multi-token prediction has DeepSeek's form ({first_after}enorm, hnorm, eh_proj), which is \
             not supported; MiMo's (model.mtp_layers.*) is"
        );
        return Err(mismatch(target, NAME, reason));
    }
    if !target.weights.contains("model.mtp_layers.0.input_proj.weight") {
        let reason =
            "it carries no layer for multi-token prediction (model.mtp_layers.*); name a draft model or an \
                      EAGLE-3 head instead"
                .to_owned();
        return Err(mismatch(target, NAME, reason));
    }
    // The files are mapped a second time, which costs next to nothing.
    let again = Checkpoint::open(&target.dir)?;
    let checkpoint = Checkpoint {
        name: format!("{} (mtp)", target.name),
        config: DecoderConfig { num_layers: 1, layers: Vec::new(), ..target.config.clone() },
        names: WeightNames { tables: vec![MIMO], ..target.names.clone() },
        quantize: target.quantize,
        ..again
    };
    let input = Input::Projection { hidden_first: true };
    Ok(Head { kind: HeadKind::Mtp, checkpoint, features: Features::FinalNorm, input, to_target: None })
}
