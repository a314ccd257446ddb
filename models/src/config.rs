//! What a decoder-only transformer looks like, independent of the family it comes from: its shape, and
//! options that combine freely. A family is a choice of them.

use tandem_kernels::experts::{Groups, Scoring};
use tandem_kernels::kv::Values;

/// Shape and options of a decoder. Written by `family/*`, read by `decoder.rs`.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Rows of the embedding, padding included.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer; an expert's own is in [`Experts`].
    pub intermediate_size: usize,
    /// Transformer blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`. 1 with [`DecoderConfig::latent`].
    pub num_kv_heads: usize,
    /// Width of a head, as attention has it; see [`LatentAttention`].
    pub head_dim: usize,
    /// Keys and values of all heads are made of one latent a token.
    pub latent: Option<LatentAttention>,
    /// Longest context.
    pub max_position_embeddings: usize,
    /// The normalisation of every norm but those of [`QkNorm`], which is RMS.
    pub norm: NormKind,
    /// Added to the mean square, or to the variance.
    pub norm_eps: f32,
    /// Added to every norm's weight as it is loaded: Gemma stores `w` and multiplies by `1 + w`.
    pub norm_weight_offset: f32,
    /// Where the norms of a layer stand.
    pub norm_placement: NormPlacement,
    /// Normalisation of queries and keys.
    pub qk_norm: QkNorm,
    /// Rotary position embedding.
    pub rope: Rope,
    /// That of the layers with [`Positions::LocalRope`].
    pub local_rope: Option<Rope>,
    /// How layers differ: one entry a layer, or none where every layer is the default.
    pub layers: Vec<LayerConfig>,
    /// Factor on the attention scores; `None` is `1 / sqrt(head_dim)`.
    pub attn_scale: Option<f32>,
    /// Attention scores become `cap * tanh(score / cap)`.
    pub attn_soft_cap: Option<f32>,
    /// Every query head has a learned logit in its softmax that attends to nothing.
    pub attn_sinks: bool,
    /// Bias on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention output projection.
    pub o_bias: bool,
    /// Bias on the feed-forward projections.
    pub mlp_bias: bool,
    /// The feed-forward layer's nonlinearity.
    pub activation: Activation,
    /// `act(gate) * up` rather than `act(up)`.
    pub gated: bool,
    /// The feed-forward layers that are mixtures of experts.
    pub experts: Option<Experts>,
    /// Factor on the embedding.
    pub embed_scale: f32,
    /// Factor on what a sublayer adds to the residual stream.
    pub residual_scale: f32,
    /// Factor on the logits.
    pub logits_scale: f32,
    /// Logits become `cap * tanh(logit / cap)`.
    pub logits_soft_cap: Option<f32>,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
}

impl DecoderConfig {
    /// What attention's values are.
    pub fn values(&self) -> Values {
        self.latent.map_or(Values::Own, |latent| Values::OfKeys(latent.kv_rank))
    }

    /// Width of the part of a head that the rotation is made for.
    pub fn rotary_width(&self) -> usize {
        if self.latent.is_some() { self.rope.dim } else { self.head_dim }
    }

    /// How layer `index` differs from the others.
    pub fn layer(&self, index: usize) -> LayerConfig {
        self.layers.get(index).copied().unwrap_or_default()
    }
}

/// A plain Llama of no size: the base on which a shape and options are set.
impl Default for DecoderConfig {
    fn default() -> Self {
        DecoderConfig {
            vocab_size: 0,
            hidden_size: 0,
            intermediate_size: 0,
            num_layers: 0,
            num_heads: 0,
            num_kv_heads: 0,
            head_dim: 0,
            latent: None,
            max_position_embeddings: 0,
            norm: NormKind::Rms,
            norm_eps: 1e-6,
            norm_weight_offset: 0.0,
            norm_placement: NormPlacement::Pre,
            qk_norm: QkNorm::None,
            rope: Rope::plain(0, 10_000.0),
            local_rope: None,
            layers: Vec::new(),
            attn_scale: None,
            attn_soft_cap: None,
            attn_sinks: false,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            activation: Activation::Silu,
            gated: true,
            experts: None,
            embed_scale: 1.0,
            residual_scale: 1.0,
            logits_scale: 1.0,
            logits_soft_cap: None,
            tie_word_embeddings: false,
        }
    }
}

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) in its absorbed form. A token has one latent of
/// `kv_rank` channels, of which every head would make its keys and values, and one key of
/// [`Rope::dim`] channels that all heads share and that alone turns. Instead of making keys, the projection
/// from latent to key is applied to the query, and that to the value after attention; so attention is one of
/// `num_heads` queries over one key of `head_dim = kv_rank + rope.dim` channels, whose first `kv_rank` are the
/// value, and nothing else is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatentAttention {
    /// Width of the latent.
    pub kv_rank: usize,
    /// Width of the latent of which queries are made; `None` if they are made of the residual stream.
    pub q_rank: Option<usize>,
    /// Channels of a head's query, and of the key it would have, that do not turn.
    pub content_dim: usize,
    /// Width of a head's value.
    pub value_dim: usize,
    /// Added to the mean square by the norms of both latents.
    pub norm_eps: f32,
}

/// What sets a layer apart from its neighbours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerConfig {
    /// Keys that a query sees, its own included; `None`: all before it.
    pub window: Option<usize>,
    /// How queries and keys know where they are.
    pub positions: Positions,
    /// The feed-forward layer is a plain one although the model has experts.
    pub dense: bool,
}

/// How the queries and keys of a layer know where they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Positions {
    /// By [`DecoderConfig::rope`].
    #[default]
    Rope,
    /// By [`DecoderConfig::local_rope`].
    LocalRope,
    /// Only by what the causal mask tells.
    None,
}

/// The normalisation of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps) * weight`
    Rms,
    /// `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`
    Layer,
}

/// Where the norms of a layer stand, for attention and feed-forward alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormPlacement {
    /// `x + f(norm(x))`
    Pre,
    /// `x + norm(f(x))`
    Post,
    /// `x + norm(f(norm(x)))`
    Both,
}

impl NormPlacement {
    /// There are norms before the sublayers.
    pub fn has_pre(self) -> bool {
        self != NormPlacement::Post
    }

    /// There are norms after the sublayers.
    pub fn has_post(self) -> bool {
        self != NormPlacement::Pre
    }
}

/// RMS normalisation of queries and keys before they are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QkNorm {
    /// None.
    None,
    /// Each head by itself, all with one weight of `head_dim`.
    PerHead,
    /// All heads of a token together.
    AllHeads,
}

/// The nonlinearity of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x / (1 + exp(-x))`
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`
    GeluTanh,
    /// Gated only: `(clamp(up, -limit, limit) + 1) * g / (1 + exp(-alpha g))` with `g = min(gate, limit)`.
    ClampedSwiglu {
        /// Gain of the sigmoid.
        alpha: f32,
        /// Bound of gate and up.
        limit: f32,
    },
}

/// Feed-forward layers of which a router chooses a few for every token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Experts {
    /// Experts of a layer.
    pub num_experts: usize,
    /// How many of them compute a token.
    pub num_experts_per_token: usize,
    /// Width of an expert.
    pub intermediate_size: usize,
    /// What makes scores of the router's logits.
    pub scoring: Scoring,
    /// A bias by which experts are chosen, and which does not count in what they weigh.
    pub choice_bias: bool,
    /// Only the experts of the best groups are chosen.
    pub groups: Option<Groups>,
    /// Weights of the chosen experts: shares of their own scores, or their scores as they are.
    pub renormalise: bool,
    /// Factor on the weights.
    pub weight_scale: f32,
    /// Width of the expert that computes every token besides; 0 if there is none.
    pub shared_intermediate_size: usize,
    /// Bias on the router and on the experts' projections.
    pub bias: bool,
}

/// Experts of no number: the base on which options are set.
impl Default for Experts {
    fn default() -> Self {
        Experts {
            num_experts: 0,
            num_experts_per_token: 0,
            intermediate_size: 0,
            scoring: Scoring::Softmax,
            choice_bias: false,
            groups: None,
            renormalise: true,
            weight_scale: 1.0,
            shared_intermediate_size: 0,
            bias: false,
        }
    }
}

/// Rotary position embedding of a head's first channels; with [`DecoderConfig::latent`], of its last.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Channels of a head that turn; even, at most `head_dim`.
    pub dim: usize,
    /// Base of the frequencies.
    pub theta: f32,
    /// How the frequencies are stretched.
    pub scaling: RopeScaling,
    /// In the checkpoint's tensors channel `2i` turns with `2i + 1`, not `i` with `i + dim / 2`. The
    /// loader puts rows in the second order, so nothing after it knows.
    pub interleaved: bool,
}

impl Rope {
    /// No scaling, half-split.
    pub fn plain(dim: usize, theta: f32) -> Self {
        Rope { dim, theta, scaling: RopeScaling::None, interleaved: false }
    }
}

/// Frequency scaling of rotary position embeddings. Every one is a function of the configuration
/// alone: where the original depends on the length of the current context, the longest context that the
/// model is served with stands for it, so that a token's keys never depend on what comes after it.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// Positions divided by a factor.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// NTK-aware scaling of the base, for a context of `factor` times the pretraining's.
    DynamicNtk {
        /// Longest context over the pretraining's.
        factor: f32,
    },
    /// Llama 3.1's per-frequency interpolation.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f32,
        /// Wavelengths above `original / low` are divided.
        low_freq_factor: f32,
        /// Wavelengths below `original / high` are kept.
        high_freq_factor: f32,
        /// The context length of pretraining.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// The divisor of low frequencies.
        factor: f32,
        /// Frequencies that turn more often than this in the pretraining's context are kept.
        beta_fast: f32,
        /// Frequencies that turn less often than this are divided.
        beta_slow: f32,
        /// The ramp between them begins and ends at whole channels.
        truncate: bool,
        /// Factor on cosines and sines.
        attention_factor: f32,
        /// The context length of pretraining.
        original_max_position_embeddings: usize,
    },
    /// LongRoPE (arXiv 2402.13753): a divisor for every frequency.
    LongRope {
        /// `[dim / 2]`: the divisors. The long ones if the model is made for more than its pretraining's
        /// context, else the short ones.
        factors: Vec<f32>,
        /// Factor on cosines and sines.
        attention_factor: f32,
    },
}
