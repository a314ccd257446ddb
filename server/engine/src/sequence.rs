//! One generation: its tokens, what of them each model has computed, and its account.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use arrayvec::ArrayVec;

use crate::api::{
    BATCH_PATIENCE, CacheSalt, DraftSource, EngineError, Event, FinishReason, Finished, Lane,
    MAX_DRAFT_TOKENS, OutputToken, Priority, SamplingParams, SequenceId, SpeculationParams, SubmitRequest,
    TokenId, TokenLogprobs, Usage,
};
use crate::block_manager::{BlockTable, CachedPrefix};
use crate::constraint::Constrained;
use crate::embedding::Pooling;
use crate::outbox::{ClientGone, Outbox};
use crate::sampler::{Draw, TokenCounts};
use crate::speculation::{Acceptance, Offer, ProposalKind, TextProposers};

/// One of the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ModelRole {
    Target,
    Draft,
}

impl Lane {
    /// The model whose tokens this lane's clients see.
    pub(crate) fn answered_by(self) -> ModelRole {
        match self {
            Lane::Fast => ModelRole::Draft,
            Lane::Deep => ModelRole::Target,
        }
    }
}

/// One step's draft of a sequence.
#[derive(Clone, Debug)]
pub(crate) struct DraftState {
    /// Who proposes.
    pub(crate) source: DraftSource,
    /// What the proposal is like, for the account of how often such ones stand.
    pub(crate) kind: ProposalKind,
    /// The policy decides after each token whether the draft model goes on.
    pub(crate) is_adaptive: bool,
    /// The chance that all its tokens so far stand.
    pub(crate) standing: f64,
    /// How sure the draft model was of each of its tokens.
    pub(crate) confidences: ArrayVec<f32, MAX_DRAFT_TOKENS>,
}

impl Default for DraftState {
    fn default() -> Self {
        DraftState {
            source: DraftSource::Draft,
            kind: ProposalKind::new(DraftSource::Draft, Offer::default()),
            is_adaptive: false,
            standing: 1.0,
            confidences: ArrayVec::new(),
        }
    }
}

/// Who goes first: the smaller one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Urgency {
    priority: Priority,
    submitted: Duration,
    id: SequenceId,
}

impl Urgency {
    pub(crate) fn priority(self) -> Priority {
        self.priority
    }
}

/// Tokens that a step commits without drawing them, at most: with the longest draft they fit the share of
/// a pass that every seat is sure of.
const MAX_JUMPED_TOKENS: usize = 24;

/// A sequence, waiting or running. A preempted one waits again, with its output so far.
///
/// `tokens` is the prompt, then the committed output, then this step's draft tokens, which are
/// provisional: [`Sequence::rollback`] removes them, and nothing that leaves the engine shows them.
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) lane: Lane,
    pub(crate) params: SamplingParams,
    priority: Priority,
    pub(crate) cache_salt: CacheSalt,
    max_predict_time: Option<Duration>,
    pub(crate) speculation: SpeculationParams,
    prompt: Arc<[TokenId]>,
    /// Whose prompt begins with so many of the same tokens: see [`Sequence::begins_as`].
    alike: Cell<Option<(SequenceId, usize)>>,
    tokens: Vec<TokenId>,
    num_tokens: usize,
    num_computed: [usize; 2],
    pub(crate) block_table: BlockTable,
    pub(crate) counts: Option<TokenCounts>,
    constraint: Option<Constrained>,
    /// Committed tokens that nobody had to draw, since the last pass of the answering model.
    num_jumped_tokens: usize,
    /// Tokens that the draft model is to propose in this step.
    pub(crate) num_planned_draft_tokens: usize,
    /// What this step's draft is.
    pub(crate) drafting: DraftState,
    /// Proposers that need no forward pass; on the deep lane only.
    pub(crate) proposers: Option<Box<TextProposers>>,
    /// Part of the target's pass that is under way.
    pub(crate) in_flight: bool,
    pub(crate) acceptance: Acceptance,
    pub(crate) finished: Option<FinishReason>,
    outbox: Outbox,
    clock: Clock,
    pub(crate) usage: Usage,
    /// Of a sequence that gives an embedding.
    pub(crate) pooling: Option<Pooling>,
}

#[derive(Default)]
struct Clock {
    submitted: Duration,
    started: Option<Duration>,
    first_token: Option<Duration>,
}

impl Sequence {
    /// `num_token_ids`: ids below this are tokens.
    pub(crate) fn new(request: SubmitRequest, num_token_ids: usize, now: Duration) -> Self {
        Sequence {
            id: request.id,
            lane: request.lane,
            alike: Cell::new(None),
            tokens: Vec::new(),
            num_tokens: request.prompt.len(),
            num_computed: [0; 2],
            block_table: BlockTable::default(),
            counts: TokenCounts::for_sequence(&request.prompt, &request.params),
            constraint: request.constraint.map(|constraint| Constrained::new(constraint, num_token_ids)),
            num_jumped_tokens: 0,
            priority: request.priority,
            cache_salt: request.cache_salt,
            max_predict_time: request.max_predict_time,
            speculation: request.speculation,
            num_planned_draft_tokens: 0,
            drafting: DraftState::default(),
            proposers: None,
            in_flight: false,
            acceptance: Acceptance::new(request.params.temperature > 0.0),
            finished: None,
            outbox: Outbox::new(request.events, &request.params),
            clock: Clock { submitted: now, ..Clock::default() },
            usage: Usage { num_prompt_tokens: request.prompt.len() as u32, ..Usage::default() },
            prompt: request.prompt,
            params: request.params,
            pooling: None,
        }
    }

    /// Where the sequence stands in a pass. A text to embed comes after those that somebody reads, however long it has
    /// taken: it would have the whole of each small pass.
    pub(crate) fn urgency(&self, now: Duration) -> Urgency {
        let turn = self.turn(now);
        if self.is_embedding() { Urgency { priority: self.priority, ..turn } } else { turn }
    }

    /// Where the sequence stands among those that wait, and among those that may have to give way: the same place, or
    /// two would take turns at one seat.
    pub(crate) fn turn(&self, now: Duration) -> Urgency {
        let is_patient = self.age(now) < BATCH_PATIENCE;
        let priority = if is_patient { self.priority } else { Priority::Interactive };
        Urgency { priority, submitted: self.clock.submitted, id: self.id }
    }

    /// How long ago the sequence was submitted.
    pub(crate) fn age(&self, now: Duration) -> Duration {
        now.saturating_sub(self.clock.submitted)
    }

    /// Takes the sequence from waiting to running, with what the cache has of it. The only place where
    /// its buffers are allocated.
    pub(crate) fn start(&mut self, prefix: CachedPrefix, now: Duration) {
        self.block_table = prefix.table;
        if self.tokens.is_empty() {
            self.tokens.reserve_exact(self.max_len() + MAX_DRAFT_TOKENS);
            self.tokens.extend_from_slice(&self.prompt);
            if self.lane == Lane::Deep && !self.is_embedding() {
                let max_len = self.max_len();
                self.proposers =
                    Some(Box::new(TextProposers::new(&self.speculation, self.prompt.len(), max_len)));
            }
        }
        // The last token is computed in any case: its logits are what the sequence goes on from.
        let most = self.num_tokens - 1;
        self.num_computed = prefix.num_computed.map(|computed| computed.min(most));
        if self.scores_prompt() {
            // Prompt tokens whose successors have not been scored must be computed for their logits.
            let computed = &mut self.num_computed[self.lane.answered_by() as usize];
            *computed = (*computed).min(self.outbox.num_scored());
        }
        if self.clock.started.is_none() {
            self.clock.started = Some(now);
            self.usage.queue_time = now.saturating_sub(self.clock.submitted);
            let cached = self.num_computed(self.lane.answered_by()).min(self.prompt.len());
            self.usage.num_cached_tokens = cached as u32;
        }
    }

    /// Takes the sequence from running to waiting, and its blocks from it.
    pub(crate) fn preempt(&mut self) -> BlockTable {
        self.rollback();
        self.in_flight = false;
        self.num_jumped_tokens = 0;
        self.num_computed = [0; 2];
        std::mem::take(&mut self.block_table)
    }

    /// Prompt and committed output; the prompt alone before the first start.
    pub(crate) fn committed_tokens(&self) -> &[TokenId] {
        if self.tokens.is_empty() { &self.prompt } else { &self.tokens[..self.num_tokens] }
    }

    /// Raises `max_tokens`.
    pub(crate) fn extend(&mut self, max_tokens: u32) {
        self.params.max_tokens = self.params.max_tokens.max(max_tokens);
        if !self.tokens.is_empty() {
            let wanted = self.max_len() + MAX_DRAFT_TOKENS;
            self.tokens.reserve_exact(wanted.saturating_sub(self.tokens.len()));
        }
    }

    /// True if the time for the output is over.
    pub(crate) fn is_out_of_time(&self, now: Duration) -> bool {
        let since_first = self.clock.first_token.map(|first| now.saturating_sub(first));
        self.max_predict_time.zip(since_first).is_some_and(|(limit, time)| time >= limit)
    }

    /// True until the first output token, if there is to be one.
    pub(crate) fn awaits_first_token(&self) -> bool {
        self.clock.first_token.is_none() && !self.is_embedding()
    }

    /// True if not every token may stand everywhere.
    pub(crate) fn is_constrained(&self) -> bool {
        self.constraint.is_some()
    }

    /// Tokens the sequence has when it has produced all it may.
    pub(crate) fn max_len(&self) -> usize {
        self.prompt.len() + self.params.max_tokens as usize
    }

    pub(crate) fn num_prompt_tokens(&self) -> usize {
        self.prompt.len()
    }

    /// True if the first `num_tokens` of both prompts are the same. Of the sequence that was so last only what is new
    /// is compared: the question is asked again before every pass.
    pub(crate) fn begins_as(&self, other: &Sequence, num_tokens: usize) -> bool {
        let (Some(own), Some(theirs)) = (self.prompt.get(..num_tokens), other.prompt.get(..num_tokens))
        else {
            return false;
        };
        let known = self.alike.get().filter(|&(id, _)| id == other.id);
        let num_known = known.map_or(0, |(_, num_known)| num_known.min(num_tokens));
        // The answers to one request have one prompt.
        let is_alike = Arc::ptr_eq(&self.prompt, &other.prompt) || own[num_known..] == theirs[num_known..];
        if is_alike {
            self.alike.set(Some((other.id, num_tokens)));
        }
        is_alike
    }

    /// True if [`Sequence::begins_as`] was so of that one last.
    pub(crate) fn was_alike(&self, other: SequenceId) -> bool {
        self.alike.get().is_some_and(|(id, _)| id == other)
    }

    /// Tokens of prompt and committed output.
    pub(crate) fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    pub(crate) fn num_output_tokens(&self) -> usize {
        self.num_tokens - self.prompt.len()
    }

    /// Output tokens that may still come.
    pub(crate) fn num_remaining_tokens(&self) -> usize {
        self.max_len() - self.num_tokens
    }

    /// Prompt, committed output and this step's draft tokens.
    pub(crate) fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// This step's draft tokens.
    pub(crate) fn draft_tokens(&self) -> &[TokenId] {
        &self.tokens[self.num_tokens..]
    }

    pub(crate) fn push_draft_token(&mut self, id: TokenId) {
        self.tokens.push(id);
    }

    /// Takes back the last draft token, which no model has computed yet.
    pub(crate) fn pop_draft_token(&mut self) {
        if self.tokens.len() > self.num_tokens {
            self.tokens.pop();
        }
    }

    /// Tokens whose keys and values this model's cache holds.
    pub(crate) fn num_computed(&self, role: ModelRole) -> usize {
        self.num_computed[role as usize]
    }

    pub(crate) fn advance(&mut self, role: ModelRole, num_tokens: usize) {
        self.num_computed[role as usize] += num_tokens;
    }

    /// Before the target computes more: what a head computed from its own guesses of the target's hidden states
    /// counts as not computed, because it is about to have the target's own. So its cache is what it would be
    /// had nothing ever been rejected, and a function of the text alone.
    pub(crate) fn forget_guesses(&mut self) {
        // Its row of a token is made of the hidden state at the token before.
        let known = self.num_computed(ModelRole::Target) + 1;
        let computed = &mut self.num_computed[ModelRole::Draft as usize];
        *computed = known.min(*computed);
    }

    /// True if a head has what it drafts from: the target's hidden states of all tokens but the last.
    pub(crate) fn has_hidden_states(&self) -> bool {
        let known = self.num_computed(ModelRole::Target);
        known > 0 && self.num_tokens == known + 1
    }

    /// True while the answering model has not seen the whole prompt.
    pub(crate) fn is_prefilling(&self) -> bool {
        self.num_tokens > self.num_computed(self.lane.answered_by()) + 1 + self.num_jumped_tokens
    }

    /// Committed tokens that nobody had to draw, since the last pass of the answering model: they are
    /// computed with the next, as draft tokens are.
    pub(crate) fn num_jumped_tokens(&self) -> usize {
        self.num_jumped_tokens
    }

    /// What the token after the first `num_provisional` draft tokens is drawn with.
    ///
    /// # Errors
    /// If the constraint cannot say what may stand there.
    pub(crate) fn draw_after(&mut self, num_provisional: usize) -> Result<Draw<'_>, EngineError> {
        let position = self.num_tokens + num_provisional;
        let output = &self.tokens[self.prompt.len()..position];
        let allowed = match &mut self.constraint {
            Some(constraint) => Some(constraint.allowed(output, &self.params)?),
            None => None,
        };
        Ok(Draw {
            params: &self.params,
            counts: self.counts.as_ref(),
            provisional: &self.tokens[self.num_tokens..position],
            position,
            num_output_tokens: output.len(),
            allowed,
        })
    }

    /// True if nothing can follow the first `num_provisional` draft tokens.
    ///
    /// # Errors
    /// As [`Sequence::draw_after`].
    pub(crate) fn is_complete_after(&mut self, num_provisional: usize) -> Result<bool, EngineError> {
        let output = &self.tokens[self.prompt.len()..self.num_tokens + num_provisional];
        match &mut self.constraint {
            Some(constraint) => constraint.is_complete(output, &self.params),
            None => Ok(false),
        }
    }

    /// Drafts `ids`, up to the first that cannot stand there.
    pub(crate) fn push_draft_text(&mut self, ids: &[TokenId]) {
        for &id in ids {
            if self.constraint.is_some() {
                let num_provisional = self.draft_tokens().len();
                let can_stand = self.draw_after(num_provisional).is_ok_and(|draw| draw.allows(id));
                if !can_stand {
                    break;
                }
            }
            self.push_draft_token(id);
            if self.constraint.is_some() && self.params.stop_token_ids.contains(&id) {
                break;
            }
        }
    }

    /// Commits the tokens to which there is no alternative: whatever the logits, they would be drawn.
    /// Not if their log-probabilities are wanted, which take a pass.
    ///
    /// # Errors
    /// As [`Sequence::draw_after`].
    pub(crate) fn jump(&mut self, now: Duration) -> Result<(), EngineError> {
        self.num_jumped_tokens = 0;
        if self.constraint.is_none() || self.params.logprobs.is_some() {
            return Ok(());
        }
        while self.finished.is_none() && self.num_jumped_tokens < MAX_JUMPED_TOKENS {
            let only = self.draw_after(0)?.only_token();
            let Some(id) = only else { break };
            self.num_jumped_tokens += 1;
            self.take_token(id, false, None, now)?;
        }
        Ok(())
    }

    /// Commits a token that was drawn, and ends the sequence if it was the last.
    ///
    /// # Errors
    /// If the constraint cannot say whether it was.
    pub(crate) fn take_token(
        &mut self,
        id: TokenId,
        drafted: bool,
        logprobs: Option<TokenLogprobs>,
        now: Duration,
    ) -> Result<(), EngineError> {
        self.commit(id, drafted, logprobs, now);
        if self.is_complete_after(0)? {
            self.finished = Some(FinishReason::Complete);
        } else if self.num_remaining_tokens() == 0 {
            self.finished = Some(FinishReason::Length);
        }
        Ok(())
    }

    /// Forgets the draft tokens, in the text and in both caches.
    pub(crate) fn rollback(&mut self) {
        self.tokens.truncate(self.num_tokens);
        self.num_planned_draft_tokens = 0;
        for computed in &mut self.num_computed {
            *computed = (*computed).min(self.num_tokens);
        }
    }

    /// Makes `id` the next token. Draft tokens must have been rolled back, or `id` must equal the
    /// first of them.
    fn commit(&mut self, id: TokenId, drafted: bool, logprobs: Option<TokenLogprobs>, now: Duration) {
        if self.tokens.len() > self.num_tokens {
            debug_assert_eq!(
                self.tokens[self.num_tokens], id,
                "commit over another draft token: this is a bug"
            );
        } else {
            self.tokens.push(id);
        }
        self.num_tokens += 1;
        if let Some(counts) = &mut self.counts {
            counts.push(id);
        }
        self.outbox.push(OutputToken { id, drafted }, logprobs);
        let started = self.clock.started.unwrap_or(now);
        let first = *self.clock.first_token.get_or_insert(now);
        self.usage.num_output_tokens += 1;
        self.usage.prefill_time = first.saturating_sub(started);
        self.usage.decode_time = now.saturating_sub(first);
    }

    /// Reports how sure the model was of the token committed last.
    pub(crate) fn push_margin(&mut self, margin: f32) {
        self.outbox.push_margin(margin);
    }

    /// True while prompt tokens wait to be scored; there is no output yet then.
    pub(crate) fn scores_prompt(&self) -> bool {
        self.params.prompt_logprobs.is_some() && self.outbox.num_scored() + 1 < self.prompt.len()
    }

    /// Prompt tokens whose successor has been scored, from the start.
    pub(crate) fn num_scored(&self) -> usize {
        self.outbox.num_scored()
    }

    pub(crate) fn push_prompt_logprobs(&mut self, logprobs: TokenLogprobs) {
        self.outbox.push_prompt_logprobs(logprobs);
    }

    pub(crate) fn send_embedding(&mut self, embedding: Vec<f32>) {
        self.outbox.push_embedding(embedding);
    }

    /// Offers what is new to the client.
    ///
    /// # Errors
    /// If nobody listens any more.
    pub(crate) fn emit(&mut self) -> Result<(), ClientGone> {
        let prompt_done = self.num_computed(self.lane.answered_by()) >= self.prompt.len();
        let last = self.finished.map(|reason| Event::Finished(Finished { reason, usage: self.usage }));
        self.outbox.flush(prompt_done, self.usage, last)
    }

    /// True once the client has been handed everything.
    pub(crate) fn is_delivered(&self) -> bool {
        self.outbox.is_delivered()
    }

    /// Tells the client that the sequence failed, as far as there is room.
    pub(crate) fn fail(self, error: EngineError) {
        self.outbox.fail(error);
    }
}
