//! How much of a context, and of how many sequences, the keys and values of the models are kept for.

use anyhow::bail;
use tandem_models::{BackendKind, KvType};

use super::pair::Loaded;
use crate::config::Config;

/// Tokens a block of the KV cache holds: small enough that a short completion wastes little, large
/// enough that block tables stay short.
const BLOCK_SIZE: usize = 16;

/// Storage for keys and values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvInfo {
    pub(crate) num_blocks: usize,
    pub(crate) block_size: usize,
    pub(crate) size_bytes: u64,
    pub(crate) kv_type: KvType,
}

impl KvInfo {
    /// Tokens that fit, of all sequences together.
    pub(crate) fn num_tokens(&self) -> usize {
        self.num_blocks * self.block_size
    }

    /// What a sequence of so many tokens takes of it.
    pub(crate) fn bytes_of(&self, num_tokens: usize) -> u64 {
        num_tokens.div_ceil(self.block_size) as u64 * (self.size_bytes / self.num_blocks as u64)
    }
}

/// Storage for keys and values, and the context that fits it.
pub(super) fn size_context(config: &Config, pair: [&Option<Loaded>; 2]) -> anyhow::Result<(KvInfo, usize)> {
    let loaded = || pair.into_iter().flatten();
    let bytes_per_token: usize = loaded().map(|loaded| loaded.model.kv_bytes_per_token()).sum();
    let wanted_len = context_len(config.max_model_len, loaded())?;
    let kv = size_kv_cache(config, bytes_per_token, wanted_len)?;
    let max_model_len = wanted_len.min(kv.num_tokens());
    if max_model_len < wanted_len {
        tracing::warn!(
            "the KV cache holds {max_model_len} tokens, so the context is limited to that instead of \
             {wanted_len}; --kv-memory raises it"
        );
    }
    Ok((kv, max_model_len))
}

/// The context of the shorter-sighted model, or the part of it that was asked for.
fn context_len<'a>(asked: Option<usize>, loaded: impl Iterator<Item = &'a Loaded>) -> anyhow::Result<usize> {
    let longest =
        loaded.map(|loaded| (loaded.model.config().max_position_embeddings, &loaded.info.name)).min();
    let (longest, name) = longest.expect("find_pair returns at least one model: this is a bug");
    match asked {
        Some(len) if len > longest => {
            bail!(
                "--max-model-len is {len}; {name} holds at most {longest} tokens of context; --rope-scaling \
                 can stretch it"
            )
        }
        asked => Ok(asked.unwrap_or(longest)),
    }
}

/// What keys and values are stored as: the reference backend has f32 only.
pub(super) fn kv_type(config: &Config) -> KvType {
    match config.backend {
        BackendKind::Cpu => config.kv_dtype,
        BackendKind::Reference => KvType::F32,
    }
}

/// Decides how many blocks there are.
fn size_kv_cache(config: &Config, bytes_per_token: usize, max_model_len: usize) -> anyhow::Result<KvInfo> {
    let block_bytes = (bytes_per_token * BLOCK_SIZE) as u64;
    let budget = match config.kv_memory {
        Some(budget) => budget,
        None => {
            // A full context for every sequence, within a quarter of what is free.
            let blocks = config.max_num_seqs as u64 * max_model_len.div_ceil(BLOCK_SIZE) as u64;
            (blocks * block_bytes).min(available_memory() / 4).max(block_bytes)
        }
    };
    let num_blocks = budget / block_bytes;
    if num_blocks == 0 {
        bail!(
            "--kv-memory is {budget} bytes; one block of {BLOCK_SIZE} tokens takes {block_bytes} bytes with \
             these models"
        );
    }
    // Slots are counted in u32.
    let num_blocks = num_blocks.min(u64::from(u32::MAX) / BLOCK_SIZE as u64) as usize;
    let size_bytes = num_blocks as u64 * block_bytes;
    Ok(KvInfo { num_blocks, block_size: BLOCK_SIZE, size_bytes, kv_type: kv_type(config) })
}

/// Bytes that can be used without swapping: the system's word, bounded by the container's limit.
fn available_memory() -> u64 {
    // Where the system says nothing, assume a small machine.
    const UNKNOWN: u64 = 2 << 30;
    let system = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
    });
    let read = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let container = read("/sys/fs/cgroup/memory.max")
        .map(|limit| limit.saturating_sub(read("/sys/fs/cgroup/memory.current").unwrap_or(0)));
    system.unwrap_or(UNKNOWN).min(container.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kv_memory_becomes_whole_blocks() {
        let config = Config { kv_memory: Some(1 << 20), ..Config::default() };
        let kv = size_kv_cache(&config, 1000, 2048).expect("fits");
        assert_eq!((kv.num_blocks, kv.num_tokens()), (65, 65 * 16));
        assert_eq!(kv.size_bytes, 65 * 16_000);
    }

    #[test]
    fn too_little_kv_memory_is_refused_with_both_numbers() {
        let config = Config { kv_memory: Some(15_999), ..Config::default() };
        let message = size_kv_cache(&config, 1000, 2048).unwrap_err().to_string();
        assert!(message.contains("15999 bytes") && message.contains("16000 bytes"), "{message}");
    }

    #[test]
    fn without_kv_memory_every_sequence_gets_a_full_context_if_the_machine_can() {
        let config = Config { max_num_seqs: 2, ..Config::default() };
        let kv = size_kv_cache(&config, 4, 100).expect("fits");
        assert_eq!(kv.num_blocks, 2 * 7);
        let config = Config { max_num_seqs: 4096, ..Config::default() };
        let kv = size_kv_cache(&config, 1 << 20, 1 << 20).expect("fits");
        assert!(kv.size_bytes <= available_memory().max(4 << 30), "{}", kv.size_bytes);
    }
}
