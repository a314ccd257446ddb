//! Nonlinearities of feed-forward layers: the gates, and GELU in its tanh form by itself.
//!
//! `silu(x) = x / (1 + exp(-x))`;
//! `gelu(x) = (0.5 * x) * (1 + tanh(0.797_884_6 * fma(0.044_715 * x * x, x, x)))`.

pub(crate) mod scalar;
pub(crate) mod vector;

use crate::LANES;
use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// `sqrt(2 / pi)`
pub(crate) const GELU_INNER: f32 = 0.797_884_6;
pub(crate) const GELU_CUBE: f32 = 0.044_715;

/// Elements in a nanosecond on one core, about.
const ELEMENTS_PER_NS: usize = 1;

/// What stands between the projections of a gated layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    /// `silu(gate) * up`
    Silu,
    /// `gelu(gate) * up`
    Gelu,
    /// `(clamp(up, -limit, limit) + 1) * (g / (1 + exp(-alpha * g)))` with `g = min(gate, limit)`. A NaN
    /// is not clamped.
    ClampedSwiglu {
        /// Gain of the sigmoid.
        alpha: f32,
        /// Bound of gate and up.
        limit: f32,
    },
}

/// `out` = the gate of every row of `gate_up: [rows, 2 * width]`, each row its gate and then its up half;
/// `out: [rows, width]`.
///
/// # Panics
/// If `width` is 0 or the lengths do not fit it.
pub fn gate_stacked(pool: &ThreadPool, gate: Gate, gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert!(
        width > 0 && out.len().is_multiple_of(width) && gate_up.len() == 2 * out.len(),
        "gate_stacked: gate_up has {} elements and out {} for rows of width {width}",
        gate_up.len(),
        out.len()
    );
    let rows = out.len() / width;
    let tasks = pool.num_tasks(rows, 1 + width / ELEMENTS_PER_NS);
    let out = SharedOut::new(out);
    pool.run(tasks, &|i| {
        for row in i * rows / tasks..(i + 1) * rows / tasks {
            let (gates, ups) = gate_up[row * 2 * width..(row + 1) * 2 * width].split_at(width);
            // SAFETY: a row belongs to one task; lengths are equal.
            unsafe { (pool.kernels().gate)(gate, gates, ups, out.part(row * width, width)) };
        }
    });
}

/// `out = gelu(x)`, element by element.
///
/// # Panics
/// If the lengths differ.
pub fn gelu(pool: &ThreadPool, x: &[f32], out: &mut [f32]) {
    let len = x.len();
    assert!(out.len() == len, "gelu: x has {len} elements, out {}", out.len());
    // Whole vectors, so that only the last task has a tail.
    let units = len.div_ceil(LANES);
    let tasks = pool.num_tasks(units, 1 + LANES / ELEMENTS_PER_NS);
    let out = SharedOut::new(out);
    pool.run(tasks, &|i| {
        let begin = i * units / tasks * LANES;
        let end = len.min((i + 1) * units / tasks * LANES);
        // SAFETY: tasks have different ranges; lengths are equal.
        unsafe { (pool.kernels().gelu)(&x[begin..end], out.part(begin, end - begin)) };
    });
}
