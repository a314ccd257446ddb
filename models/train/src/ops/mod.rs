//! Fused operations with hand-written backward passes, as candle custom ops.
//!
//! candle's plain autograd builds a softmax, a norm or a rotation from half a dozen tensors, each
//! a pass over memory, and candle-nn's own fused `rms_norm`, `softmax_last_dim` and `rope` have no
//! backward (they cut the graph without an error). These do one pass forward and one backward, in f32 on the CPU; matrix products go
//! through candle's gemm.
//!
//! Invariant: every reduction runs in one order that depends on shapes only, never on threads, so
//! equal inputs give equal bits. Each op is held to finite differences and to plain autograd.

mod attention;
mod head_loss;
mod linear;
mod norm;
mod rope;
mod silu_mul;
pub(crate) mod simd;
#[cfg(test)]
mod tests;

pub(crate) use attention::{AttentionShape, causal_attention};
pub(crate) use head_loss::{HeadLoss, Teacher, score};
pub(crate) use linear::linear;
pub(crate) use norm::rms_norm;
pub(crate) use rope::{rope, rotate};
pub(crate) use silu_mul::silu_mul;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Result, Storage};

/// Rows that one task takes; fixed, because partial sums of a reduction are cut here.
const ROWS_PER_TASK: usize = 64;

/// The elements of a contiguous f32 tensor on the CPU.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("fused op needs a contiguous argument, got strides {:?}", layout.stride())
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

fn cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => candle_core::bail!("fused op runs on the CPU only"),
    }
}

/// Layout of a row-strided matrix inside a larger buffer: `[rows, cols]` starting at `offset`.
fn matrix(rows: usize, cols: usize, row_stride: usize, offset: usize) -> Layout {
    Layout::new((rows, cols).into(), vec![row_stride, 1], offset)
}

/// The transpose of [`matrix`]: `[cols, rows]`.
fn transposed(rows: usize, cols: usize, row_stride: usize, offset: usize) -> Layout {
    Layout::new((cols, rows).into(), vec![1, row_stride], offset)
}

/// `lhs [m, k] @ rhs [k, n]` with candle's gemm, on layouts of any stride.
fn matmul(lhs: (&CpuStorage, &Layout), rhs: (&CpuStorage, &Layout)) -> Result<Vec<f32>> {
    let (m, k) = lhs.1.shape().dims2()?;
    let n = rhs.1.shape().dims2()?.1;
    match lhs.0.matmul(rhs.0, (1, m, n, k), lhs.1, rhs.1)? {
        CpuStorage::F32(product) => Ok(product),
        _ => candle_core::bail!("fused op needs f32"),
    }
}
