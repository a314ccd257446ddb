//! The tokens that top-k, top-p and min-p leave to be drawn from, found while a row goes by.
//!
//! Of a vocabulary of 152 thousand tokens mostly some dozens stay. So whoever looks at a part of a row, chunk by chunk,
//! keeps only the tokens that may be among them: those above a logit that is raised with what has been seen, by the
//! `top_k` likeliest so far, or by the greatest logit and the sum of exponentials so far. What several parts have
//! kept is joined, and only then decided, by sums of the whole row: which tokens stay does not depend on how the
//! row was cut. Of a flat row many are kept, up to eight bytes for each of its tokens by its parts and as many again
//! where they are joined; buffers, which stay as large as they have been, grow by doubling, to twice that at most.

use super::choice::{Keep, Mass};
use crate::dispatch::Kernels;
use crate::math;
use crate::math::double::{exp, ln};

/// More than any rounding of a logit over a temperature.
const SLACK: f64 = 1e-3;

/// A token and its logit.
pub(crate) type Token = (u32, f32);

/// The likeliest first; of equal logits the lower id. (Adding zero makes both zeros one, as they are where the greatest
/// logit is looked for.)
fn by_rank(a: &Token, b: &Token) -> std::cmp::Ordering {
    (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0))
}

/// Sorts the `num` first by rank to the front, and gives them.
fn sort_first(tokens: &mut [Token], num: usize) -> &mut [Token] {
    let num = num.min(tokens.len());
    if num > 0 && num < tokens.len() {
        tokens.select_nth_unstable_by(num - 1, by_rank);
    }
    tokens[..num].sort_unstable_by(by_rank);
    &mut tokens[..num]
}

/// Tokens of a part of a row, as likely as needed; a buffer that is used again and again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Likely {
    tokens: Vec<Token>,
    /// What is less is out; above negative infinity.
    least: f32,
    /// Tokens at which those that are out by now are thrown away.
    most: usize,
    /// All that was looked at: the greatest logit, and the sum of exponentials relative to it.
    max: f32,
    sum: f64,
}

impl Likely {
    /// Before anything was looked at.
    pub(crate) fn clear(&mut self) {
        self.tokens.clear();
        (self.least, self.most) = (f32::MIN, 0);
        (self.max, self.sum) = (f32::NEG_INFINITY, 0.0);
    }

    fn add(&mut self, kernels: &Kernels, first: u32, logits: &[f32]) {
        // SAFETY: a table is of an available instruction set; any length will do.
        unsafe { (kernels.collect)(logits, first, self.least, &mut self.tokens) }
    }

    /// Looks at the tokens from `first` on for the `num_top` likeliest of all.
    pub(crate) fn look_for_top(&mut self, kernels: &Kernels, first: u32, logits: &[f32], num_top: usize) {
        if num_top == 0 {
            return;
        }
        self.add(kernels, first, logits);
        if self.tokens.len() >= 2 * num_top + 64 {
            let (_, last, _) = self.tokens.select_nth_unstable_by(num_top - 1, by_rank);
            self.least = last.1;
            self.tokens.truncate(num_top);
        }
    }

    /// Looks at the tokens from `first` on for those that top-p and min-p may keep, of a row of `num_tokens`.
    /// `mass` is of these logits: of the sum, if top-p keeps some from being drawn, else only the maximum counts.
    pub(crate) fn look_for_share(
        &mut self,
        kernels: &Kernels,
        (first, logits): (u32, &[f32]),
        mass: Mass,
        (keep, inverse_temperature): (&Keep, f64),
        num_tokens: usize,
    ) {
        if mass.max == f32::NEG_INFINITY {
            return;
        }
        let factor = factor(inverse_temperature);
        if mass.max > self.max {
            self.sum *= f64::from(math::exp((self.max - mass.max) * factor));
            self.max = mass.max;
        }
        self.sum += mass.relative_to(self.max, factor);
        if mass.max < self.least {
            return;
        }
        // The row's greatest logit and its sum can only be more; twice the slack for how this one was rounded.
        let least = least_logit(self.max, self.sum, (keep, inverse_temperature), num_tokens, 2.0 * SLACK);
        self.least = self.least.max(least);
        self.add(kernels, first, logits);
        if self.tokens.len() >= self.most {
            let least = self.least;
            self.tokens.retain(|token| token.1 >= least);
            self.most = 2 * self.tokens.len() + 1024;
        }
    }

    /// Adds what another part of the row has kept.
    pub(crate) fn join(&mut self, other: &Likely) {
        self.tokens.extend_from_slice(&other.tokens);
    }

    /// Of the whole row: brings the `num_top` likeliest tokens to the front, in order, and says how many these are;
    /// fewer where not so many logits are above negative infinity.
    pub(crate) fn sort(&mut self, num_top: usize) -> usize {
        sort_first(&mut self.tokens, num_top).len()
    }

    /// How many tokens there are.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The first of the tokens.
    pub(crate) fn first(&self, num: usize) -> &[Token] {
        &self.tokens[..num]
    }

    /// Of the whole row: the tokens that stay, likeliest first; at least one, if a logit is above negative infinity.
    /// `total` is the sum of all exponentials relative to the greatest, if top-p is a share of that.
    pub(crate) fn kept(
        &mut self,
        keep: &Keep,
        inverse_temperature: f64,
        total: f64,
        num_tokens: usize,
    ) -> &[Token] {
        let tokens = &mut self.tokens;
        let max = tokens.iter().map(|token| token.1).fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| exp(f64::from(logit - max) * inverse_temperature);
        let mut total = total;
        if keep.top_k > 0 {
            let num_top = sort_first(tokens, keep.top_k as usize).len();
            tokens.truncate(num_top);
            if keep.top_p < 1.0 {
                // In id order: a sum that no rule of ranks has a part in.
                tokens.sort_unstable_by_key(|token| token.0);
                total = tokens.iter().map(|token| weight(token.1)).sum();
                tokens.sort_unstable_by(by_rank);
            }
        } else {
            let least = least_logit(max, total, (keep, inverse_temperature), num_tokens, SLACK);
            tokens.retain(|token| token.1 >= least);
        }
        let num_kept = if keep.top_p < 1.0 {
            let wanted = f64::from(keep.top_p) * total;
            let mut sum = 0.0;
            first_by_rank(tokens, |token| {
                sum += weight(token.1);
                sum >= wanted
            })
        } else {
            tokens.sort_unstable_by(by_rank);
            tokens.len()
        };
        tokens.truncate(num_kept);
        if keep.min_p > 0.0 {
            let least = f64::from(keep.min_p);
            let num_kept = tokens.partition_point(|token| weight(token.1) >= least);
            tokens.truncate(num_kept.max(1));
        }
        tokens
    }
}

/// Sorts by rank as far as the first token with which `is_last` says that it is enough; gives how many these are, all
/// if it never does. A nucleus is mostly a small part of what may be in one.
fn first_by_rank(tokens: &mut [Token], mut is_last: impl FnMut(&Token) -> bool) -> usize {
    let (mut begin, mut num) = (0, 64);
    while begin < tokens.len() {
        let sorted = sort_first(&mut tokens[begin..], num);
        if let Some(last) = sorted.iter().position(&mut is_last) {
            return begin + last + 1;
        }
        begin += sorted.len();
        num *= 4;
    }
    tokens.len()
}

/// What exponentials are taken of logits times, as far as that is an f32.
pub(crate) fn factor(inverse_temperature: f64) -> f32 {
    (inverse_temperature as f32).min(f32::MAX)
}

/// A logit below which nothing stays of a row of `num_tokens`; `sum` is of exponentials relative to `max`.
fn least_logit(
    max: f32,
    sum: f64,
    (keep, inverse_temperature): (&Keep, f64),
    num_tokens: usize,
    slack: f64,
) -> f32 {
    let mut least = f64::from(keep.min_p);
    if keep.top_p < 1.0 {
        // Tokens this unlikely weigh less than `1 - top_p` together: the nucleus is complete without them.
        least = least.max((1.0 - f64::from(keep.top_p)) * sum / num_tokens as f64);
    }
    let least = f64::from(max) + (ln(least) - slack) / inverse_temperature;
    (least as f32).next_down().max(f32::MIN)
}
