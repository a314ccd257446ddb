//! Gemma 2 and 3: norms before and after each sublayer with weights stored less one, GeGLU, embeddings
//! scaled by the root of their width, alternating windows. Gemma 2 caps scores and logits; Gemma 3 has
//! norms on queries and keys and a rotation of its own in sliding layers, and from 4B on stands inside a
//! model that also sees images, which is not used.
//! Source: transformers, `configuration_gemma{2,3}.py`, `modeling_gemma{2,3}.py`.

use serde_json::json;

use super::options::{MAX_POSITIONS, Options};
use super::{DecoderConfig, Family, ModelError, NameTable, Role, WeightNames};
use crate::Rope;
use crate::config::{Activation, LayerConfig, NormPlacement, Positions, QkNorm};

pub(super) const GEMMA2: Family = Family {
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    config: gemma2,
    names: || WeightNames::hugging_face().with(NAMES),
    text_config: None,
};

pub(super) const GEMMA3_TEXT: Family =
    Family { model_type: "gemma3_text", architecture: "Gemma3ForCausalLM", config: gemma3, ..GEMMA2 };

pub(super) const GEMMA3: Family = Family {
    model_type: "gemma3",
    architecture: "Gemma3ForConditionalGeneration",
    config: gemma3,
    names: || WeightNames { prefix: "language_model.", ..WeightNames::hugging_face().with(NAMES) },
    // The published files leave out what is as in the 4B model.
    text_config: Some(|| {
        json!({
            "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "max_position_embeddings": 131_072, "query_pre_attn_scalar": 256, "sliding_window": 4096,
            "rope_theta": 1_000_000.0,
        })
    }),
};

const NAMES: NameTable = &[
    (Role::AttnPostNorm, "model.layers.{layer}.post_attention_layernorm.weight"),
    (Role::FfnNorm, "model.layers.{layer}.pre_feedforward_layernorm.weight"),
    (Role::FfnPostNorm, "model.layers.{layer}.post_feedforward_layernorm.weight"),
];

fn gemma2(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    let base = common(options)?;
    let (rope, max_position_embeddings) = options.rope(base.head_dim, base.max_position_embeddings)?;
    let layers = options.windows(base.num_layers, |layer| layer % 2 == 0)?;
    Ok(DecoderConfig { rope, max_position_embeddings, layers, ..base })
}

fn gemma3(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    let base = common(options)?;
    let (head_dim, stated) = (base.head_dim, base.max_position_embeddings);
    // transformers 5 writes two sets of rotary options, older versions one and a base.
    let parameters = options.object("rope_parameters", "rope_parameters.")?;
    let ((rope, max_position_embeddings), local) = match parameters.filter(|both| both.has("full_attention"))
    {
        Some(both) => {
            let part =
                |key| options.rope_in(both.object(key, "rope_parameters.*.")?.as_ref(), head_dim, stated);
            let parts = (part("full_attention")?, part("sliding_attention")?.0);
            both.refuse_unread()?;
            parts
        }
        None => {
            let theta = options.positive("rope_local_base_freq", Some(10_000.0))?;
            (options.rope(head_dim, stated)?, Rope::plain(head_dim, theta))
        }
    };
    let period = options.size("sliding_window_pattern", Some(6), MAX_POSITIONS)?;
    let mut layers = options.windows(base.num_layers, |layer| !(layer + 1).is_multiple_of(period))?;
    for layer in layers.iter_mut().filter(|layer| layer.window.is_some()) {
        *layer = LayerConfig { positions: Positions::LocalRope, ..*layer };
    }
    Ok(DecoderConfig {
        qk_norm: QkNorm::PerHead,
        rope,
        local_rope: Some(local),
        max_position_embeddings,
        layers,
        ..base
    })
}

fn common(options: &Options<'_>) -> Result<DecoderConfig, ModelError> {
    // `hidden_act` is the older key, and wrong where both are.
    options.ignore(&["hidden_act"]);
    let attention_bias = options.bool("attention_bias", false)?;
    let base = options.shape()?;
    let scalar = options.positive("query_pre_attn_scalar", Some(base.head_dim as f32))?;
    Ok(DecoderConfig {
        norm_weight_offset: 1.0,
        norm_placement: NormPlacement::Both,
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        attn_scale: Some(scalar.sqrt().recip()),
        attn_soft_cap: options.positive_or_none("attn_logit_softcapping")?,
        activation: options.activation_or("hidden_activation", Activation::GeluTanh)?,
        embed_scale: (base.hidden_size as f32).sqrt(),
        logits_soft_cap: options.positive_or_none("final_logit_softcapping")?,
        tie_word_embeddings: options.bool("tie_word_embeddings", true)?,
        ..base
    })
}
