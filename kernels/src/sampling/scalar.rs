//! The sampler's kernels in plain Rust: the specification.

use crate::math::exp;

pub(crate) fn argmax(values: &[f32]) -> usize {
    let mut best = (0, f32::NEG_INFINITY);
    for (i, &value) in values.iter().enumerate() {
        if value > best.1 {
            best = (i, value);
        }
    }
    best.0
}

pub(crate) fn all_finite(values: &[f32]) -> bool {
    values.iter().all(|value| value.is_finite())
}

pub(crate) fn exp_sub(x: &[f32], max: f32, out: &mut [f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = exp(x - max);
    }
}
