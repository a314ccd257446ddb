//! Size and addressing of the paged KV cache. A token's keys and values lie in one *slot* of every
//! layer; `block_size` consecutive slots form a block, and which block belongs to which sequence is
//! the engine's business alone. The storage itself belongs to the backend.

use crate::config::DecoderConfig;
use crate::error::ModelError;

/// Shape of a KV cache. Its sizes are known not to overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers, each with storage of its own.
    pub num_layers: usize,
    /// Blocks of a layer.
    pub num_blocks: usize,
    /// Slots of a block.
    pub block_size: usize,
    /// Heads of a key row and of a value row.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl KvLayout {
    /// The layout of `num_blocks` blocks for a model of shape `config`.
    ///
    /// # Errors
    /// If a number is 0, or if slots or bytes do not fit their types.
    pub fn new(config: &DecoderConfig, num_blocks: usize, block_size: usize) -> Result<Self, ModelError> {
        let refuse = |reason: String| ModelError::Backend { context: "KV cache", reason };
        if num_blocks == 0 || block_size == 0 {
            return Err(refuse(format!(
                "{num_blocks} blocks of {block_size} tokens hold nothing; both must be at least 1"
            )));
        }
        // Slots are addressed with 32 bits, storage with isize.
        let num_slots = num_blocks.checked_mul(block_size).filter(|&slots| slots <= u32::MAX as usize);
        let size_bytes =
            num_slots.and_then(|slots| slots.checked_mul(kv_bytes_per_token(config))).map(isize::try_from);
        if !matches!(size_bytes, Some(Ok(_))) {
            return Err(refuse(format!(
                "{num_blocks} blocks of {block_size} tokens at {} bytes a token are more than can be addressed",
                kv_bytes_per_token(config)
            )));
        }
        Ok(KvLayout {
            num_layers: config.num_layers,
            num_blocks,
            block_size,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
        })
    }

    /// Tokens that the cache holds.
    pub fn num_slots(&self) -> usize {
        self.num_blocks * self.block_size
    }

    /// Elements of one token's keys (or values) in one layer.
    pub fn row_len(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Elements of one layer's keys (or values).
    pub fn layer_len(&self) -> usize {
        self.num_slots() * self.row_len()
    }
}

/// Bytes of keys and values that one token costs in all layers; saturates instead of wrapping.
pub fn kv_bytes_per_token(config: &DecoderConfig) -> usize {
    [config.num_layers, config.num_kv_heads, config.head_dim]
        .into_iter()
        .fold(2 * size_of::<f32>(), usize::saturating_mul)
}

/// `len` zeros, or an error where a plain `vec![]` would end the process.
///
/// The pages are the system's to hand out when they are first written, so a cache costs what is used
/// of it.
pub(crate) fn try_zeros(len: usize) -> Result<Vec<f32>, ModelError> {
    bytemuck::allocation::try_zeroed_vec(len).map_err(|()| ModelError::Backend {
        context: "KV cache",
        reason: format!("no memory for {} bytes", len.saturating_mul(size_of::<f32>())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RopeScaling;

    fn config() -> DecoderConfig {
        DecoderConfig {
            vocab_size: 8,
            hidden_size: 8,
            intermediate_size: 8,
            num_layers: 3,
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 4,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            max_position_embeddings: 64,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            tie_word_embeddings: true,
        }
    }

    #[test]
    fn sizes() {
        let layout = KvLayout::new(&config(), 5, 16).unwrap();
        assert_eq!((layout.num_slots(), layout.row_len(), layout.layer_len()), (80, 4, 320));
        assert_eq!(kv_bytes_per_token(&config()), 3 * 2 * 4 * 4);
    }

    #[test]
    fn impossible_sizes_are_errors() {
        for (num_blocks, block_size) in
            [(0, 16), (16, 0), (usize::MAX, 2), (1 << 28, 16), (u32::MAX as usize, 1 << 40)]
        {
            let error = KvLayout::new(&config(), num_blocks, block_size).unwrap_err().to_string();
            assert!(error.contains(&num_blocks.to_string()), "{error}");
        }
        let mut giant = config();
        giant.num_layers = usize::MAX / 2;
        assert!(KvLayout::new(&giant, 1, 16).is_err());
        assert!(try_zeros(usize::MAX / 8).is_err());
    }
}
