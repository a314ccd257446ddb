//! DeepSeek-V2, V2.5, DeepSeek-Coder-V2 and V3, and what was made in their image: latent attention, and
//! experts of which some compute every token. V2 scores experts with a softmax; V3 with sigmoids, and
//! chooses them by a bias besides.
//! Source: transformers, `configuration_deepseek_v{2,3}.py` and their `modeling_*.py`; arXiv 2405.04434,
//! 2412.19437.

use tandem_kernels::attention::MAX_HEAD_DIM;
use tandem_kernels::experts::{Groups, Scoring};

use super::options::{MAX_EXPERTS, MAX_HIDDEN, MAX_INTERMEDIATE, Options};
use super::{DecoderConfig, Family, ModelError, NameTable, Role, WeightNames};
use crate::Rope;
use crate::config::{Experts, LatentAttention, LayerConfig, RopeScaling};
use crate::rope::yarn_gain;

pub(super) const V2: Family = Family {
    model_type: "deepseek_v2",
    architecture: "DeepseekV2ForCausalLM",
    config: |options| config(options, "softmax", "greedy"),
    names: || WeightNames::hugging_face().with(NAMES),
    text_config: None,
};

pub(super) const V3: Family = Family {
    model_type: "deepseek_v3",
    architecture: "DeepseekV3ForCausalLM",
    config: |options| config(options, "sigmoid", "noaux_tc"),
    ..V2
};

const NAMES: NameTable = &[
    (Role::QDown, "model.layers.{layer}.self_attn.q_a_proj.weight"),
    (Role::QDownNorm, "model.layers.{layer}.self_attn.q_a_layernorm.weight"),
    (Role::QUp, "model.layers.{layer}.self_attn.q_b_proj.weight"),
    (Role::KvDown, "model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"),
    (Role::KvDownNorm, "model.layers.{layer}.self_attn.kv_a_layernorm.weight"),
    (Role::KvUp, "model.layers.{layer}.self_attn.kv_b_proj.weight"),
    (Role::Router, "model.layers.{layer}.mlp.gate.weight"),
    (Role::RouterChoiceBias, "model.layers.{layer}.mlp.gate.e_score_correction_bias"),
    (Role::SharedGate, "model.layers.{layer}.mlp.shared_experts.gate_proj.weight"),
    (Role::SharedUp, "model.layers.{layer}.mlp.shared_experts.up_proj.weight"),
    (Role::SharedDown, "model.layers.{layer}.mlp.shared_experts.down_proj.weight"),
    (Role::ExpertGate, "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"),
    (Role::ExpertUp, "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"),
    (Role::ExpertDown, "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"),
];

/// The norms of latents do not follow `rms_norm_eps`.
const LATENT_NORM_EPS: f32 = 1e-6;

fn config(options: &Options<'_>, scoring: &str, method: &str) -> Result<DecoderConfig, ModelError> {
    let shape = options.shape()?;
    // What a GGUF file says: the latent as the one key of all heads.
    if ![1, shape.num_heads].contains(&shape.num_kv_heads) {
        return Err(options.error("num_key_value_heads", "as many as `num_attention_heads`"));
    }
    // Training, and the layers that predict further tokens, which stand behind the others in a checkpoint.
    // `head_dim` is whatever its writer took for one.
    options.ignore(&[
        "aux_loss_alpha",
        "ep_size",
        "head_dim",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "qk_head_dim",
        "seq_aux",
    ]);
    let turning = options.size("qk_rope_head_dim", Some(64), MAX_HEAD_DIM)?;
    let kv_rank = options.size("kv_lora_rank", Some(512), MAX_HEAD_DIM)?;
    if !turning.is_multiple_of(2) {
        return Err(options.error("qk_rope_head_dim", "even"));
    }
    if kv_rank + turning > MAX_HEAD_DIM {
        let wanted = format!("at most {MAX_HEAD_DIM} together with `qk_rope_head_dim`, which is {turning}");
        return Err(options.error("kv_lora_rank", wanted));
    }
    let latent = LatentAttention {
        kv_rank,
        q_rank: match options.has("q_lora_rank") {
            true => Some(options.size("q_lora_rank", None, MAX_HIDDEN)?),
            false => None,
        },
        content_dim: options.size("qk_nope_head_dim", Some(128), MAX_HEAD_DIM)?,
        value_dim: options.size("v_head_dim", Some(128), MAX_HEAD_DIM)?,
        norm_eps: LATENT_NORM_EPS,
    };
    let (rope, max_position_embeddings) = options.rope(turning, shape.max_position_embeddings)?;
    let attention_bias = options.bool("attention_bias", false)?;
    let experts = experts(options, scoring, method)?;
    let num_dense = match experts {
        None => shape.num_layers,
        Some(_) => options.count("first_k_dense_replace", 0)?,
    };
    let layer = |index| LayerConfig { dense: index < num_dense, ..LayerConfig::default() };
    Ok(DecoderConfig {
        num_kv_heads: 1,
        head_dim: kv_rank + turning,
        latent: Some(latent),
        max_position_embeddings,
        layers: (0..shape.num_layers).map(layer).collect(),
        attn_scale: Some(scale(options, &latent, &rope)?),
        rope: Rope { interleaved: options.bool("rope_interleave", true)?, ..rope },
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: options.bool("mlp_bias", false)?,
        experts,
        ..shape
    })
}

/// The factor on attention scores: YaRN's gain of all channels counts twice, once for the query and once for
/// the key.
fn scale(options: &Options<'_>, latent: &LatentAttention, rope: &Rope) -> Result<f32, ModelError> {
    let width = (latent.content_dim + rope.dim) as f64;
    let gain = match (&rope.scaling, options.rope_object()?) {
        (&RopeScaling::Yarn { factor, .. }, Some(object)) => {
            yarn_gain(factor, object.number("mscale_all_dim")?.unwrap_or(0.0))
        }
        _ => 1.0,
    };
    Ok((width.sqrt().recip() * gain * gain) as f32)
}

fn experts(options: &Options<'_>, scoring: &str, method: &str) -> Result<Option<Experts>, ModelError> {
    if !options.has("n_routed_experts") {
        return Ok(None);
    }
    let num_experts = options.size("n_routed_experts", None, MAX_EXPERTS)?;
    let num_experts_per_token = options.size("num_experts_per_tok", None, num_experts)?;
    let intermediate_size = options.size("moe_intermediate_size", None, MAX_INTERMEDIATE)?;
    let num_shared = options.count("n_shared_experts", 0)?.min(MAX_EXPERTS);
    let renormalise = options.bool("norm_topk_prob", false)?;
    if options.size("moe_layer_freq", Some(1), usize::MAX)? != 1 {
        return Err(options.error("moe_layer_freq", "1: every layer after the first ones has experts"));
    }
    let scoring = match options.string("scoring_func")?.unwrap_or(scoring) {
        "softmax" => Scoring::Softmax,
        "sigmoid" => Scoring::Sigmoid,
        _ => return Err(options.error("scoring_func", "\"softmax\" or \"sigmoid\"")),
    };
    let method = options.string("topk_method")?.unwrap_or(method);
    if scoring == Scoring::Softmax && renormalise {
        let wanted = "false with a softmax: those who run such models do not agree on what it means";
        return Err(options.error("norm_topk_prob", wanted));
    }
    let groups = match method {
        "greedy" => {
            options.ignore(&["n_group", "topk_group"]);
            None
        }
        "group_limited_greedy" | "noaux_tc" => {
            groups(options, num_experts, num_experts_per_token, method == "noaux_tc")?
        }
        _ => {
            return Err(options.error("topk_method", "\"greedy\", \"group_limited_greedy\" or \"noaux_tc\""));
        }
    };
    Ok(Some(Experts {
        num_experts,
        num_experts_per_token,
        intermediate_size,
        scoring,
        choice_bias: method == "noaux_tc",
        groups,
        renormalise,
        weight_scale: options.positive("routed_scaling_factor", Some(1.0))?,
        shared_intermediate_size: num_shared * intermediate_size,
        bias: false,
    }))
}

fn groups(
    options: &Options<'_>,
    num_experts: usize,
    num_picks: usize,
    two_best: bool,
) -> Result<Option<Groups>, ModelError> {
    let num_groups = options.size("n_group", Some(1), num_experts)?;
    let num_picked = options.size("topk_group", Some(num_groups), num_groups)?;
    let size = num_experts / num_groups;
    if num_groups * size != num_experts || two_best && size < 2 {
        let wanted =
            format!("a divisor of `n_routed_experts`, which is {num_experts}, of groups of two or more");
        return Err(options.error("n_group", wanted));
    }
    if num_picked * size < num_picks {
        let wanted =
            format!("groups of {size} experts that hold `num_experts_per_tok`, which is {num_picks}");
        return Err(options.error("topk_group", wanted));
    }
    Ok((num_picked < num_groups).then_some(Groups { num_groups, num_picked, two_best }))
}
