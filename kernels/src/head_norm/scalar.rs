//! RMS normalisation in place in plain Rust: the specification.

use crate::LANES;
use crate::norm::scalar::fold;

pub(crate) fn head_norm(head: &mut [f32], weight: &[f32], eps: f32) {
    let mut sums = [[0.0f32; LANES]; 4];
    for (i, &x) in head.iter().enumerate() {
        let sum = &mut sums[i / LANES % 4][i % LANES];
        *sum = x.mul_add(x, *sum);
    }
    let lanes = std::array::from_fn(|l| (sums[0][l] + sums[1][l]) + (sums[2][l] + sums[3][l]));
    let scale = 1.0 / (fold(lanes) / head.len() as f32 + eps).sqrt();
    for (x, &weight) in head.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}
