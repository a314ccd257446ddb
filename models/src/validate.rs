//! What a batch must satisfy before it reaches kernels that use its numbers as addresses. Costs one
//! comparison a number.

use crate::batch::ForwardBatch;
use crate::error::ModelError;
use crate::kv_cache::KvLayout;

/// The bounds of a loaded model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) vocab_size: usize,
    pub(crate) num_positions: usize,
    pub(crate) kv: KvLayout,
}

impl Bounds {
    /// Fails unless every number of `batch` is in bounds and its arrays fit together.
    pub(crate) fn check(&self, batch: &ForwardBatch) -> Result<(), ModelError> {
        let num_tokens = batch.num_tokens();
        let num_seqs = batch.num_seqs();
        let lengths = batch.positions.len() == num_tokens && batch.slot_mapping.len() == num_tokens;
        require(lengths, || "token_ids, positions and slot_mapping differ in length".to_owned())?;
        require(is_partition(&batch.cu_seqlens_q, num_seqs, num_tokens), || {
            format!("cu_seqlens_q {:?} does not cut {num_tokens} rows into {num_seqs}", batch.cu_seqlens_q)
        })?;
        let num_ids = batch.block_tables.len();
        require(is_partition(&batch.block_table_offsets, num_seqs, num_ids), || {
            let offsets = &batch.block_table_offsets;
            format!("block_table_offsets {offsets:?} does not cut {num_ids} ids into {num_seqs}")
        })?;
        below("token id", &batch.token_ids, self.vocab_size)?;
        below("block", &batch.block_tables, self.kv.num_blocks)?;
        below("logits row", &batch.logits_rows, num_tokens)?;
        below("hidden row", &batch.hidden_rows, num_tokens)?;
        require(batch.wanted.len() == batch.logits_rows.len() && batch.num_token_ids > 0, || {
            let (wanted, rows) = (batch.wanted.len(), batch.logits_rows.len());
            format!("{wanted} wants of {rows} logits rows, of {} tokens", batch.num_token_ids)
        })?;
        for (name, rows) in [("logits_rows", &batch.logits_rows), ("hidden_rows", &batch.hidden_rows)] {
            require(rows.is_sorted_by(|a, b| a < b), || format!("{name} {rows:?} are not ascending"))?;
        }
        (0..num_seqs).try_for_each(|seq| self.check_sequence(batch, seq))
    }

    /// A sequence's rows are the last tokens of its context, and lie where its block table says.
    fn check_sequence(&self, batch: &ForwardBatch, seq: usize) -> Result<(), ModelError> {
        let rows = batch.cu_seqlens_q[seq] as usize..batch.cu_seqlens_q[seq + 1] as usize;
        let blocks = batch.block_table_offsets[seq] as usize..batch.block_table_offsets[seq + 1] as usize;
        let blocks = &batch.block_tables[blocks];
        let context_len = batch.context_lens[seq] as usize;
        let block_size = self.kv.block_size;
        require(context_len <= self.num_positions, || {
            format!("sequence {seq} has a context of {context_len} tokens; at most {}", self.num_positions)
        })?;
        require(context_len <= blocks.len() * block_size, || {
            format!("sequence {seq} has {} blocks for a context of {context_len} tokens", blocks.len())
        })?;
        require(rows.len() <= context_len, || {
            format!("sequence {seq} has {} rows in a context of {context_len} tokens", rows.len())
        })?;
        for (position, row) in (context_len - rows.len()..).zip(rows) {
            let slot = blocks[position / block_size] as usize * block_size + position % block_size;
            let (found_position, found_slot) = (batch.positions[row], batch.slot_mapping[row]);
            require((found_position as usize, found_slot as usize) == (position, slot), || {
                format!(
                    "row {row} of sequence {seq} has position {found_position} and slot {found_slot}; \
                     context and block table put it at position {position} and slot {slot}"
                )
            })?;
        }
        Ok(())
    }
}

fn require(holds: bool, reason: impl FnOnce() -> String) -> Result<(), ModelError> {
    if holds { Ok(()) } else { Err(ModelError::Backend { context: "forward batch", reason: reason() }) }
}

fn below(what: &str, values: &[u32], bound: usize) -> Result<(), ModelError> {
    match values.iter().max() {
        Some(&max) => {
            require((max as usize) < bound, || format!("{what} {max} does not exist; there are {bound}"))
        }
        None => Ok(()),
    }
}

/// True if `offsets` are `parts + 1` numbers that rise from 0 to `total`.
fn is_partition(offsets: &[u32], parts: usize, total: usize) -> bool {
    offsets.len() == parts + 1 && offsets[0] == 0 && offsets[parts] as usize == total && offsets.is_sorted()
}

#[cfg(test)]
mod tests {
    use tandem_kernels::kv::{KvType, Values};

    use super::*;

    const BOUNDS: Bounds = Bounds {
        vocab_size: 10,
        num_positions: 64,
        kv: KvLayout {
            num_layers: 1,
            num_blocks: 4,
            block_size: 4,
            num_kv_heads: 1,
            head_dim: 4,
            values: Values::Own,
            kv_type: KvType::F32,
        },
    };

    fn batch() -> ForwardBatch {
        let mut batch = ForwardBatch::new();
        batch.push_sequence(&[1, 2, 3], 4, &[2, 0], 4, 1);
        batch.push_sequence(&[9], 0, &[3], 4, 1);
        batch
    }

    #[test]
    fn a_good_batch_passes() {
        BOUNDS.check(&batch()).unwrap();
        BOUNDS.check(&ForwardBatch::new()).unwrap();
    }

    #[test]
    fn every_bad_number_is_named() {
        type Break = fn(&mut ForwardBatch);
        let cases: [(&str, Break); 15] = [
            ("token id 10", |batch| batch.token_ids[0] = 10),
            ("row 2 of sequence 0 has position 7", |batch| batch.positions[2] = 7),
            ("row 3 of sequence 1 has position 0 and slot 11", |batch| batch.slot_mapping[3] = 11),
            ("block 4", |batch| batch.block_tables[2] = 4),
            ("logits row 4", |batch| batch.logits_rows[1] = 4),
            ("ascending", |batch| batch.logits_rows[0] = 3),
            ("1 wants of 2 logits rows", |batch| batch.wanted.truncate(1)),
            ("of 0 tokens", |batch| batch.num_token_ids = 0),
            ("cu_seqlens_q", |batch| batch.cu_seqlens_q[1] = 5),
            ("block_table_offsets", |batch| batch.block_table_offsets[0] = 1),
            ("2 blocks for a context of 9", |batch| batch.context_lens[0] = 9),
            ("3 rows in a context of 2", |batch| batch.context_lens[0] = 2),
            ("context of 65 tokens; at most 64", |batch| batch.context_lens[0] = 65),
            ("differ in length", |batch| batch.slot_mapping.truncate(1)),
            ("cu_seqlens_q", |batch| batch.context_lens.push(1)),
        ];
        for (wanted, break_it) in cases {
            let mut batch = batch();
            break_it(&mut batch);
            let message = BOUNDS.check(&batch).unwrap_err().to_string();
            assert!(message.contains(wanted), "{message} lacks {wanted}");
        }
    }
}
