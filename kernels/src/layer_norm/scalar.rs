//! Layer normalisation in plain Rust: the specification.

use crate::LANES;
use crate::norm::scalar::fold;

pub(crate) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let mean = sum(x, |sum, x| sum + x) / x.len() as f32;
    let variance = sum(x, |sum, x| (x - mean).mul_add(x - mean, sum)) / x.len() as f32;
    let scale = 1.0 / (variance + eps).sqrt();
    for (((out, &x), &weight), &bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *out = ((x - mean) * scale).mul_add(weight, bias);
    }
}

/// The chains of [`crate::norm`].
fn sum(x: &[f32], add: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [[0.0f32; LANES]; 4];
    for (i, &x) in x.iter().enumerate() {
        let sum = &mut sums[i / LANES % 4][i % LANES];
        *sum = add(*sum, x);
    }
    fold(std::array::from_fn(|l| (sums[0][l] + sums[1][l]) + (sums[2][l] + sums[3][l])))
}
