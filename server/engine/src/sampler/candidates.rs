//! The tokens that top-k, top-p and min-p leave to be drawn from.
//!
//! Of a vocabulary of 152 thousand tokens mostly some dozens stay, so a row is read as a whole by vector kernels alone:
//! they give a logit below which nothing stays, and what is above it. What is sorted is no more than that.

use tandem_kernels::math::double;
use tandem_kernels::sampling::{MAXIMUM_OF, argmax, collect, maxima, sum_exp};

use crate::api::{SamplingParams, TokenId};

/// More than any rounding of a logit over a temperature.
const SLACK: f64 = 1e-3;

/// The likeliest first; of equal logits the lower id.
fn by_rank(a: &(TokenId, f32), b: &(TokenId, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Some tokens of a row; buffers that are used again and again.
#[derive(Debug, Default)]
pub(super) struct Ranking {
    tokens: Vec<(TokenId, f32)>,
    /// Of chunks of the row.
    maxima: Vec<f32>,
}

impl Ranking {
    /// The `num_top` likeliest tokens, in order; fewer where not so many logits are above negative infinity.
    pub(super) fn top(&mut self, logits: &[f32], num_top: usize) -> &[(TokenId, f32)] {
        self.take_top(logits, num_top);
        self.tokens.sort_unstable_by(by_rank);
        &self.tokens
    }

    /// The same tokens in any order.
    fn take_top(&mut self, logits: &[f32], num_top: usize) {
        self.tokens.clear();
        if num_top == 0 {
            return;
        }
        self.maxima.clear();
        maxima(logits, &mut self.maxima);
        let mut least = f32::NEG_INFINITY;
        if num_top <= self.maxima.len() {
            // So many chunks have a token that is at least this likely.
            least = *self.maxima.select_nth_unstable_by(num_top - 1, |a, b| b.total_cmp(a)).1;
        }
        self.take_from(logits, least);
        if num_top < self.tokens.len() {
            self.tokens.select_nth_unstable_by(num_top - 1, by_rank);
            self.tokens.truncate(num_top);
        }
    }

    /// Tokens whose logit is at least `least`, and above negative infinity, in the order of their ids.
    fn take_from(&mut self, logits: &[f32], least: f32) {
        self.tokens.clear();
        collect(logits, least.max(f32::MIN), &mut self.tokens);
    }
}

/// Candidates of a draw; buffers that are used again and again.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    ranking: Ranking,
    /// In the order of ids.
    weights: Vec<f64>,
}

impl Candidates {
    /// Scratch for a vocabulary of `vocab_size` tokens.
    pub(super) fn new(vocab_size: usize) -> Self {
        let tokens = Vec::with_capacity(vocab_size);
        let maxima = Vec::with_capacity(vocab_size.div_ceil(MAXIMUM_OF));
        Candidates { ranking: Ranking { tokens, maxima }, weights: Vec::new() }
    }

    /// The tokens that stay, likeliest first; at least one, if a logit is above negative infinity.
    pub(super) fn of(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        inverse_temperature: f64,
    ) -> &[(TokenId, f32)] {
        let max = logits[argmax(logits)];
        let weight = |logit: f32| double::exp(f64::from(logit - max) * inverse_temperature);
        let Candidates { ranking, weights } = self;
        let top_k = params.top_k as usize;
        // What top-p is a share of.
        let mut total = 0.0;
        if top_k > 0 {
            ranking.take_top(logits, top_k);
            if params.top_p < 1.0 {
                // In id order, so that the sum does not depend on how the selection moved things.
                ranking.tokens.sort_unstable_by_key(|c| c.0);
                weights.clear();
                weights.extend(ranking.tokens.iter().map(|c| weight(c.1)));
                total = weights.iter().sum();
            }
        } else {
            let mut least = f64::from(params.min_p);
            if params.top_p < 1.0 {
                total = sum_exp(logits, (inverse_temperature as f32).min(f32::MAX));
                // Tokens this unlikely weigh less than `1 - top_p` together: the nucleus is complete without them.
                least = least.max((1.0 - f64::from(params.top_p)) * total / logits.len() as f64);
            }
            let least = f64::from(max) + (least.ln() - SLACK) / inverse_temperature;
            ranking.take_from(logits, (least as f32).next_down());
        }
        ranking.tokens.sort_unstable_by(by_rank);
        if params.top_p < 1.0 {
            let wanted = f64::from(params.top_p) * total;
            let mut sum = 0.0;
            let last = ranking.tokens.iter().position(|c| {
                sum += weight(c.1);
                sum >= wanted
            });
            ranking.tokens.truncate(last.map_or(ranking.tokens.len(), |last| last + 1));
        }
        if params.min_p > 0.0 {
            let least = f64::from(params.min_p);
            let keep = ranking.tokens.partition_point(|c| weight(c.1) >= least);
            ranking.tokens.truncate(keep.max(1));
        }
        &ranking.tokens
    }
}
