//! What the engine sees of a model: a paged KV cache to size and passes to run. One object is one set
//! of weights on one backend; it belongs to the thread that drives it.

use crate::batch::ForwardBatch;
use crate::config::DecoderConfig;
use crate::error::ModelError;
use crate::outputs::Outputs;
use crate::weights::{Dtype, TensorView};

/// Weights as they were handed to the backend, after everything that loading made of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightMemory {
    /// Elements and bytes of each element type.
    pub types: Vec<(Dtype, u64, u64)>,
}

impl WeightMemory {
    pub(crate) fn add(&mut self, view: &TensorView<'_>) {
        let (elements, bytes) = (view.num_elements() as u64, view.data.len() as u64);
        match self.types.iter_mut().find(|(dtype, ..)| *dtype == view.dtype) {
            Some(sum) => *sum = (view.dtype, sum.1 + elements, sum.2 + bytes),
            None => self.types.push((view.dtype, elements, bytes)),
        }
    }

    /// Elements of all types.
    pub fn num_parameters(&self) -> u64 {
        self.types.iter().map(|(_, elements, _)| elements).sum()
    }

    /// Bytes of all types.
    pub fn size_bytes(&self) -> u64 {
        self.types.iter().map(|(.., bytes)| bytes).sum()
    }

    /// The type that most bytes are of.
    pub fn main_type(&self) -> Option<Dtype> {
        self.types.iter().max_by_key(|(.., bytes)| *bytes).map(|(dtype, ..)| *dtype)
    }
}

/// A loaded model.
///
/// **Bit rule**: a row's logits are a function of the weights and of the tokens before it alone. They
/// never depend on the other rows of the pass, on how the prompt was cut into passes, on which blocks
/// hold the context or on the number of threads. ([`crate::ReferenceBackend`] alone keeps it only up to
/// rounding.)
pub trait Model: Send {
    /// The model's shape.
    fn config(&self) -> &DecoderConfig;

    /// What the weights take; nothing if that is not known.
    fn weight_memory(&self) -> WeightMemory {
        WeightMemory::default()
    }

    /// Bytes of keys and values that one token of context costs, all layers together.
    fn kv_bytes_per_token(&self) -> usize;

    /// Sets aside storage for `num_blocks * block_size` tokens; what an earlier call had set aside is
    /// dropped with its contents.
    ///
    /// # Errors
    /// If either number is 0, or if the storage is larger than the device can give.
    fn allocate_kv_cache(&mut self, num_blocks: usize, block_size: usize) -> Result<(), ModelError>;

    /// Makes ready for passes with [`ForwardBatch::short_head`]: their rows of logits are those of the first
    /// `num_tokens` tokens of the vocabulary, the same bits as in a whole row, for as much less work. False if
    /// the model only has its whole head.
    ///
    /// # Errors
    /// If `num_tokens` is 0 or more than the vocabulary has, or if the device fails.
    fn set_short_head(&mut self, num_tokens: usize) -> Result<bool, ModelError> {
        let _ = num_tokens;
        Ok(false)
    }

    /// The head that was loaded with this model to draft from its hidden states, as a model of its own: the row of
    /// a token is made of its embedding and of what this model left at the token before it, so this
    /// model has to have computed that one. Where it has not, the row is made of the guess that the head left
    /// there when it gave the logits after that token. Cache and blocks are this model's, so slots are the
    /// same; [`Model::allocate_kv_cache`] and [`Model::kv_bytes_per_token`] of this model count for both.
    /// What the head gives for a first token means nothing, and no later row reads it.
    fn drafting_head(&mut self) -> Option<&mut dyn Model> {
        None
    }

    /// Starts a pass that stores the batch's keys and values and yields what is wanted of its
    /// `logits_rows`. A pass that was not finished is forgotten; its keys and values may be half written.
    ///
    /// Does not allocate once it has seen a batch as large as this one.
    ///
    /// # Errors
    /// If the KV cache is not allocated, if the batch names a token, position, slot, block or row that
    /// does not exist, or if the device fails.
    fn begin(&mut self, batch: &ForwardBatch) -> Result<(), ModelError>;

    /// Computes one layer of the pass that was begun. False if there was none left: then
    /// [`Model::finish`] is next. Whatever else runs between two layers, the bits are the same.
    ///
    /// # Errors
    /// If the device fails. The cache then holds what the failed pass wrote.
    fn advance(&mut self) -> Result<bool, ModelError>;

    /// Between the last [`Model::advance`] and [`Model::finish`]: overwrites `hidden` with the last hidden
    /// states, after the final norm, of the batch's `hidden_rows`: `[batch.hidden_rows.len(), hidden_size]`,
    /// row-major. The bit rule holds for them as it does for logits.
    ///
    /// # Errors
    /// If the model does not give any, or as [`Model::advance`].
    fn hidden_states(&mut self, hidden: &mut Vec<f32>) -> Result<(), ModelError> {
        hidden.clear();
        let reason = "this model gives none".to_owned();
        Err(ModelError::Backend { context: "hidden states", reason })
    }

    /// Ends the pass: what was wanted of the batch's `logits_rows`. What a row gives is a function of its logits and of
    /// [`Wanted`](crate::Wanted) alone: a token is the one that would be chosen of the whole row.
    ///
    /// # Errors
    /// As [`Model::advance`].
    fn finish(&mut self) -> Result<Outputs<'_>, ModelError>;

    /// Runs one pass from begin to finish and overwrites `logits` with the rows that are wanted whole.
    ///
    /// # Errors
    /// As [`Model::begin`].
    fn forward(&mut self, batch: &ForwardBatch, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        self.begin(batch)?;
        while self.advance()? {}
        let outputs = self.finish()?;
        logits.clear();
        logits.extend_from_slice(outputs.logits);
        Ok(())
    }
}
