//! RMS normalisation, in place, of parts of rows: of the heads of queries and keys inside the output of
//! a stacked projection. The sum of squares runs in the chains of [`crate::norm`], over one part.

pub(crate) mod scalar;
pub(crate) mod vector;

use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// Elements in a nanosecond on one core, about.
const ELEMENTS_PER_NS: usize = 6;

/// Where the parts stand.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Rows.
    pub rows: usize,
    /// Elements from one row's first part to the next row's.
    pub row_stride: usize,
    /// Consecutive parts of a row; each is as wide as the weight.
    pub num_heads: usize,
}

/// `part = part / sqrt(mean(part^2) + eps) * weight` for `heads.num_heads` parts of each row; row `r`
/// begins at `r * row_stride`.
///
/// # Panics
/// If the weight is empty, the parts overlap the next row, or `x` is too short.
pub fn head_norm(pool: &ThreadPool, x: &mut [f32], weight: &[f32], eps: f32, heads: Heads) {
    let Heads { rows, row_stride, num_heads } = heads;
    let (head_dim, width) = (weight.len(), num_heads * weight.len());
    assert!(head_dim > 0, "head_norm: the weight is empty");
    assert!(
        row_stride >= width,
        "head_norm: parts of {width} elements in rows with a stride of {row_stride}"
    );
    let needed = rows.checked_sub(1).map_or(0, |last| last * row_stride + width);
    assert!(x.len() >= needed, "head_norm: x has {} elements; {rows} rows need {needed}", x.len());
    let tasks = pool.num_tasks(rows, 1 + width / ELEMENTS_PER_NS);
    let x = SharedOut::new(x);
    pool.run(tasks, &|i| {
        for row in i * rows / tasks..(i + 1) * rows / tasks {
            // SAFETY: a row belongs to one task and rows do not overlap.
            let parts = unsafe { x.part(row * row_stride, width) };
            for part in parts.chunks_exact_mut(head_dim) {
                // SAFETY: the part is as long as the weight.
                unsafe { (pool.kernels().head_norm)(part, weight, eps) };
            }
        }
    });
}
