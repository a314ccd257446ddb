//! A decoder's weights as a backend holds them. What a family does not have is `None`.

use crate::backend::{Backend, ExpertLinear, GatedFeedForward, Linear, Norm, QkNormWeights};
use crate::config::DecoderConfig;

pub(super) struct Weights<B: Backend> {
    pub(super) embed: B::Matrix,
    pub(super) layers: Vec<LayerWeights<B>>,
    pub(super) final_norm: NormWeights<B>,
    /// `None` if the head is the embedding.
    pub(super) lm_head: Option<B::Matrix>,
}

impl<B: Backend> Weights<B> {
    pub(super) fn head(&self) -> &B::Matrix {
        self.lm_head.as_ref().unwrap_or(&self.embed)
    }
}

pub(super) struct LayerWeights<B: Backend> {
    pub(super) attn_norm: Option<NormWeights<B>>,
    pub(super) attention: AttentionWeights<B>,
    pub(super) sinks: Option<B::Vector>,
    pub(super) o: Projection<B>,
    pub(super) attn_post_norm: Option<NormWeights<B>>,
    pub(super) ffn_norm: Option<NormWeights<B>>,
    pub(super) ffn: FeedForward<B>,
    pub(super) ffn_post_norm: Option<NormWeights<B>>,
}

/// What makes queries, keys and values.
pub(super) enum AttentionWeights<B: Backend> {
    Heads { qkv: Projection<B>, qk_norm: Option<QkNormVectors<B>> },
    Latent(LatentWeights<B>),
}

/// Those of [`crate::config::LatentAttention`].
pub(super) struct LatentWeights<B: Backend> {
    /// Makes the latents of queries, and normalises them.
    pub(super) q_down: Option<(Projection<B>, B::Vector)>,
    /// `[num_heads * (content_dim + rope.dim), _]`
    pub(super) q: Projection<B>,
    /// `[kv_rank + rope.dim, hidden_size]`: the latent, and the key that turns.
    pub(super) kv_down: Projection<B>,
    /// `[kv_rank]`
    pub(super) kv_norm: B::Vector,
    /// `[num_heads]` of `[kv_rank, content_dim]`: from a query to what it is for the latent.
    pub(super) k_up: Vec<B::Matrix>,
    /// `[num_heads]` of `[value_dim, kv_rank]`: from a latent to the value.
    pub(super) v_up: Vec<B::Matrix>,
}

pub(super) enum FeedForward<B: Backend> {
    Dense(Dense<B>),
    Experts {
        router: Projection<B>,
        /// `[num_experts]`
        choice_bias: Option<B::Vector>,
        up: ExpertProjection<B>,
        down: ExpertProjection<B>,
        /// The expert that computes every token.
        shared: Option<Dense<B>>,
    },
}

pub(super) struct Dense<B: Backend> {
    /// Gate and up, one after the other, if there is a gate.
    pub(super) up: Projection<B>,
    pub(super) down: Projection<B>,
}

pub(super) struct Projection<B: Backend> {
    pub(super) weight: B::Matrix,
    pub(super) bias: Option<B::Vector>,
}

pub(super) struct ExpertProjection<B: Backend> {
    /// `[num_experts]`
    pub(super) weights: Vec<B::Matrix>,
    pub(super) biases: Option<Vec<B::Vector>>,
}

pub(super) struct QkNormVectors<B: Backend> {
    pub(super) q: B::Vector,
    pub(super) k: B::Vector,
}

pub(super) struct NormWeights<B: Backend> {
    pub(super) weight: B::Vector,
    pub(super) bias: Option<B::Vector>,
}

impl<B: Backend> Projection<B> {
    pub(super) fn linear(&self) -> Linear<'_, B::Matrix, B::Vector> {
        Linear { weight: &self.weight, bias: self.bias.as_ref() }
    }
}

impl<B: Backend> Dense<B> {
    pub(super) fn gated(&self, config: &DecoderConfig) -> GatedFeedForward<'_, B::Matrix, B::Vector> {
        let activation = config.activation;
        GatedFeedForward { up: self.up.linear(), activation, down: self.down.linear() }
    }
}

impl<B: Backend> ExpertProjection<B> {
    pub(super) fn linear(&self) -> ExpertLinear<'_, B::Matrix, B::Vector> {
        ExpertLinear { weights: &self.weights, biases: self.biases.as_deref() }
    }
}

impl<B: Backend> NormWeights<B> {
    pub(super) fn of(&self, config: &DecoderConfig) -> Norm<'_, B::Vector> {
        Norm { kind: config.norm, weight: &self.weight, bias: self.bias.as_ref(), eps: config.norm_eps }
    }
}

impl<B: Backend> QkNormVectors<B> {
    pub(super) fn of(&self, config: &DecoderConfig) -> QkNormWeights<'_, B::Vector> {
        QkNormWeights { q: &self.q, k: &self.k, eps: config.norm_eps }
    }
}
