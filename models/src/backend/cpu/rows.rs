//! Rows that are copied from place to place on the CPU: hidden states to and from slots beside the KV cache, columns
//! side by side, and the rows that get logits. Each function is the operation of its name in
//! [`Backend`](crate::backend::Backend).

use crate::backend::{Columns, Rows};
use crate::batch::ForwardBatch;
use crate::error::ModelError;

/// Not made ready ahead of use, as keys and values are: first touching a row of 896 to 3584 numbers takes 3 to 9 us,
/// once a token and not once a layer.
pub(super) fn allocate_slots(num_slots: usize, width: usize) -> Result<Vec<f32>, ModelError> {
    let zeros = num_slots.checked_mul(width).map(bytemuck::allocation::try_zeroed_vec::<f32>);
    zeros.and_then(Result::ok).ok_or_else(|| ModelError::Backend {
        context: "KV cache",
        reason: format!("no memory for the hidden states of {num_slots} tokens, {width} numbers each"),
    })
}

pub(super) fn store_slots(inputs: &ForwardBatch, rows: Rows, width: usize, x: &[f32], store: &mut [f32]) {
    let mut put = |slot: u32, row: &[f32]| {
        let at = slot as usize * width;
        store[at..at + width].copy_from_slice(row);
    };
    let values = x.chunks_exact(width);
    match rows {
        Rows::All => inputs.slot_mapping.iter().zip(values).for_each(|(&slot, row)| put(slot, row)),
        Rows::Logits => {
            let slots = inputs.logits_rows.iter().map(|&row| inputs.slot_mapping[row as usize]);
            slots.zip(values).for_each(|(slot, row)| put(slot, row));
        }
    }
}

pub(super) fn load_slots_before(
    inputs: &ForwardBatch,
    block_size: usize,
    width: usize,
    store: &[f32],
    out: &mut [f32],
) {
    for sequence in 0..inputs.num_seqs() {
        let rows = inputs.cu_seqlens_q[sequence] as usize..inputs.cu_seqlens_q[sequence + 1] as usize;
        let blocks = &inputs.block_tables[inputs.block_table_offsets[sequence] as usize..];
        for row in rows {
            let to = &mut out[row * width..(row + 1) * width];
            match (inputs.positions[row] as usize).checked_sub(1) {
                None => to.fill(0.0),
                Some(before) => {
                    let slot = blocks[before / block_size] as usize * block_size + before % block_size;
                    to.copy_from_slice(&store[slot * width..(slot + 1) * width]);
                }
            }
        }
    }
}

pub(super) fn put_columns(rows: usize, x: &[f32], columns: Columns, out: &mut [f32]) {
    let Columns { first, width, of } = columns;
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(of)).take(rows) {
        out[first..first + width].copy_from_slice(x);
    }
}

pub(super) fn pick_logits_rows(inputs: &ForwardBatch, width: usize, x: &mut [f32]) {
    for (to, &from) in inputs.logits_rows.iter().enumerate() {
        let from = from as usize * width;
        x.copy_within(from..from + width, to * width);
    }
}
