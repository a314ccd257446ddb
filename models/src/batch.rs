//! The inputs of one forward pass, in the field's flat layout: the tokens of all sequences one after
//! the other, with offsets. Built by the engine, read by [`crate::Model::forward`]. Buffers keep
//! their capacity between passes, so building a batch does not allocate in the steady state.

use crate::outputs::Wanted;

/// One pass over `num_seqs` sequences of any mix of prefill, decode and verification.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ForwardBatch {
    /// `[num_tokens]`
    pub token_ids: Vec<u32>,
    /// `[num_tokens]`: absolute position of each token in its sequence.
    pub positions: Vec<u32>,
    /// `[num_tokens]`: where each token's key and value go; `block_id * block_size + offset`.
    pub slot_mapping: Vec<u32>,
    /// `[num_seqs + 1]`: sequence `i` owns rows `cu_seqlens_q[i]..cu_seqlens_q[i + 1]`.
    pub cu_seqlens_q: Vec<u32>,
    /// `[num_seqs]`: tokens of context of each sequence, this pass's included.
    pub context_lens: Vec<u32>,
    /// Block ids of all sequences, one after the other.
    pub block_tables: Vec<u32>,
    /// `[num_seqs + 1]`: sequence `i` owns `block_tables[block_table_offsets[i]..block_table_offsets[i + 1]]`.
    pub block_table_offsets: Vec<u32>,
    /// Rows whose logits are wanted, ascending. Only these pass through the head.
    pub logits_rows: Vec<u32>,
    /// `[logits_rows.len()]`: what is wanted of each; a row of which one token is wanted is never written to memory,
    /// where the backend can do without.
    pub wanted: Vec<Wanted>,
    /// Ids below this are tokens, of which those are chosen; logits beyond are padding.
    pub num_token_ids: usize,
    /// Rows whose last hidden state is wanted, ascending; see [`crate::Model::hidden_states`]. They need no
    /// logits.
    pub hidden_rows: Vec<u32>,
    /// Rows of logits are those of the vocabulary's first tokens alone; see
    /// [`crate::Model::set_short_head`].
    pub short_head: bool,
}

impl ForwardBatch {
    /// An empty batch.
    pub fn new() -> Self {
        let mut batch = ForwardBatch::default();
        batch.clear();
        batch
    }

    /// Empties the batch and keeps its buffers.
    pub fn clear(&mut self) {
        self.token_ids.clear();
        self.positions.clear();
        self.slot_mapping.clear();
        self.cu_seqlens_q.clear();
        self.cu_seqlens_q.push(0);
        self.context_lens.clear();
        self.block_tables.clear();
        self.block_table_offsets.clear();
        self.block_table_offsets.push(0);
        self.logits_rows.clear();
        self.wanted.clear();
        self.num_token_ids = usize::MAX;
        self.hidden_rows.clear();
        self.short_head = false;
    }

    /// Appends `tokens`, which stand at `start_position..` of a sequence whose earlier tokens are in
    /// the KV cache, and asks for the logits of the last `num_logits` of them, whole.
    ///
    /// # Panics
    /// If `block_table` does not cover the sequence's context, or `num_logits > tokens.len()`.
    pub fn push_sequence(
        &mut self,
        tokens: &[u32],
        start_position: usize,
        block_table: &[u32],
        block_size: usize,
        num_logits: usize,
    ) {
        let context_len = start_position + tokens.len();
        let num_blocks = context_len.div_ceil(block_size);
        assert!(num_logits <= tokens.len() && num_blocks <= block_table.len());
        for (i, &token) in tokens.iter().enumerate() {
            let position = start_position + i;
            let slot = block_table[position / block_size] as usize * block_size + position % block_size;
            self.token_ids.push(token);
            self.positions.push(position as u32);
            self.slot_mapping.push(slot as u32);
        }
        let end = self.token_ids.len();
        self.cu_seqlens_q.push(end as u32);
        self.context_lens.push(context_len as u32);
        self.block_tables.extend_from_slice(&block_table[..num_blocks]);
        self.block_table_offsets.push(self.block_tables.len() as u32);
        self.logits_rows.extend((end - num_logits..end).map(|row| row as u32));
        self.wanted.resize(self.logits_rows.len(), Wanted::Whole);
    }

    /// What is wanted of the rows that [`ForwardBatch::push_sequence`] asked for last; the last of them if `wanted` is
    /// shorter.
    pub fn want(&mut self, wanted: impl ExactSizeIterator<Item = Wanted>) {
        let begin = self.wanted.len().saturating_sub(wanted.len());
        for (row, wanted) in self.wanted[begin..].iter_mut().zip(wanted) {
            *row = wanted;
        }
    }

    /// Asks for the last hidden state of every token of the sequence that was pushed last.
    pub fn want_hidden_states(&mut self) {
        let num_seqs = self.num_seqs();
        self.hidden_rows.extend(self.cu_seqlens_q[num_seqs - 1]..self.cu_seqlens_q[num_seqs]);
    }

    /// Rows of this pass.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Sequences of this pass.
    pub fn num_seqs(&self) -> usize {
        self.context_lens.len()
    }

    /// True if there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.token_ids.is_empty()
    }
}
