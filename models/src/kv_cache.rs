//! Size and addressing of the paged KV cache. A token's keys and values lie in one *slot* of every
//! layer; `block_size` consecutive slots form a block, and which block belongs to which sequence is
//! the engine's business alone. The storage itself belongs to the backend.

use tandem_kernels::kv::{KvType, Values};
use tandem_kernels::pages::ZeroedPages;

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
    /// Width of a head's key.
    pub head_dim: usize,
    /// What its values are.
    pub values: Values,
    /// Element type.
    pub kv_type: KvType,
}

impl KvLayout {
    /// The layout of `num_blocks` blocks for a model of shape `config`.
    ///
    /// # Errors
    /// If a number is 0, or if slots or bytes do not fit their types.
    pub fn new(
        config: &DecoderConfig,
        kv_type: KvType,
        num_blocks: usize,
        block_size: usize,
    ) -> Result<Self, ModelError> {
        let refuse = |reason: String| ModelError::Backend { context: "KV cache", reason };
        if num_blocks == 0 || block_size == 0 {
            return Err(refuse(format!(
                "{num_blocks} blocks of {block_size} tokens hold nothing; both must be at least 1"
            )));
        }
        // Slots are addressed with 32 bits, storage with isize.
        let num_slots = num_blocks.checked_mul(block_size).filter(|&slots| slots <= u32::MAX as usize);
        let token_bytes = kv_bytes_per_token(config, kv_type);
        let size_bytes = num_slots.and_then(|slots| slots.checked_mul(token_bytes)).map(isize::try_from);
        if !matches!(size_bytes, Some(Ok(_))) {
            return Err(refuse(format!(
                "{num_blocks} blocks of {block_size} tokens at {token_bytes} bytes a token are more than can be \
                 addressed"
            )));
        }
        Ok(KvLayout {
            num_layers: config.num_layers,
            num_blocks,
            block_size,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            values: config.values(),
            kv_type,
        })
    }

    /// Tokens that the cache holds.
    pub fn num_slots(&self) -> usize {
        self.num_blocks * self.block_size
    }

    /// Elements of one token's keys in one layer, and of its values where they are its own.
    pub fn row_len(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Elements of one layer's keys, and of its values where they are its own.
    pub fn layer_len(&self) -> usize {
        self.num_slots() * self.row_len()
    }
}

/// Bytes of keys and values that one token costs in all layers; saturates instead of wrapping.
pub fn kv_bytes_per_token(config: &DecoderConfig, kv_type: KvType) -> usize {
    // A file may claim any width.
    const WIDEST: usize = usize::MAX >> 6;
    [config.num_layers, config.num_kv_heads]
        .into_iter()
        .fold(kv_type.token_bytes(config.head_dim.min(WIDEST), config.values()), usize::saturating_mul)
}

/// `len` zero bytes, or an error where a plain `vec![]` would end the process. A cache costs what is used
/// of it, and what is made ready ahead.
pub(crate) fn try_zeros(len: usize) -> Result<ZeroedPages, ModelError> {
    ZeroedPages::new(len).map_err(|error| ModelError::Backend {
        context: "KV cache",
        reason: format!("no memory for {len} bytes: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LatentAttention;

    fn config() -> DecoderConfig {
        DecoderConfig {
            vocab_size: 8,
            hidden_size: 8,
            intermediate_size: 8,
            num_layers: 3,
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 4,
            max_position_embeddings: 64,
            ..DecoderConfig::default()
        }
    }

    #[test]
    fn sizes() {
        let layout = KvLayout::new(&config(), KvType::F32, 5, 16).unwrap();
        assert_eq!((layout.num_slots(), layout.row_len(), layout.layer_len()), (80, 4, 320));
        let bytes = KvType::ALL.map(|kv_type| kv_bytes_per_token(&config(), kv_type));
        assert_eq!(bytes, [3 * 2 * 4 * 4, 3 * 2 * 4 * 2, 3 * 2 * (4 + 4)]);
    }

    #[test]
    fn a_latent_is_stored_once() {
        // DeepSeek-Coder-V2-Lite.
        let latent =
            LatentAttention { kv_rank: 512, q_rank: None, content_dim: 128, value_dim: 128, norm_eps: 1e-6 };
        let config = DecoderConfig {
            num_layers: 27,
            num_heads: 16,
            num_kv_heads: 1,
            head_dim: 576,
            latent: Some(latent),
            ..DecoderConfig::default()
        };
        let bytes = KvType::ALL.map(|kv_type| kv_bytes_per_token(&config, kv_type));
        assert_eq!(bytes, [27 * 576 * 4, 27 * 576 * 2, 27 * (576 + 4)]);
    }

    #[test]
    fn impossible_sizes_are_errors() {
        for (num_blocks, block_size) in
            [(0, 16), (16, 0), (usize::MAX, 2), (1 << 28, 16), (u32::MAX as usize, 1 << 40)]
        {
            let error = KvLayout::new(&config(), KvType::Q8, num_blocks, block_size).unwrap_err().to_string();
            assert!(error.contains(&num_blocks.to_string()), "{error}");
        }
        let mut giant = config();
        giant.num_layers = usize::MAX / 2;
        assert!(KvLayout::new(&giant, KvType::F16, 1, 16).is_err());
        assert!(try_zeros(usize::MAX / 8).is_err());
    }
}
