//! From a row of logits to a token.
//!
//! Order, as in Hugging Face transformers: logit bias, repetition penalty, presence and frequency
//! penalties, the mask of what may come next, temperature, top-k, top-p, min-p, then the draw. The draw is Gumbel-max with common
//! random numbers, carried out as the exponential race it is equivalent to: with `e_i = -ln u_i`
//! and weights `w_i = exp(z_i - max z)`, `argmax(z_i + gumbel_i) == argmin(e_i / w_i)`. The race
//! allows most tokens to be passed over without an exponential or a logarithm, because
//! `e_i >= 1 - u_i` and `w_i` is at most a power of two that costs a few integer operations.
//!
//! The result is a function of (logits, parameters, tokens so far, position). Nothing is allocated
//! in the steady state: scratch buffers live in [`Sampler`].

mod logprobs;
mod noise;

use std::collections::HashMap;

use tandem_kernels::sampling;

use crate::api::{EngineError, SamplingParams, TokenId};
use crate::constraint::TokenMask;
pub(crate) use logprobs::{LogprobScratch, margin};
use noise::NoiseRow;

/// How often tokens occurred, kept only for sequences that ask for a penalty.
#[derive(Debug, Default)]
pub(crate) struct TokenCounts {
    counts: HashMap<TokenId, Count>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Count {
    in_prompt: bool,
    in_output: u32,
}

impl TokenCounts {
    /// The counts a sequence starts with, or `None` if its parameters need none.
    pub(crate) fn for_sequence(prompt: &[TokenId], params: &SamplingParams) -> Option<Self> {
        let needed = params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0;
        needed.then(|| {
            let mut counts = TokenCounts::default();
            for &id in prompt {
                counts.counts.entry(id).or_default().in_prompt = true;
            }
            counts
        })
    }

    /// Notes one more output token.
    pub(crate) fn push(&mut self, id: TokenId) {
        self.counts.entry(id).or_default().in_output += 1;
    }
}

/// What a token is drawn for: the sequence's side of the draw.
pub(crate) struct Draw<'a> {
    /// The sequence's parameters.
    pub(crate) params: &'a SamplingParams,
    /// Occurrences among the committed tokens.
    pub(crate) counts: Option<&'a TokenCounts>,
    /// Draft tokens after the committed ones, which the penalties count as output.
    pub(crate) provisional: &'a [TokenId],
    /// Absolute position of the token to draw.
    pub(crate) position: usize,
    /// Output tokens before it.
    pub(crate) num_output_tokens: usize,
    /// The tokens that may stand there, stop tokens included, if not all; not empty.
    pub(crate) allowed: Option<&'a TokenMask>,
}

impl Draw<'_> {
    /// True if the token may stand there.
    pub(crate) fn allows(&self, id: TokenId) -> bool {
        self.allowed.is_none_or(|allowed| allowed.allows(id))
    }

    /// The token that is drawn whatever the logits, if there is one and it does not end the output.
    pub(crate) fn only_token(&self) -> Option<TokenId> {
        let only = self.allowed?.only()?;
        (!self.params.stop_token_ids.contains(&only)).then_some(only)
    }

    /// The token's share among those that may stand there, by the bare logits.
    pub(crate) fn probability(&self, logits: &[f32], id: TokenId) -> f32 {
        let logit = f64::from(logits[id as usize]);
        let Some(allowed) = self.allowed else {
            return (logit - sampling::log_sum_exp(logits)).exp() as f32;
        };
        let total: f64 = allowed.iter().map(|id| (f64::from(logits[id as usize]) - logit).exp()).sum();
        total.recip() as f32
    }
}

/// Draws tokens; owns the scratch that this takes.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    adjusted: Vec<f32>,
    candidates: Vec<(TokenId, f32)>,
    weights: Vec<f64>,
}

impl Sampler {
    /// Scratch for a vocabulary of `vocab_size` tokens.
    pub(crate) fn new(vocab_size: usize) -> Self {
        Sampler {
            adjusted: Vec::with_capacity(vocab_size),
            candidates: Vec::with_capacity(vocab_size),
            weights: Vec::with_capacity(vocab_size),
        }
    }

    /// Draws the token at `draw.position` from one row of logits.
    ///
    /// # Errors
    /// [`EngineError::NonFiniteLogits`] if a logit is NaN or infinite.
    pub(crate) fn draw(&mut self, logits: &[f32], draw: &Draw<'_>) -> Result<TokenId, EngineError> {
        if !sampling::all_finite(logits) {
            return Err(EngineError::NonFiniteLogits);
        }
        let params = draw.params;
        // A mask says itself where stop tokens may stand.
        let mask_stops = draw.allowed.is_none() && draw.num_output_tokens < params.min_tokens as usize;
        let is_bare = params.logit_bias.is_empty() && draw.counts.is_none() && draw.allowed.is_none();
        let logits = if is_bare && !mask_stops {
            logits
        } else {
            adjust(&mut self.adjusted, logits, draw, mask_stops);
            &self.adjusted
        };
        if params.temperature == 0.0 {
            return Ok(argmax(logits));
        }
        let inverse_temperature = 1.0 / f64::from(params.temperature);
        let noise = NoiseRow::new(params.seed, draw.position as u64);
        if params.top_k == 0 && params.top_p == 1.0 && params.min_p == 0.0 {
            let best = argmax(logits);
            let all = logits.iter().enumerate().map(|(id, &logit)| (id as TokenId, logit));
            return Ok(race(all, (best, logits[best as usize]), inverse_temperature, noise));
        }
        truncate(&mut self.candidates, &mut self.weights, logits, params, inverse_temperature);
        let first = self.candidates[0];
        Ok(race(self.candidates.iter().copied(), first, inverse_temperature, noise))
    }
}

/// Leaves in `candidates`, likeliest first, the tokens that top-k, top-p and min-p keep.
fn truncate(
    candidates: &mut Vec<(TokenId, f32)>,
    scratch: &mut Vec<f64>,
    logits: &[f32],
    params: &SamplingParams,
    inverse_temperature: f64,
) {
    let by_rank = |a: &(TokenId, f32), b: &(TokenId, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    candidates.clear();
    candidates.extend(
        logits
            .iter()
            .enumerate()
            .filter(|(_, logit)| **logit > f32::NEG_INFINITY)
            .map(|(id, &logit)| (id as TokenId, logit)),
    );
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, by_rank);
        candidates.truncate(top_k);
    }
    let max = candidates.iter().map(|c| c.1).fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit - max) * inverse_temperature).exp();
    if params.top_p < 1.0 {
        // In id order, so that the sum does not depend on how the selection above moved things.
        candidates.sort_unstable_by_key(|c| c.0);
        scratch.clear();
        scratch.extend(candidates.iter().map(|c| weight(c.1)));
        let total: f64 = scratch.iter().sum();
        let wanted = f64::from(params.top_p) * total;
        // Tokens this unlikely weigh less than `1 - top_p` together, so the nucleus is
        // complete without them and only the rest is sorted.
        let negligible = (total - wanted) / candidates.len() as f64;
        let mut weights = scratch.iter();
        candidates.retain(|_| weights.next().is_some_and(|&w| w >= negligible));
        candidates.sort_unstable_by(by_rank);
        let mut sum = 0.0;
        let keep = candidates.iter().position(|c| {
            sum += weight(c.1);
            sum >= wanted
        });
        candidates.truncate(keep.map_or(candidates.len(), |last| last + 1));
    } else {
        candidates.sort_unstable_by(by_rank);
    }
    if params.min_p > 0.0 {
        let min_p = f64::from(params.min_p);
        let keep = candidates.partition_point(|c| weight(c.1) >= min_p);
        candidates.truncate(keep.max(1));
    }
}

/// Writes the logits with bias, penalties and masks applied to `adjusted`.
fn adjust(adjusted: &mut Vec<f32>, logits: &[f32], draw: &Draw<'_>, mask_stops: bool) {
    let params = draw.params;
    adjusted.clear();
    adjusted.extend_from_slice(logits);
    for &(id, bias) in &params.logit_bias {
        // A short head does not have every token.
        if let Some(logit) = adjusted.get_mut(id as usize) {
            *logit += bias;
        }
    }
    if let Some(counts) = draw.counts {
        let mut penalise = |id: TokenId, in_prompt: bool, in_output: u32| {
            if let Some(logit) = adjusted.get_mut(id as usize) {
                if in_prompt || in_output > 0 {
                    *logit = if *logit > 0.0 {
                        *logit / params.repetition_penalty
                    } else {
                        *logit * params.repetition_penalty
                    };
                }
                if in_output > 0 {
                    *logit -= params.presence_penalty + params.frequency_penalty * in_output as f32;
                }
                // A penalty must not make an infinity of a large logit: the weights would be NaN.
                *logit = logit.clamp(f32::MIN, f32::MAX);
            }
        };
        let drafted = |id: TokenId| draw.provisional.iter().filter(|&&p| p == id).count() as u32;
        for (&id, count) in &counts.counts {
            penalise(id, count.in_prompt, count.in_output + drafted(id));
        }
        for (i, &id) in draw.provisional.iter().enumerate() {
            if !counts.counts.contains_key(&id) && !draw.provisional[..i].contains(&id) {
                penalise(id, false, drafted(id));
            }
        }
    }
    if mask_stops {
        for &id in &params.stop_token_ids {
            if let Some(logit) = adjusted.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    if let Some(allowed) = draw.allowed {
        allowed.apply(adjusted);
    }
}

/// The winner of the exponential race; of equals, the first in `candidates`' order, `first` before all.
/// `first` must be a candidate of the greatest logit.
fn race(
    candidates: impl Iterator<Item = (TokenId, f32)>,
    first: (TokenId, f32),
    inverse_temperature: f64,
    noise: NoiseRow,
) -> TokenId {
    let max = f64::from(first.1);
    let mut winner = first.0;
    // `-ln u` from `1 - u`.
    let exponential = |complement: f64| -(-complement).ln_1p();
    let mut best = exponential(noise.complement(first.0));
    for (id, logit) in candidates {
        let complement = noise.complement(id);
        let scaled = (f64::from(logit) - max) * inverse_temperature;
        if complement >= best * power_of_two_above(scaled) || id == first.0 {
            continue;
        }
        let time = exponential(complement) / scaled.exp();
        if time < best {
            best = time;
            winner = id;
        }
    }
    winner
}

/// A power of two that is at least `exp(x)`, for `x <= 0`; for very small `x`, 2^-1022.
#[inline]
fn power_of_two_above(x: f64) -> f64 {
    // Truncation rounds a negative number up, so one more than log2(exp(x)) is never needed above it.
    let exponent = (x * std::f64::consts::LOG2_E).max(-1022.0) as i64 + 1;
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// The first of the greatest logits.
fn argmax(logits: &[f32]) -> TokenId {
    sampling::argmax(logits) as TokenId
}

#[cfg(test)]
mod tests;
