//! What several tests of whole models share.

use std::sync::Arc;

use tandem_kernels::ThreadPool;
use tandem_models::{BackendKind, Checkpoint, ForwardBatch, load};

/// Logits of all tokens in one pass.
pub(crate) fn logits(checkpoint: &Checkpoint, kind: BackendKind, tokens: &[u32]) -> Vec<f32> {
    let mut model = load(checkpoint, kind, Arc::new(ThreadPool::new(2))).unwrap();
    let num_blocks = tokens.len().div_ceil(4);
    model.allocate_kv_cache(num_blocks, 4).unwrap();
    let block_table: Vec<u32> = (0..num_blocks as u32).collect();
    let (mut batch, mut logits) = (ForwardBatch::new(), Vec::new());
    batch.push_sequence(tokens, 0, &block_table, 4, tokens.len());
    model.forward(&batch, &mut logits).unwrap();
    logits
}
