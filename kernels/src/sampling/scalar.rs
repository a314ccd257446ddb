//! The sampler's kernels in plain Rust: the specification.

use super::MAXIMUM_OF;
use super::choice::{Best, Mass, Race};
use crate::LANES;
use crate::math::exp;
use crate::norm::scalar::fold;

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

pub(crate) fn greatest(logits: &[f32], first: u32, best: &mut Best) {
    for (id, &logit) in (first..).zip(logits) {
        best.is_finite &= logit.is_finite();
        if f64::from(logit) > best.score {
            *best = Best { id, logit, score: f64::from(logit), is_finite: best.is_finite };
        }
    }
}

pub(crate) fn race(logits: &[f32], first: u32, race: &Race, best: &mut Best) {
    for (id, &logit) in (first..).zip(logits) {
        best.is_finite &= logit.is_finite();
        race.offer(best, id, logit);
    }
}

pub(crate) fn mass(logits: &[f32], factor: f32) -> Mass {
    let max =
        logits.iter().copied().fold(f32::NEG_INFINITY, |max, logit| if logit > max { logit } else { max });
    let mut sums = [0.0f32; LANES];
    for (i, &logit) in logits.iter().enumerate() {
        sums[i % LANES] += exp((logit - max) * factor);
    }
    Mass { max, sum: fold(sums) }
}

pub(crate) fn maxima(logits: &[f32], out: &mut Vec<f32>) {
    let greater = |max, &logit| if logit > max { logit } else { max };
    out.extend(logits.chunks(MAXIMUM_OF).map(|chunk| chunk.iter().fold(f32::NEG_INFINITY, greater)));
}

pub(crate) fn collect(logits: &[f32], least: f32, out: &mut Vec<(u32, f32)>) {
    out.extend((0..).zip(logits.iter().copied()).filter(|&(_, logit)| logit >= least));
}
