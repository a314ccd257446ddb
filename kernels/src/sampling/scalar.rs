//! The sampler's kernels in plain Rust: the specification.

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

/// Appends all values that are at least `least`, in order, with their ids, of which the first is `first`.
pub(crate) fn collect(logits: &[f32], first: u32, least: f32, out: &mut Vec<(u32, f32)>) {
    out.extend((first..).zip(logits.iter().copied()).filter(|&(_, logit)| logit >= least));
}

/// Makes every logit whose bit is not set negative infinity: bit `i` of word `w` is that of logit `32 w + i`, and of
/// words that are missing none is set.
#[inline(always)]
pub(crate) fn mask(logits: &mut [f32], words: &[u32]) {
    let num_covered = logits.len().min(32 * words.len());
    let (covered, rest) = logits.split_at_mut(num_covered);
    for (logits, &word) in covered.chunks_mut(32).zip(words) {
        if word != u32::MAX {
            for (bit, logit) in logits.iter_mut().enumerate() {
                *logit = if word & (1 << bit) != 0 { *logit } else { f32::NEG_INFINITY };
            }
        }
    }
    rest.fill(f32::NEG_INFINITY);
}
