//! RMS normalisation in plain Rust: the specification.

use crate::LANES;

pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mut sums = [[0.0f32; LANES]; 4];
    for (i, &x) in x.iter().enumerate() {
        let sum = &mut sums[i / LANES % 4][i % LANES];
        *sum = x.mul_add(x, *sum);
    }
    let lanes = std::array::from_fn(|l| (sums[0][l] + sums[1][l]) + (sums[2][l] + sums[3][l]));
    let mean = fold(lanes) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// The sum of 16 lanes, folded in halves.
pub(crate) fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

pub(crate) fn add(sum: &mut [f32], x: &[f32]) {
    for (sum, &x) in sum.iter_mut().zip(x) {
        *sum += x;
    }
}
