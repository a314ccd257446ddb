//! Layer normalisation: `out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, row by row.
//!
//! Both sums, of the elements and of the squares of their distances from the mean, run in the 64 chains
//! of [`crate::norm`] and are added in the same order.

pub(crate) mod scalar;
pub(crate) mod vector;

use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// Elements of a row in a nanosecond on one core, about.
const ELEMENTS_PER_NS: usize = 5;

/// One row: its elements, weight, bias and epsilon, and the output.
pub(crate) type Kernel = unsafe fn(&[f32], &[f32], &[f32], f32, &mut [f32]);

/// Normalises every row of `x: [rows, weight.len()]` into `out`, of the same shape.
///
/// # Panics
/// If `x` is not whole rows, or `out` or `bias` does not fit.
pub fn layer_norm(pool: &ThreadPool, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert!(
        width > 0 && x.len().is_multiple_of(width),
        "layer_norm: x has {} elements, not whole rows of {width}",
        x.len()
    );
    assert!(out.len() == x.len(), "layer_norm: out has {} elements, x {}", out.len(), x.len());
    assert!(bias.len() == width, "layer_norm: bias has {} elements, weight {width}", bias.len());
    let rows = x.len() / width;
    let out = SharedOut::new(out);
    let tasks = pool.num_tasks(rows, 1 + width / ELEMENTS_PER_NS);
    pool.run(tasks, &|i| {
        for row in i * rows / tasks..(i + 1) * rows / tasks {
            let x = &x[row * width..(row + 1) * width];
            // SAFETY: a row belongs to one task; lengths are equal.
            unsafe { (pool.kernels().layer_norm)(x, weight, bias, eps, out.part(row * width, width)) };
        }
    });
}
