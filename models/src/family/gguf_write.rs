//! The way back from [`super::gguf`]: what a file has to say of a decoder so that the same family reads it.
//! Whoever writes a file opens it again and compares, so what GGUF cannot say is an error and not a model
//! that computes something else.

use serde_json::{Map, Value as Json};
use tandem_kernels::experts::Scoring;

use super::WeightNames;
use super::gguf::{ARCHITECTURES, Architecture, KEYS, NAMES, SIGMOID, SOFTMAX};
use crate::config::{LatentAttention, NormKind, RopeScaling};
use crate::rope::{frequencies, yarn_attention_factor};
use crate::weights::gguf::GgufBuilder;
use crate::{DecoderConfig, Rope};

/// Model types that are written as another architecture.
const ALIASES: [(&str, &str); 4] =
    [("mistral", "llama"), ("mistral3", "llama"), ("gemma3", "gemma3_text"), ("deepseek_v3", "deepseek_v2")];

/// How the files of a family are written.
pub(crate) struct Written {
    architecture: &'static Architecture,
    /// What the tensors are called.
    pub(crate) names: WeightNames,
    /// Rows of query and key go into the order of a rotation of neighbouring pairs.
    pub(crate) permuted: bool,
}

impl Written {
    /// That of `model_type`; `None` if no GGUF architecture is like it.
    pub(crate) fn find(model_type: &str) -> Option<Self> {
        let alias = ALIASES.iter().find(|(alias, _)| *alias == model_type).map(|(_, written)| *written);
        let wanted = alias.unwrap_or(model_type);
        let architecture = ARCHITECTURES.iter().find(|architecture| architecture.model_type == wanted)?;
        let names = WeightNames::of(NAMES).with(architecture.names);
        Some(Written { architecture, names, permuted: architecture.permuted })
    }

    /// All architectures, for messages.
    pub(crate) fn known() -> String {
        let names: Vec<&str> = ARCHITECTURES.iter().map(|architecture| architecture.model_type).collect();
        names.join(", ")
    }

    /// Adds what `config`, which the family made of `json`, is like. The tensors that belong to it are
    /// returned: divisors of rotary frequencies.
    ///
    /// # Errors
    /// If the rotation is stretched in a way that GGUF has no word for.
    pub(crate) fn describe(
        &self,
        config: &DecoderConfig,
        json: &Map<String, Json>,
        file: &mut GgufBuilder,
    ) -> Result<Vec<(&'static str, Vec<f32>)>, String> {
        let name = self.architecture.name;
        let key = |key: &str| format!("{name}.{key}");
        file.string("general.architecture", name);
        for (of, size) in [
            ("block_count", config.num_layers),
            ("context_length", config.max_position_embeddings),
            ("embedding_length", config.hidden_size),
            ("feed_forward_length", config.intermediate_size),
            ("attention.head_count", config.num_heads),
            ("attention.head_count_kv", config.num_kv_heads),
            ("attention.key_length", config.head_dim),
            ("attention.value_length", config.values().width(config.head_dim)),
            ("rope.dimension_count", config.rope.dim),
            ("vocab_size", config.vocab_size),
        ] {
            file.u32(&key(of), size as u32);
        }
        if config.norm == NormKind::Rms {
            file.f32(&key("attention.layer_norm_rms_epsilon"), config.norm_eps);
        }
        file.f32(&key("rope.freq_base"), config.rope.theta);
        if let Some(experts) = &config.experts {
            file.u32(&key("expert_count"), experts.num_experts as u32)
                .u32(&key("expert_used_count"), experts.num_experts_per_token as u32)
                .u32(&key("expert_feed_forward_length"), experts.intermediate_size as u32);
        }
        if let Some(latent) = &config.latent {
            self.describe_latent(config, latent, json, file);
        }
        if let Some(local) = &config.local_rope {
            file.f32(&key("rope.freq_base_swa"), local.theta);
        }
        // The architecture's own, as far as the file at hand has them.
        const WRITTEN: [&str; 4] =
            ["expert_count", "expert_used_count", "expert_feed_forward_length", "rope.freq_base_swa"];
        let own = self.architecture.keys.iter().filter(|(of, _)| !WRITTEN.contains(of));
        for (of, option) in own {
            debug_assert!(!KEYS.iter().any(|(common, _)| common == of));
            match json.get(*option) {
                Some(Json::Number(number)) if number.is_u64() && !of.ends_with("scale") => {
                    file.u32(&key(of), number.as_u64().unwrap_or(0) as u32);
                }
                Some(Json::Number(number)) => {
                    file.f32(&key(of), number.as_f64().unwrap_or(0.0) as f32);
                }
                _ => {}
            }
        }
        rotary(&key, &config.rope, json, file)
    }

    /// What DeepSeek's files say in words of their own.
    fn describe_latent(
        &self,
        config: &DecoderConfig,
        latent: &LatentAttention,
        json: &Map<String, Json>,
        file: &mut GgufBuilder,
    ) {
        let key = |key: &str| format!("{}.{key}", self.architecture.name);
        file.u32(&key("attention.key_length_mla"), (latent.content_dim + config.rope.dim) as u32)
            .u32(&key("attention.value_length_mla"), latent.value_dim as u32);
        if let Some(experts) = &config.experts {
            let function = if experts.scoring == Scoring::Sigmoid { SIGMOID } else { SOFTMAX };
            file.u32(&key("expert_gating_func"), function as u32)
                .bool(&key("expert_weights_norm"), experts.renormalise);
        }
        let object = ["rope_scaling", "rope_parameters"].iter().find_map(|key| json.get(*key)?.as_object());
        let gain = object.and_then(|object| object.get("mscale_all_dim")?.as_f64());
        if let Some(gain) = gain {
            file.f32(&key("rope.scaling.yarn_log_multiplier"), (0.1 * gain) as f32);
        }
    }
}

fn rotary(
    key: &dyn Fn(&str) -> String,
    rope: &Rope,
    json: &Map<String, Json>,
    file: &mut GgufBuilder,
) -> Result<Vec<(&'static str, Vec<f32>)>, String> {
    let scaling = |name: &str| key(&format!("rope.scaling.{name}"));
    match &rope.scaling {
        RopeScaling::None => Ok(Vec::new()),
        RopeScaling::Linear { factor } => {
            file.string(&scaling("type"), "linear").f32(&scaling("factor"), *factor);
            Ok(Vec::new())
        }
        RopeScaling::Llama3 { .. } => {
            let plain = frequencies(&Rope::plain(rope.dim, rope.theta));
            let factors = plain.iter().zip(frequencies(rope)).map(|(plain, scaled)| plain / scaled).collect();
            Ok(vec![("rope_freqs.weight", factors)])
        }
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            attention_factor,
            original_max_position_embeddings,
            ..
        } => {
            file.string(&scaling("type"), "yarn")
                .f32(&scaling("factor"), *factor)
                .u32(&scaling("original_context_length"), *original_max_position_embeddings as u32)
                .f32(&scaling("yarn_beta_fast"), *beta_fast)
                .f32(&scaling("yarn_beta_slow"), *beta_slow);
            if *attention_factor != yarn_attention_factor(*factor, None) {
                file.f32(&scaling("attn_factor"), *attention_factor);
            }
            Ok(Vec::new())
        }
        RopeScaling::LongRope { attention_factor, .. } => {
            let object =
                ["rope_scaling", "rope_parameters"].iter().find_map(|key| json.get(*key)?.as_object());
            let factors = |key: &str| -> Option<Vec<f32>> {
                object?.get(key)?.as_array()?.iter().map(|x| Some(x.as_f64()? as f32)).collect()
            };
            let (Some(short), Some(long)) = (factors("short_factor"), factors("long_factor")) else {
                return Err("LongRoPE without its two lists of factors".to_owned());
            };
            let original = "original_max_position_embeddings";
            let original = json.get(original).or_else(|| object?.get(original)).and_then(Json::as_u64);
            if let Some(original) = original {
                file.u32(&scaling("original_context_length"), original as u32);
            }
            file.f32(&scaling("attn_factor"), *attention_factor);
            Ok(vec![("rope_factors_long.weight", long), ("rope_factors_short.weight", short)])
        }
        RopeScaling::DynamicNtk { .. } => Err("a rotation with dynamic scaling".to_owned()),
    }
}
