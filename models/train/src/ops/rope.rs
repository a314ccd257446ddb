//! Rotary position embedding, half-split ("neox") pairs, on token-major rows.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use tandem_models::rope::RopeTable;

use super::simd::vectorized;
use super::{ROWS_PER_TASK, cpu, slice};

/// Rotates every head of one token's row; `direction` -1 undoes it.
#[inline(always)]
pub(crate) fn rotate(table: &RopeTable, head_dim: usize, row: &mut [f32], position: usize, direction: f32) {
    let half = head_dim / 2;
    let at = position * half..(position + 1) * half;
    let (cos, sin) = (&table.cos[at.clone()], &table.sin[at]);
    for head in row.chunks_exact_mut(head_dim) {
        let (low, high) = head.split_at_mut(half);
        for i in 0..half {
            let (a, b, s) = (low[i], high[i], sin[i] * direction);
            low[i] = a * cos[i] - b * s;
            high[i] = b * cos[i] + a * s;
        }
    }
}

struct Rope {
    table: Arc<RopeTable>,
    head_dim: usize,
    seq_len: usize,
}

/// Rotates `x [rows, heads * head_dim]`, whose rows are sequences of `seq_len` tokens from position 0.
pub(crate) fn rope(x: &Tensor, table: &Arc<RopeTable>, head_dim: usize, seq_len: usize) -> Result<Tensor> {
    if seq_len > table.num_positions {
        candle_core::bail!("sequence of {seq_len} tokens; the rotary table holds {}", table.num_positions)
    }
    x.apply_op1(Rope { table: Arc::clone(table), head_dim, seq_len })
}

impl Rope {
    fn rotated(&self, x: &[f32], width: usize, direction: f32) -> Vec<f32> {
        let mut out = x.to_vec();
        out.par_chunks_mut(ROWS_PER_TASK * width).enumerate().for_each(|(task, rows)| {
            vectorized(|| {
                for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                    let position = (task * ROWS_PER_TASK + i) % self.seq_len;
                    rotate(&self.table, self.head_dim, row, position, direction);
                }
            });
        });
        out
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope-fused"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        Ok((CpuStorage::F32(self.rotated(slice(x, layout)?, width, 1.0)), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let (_, width) = grad.dims2()?;
        let (storage, layout) = grad.storage_and_layout();
        let turned_back = self.rotated(slice(cpu(&storage)?, layout)?, width, -1.0);
        Ok(Some(Tensor::from_vec(turned_back, x.shape(), x.device())?))
    }
}
