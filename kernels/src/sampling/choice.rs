//! From a row of logits to one token: the greatest logit, or one drawn at a temperature.
//!
//! Before that, logits of some tokens may be changed and all but some tokens masked; of what is left top-k, top-p and
//! min-p may keep only the likeliest (`candidates.rs`).
//!
//! The draw is Gumbel-max with common random numbers ([`Noise`]): with `c` one less a token's uniform number, its score
//! is `logit / temperature - ln(-ln(1 - c))`, and the greatest score wins; of equals, the lowest id. A score is a
//! function of its own token alone, so a row can be cut anywhere and looked at in any order: whoever has the
//! greatest score of all parts has won. That makes the choice part of the product that computes the logits
//! ([`crate::matmul::head`]).
//!
//! Most tokens are passed over without a logarithm: `-ln(1 - c) >= c`, so a token cannot have won unless
//! `log2(c) < (logit / temperature - best score) * log2(e)`, of which bounds cost a few operations on 16 tokens at a
//! time.
//!
//! Sums of exponentials, such as a token's *share*, its probability at temperature 1, is of, are sums over 512 logits
//! each, added in order.

use std::sync::Arc;

use super::noise::Noise;
use crate::dispatch::Kernels;
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

/// The tokens that a race is run among: by temperature, first the `top_k` likeliest, of those the likeliest whose
/// probabilities reach `top_p`, of those the ones that are at least `min_p` times as likely as the likeliest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Keep {
    /// 0: all.
    pub top_k: u32,
    /// In `(0, 1]`; 1: all.
    pub top_p: f32,
    /// In `[0, 1]`; 0: all.
    pub min_p: f32,
}

impl Keep {
    /// Every token.
    pub const ALL: Keep = Keep { top_k: 0, top_p: 1.0, min_p: 0.0 };

    /// True if it may leave a token out.
    pub fn is_some(&self) -> bool {
        *self != Keep::ALL
    }
}

impl Default for Keep {
    fn default() -> Self {
        Keep::ALL
    }
}

/// What becomes of one token's logit before a token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// The token.
    pub id: u32,
    /// Added first.
    pub bias: f32,
    /// Then a positive logit is divided by it, another multiplied; positive, 1 changes nothing.
    pub repetition: f32,
    /// Then subtracted.
    pub less: f32,
    /// It cannot be chosen.
    pub is_forbidden: bool,
}

impl Change {
    /// No change of the token's logit.
    pub fn none(id: u32) -> Self {
        Change { id, bias: 0.0, repetition: 1.0, less: 0.0, is_forbidden: false }
    }

    /// What the logit becomes.
    fn of(&self, logit: f32) -> f32 {
        if self.is_forbidden {
            return f32::NEG_INFINITY;
        }
        let logit = logit + self.bias;
        let logit = if logit > 0.0 { logit / self.repetition } else { logit * self.repetition };
        // A penalty must not make an infinity of a large logit: the weights would be NaN.
        (logit - self.less).clamp(f32::MIN, f32::MAX)
    }
}

/// How a row's token is chosen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    /// Drawn like this; `None`: the greatest logit, the first of equals.
    pub race: Option<Race>,
    /// Who runs.
    pub keep: Keep,
    /// Its share is wanted, too: of all tokens that the mask allows, changes included.
    pub share: bool,
    /// Bare logits, those before any change, are wanted, too: of the chosen token, of so many of the likeliest,
    /// and the logarithm of the sum of their exponentials.
    pub report: Option<u32>,
    /// Ascending in id, each once; ids beyond the row mean nothing.
    pub changes: Option<Arc<Vec<Change>>>,
    /// Bit `i` of word `w`: token `32 w + i` may be chosen. Of words that are missing, none. The row's other
    /// logits count as negative infinity.
    pub mask: Option<Arc<Vec<u32>>>,
}

impl Choice {
    /// The race, if it is not run among all tokens.
    pub(crate) fn kept_race(&self) -> Option<&Race> {
        self.race.as_ref().filter(|_| self.keep.is_some())
    }

    pub(crate) fn changes_logits(&self) -> bool {
        self.changes.is_some() || self.mask.is_some()
    }

    /// Makes of the row's logits from `first` on, a multiple of 32, those that the token is chosen of. What those were
    /// that are no longer is added to `bare`.
    pub(crate) fn change(
        &self,
        kernels: &Kernels,
        first: u32,
        logits: &mut [f32],
        mut bare: Option<&mut Vec<(u32, f32)>>,
    ) {
        let changes = self.changes.as_ref().map_or(&[][..], |changes| changes);
        let begin = changes.partition_point(|change| change.id < first);
        for change in &changes[begin..] {
            let Some(logit) = logits.get_mut((change.id - first) as usize) else { break };
            if let Some(bare) = &mut bare {
                bare.push((change.id, *logit));
            }
            *logit = change.of(*logit);
        }
        if let Some(mask) = &self.mask {
            let words = mask.get(first as usize / 32..).unwrap_or_default();
            // SAFETY: a table is of an available instruction set; any lengths will do.
            unsafe { (kernels.mask)(logits, words) };
        }
    }
}

/// The token that a row gives.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Chosen {
    /// Its id; 0 where every token is masked or forbidden.
    pub token: u32,
    /// Its probability at temperature 1; 0 if nobody asked.
    pub share: f32,
    /// None of the row's bare logits is NaN or infinite. If one is, the rest means nothing.
    pub is_finite: bool,
    /// What was to be reported.
    pub report: Option<Report>,
}

/// Of a row's bare logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    /// The chosen token's; negative infinity where every token is masked or forbidden and none was chosen.
    pub logit: f32,
    /// `ln(sum of exp(logit))`: a logit less this is a log-probability.
    pub log_sum: f64,
    /// How many of the likeliest tokens are given beside this; fewer than were asked for if there are not so many.
    pub num_top: u32,
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

/// The exponentials of a chunk, added: `sum * exp(max)`. Without a number among them the sum means nothing.
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

    /// The greatest of the chunks' logits, and the sum of all exponentials relative to it: of `logit * factor`.
    pub(crate) fn total(masses: impl Iterator<Item = Mass> + Clone, factor: f32) -> (f32, f64) {
        let masses = masses.filter(|mass| mass.max > f32::NEG_INFINITY);
        let max = masses.clone().map(|mass| mass.max).fold(f32::NEG_INFINITY, f32::max);
        (max, masses.map(|mass| mass.relative_to(max, factor)).sum())
    }
}

impl Race {
    /// See the file's header. Negative infinity for a logit of that.
    #[inline]
    pub fn score(&self, id: u32, logit: f32) -> f64 {
        f64::from(logit) * self.inverse_temperature - ln(-ln_1p(-self.noise.complement(id)))
    }

    /// Lets a token run against the best of those before it, in any order: of equals the lowest id is the best.
    #[inline]
    pub(crate) fn offer(&self, best: &mut Best, id: u32, logit: f32) {
        let lead = f64::from(logit) * self.inverse_temperature - best.score;
        if lead <= 0.0 && self.noise.complement(id) >= power_of_two_above(lead) {
            return;
        }
        let score = self.score(id, logit);
        if score > best.score || (score == best.score && id < best.id) {
            *best = Best { id, logit, score, is_finite: best.is_finite };
        }
    }

    /// The winner among `candidates`, in any order; [`Best::NONE`] if none has a logit above negative infinity.
    pub(crate) fn winner(&self, candidates: impl Iterator<Item = (u32, f32)>) -> Best {
        let mut best = Best::NONE;
        candidates.for_each(|(id, logit)| self.offer(&mut best, id, logit));
        best
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
}
