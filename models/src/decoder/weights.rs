//! A decoder's weights as a backend holds them. What a family does not have is `None`.

use crate::backend::{Backend, ExpertLinear, Linear, Norm, QkNormWeights};
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
    pub(super) qkv: Projection<B>,
    pub(super) qk_norm: Option<QkNormVectors<B>>,
    pub(super) sinks: Option<B::Vector>,
    pub(super) o: Projection<B>,
    pub(super) attn_post_norm: Option<NormWeights<B>>,
    pub(super) ffn_norm: Option<NormWeights<B>>,
    pub(super) ffn: FeedForward<B>,
    pub(super) ffn_post_norm: Option<NormWeights<B>>,
}

pub(super) enum FeedForward<B: Backend> {
    /// `up` is gate and up, one after the other, if there is a gate.
    Dense {
        up: Projection<B>,
        down: Projection<B>,
    },
    Experts {
        router: Projection<B>,
        up: ExpertProjection<B>,
        down: ExpertProjection<B>,
    },
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

impl<B: Backend> LayerWeights<B> {
    pub(super) fn qk_norm(&self, config: &DecoderConfig) -> Option<QkNormWeights<'_, B::Vector>> {
        let QkNormVectors { q, k } = self.qk_norm.as_ref()?;
        Some(QkNormWeights { q, k, eps: config.norm_eps })
    }
}
