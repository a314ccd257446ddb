//! What a sampler does to a row of logits. One row, one thread: rows are sampled in the engine's thread.

pub(crate) mod scalar;

use std::sync::OnceLock;

use crate::dispatch::{self, Kernels};
use crate::isa;

fn active() -> &'static Kernels {
    static ACTIVE: OnceLock<&'static Kernels> = OnceLock::new();
    ACTIVE.get_or_init(|| dispatch::kernels(isa::active()))
}

/// The index of the largest value, the first of equals; NaN never wins. 0 if nothing is larger than
/// negative infinity.
///
/// # Panics
/// If `values` is empty.
pub fn argmax(values: &[f32]) -> usize {
    assert!(!values.is_empty(), "argmax of nothing");
    // SAFETY: the table is of an available instruction set; any length will do.
    unsafe { (active().argmax)(values) }
}

/// True if no value is NaN or infinite.
pub fn all_finite(values: &[f32]) -> bool {
    // SAFETY: the table is of an available instruction set; any length will do.
    unsafe { (active().all_finite)(values) }
}

/// `out = exp(x - max)`, element by element, with [`crate::math::exp`].
///
/// # Panics
/// If the lengths differ.
pub fn exp_sub(x: &[f32], max: f32, out: &mut [f32]) {
    assert!(x.len() == out.len(), "exp_sub: x has {} elements, out {}", x.len(), out.len());
    // SAFETY: the table is of an available instruction set; lengths are equal.
    unsafe { (active().exp_sub)(x, max, out) }
}

/// `ln(sum of exp(x))`, summed in f64 in order: `logits[i] - log_sum_exp(logits)` is the log
/// probability of token `i`. Negative infinity for an empty row.
pub fn log_sum_exp(x: &[f32]) -> f64 {
    if x.is_empty() {
        return f64::NEG_INFINITY;
    }
    let max = x[argmax(x)];
    if max == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    const CHUNK: usize = 512;
    let mut exps = [0.0; CHUNK];
    let mut sum = 0.0;
    for chunk in x.chunks(CHUNK) {
        let exps = &mut exps[..chunk.len()];
        exp_sub(chunk, max, exps);
        sum += exps.iter().map(|&e| f64::from(e)).sum::<f64>();
    }
    f64::from(max) + sum.ln()
}
