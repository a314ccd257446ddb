//! What a decoder-only transformer looks like, independent of the family it comes from.

/// Shape and options of a decoder. Written by `family/*`, read by `decoder.rs`.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Rows of the embedding, padding included.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated feed-forward layer.
    pub intermediate_size: usize,
    /// Transformer blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// How the rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// Longest context.
    pub max_position_embeddings: usize,
    /// Bias on the query, key and value projections (Qwen2; Llama's `attention_bias`).
    pub qkv_bias: bool,
    /// Bias on the attention output projection (Llama's `attention_bias`).
    pub o_bias: bool,
    /// Bias on the feed-forward projections (Llama's `mlp_bias`).
    pub mlp_bias: bool,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
}

/// Frequency scaling of rotary position embeddings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// Positions divided by a factor.
    Linear {
        /// The divisor.
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
}
