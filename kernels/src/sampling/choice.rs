//! From a row of logits to one token: the greatest logit, or one drawn at a temperature.
//!
//! The draw is Gumbel-max with common random numbers ([`Noise`]): with `c` one less a token's uniform number, its score is
//! `logit / temperature - ln(-ln(1 - c))`, and the greatest score wins; of equals, the lowest id. A score is a
//! function of its own token alone, so a row can be cut anywhere and looked at in any order: whoever has the
//! greatest score of all parts has won. That makes the choice part of the product that computes the logits
//! ([`crate::matmul::head`]).
//!
//! Most tokens are passed over without a logarithm: `-ln(1 - c) >= c`, so a token cannot have won unless
//! `log2(c) < (logit / temperature - best score) * log2(e)`, of which bounds cost a few operations on 16 tokens at a
//! time.
//!
//! A token's *share*, its probability at temperature 1, is of sums over 512 logits each, added in order.

use super::noise::Noise;
use crate::math;
use crate::math::double::{ln, ln_1p};

/// Logits whose exponentials are added up relative to their own maximum; where chunks begin is part of what a
/// share is.
pub(crate) const SHARE_CHUNK: usize = 512;

/// A draw at a temperature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Race {
    /// The position's noise.
    pub noise: Noise,
    /// One over the temperature; positive.
    pub inverse_temperature: f64,
}

/// How a row's token is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Choice {
    /// Drawn like this; `None`: the greatest logit, the first of equals.
    pub race: Option<Race>,
    /// Its share is wanted, too.
    pub share: bool,
}

/// The token that a row gives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chosen {
    /// Its id.
    pub token: u32,
    /// Its probability at temperature 1; 0 if nobody asked.
    pub share: f32,
    /// None of the row's logits is NaN or infinite. If one is, the rest means nothing.
    pub is_finite: bool,
}

/// The best token of the part of a row that was looked at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Best {
    pub(crate) id: u32,
    pub(crate) logit: f32,
    /// What it won with: the logit itself, or the score of a race.
    pub(crate) score: f64,
    /// No logit so far was NaN or infinite.
    pub(crate) is_finite: bool,
}

/// The exponentials of a chunk, added: `sum * exp(max)`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Mass {
    pub(crate) max: f32,
    pub(crate) sum: f32,
}

impl Mass {
    /// The sum relative to a greater maximum, logits being multiplied by `factor`.
    pub(crate) fn relative_to(&self, max: f32, factor: f32) -> f64 {
        f64::from(self.sum) * f64::from(math::exp((self.max - max) * factor))
    }
}

impl Race {
    /// See the file's header. Negative infinity for a logit of that.
    #[inline]
    pub fn score(&self, id: u32, logit: f32) -> f64 {
        f64::from(logit) * self.inverse_temperature - ln(-ln_1p(-self.noise.complement(id)))
    }

    /// Lets a token run against the best of those before it.
    #[inline]
    pub(crate) fn offer(&self, best: &mut Best, id: u32, logit: f32) {
        let lead = f64::from(logit) * self.inverse_temperature - best.score;
        if lead <= 0.0 && self.noise.complement(id) >= power_of_two_above(lead) {
            return;
        }
        let score = self.score(id, logit);
        if score > best.score {
            *best = Best { id, logit, score, is_finite: best.is_finite };
        }
    }

    /// The winner among `candidates`, of equals the first; 0 if none has a logit above negative infinity.
    pub fn winner(&self, candidates: impl Iterator<Item = (u32, f32)>) -> u32 {
        let mut best = Best::NONE;
        candidates.for_each(|(id, logit)| self.offer(&mut best, id, logit));
        best.id
    }
}

/// A power of two that is at least twice `exp(x)`, for `x <= 0`; for very small `x`, 2^-1021.
#[inline]
fn power_of_two_above(x: f64) -> f64 {
    // Truncation rounds a negative number up.
    let exponent = (x * std::f64::consts::LOG2_E).max(-1022.0) as i64 + 1;
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

impl Best {
    /// Before anything was looked at.
    pub(crate) const NONE: Best =
        Best { id: 0, logit: f32::NEG_INFINITY, score: f64::NEG_INFINITY, is_finite: true };

    /// The better of two parts of a row.
    pub(crate) fn or(self, other: Best) -> Best {
        let wins = other.score > self.score || (other.score == self.score && other.id < self.id);
        Best { is_finite: self.is_finite && other.is_finite, ..if wins { other } else { self } }
    }

    /// What the row gives, `masses` being those of all its chunks, if a share is wanted.
    pub(crate) fn chosen(self, masses: &[Mass]) -> Chosen {
        let Best { id: token, logit, is_finite, .. } = self;
        let max = masses.iter().map(|mass| mass.max).fold(f32::NEG_INFINITY, f32::max);
        let total: f64 = masses.iter().map(|mass| mass.relative_to(max, 1.0)).sum();
        let share = if masses.is_empty() { 0.0 } else { f64::from(math::exp(logit - max)) / total };
        Chosen { token, share: share as f32, is_finite }
    }
}
