//! What every protocol asks for and gets: prompts in, text out.
//!
//! A [`GenerationRequest`] becomes one sequence a choice, or joins one that runs (`sharing`).
//! [`Generation`] turns the engine's events into text (detokenized, cut at stop strings) and an
//! account. Dropping it frees the sequences that nobody else reads: a closed connection needs no
//! other handling.

mod choice;
mod flight;
mod sharing;

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tandem_engine::{CacheSalt, Lane, Priority, SamplingParams, SpeculationParams, TokenLogprobs};

use super::error::ApiError;
use super::lanes::{Reason, lane_name};
use super::metrics::TokenClock;
use super::state::{AppState, ServedModel, unix_seconds};
use super::traces::WorkRecord;
use crate::keys::Client;
use crate::text::GapRules;
use crate::text::grammar::Grammar;
use choice::{Choice, TextRules};
use flight::FlightPlan;
pub(super) use sharing::Flights;
pub use sharing::Shared;

/// The internal request that every protocol is translated to.
pub struct GenerationRequest {
    /// At least one.
    pub prompts: Vec<Prompt>,
    /// Sequences for each prompt. The `i`-th uses `params.seed + i`.
    pub num_choices: usize,
    /// How to sample; `max_tokens` is each prompt's own.
    pub params: SamplingParams,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// The client named `params.seed`; otherwise it was drawn.
    pub names_seed: bool,
    /// Who goes first.
    pub priority: Priority,
    /// Whose cached blocks the sequences may share.
    pub cache_salt: CacheSalt,
    /// Longest time from the first output token to the last.
    pub max_predict_time: Option<Duration>,
    /// How to speculate; never changes the output.
    pub speculation: SpeculationParams,
    /// Control tokens that show in the text; all others do not.
    pub markers: Arc<[u32]>,
    /// An answer that fills a gap ends where it meets what follows.
    pub fits_gaps: bool,
    /// Who pays for the output, if anybody does.
    pub client: Option<Arc<Client>>,
    /// The form of every answer.
    pub grammar: Option<Arc<Grammar>>,
}

/// One prompt of a request.
pub struct Prompt {
    /// Its tokens.
    pub tokens: Arc<[u32]>,
    /// What it was made of, if that was text that the client wrote.
    pub text: Option<PromptText>,
    /// The bound on its answer.
    pub max_tokens: u32,
    /// The gap that its answer fills.
    pub gap: Option<GapRules>,
}

/// The text of a completion's prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptText {
    /// What the answer continues.
    pub before: Arc<str>,
    /// What follows the answer, if it fills a gap.
    pub after: Option<Arc<str>>,
}

/// New text of one choice.
#[derive(Debug, Default)]
pub struct Delta {
    /// Never part of a stop string.
    pub text: String,
    /// The tokens whose text begins in what was released so far, if `logprobs` was asked for.
    pub tokens: Vec<ScoredToken>,
    /// Once, before any text, if `prompt_logprobs` was asked for.
    pub prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
}

/// An output token with its log-probabilities.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredToken {
    /// The token.
    pub id: u32,
    /// Its own and its rivals'.
    pub logprobs: TokenLogprobs,
}

/// Why an answer ended, for clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// A stop token.
    Stop,
    /// A stop string.
    StopString,
    /// It has met the text behind the gap that it fills.
    GapFilled,
    /// `max_tokens` are there, the context is full, or the time that the client gave is over.
    Length,
}

/// The account of a choice, or of several.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Account {
    /// Tokens of the prompts, each counted once.
    pub num_prompt_tokens: u64,
    /// Of those, found in the cache.
    pub num_cached_tokens: u64,
    /// Tokens of the answers, those of a stop string included.
    pub num_output_tokens: u64,
    /// Draft tokens offered, whoever proposed them.
    pub num_draft_tokens: u64,
    /// Of those, accepted.
    pub num_accepted_tokens: u64,
    /// Draft tokens offered that came from the client's `prediction`.
    pub num_prediction_tokens: u64,
    /// Of those, accepted.
    pub num_accepted_prediction_tokens: u64,
    /// Longest wait for the first pass.
    pub queue_time: Duration,
    /// Longest prefill.
    pub prefill_time: Duration,
    /// Longest decode.
    pub decode_time: Duration,
}

impl Account {
    /// Output tokens a second of decoding; the first token comes from the prefill.
    pub fn tokens_per_second(&self, num_sequences: usize) -> f64 {
        let num_decoded = self.num_output_tokens.saturating_sub(num_sequences as u64);
        let seconds = self.decode_time.as_secs_f64();
        if seconds > 0.0 { num_decoded as f64 / seconds } else { 0.0 }
    }
}

/// What [`Generation::poll_next`] found: the choice's new [`Delta`] is at [`Generation::delta`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Which choice: `prompt * num_choices + i`.
    pub index: usize,
    /// Set when this was the choice's last.
    pub end: Option<EndReason>,
}

/// A whole answer.
#[derive(Debug)]
pub struct CompletedChoice {
    /// All of its deltas together.
    pub answer: Delta,
    /// Why it ended.
    pub end: EndReason,
}

/// Running sequences of one request. Dropping it aborts those that have not ended.
pub struct Generation {
    choices: Vec<Choice>,
    num_choices_per_prompt: usize,
    num_running: usize,
    /// Where the next poll begins, so that no choice starves the others.
    next: usize,
    client: Option<Arc<Client>>,
    lane: Lane,
    lane_reason: Reason,
    /// Of the request's span.
    record: Option<WorkRecord>,
}

impl Drop for Generation {
    fn drop(&mut self) {
        if let Some(record) = &self.record {
            let account = self.account();
            record.update(|work| work.account = account);
        }
    }
}

impl Generation {
    /// Submits every sequence of the request.
    ///
    /// # Errors
    /// What the engine refuses; nothing keeps running then.
    pub fn start(
        state: &AppState,
        served: &ServedModel,
        request: &GenerationRequest,
    ) -> Result<Generation, ApiError> {
        let num_running = request.prompts.len() * request.num_choices;
        let mut choices = Vec::with_capacity(num_running);
        for prompt in &request.prompts {
            for i in 0..request.num_choices {
                let seed = request.params.seed.wrapping_add(i as u64);
                let plan = FlightPlan {
                    lane: served.lane,
                    prompt: prompt.tokens.clone(),
                    text: prompt.text.clone().filter(|_| request.num_choices == 1),
                    params: SamplingParams { seed, max_tokens: prompt.max_tokens, ..request.params.clone() },
                    names_seed: request.names_seed,
                    priority: request.priority,
                    cache_salt: request.cache_salt,
                    max_predict_time: request.max_predict_time,
                    speculation: request.speculation.clone(),
                    grammar: request.grammar.clone(),
                };
                let clock = TokenClock::start(state.metrics.lane(served.lane));
                let tokenizer = &served.model.tokenizer;
                let boarding = state.flights.board(&state.engine, plan.clone(), tokenizer)?;
                if let Some(shared) = boarding.shared {
                    state.metrics.sequence_shared(shared);
                }
                let text = TextRules {
                    tokenizer,
                    stop: &request.stop,
                    gap: prompt.gap.as_ref().filter(|_| request.fits_gaps),
                    markers: &request.markers,
                };
                choices.push(Choice::new(&state.engine, boarding, plan, text, clock));
            }
        }
        Ok(Generation {
            choices,
            num_choices_per_prompt: request.num_choices,
            num_running,
            next: 0,
            client: request.client.clone(),
            lane: served.lane,
            lane_reason: Reason::Named,
            record: None,
        })
    }

    /// Notes why this lane answers.
    pub(super) fn set_lane_reason(&mut self, reason: Reason) {
        self.lane_reason = reason;
    }

    /// Notes for the request's span how it ends.
    pub(super) fn record(&mut self, record: WorkRecord) {
        self.record = Some(record);
    }

    /// Who answers.
    pub fn lane(&self) -> &'static str {
        lane_name(self.lane)
    }

    /// Why that lane answers.
    pub fn lane_reason(&self) -> &Reason {
        &self.lane_reason
    }

    /// The mean margin of the first tokens of all choices, awaited; `None` if they have none. Nothing is taken
    /// from what is read later. See [`SamplingParams::num_margins`].
    pub async fn mean_margin(&mut self, num_tokens: u32) -> Option<f32> {
        let (mut sum, mut count) = (0.0, 0);
        for choice in &mut self.choices {
            let margins = std::future::poll_fn(|cx| choice.poll_margins(cx, num_tokens as usize)).await;
            sum += margins.iter().map(|&margin| f64::from(margin)).sum::<f64>();
            count += margins.len();
        }
        (count > 0).then(|| (sum / count as f64) as f32)
    }

    /// Waits for the next piece of any choice; `None` after all have ended.
    ///
    /// # Errors
    /// If a sequence failed. The generation is over then.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Progress, ApiError>>> {
        if self.num_running == 0 {
            return Poll::Ready(None);
        }
        let count = self.choices.len();
        for offset in 0..count {
            let index = (self.next + offset) % count;
            let choice = &mut self.choices[index];
            if choice.has_ended() {
                continue;
            }
            let num_tokens = choice.num_tokens();
            let polled = choice.poll_next(cx);
            if let Some(client) = self.client.as_ref().filter(|_| choice.num_tokens() > num_tokens) {
                client.spend_output(u64::from(choice.num_tokens() - num_tokens), unix_seconds());
            }
            match polled {
                Poll::Pending => {}
                Poll::Ready(Err(error)) => {
                    self.num_running = 0;
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(Ok(end)) => {
                    self.num_running -= usize::from(end.is_some());
                    if let Some((record, end)) = self.record.as_ref().zip(end) {
                        record.update(|work| work.finish_reasons.push(end));
                    }
                    self.next = (index + 1) % count;
                    return Poll::Ready(Some(Ok(Progress { index, end })));
                }
            }
        }
        Poll::Pending
    }

    /// What the latest [`Progress`] of this choice brought.
    pub fn delta(&self, index: usize) -> &Delta {
        &self.choices[index].delta
    }

    /// How its sequences were come by, if not by starting them: the loosest way among the choices.
    pub fn shared(&self) -> Option<Shared> {
        let shared = || self.choices.iter().filter_map(Choice::shared);
        shared().find(|shared| *shared == Shared::Continuation).or_else(|| shared().next())
    }

    /// The seed of a running sequence whose output a request that named none goes on with.
    pub fn joined_seed(&self) -> Option<u64> {
        self.choices.iter().find_map(Choice::joined_seed)
    }

    /// The stop string that ended this choice, if one did.
    pub fn stop_string(&self, index: usize) -> Option<&str> {
        self.choices[index].stop_string()
    }

    /// True after the last choice has ended.
    pub fn has_ended(&self) -> bool {
        self.num_running == 0
    }

    /// Sequences of this request.
    pub fn num_sequences(&self) -> usize {
        self.choices.len()
    }

    /// The account of all choices that have ended: counts add up, times are the longest.
    pub fn account(&self) -> Account {
        let mut total = Account::default();
        for (index, choice) in self.choices.iter().enumerate() {
            let account = choice.account();
            if index % self.num_choices_per_prompt == 0 {
                total.num_prompt_tokens += account.num_prompt_tokens;
                total.num_cached_tokens += account.num_cached_tokens;
            }
            total.num_output_tokens += account.num_output_tokens;
            total.num_draft_tokens += account.num_draft_tokens;
            total.num_accepted_tokens += account.num_accepted_tokens;
            total.num_prediction_tokens += account.num_prediction_tokens;
            total.num_accepted_prediction_tokens += account.num_accepted_prediction_tokens;
            total.queue_time = total.queue_time.max(account.queue_time);
            total.prefill_time = total.prefill_time.max(account.prefill_time);
            total.decode_time = total.decode_time.max(account.decode_time);
        }
        total
    }

    /// Runs everything to its end.
    ///
    /// # Errors
    /// If any sequence fails.
    pub async fn collect(&mut self) -> Result<Vec<CompletedChoice>, ApiError> {
        let mut answers: Vec<(Delta, EndReason)> =
            self.choices.iter().map(|_| (Delta::default(), EndReason::Length)).collect();
        while let Some(progress) = std::future::poll_fn(|cx| self.poll_next(cx)).await {
            let Progress { index, end } = progress?;
            let delta = &mut self.choices[index].delta;
            let (answer, reason) = &mut answers[index];
            answer.text.push_str(&delta.text);
            answer.tokens.append(&mut delta.tokens);
            if let Some(scores) = delta.prompt_logprobs.take() {
                answer.prompt_logprobs = Some(scores);
            }
            if let Some(end) = end {
                *reason = end;
            }
        }
        Ok(answers.into_iter().map(|(answer, end)| CompletedChoice { answer, end }).collect())
    }
}
