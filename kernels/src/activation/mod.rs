//! The gate of a SwiGLU layer: `silu(gate) * up`, with `silu(g) = g / (1 + exp(-g))`.

pub(crate) mod scalar;
pub(crate) mod vector;

use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// Elements in a nanosecond on one core, about.
const ELEMENTS_PER_NS: usize = 2;

/// `out = silu(gate) * up`, element by element.
///
/// # Panics
/// If the lengths differ.
pub fn silu_mul(pool: &ThreadPool, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let len = gate.len();
    assert!(
        up.len() == len && out.len() == len,
        "silu_mul: gate has {len} elements, up {}, out {}",
        up.len(),
        out.len()
    );
    // Whole vectors, so that only the last task has a tail.
    let units = len.div_ceil(crate::LANES);
    let tasks = pool.num_tasks(units, 1 + crate::LANES / ELEMENTS_PER_NS);
    let out = SharedOut::new(out);
    pool.run(tasks, &|i| {
        let begin = i * units / tasks * crate::LANES;
        let end = len.min((i + 1) * units / tasks * crate::LANES);
        // SAFETY: tasks have different ranges; lengths are equal.
        unsafe {
            let out = out.part(begin, end - begin);
            (pool.kernels().silu_mul)(&gate[begin..end], &up[begin..end], out);
        }
    });
}

/// As [`silu_mul`] on the output of a stacked projection: `gate_up: [rows, 2 * width]`, each row its
/// gate and then its up half; `out: [rows, width]`.
///
/// # Panics
/// If `width` is 0 or the lengths do not fit it.
pub fn silu_mul_stacked(pool: &ThreadPool, gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert!(
        width > 0 && out.len().is_multiple_of(width) && gate_up.len() == 2 * out.len(),
        "silu_mul_stacked: gate_up has {} elements and out {} for rows of width {width}",
        gate_up.len(),
        out.len()
    );
    let rows = out.len() / width;
    let tasks = pool.num_tasks(rows, 1 + width / ELEMENTS_PER_NS);
    let out = SharedOut::new(out);
    pool.run(tasks, &|i| {
        for row in i * rows / tasks..(i + 1) * rows / tasks {
            let (gate, up) = gate_up[row * 2 * width..(row + 1) * 2 * width].split_at(width);
            // SAFETY: a row belongs to one task; lengths are equal.
            unsafe { (pool.kernels().silu_mul)(gate, up, out.part(row * width, width)) };
        }
    });
}
