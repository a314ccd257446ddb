//! Sums, factors and soft caps on whole buffers, in place: `sum + x`, `x * factor`, `cap * tanh(x / cap)`.

pub(crate) mod scalar;
pub(crate) mod vector;

use crate::LANES;
use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// Elements in a nanosecond on one core, about.
const SCALED_PER_NS: usize = 8;
const CAPPED_PER_NS: usize = 2;

/// `sum += x`, element by element.
///
/// # Panics
/// If the lengths differ.
pub fn add(pool: &ThreadPool, sum: &mut [f32], x: &[f32]) {
    assert!(sum.len() == x.len(), "add: {} elements and {}", sum.len(), x.len());
    // SAFETY: the two parts are of one length.
    in_parts(pool, sum, SCALED_PER_NS, &|begin, part| unsafe {
        (pool.kernels().add)(part, &x[begin..begin + part.len()]);
    });
}

/// `x *= factor`, element by element.
pub fn scale(pool: &ThreadPool, x: &mut [f32], factor: f32) {
    // SAFETY: the kernel takes any slice.
    in_parts(pool, x, SCALED_PER_NS, &|_, part| unsafe { (pool.kernels().scale)(part, factor) });
}

/// `x = cap * tanh(x / cap)`, element by element.
///
/// # Panics
/// If `cap` is not positive and finite.
pub fn soft_cap(pool: &ThreadPool, x: &mut [f32], cap: f32) {
    assert!(cap > 0.0 && cap.is_finite(), "soft_cap: a cap of {cap}; it must be positive and finite");
    // SAFETY: the kernel takes any slice.
    in_parts(pool, x, CAPPED_PER_NS, &|_, part| unsafe { (pool.kernels().soft_cap)(part, cap) });
}

fn in_parts(pool: &ThreadPool, x: &mut [f32], per_ns: usize, op: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    let len = x.len();
    // Whole vectors, so that only the last task has a tail.
    let units = len.div_ceil(LANES);
    let tasks = pool.num_tasks(units, 1 + LANES / per_ns);
    let x = SharedOut::new(x);
    pool.run(tasks, &|i| {
        let begin = i * units / tasks * LANES;
        let end = len.min((i + 1) * units / tasks * LANES);
        // SAFETY: tasks have different ranges.
        op(begin, unsafe { x.part(begin, end - begin) });
    });
}
