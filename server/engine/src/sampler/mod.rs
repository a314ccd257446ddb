//! From a row of logits to a token.
//!
//! Order, as in Hugging Face transformers: logit bias, repetition penalty, presence and frequency
//! penalties, the mask of what may come next, temperature, top-k, top-p, min-p, then the draw, which is Gumbel-max with
//! common random numbers ([`tandem_kernels::sampling::choice`]). Where only temperature and draw are left of this the
//! model has done it already ([`choice`], [`Row::Chosen`]), with the same outcome.
//!
//! The result is a function of (logits, parameters, tokens so far, position). Nothing is allocated
//! in the steady state: scratch buffers live in [`Sampler`].

mod candidates;
mod logprobs;

use std::collections::HashMap;

use tandem_kernels::math::double;
use tandem_kernels::sampling;
use tandem_models::outputs::{Choice, Chosen, Noise, Race};

use crate::api::{EngineError, SamplingParams, TokenId};
use crate::constraint::TokenMask;
use crate::rows::Row;
use candidates::Candidates;
pub(crate) use logprobs::{LogprobScratch, margin};

/// How the token at `position` is chosen of the bare logits; `None` if more is to be done with them first.
pub(crate) fn choice(params: &SamplingParams, position: usize) -> Option<Choice> {
    let is_bare = params.logit_bias.is_empty() && !truncates(params);
    is_bare.then(|| Choice { race: race(params, position), share: false })
}

/// True if top-k, top-p or min-p keep some tokens from being drawn.
fn truncates(params: &SamplingParams) -> bool {
    params.temperature != 0.0 && (params.top_k != 0 || params.top_p != 1.0 || params.min_p != 0.0)
}

/// The draw at `position`; `None`: the greatest logit.
fn race(params: &SamplingParams, position: usize) -> Option<Race> {
    (params.temperature != 0.0).then(|| Race {
        noise: Noise::new(params.seed, position as u64),
        inverse_temperature: 1.0 / f64::from(params.temperature),
    })
}

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

    /// The share of a token that was drawn of a row among those that may stand there, by the bare logits.
    pub(crate) fn probability(&self, row: Row<'_>, id: TokenId) -> f32 {
        let logits = match row {
            Row::Whole(logits) => logits,
            Row::Chosen(chosen) => return chosen.share,
        };
        let logit = f64::from(logits[id as usize]);
        let Some(allowed) = self.allowed else {
            return double::exp(logit - sampling::log_sum_exp(logits)) as f32;
        };
        let total: f64 = allowed.iter().map(|id| double::exp(f64::from(logits[id as usize]) - logit)).sum();
        total.recip() as f32
    }
}

/// Draws tokens; owns the scratch that this takes.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    adjusted: Vec<f32>,
    candidates: Candidates,
}

impl Sampler {
    /// Scratch for a vocabulary of `vocab_size` tokens.
    pub(crate) fn new(vocab_size: usize) -> Self {
        Sampler { adjusted: Vec::with_capacity(vocab_size), candidates: Candidates::new(vocab_size) }
    }

    /// Draws the token at `draw.position` from its row.
    ///
    /// # Errors
    /// [`EngineError::NonFiniteLogits`] if a logit is NaN or infinite.
    pub(crate) fn draw(&mut self, row: Row<'_>, draw: &Draw<'_>) -> Result<TokenId, EngineError> {
        let finite = |chosen: Chosen| {
            if chosen.is_finite { Ok(chosen.token) } else { Err(EngineError::NonFiniteLogits) }
        };
        let logits = match row {
            Row::Whole(logits) => logits,
            Row::Chosen(chosen) => return finite(chosen),
        };
        let params = draw.params;
        // A mask says itself where stop tokens may stand.
        let mask_stops = draw.allowed.is_none() && draw.num_output_tokens < params.min_tokens as usize;
        let is_bare = params.logit_bias.is_empty() && draw.counts.is_none() && draw.allowed.is_none();
        let race = race(params, draw.position);
        if is_bare && !mask_stops && !truncates(params) {
            return finite(sampling::choose(logits, Choice { race, share: false }));
        }
        if !sampling::all_finite(logits) {
            return Err(EngineError::NonFiniteLogits);
        }
        let logits = if is_bare && !mask_stops {
            logits
        } else {
            adjust(&mut self.adjusted, logits, draw, mask_stops);
            &self.adjusted
        };
        match race {
            Some(race) if truncates(params) => {
                let candidates = self.candidates.of(logits, params, race.inverse_temperature);
                Ok(race.winner(candidates.iter().copied()))
            }
            race => Ok(sampling::choose(logits, Choice { race, share: false }).token),
        }
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

#[cfg(test)]
mod tests;
