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

/// What penalties are taken of.
#[derive(Clone, Copy, Debug)]
struct Penalties {
    repetition: f32,
    presence: f32,
    frequency: f32,
}

impl Penalties {
    fn of(params: &SamplingParams) -> Self {
        Penalties {
            repetition: params.repetition_penalty,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
        }
    }

    /// What becomes of the logit of a token of prompt or output that is so often in the output.
    fn change(&self, id: TokenId, in_output: u32) -> Change {
        let less = match in_output {
            0 => 0.0,
            _ => self.presence + self.frequency * in_output as f32,
        };
        Change { repetition: self.repetition, less, ..Change::none(id) }
    }
}

/// How often tokens occurred and what that makes of their logits, kept only for sequences that ask for a penalty.
///
/// A long prompt has thousands of tokens, every row of logits takes a change of each, and a committed token changes
/// one: so the changes are kept in order, and rows share them.
#[derive(Debug)]
pub(crate) struct TokenCounts {
    penalties: Penalties,
    /// Of the tokens in the output.
    in_output: BTreeMap<TokenId, u32>,
    /// What penalties and bias make of logits, as [`Choice::changes`] wants it.
    changes: Arc<Vec<Change>>,
}

impl TokenCounts {
    /// The counts a sequence starts with, or `None` if its parameters need none.
    pub(crate) fn for_sequence(prompt: &[TokenId], params: &SamplingParams) -> Option<Self> {
        let needed = params.repetition_penalty != 1.0
            || params.presence_penalty != 0.0
            || params.frequency_penalty != 0.0;
        needed.then(|| {
            let penalties = Penalties::of(params);
            let mut ids = if params.repetition_penalty != 1.0 { prompt.to_vec() } else { Vec::new() };
            ids.sort_unstable();
            ids.dedup();
            let mut changes: Vec<Change> = ids.into_iter().map(|id| penalties.change(id, 0)).collect();
            add_biases(&mut changes, params);
            TokenCounts { penalties, in_output: BTreeMap::new(), changes: Arc::new(changes) }
        })
    }

    /// Notes one more output token.
    pub(crate) fn push(&mut self, id: TokenId) {
        let in_output = self.in_output.entry(id).or_default();
        *in_output += 1;
        let change = self.penalties.change(id, *in_output);
        // Copies them if a row that was not chosen from yet shares them.
        penalise(Arc::make_mut(&mut self.changes), &change);
    }

    /// The changes with `provisional` tokens counted as output.
    fn changes_after(&self, provisional: &[TokenId]) -> Arc<Vec<Change>> {
        let mut changes = Arc::clone(&self.changes);
        for (i, &id) in provisional.iter().enumerate() {
            if !provisional[..i].contains(&id) {
                let drafted = provisional[i..].iter().filter(|&&other| other == id).count() as u32;
                let committed = self.in_output.get(&id).copied().unwrap_or(0);
                let change = self.penalties.change(id, committed + drafted);
                penalise(Arc::make_mut(&mut changes), &change);
            }
        }
        changes
    }
}

/// Gives the token of `penalty` this penalty instead of the one it had; its bias stays.
fn penalise(changes: &mut Vec<Change>, penalty: &Change) {
    let id = penalty.id;
    match changes.binary_search_by_key(&id, |change| change.id) {
        Ok(at) => {
            let change = Change { bias: changes[at].bias, ..*penalty };
            if change == Change::none(id) {
                changes.remove(at);
            } else {
                changes[at] = change;
            }
        }
        Err(at) if *penalty != Change::none(id) => changes.insert(at, *penalty),
        Err(_) => {}
    }
}

/// Adds the biases to changes that are one a token and in the order of ids, and leaves them so.
fn add_biases(changes: &mut Vec<Change>, params: &SamplingParams) {
    if params.logit_bias.is_empty() {
        return;
    }
    changes.extend(params.logit_bias.iter().map(|&(id, bias)| Change { bias, ..Change::none(id) }));
    // Stable: of one token the penalty stays before its biases, and those in their order.
    changes.sort_by_key(|change| change.id);
    changes.dedup_by(|other, change| {
        let is_same = other.id == change.id;
        if is_same {
            change.bias += other.bias;
        }
        is_same
    });
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
        let mut changes = match self.counts {
            Some(counts) => counts.changes_after(self.provisional),
            None => {
                let mut changes = Vec::new();
                add_biases(&mut changes, params);
                Arc::new(changes)
            }
        };
        // A mask says itself where stop tokens may stand.
        if self.allowed.is_none() && self.num_output_tokens < params.min_tokens as usize {
            for &id in &params.stop_token_ids {
                forbid(Arc::make_mut(&mut changes), id);
            }
        }
        (!changes.is_empty()).then_some(changes)
    }
}

/// Keeps the token from being chosen.
fn forbid(changes: &mut Vec<Change>, id: TokenId) {
    match changes.binary_search_by_key(&id, |change| change.id) {
        Ok(at) => changes[at].is_forbidden = true,
        Err(at) => changes.insert(at, Change { is_forbidden: true, ..Change::none(id) }),
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
    ///
    /// # Errors
    /// [`EngineError::NonFiniteLogits`] if a logit is NaN or infinite.
    pub(crate) fn score(
        &mut self,
        logits: &[f32],
        token: TokenId,
        num_top: u32,
    ) -> Result<TokenLogprobs, EngineError> {
        let choice = Choice { report: Some(num_top), ..Choice::default() };
        let chosen = choose_in(logits, &choice, &mut self.room);
        // Nothing is reported of a row that is not finite.
        let report = chosen.report.ok_or(EngineError::NonFiniteLogits)?;
        Ok(logprobs(logits[token as usize], report.log_sum, self.room.top()))
    }
}

#[cfg(test)]
mod tests;
