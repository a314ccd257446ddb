//! From a sequence's parameters to how a token is chosen of a row of logits.
//!
//! Order, as in Hugging Face transformers: logit bias, repetition penalty, presence and frequency
//! penalties, the mask of what may come next, temperature, top-k, top-p, min-p, then the draw, which is Gumbel-max with
//! common random numbers. All of that is a [`Choice`], which a model makes as it computes the logits; of rows that
//! were asked for whole it is made here, with the same outcome.
//!
//! The result is a function of (logits, parameters, tokens so far, position). Log-probabilities are of the model's own
//! distribution: log-softmax of the untouched logits.

use std::collections::BTreeMap;
use std::sync::Arc;

use tandem_models::outputs::{Change, Choice, Keep, Noise, Race, Report, RowRoom, choose_in};

use crate::api::{EngineError, SamplingParams, TokenId, TokenLogprobs};
use crate::constraint::TokenMask;
use crate::rows::{Asked, Row};

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
    /// How often in the output, of all tokens of prompt and output; in the order of ids, as changes of logits are.
    counts: BTreeMap<TokenId, u32>,
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
                counts.counts.entry(id).or_default();
            }
            counts
        })
    }

    /// Notes one more output token.
    pub(crate) fn push(&mut self, id: TokenId) {
        *self.counts.entry(id).or_default() += 1;
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

    /// How the token is chosen, and what is to be said of it.
    pub(crate) fn choice(&self, asked: Asked) -> Choice {
        let SamplingParams { top_k, top_p, min_p, .. } = *self.params;
        Choice {
            race: race(self.params, self.position),
            keep: Keep { top_k, top_p, min_p },
            share: asked.share,
            report: asked.num_top,
            changes: self.changes(),
            mask: self.allowed.map(|allowed| Arc::clone(allowed.words())),
        }
    }

    /// What bias, penalties and the least length make of logits.
    fn changes(&self) -> Option<Arc<Vec<Change>>> {
        let params = self.params;
        // A mask says itself where stop tokens may stand.
        let mask_stops = self.allowed.is_none() && self.num_output_tokens < params.min_tokens as usize;
        let stops = if mask_stops { &params.stop_token_ids[..] } else { &[] };
        if params.logit_bias.is_empty() && self.counts.is_none() && stops.is_empty() {
            return None;
        }
        let mut changes = Vec::new();
        self.penalise(&mut changes);
        changes.extend(params.logit_bias.iter().map(|&(id, bias)| Change { bias, ..Change::none(id) }));
        changes.extend(stops.iter().map(|&id| Change { is_forbidden: true, ..Change::none(id) }));
        changes.sort_by_key(|change| change.id);
        changes.dedup_by(|other, change| {
            let is_same = other.id == change.id;
            if is_same {
                *change = join(change, other);
            }
            is_same
        });
        Some(Arc::new(changes))
    }

    /// Adds what penalties make of logits.
    fn penalise(&self, changes: &mut Vec<Change>) {
        let Some(counts) = self.counts else { return };
        let params = self.params;
        let mut penalise = |id: TokenId, in_output: u32| {
            let less = match in_output {
                0 => 0.0,
                _ => params.presence_penalty + params.frequency_penalty * in_output as f32,
            };
            if params.repetition_penalty != 1.0 || less != 0.0 {
                changes.push(Change { repetition: params.repetition_penalty, less, ..Change::none(id) });
            }
        };
        let drafted = |id: TokenId| self.provisional.iter().filter(|&&p| p == id).count() as u32;
        for (&id, &in_output) in &counts.counts {
            penalise(id, in_output + drafted(id));
        }
        for (i, &id) in self.provisional.iter().enumerate() {
            if !counts.counts.contains_key(&id) && !self.provisional[..i].contains(&id) {
                penalise(id, drafted(id));
            }
        }
    }
}

/// Both changes of one token's logit; of penalties only one has any.
fn join(a: &Change, b: &Change) -> Change {
    Change {
        id: a.id,
        bias: a.bias + b.bias,
        repetition: a.repetition * b.repetition,
        less: a.less + b.less,
        is_forbidden: a.is_forbidden || b.is_forbidden,
    }
}

/// A token that was drawn, and what was to be said of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drawn<'a> {
    pub(crate) id: TokenId,
    /// Its share among the tokens that could stand there.
    pub(crate) share: f32,
    report: Option<Report>,
    /// The likeliest tokens and their bare logits.
    top: &'a [(TokenId, f32)],
}

impl Drawn<'_> {
    fn report(&self) -> Report {
        self.report.unwrap_or_else(|| unreachable!("{self:?} was to be reported: this is a bug"))
    }

    /// The log-probability of the token and of the `num_top` likeliest.
    pub(crate) fn logprobs(&self, num_top: usize) -> TokenLogprobs {
        let Report { logit, log_sum, .. } = self.report();
        logprobs(logit, log_sum, &self.top[..num_top.min(self.top.len())])
    }

    /// The greatest logit less the next one; 0 if there is only one.
    pub(crate) fn margin(&self) -> f32 {
        match self.top {
            [best, next, ..] => best.1 - next.1,
            _ => 0.0,
        }
    }
}

fn logprobs(logit: f32, log_sum: f64, top: &[(TokenId, f32)]) -> TokenLogprobs {
    let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
    TokenLogprobs {
        logprob: logprob(logit),
        top: top.iter().map(|&(id, logit)| (id, logprob(logit))).collect(),
    }
}

/// Draws tokens of whole rows; owns the scratch that this takes.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    room: RowRoom,
}

impl Sampler {
    /// The token at `draw.position` of its row, and what is `asked` of it: of a row that was chosen from in the
    /// model, what was asked there.
    ///
    /// # Errors
    /// [`EngineError::NonFiniteLogits`] if a logit is NaN or infinite.
    pub(crate) fn draw<'r>(
        &'r mut self,
        row: Row<'r>,
        draw: &Draw<'_>,
        asked: Asked,
    ) -> Result<Drawn<'r>, EngineError> {
        let (chosen, top) = match row {
            Row::Chosen(chosen, top) => (chosen, top),
            Row::Whole(logits) => {
                let chosen = choose_in(logits, &draw.choice(asked), &mut self.room);
                (chosen, self.room.top())
            }
        };
        if !chosen.is_finite {
            return Err(EngineError::NonFiniteLogits);
        }
        Ok(Drawn { id: chosen.token, share: chosen.share, report: chosen.report, top })
    }

    /// The log-probability of `token` and of the `num_top` likeliest of the row.
    pub(crate) fn score(&mut self, logits: &[f32], token: TokenId, num_top: u32) -> TokenLogprobs {
        let choice = Choice { report: Some(num_top), ..Choice::default() };
        let report = choose_in(logits, &choice, &mut self.room).report;
        let log_sum = report.map_or(f64::NAN, |report| report.log_sum);
        logprobs(logits[token as usize], log_sum, self.room.top())
    }
}

#[cfg(test)]
mod tests;
