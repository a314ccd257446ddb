//! What the engine sees of a model: a paged KV cache to size and passes to run. One object is one set
//! of weights on one backend; it belongs to the thread that drives it.

use crate::batch::ForwardBatch;
use crate::config::DecoderConfig;
use crate::error::ModelError;

/// A loaded model.
///
/// **Bit rule**: a row's logits are a function of the weights and of the tokens before it alone. They
/// never depend on the other rows of the pass, on how the prompt was cut into passes, on which blocks
/// hold the context or on the number of threads. ([`crate::ReferenceBackend`] alone keeps it only up to
/// rounding.)
pub trait Model: Send {
    /// The model's shape.
    fn config(&self) -> &DecoderConfig;

    /// Bytes of keys and values that one token of context costs, all layers together.
    fn kv_bytes_per_token(&self) -> usize;

    /// Sets aside storage for `num_blocks * block_size` tokens; what an earlier call had set aside is
    /// dropped with its contents.
    ///
    /// # Errors
    /// If either number is 0, or if the storage is larger than the device can give.
    fn allocate_kv_cache(&mut self, num_blocks: usize, block_size: usize) -> Result<(), ModelError>;

    /// Runs one pass: stores the batch's keys and values and overwrites `logits` with
    /// `[batch.logits_rows.len(), vocab_size]`, row-major.
    ///
    /// Does not allocate once it has seen a batch as large as this one.
    ///
    /// # Errors
    /// If the KV cache is not allocated, if the batch names a token, position, slot, block or row that
    /// does not exist, or if the device fails. The cache then holds what the failed pass wrote.
    fn forward(&mut self, batch: &ForwardBatch, logits: &mut Vec<f32>) -> Result<(), ModelError>;
}
