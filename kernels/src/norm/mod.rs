//! RMS normalisation: `out = x / sqrt(mean(x^2) + eps) * weight`, row by row.
//!
//! The sum of squares runs in 64 chains: element `i` goes to lane `i % 16` of accumulator
//! `i / 16 % 4`. The accumulators are then added as `(a0 + a1) + (a2 + a3)` and the lanes folded in
//! halves (8, 4, 2, 1).

pub(crate) mod scalar;
pub(crate) mod vector;

use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// Elements of a row in a nanosecond on one core, about.
const ELEMENTS_PER_NS: usize = 8;

/// Normalises every row of `x: [rows, weight.len()]` into `out`, of the same shape.
///
/// # Panics
/// If `x` is not whole rows or `out` differs from it in length.
pub fn rms_norm(pool: &ThreadPool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    let rows = check("rms_norm", x.len(), width, out.len());
    let out = SharedOut::new(out);
    let tasks = pool.num_tasks(rows, 1 + width / ELEMENTS_PER_NS);
    pool.run(tasks, &|i| {
        for row in i * rows / tasks..(i + 1) * rows / tasks {
            let x = &x[row * width..(row + 1) * width];
            // SAFETY: a row belongs to one task; lengths are equal.
            unsafe { (pool.kernels().rms_norm)(x, weight, eps, out.part(row * width, width)) };
        }
    });
}

/// `residual += x`, then normalises every row of the new `residual` into `out`. All are
/// `[rows, weight.len()]`.
///
/// # Panics
/// If `x` is not whole rows or a length differs.
pub fn add_rms_norm(
    pool: &ThreadPool,
    residual: &mut [f32],
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let width = weight.len();
    let rows = check("add_rms_norm", x.len(), width, out.len());
    assert!(
        residual.len() == x.len(),
        "add_rms_norm: residual has {} elements, x {}",
        residual.len(),
        x.len()
    );
    let out = SharedOut::new(out);
    let residual = SharedOut::new(residual);
    let tasks = pool.num_tasks(rows, 1 + width / ELEMENTS_PER_NS);
    pool.run(tasks, &|i| {
        for row in i * rows / tasks..(i + 1) * rows / tasks {
            let x = &x[row * width..(row + 1) * width];
            // SAFETY: a row of either slice belongs to one task; lengths are equal.
            unsafe {
                let residual = residual.part(row * width, width);
                (pool.kernels().add)(residual, x);
                (pool.kernels().rms_norm)(residual, weight, eps, out.part(row * width, width));
            }
        }
    });
}

fn check(op: &str, len: usize, width: usize, out_len: usize) -> usize {
    assert!(width > 0, "{op}: the weight is empty");
    assert!(len.is_multiple_of(width), "{op}: x has {len} elements, not whole rows of {width}");
    assert!(out_len == len, "{op}: out has {out_len} elements, x {len}");
    len / width
}
