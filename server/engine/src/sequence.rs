//! One generation: its tokens, what of them each model has computed, and its account.

use std::sync::Arc;
use std::time::Duration;

use crate::api::{
    EngineError, Event, EventSink, FinishReason, Finished, Lane, MAX_DRAFT_TOKENS, OutputToken,
    SamplingParams, SequenceId, SinkError, SubmitRequest, TokenChunk, TokenId, TokenLogprobs, Usage,
};
use crate::block_manager::BlockTable;
use crate::sampler::TokenCounts;
use crate::speculation::AcceptanceRate;

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

/// A sequence, waiting or running.
///
/// `tokens` is the prompt, then the committed output, then this step's draft tokens, which are
/// provisional: [`Sequence::rollback`] removes them, and nothing that leaves the engine shows them.
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) lane: Lane,
    pub(crate) params: SamplingParams,
    prompt: Arc<[TokenId]>,
    tokens: Vec<TokenId>,
    num_tokens: usize,
    num_computed: [usize; 2],
    pub(crate) block_table: BlockTable,
    pub(crate) counts: Option<TokenCounts>,
    pub(crate) max_draft_tokens: Option<u8>,
    pub(crate) num_planned_draft_tokens: usize,
    pub(crate) acceptance: AcceptanceRate,
    pub(crate) finished: Option<FinishReason>,
    /// Set when the sequence cannot go on; the engine fails it at the end of the pass.
    pub(crate) error: Option<EngineError>,
    outbox: Outbox,
    clock: Clock,
    pub(crate) usage: Usage,
}

#[derive(Default)]
struct Clock {
    submitted: Duration,
    started: Option<Duration>,
    first_token: Option<Duration>,
}

impl Sequence {
    pub(crate) fn new(request: SubmitRequest, now: Duration) -> Self {
        Sequence {
            id: request.id,
            lane: request.lane,
            tokens: Vec::new(),
            num_tokens: request.prompt.len(),
            num_computed: [0; 2],
            block_table: BlockTable::default(),
            counts: TokenCounts::for_sequence(&request.prompt, &request.params),
            max_draft_tokens: request.max_draft_tokens,
            num_planned_draft_tokens: 0,
            acceptance: AcceptanceRate::default(),
            finished: None,
            error: None,
            outbox: Outbox::new(request.events, &request.params),
            clock: Clock { submitted: now, ..Clock::default() },
            usage: Usage { num_prompt_tokens: request.prompt.len() as u32, ..Usage::default() },
            prompt: request.prompt,
            params: request.params,
        }
    }

    /// Takes the sequence from waiting to running. The only place where its buffers are allocated.
    pub(crate) fn start(&mut self, block_table: BlockTable, now: Duration) {
        self.block_table = block_table;
        self.tokens.reserve_exact(self.max_len() + MAX_DRAFT_TOKENS);
        self.tokens.extend_from_slice(&self.prompt);
        self.clock.started = Some(now);
        self.usage.queue_time = now.saturating_sub(self.clock.submitted);
    }

    /// Tokens the sequence has when it has produced all it may.
    pub(crate) fn max_len(&self) -> usize {
        self.prompt.len() + self.params.max_tokens as usize
    }

    pub(crate) fn num_prompt_tokens(&self) -> usize {
        self.prompt.len()
    }

    /// Prompt and committed output.
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

    /// Tokens whose keys and values this model's cache holds.
    pub(crate) fn num_computed(&self, role: ModelRole) -> usize {
        self.num_computed[role as usize]
    }

    pub(crate) fn advance(&mut self, role: ModelRole, num_tokens: usize) {
        self.num_computed[role as usize] += num_tokens;
    }

    /// True while the answering model has not seen the whole prompt.
    pub(crate) fn is_prefilling(&self) -> bool {
        self.num_tokens - self.num_computed(self.lane.answered_by()) > 1
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
    pub(crate) fn commit(
        &mut self,
        id: TokenId,
        drafted: bool,
        logprobs: Option<TokenLogprobs>,
        now: Duration,
    ) {
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

    pub(crate) fn push_prompt_logprobs(&mut self, logprobs: TokenLogprobs) {
        self.outbox.prompt_logprobs.get_or_insert_with(|| vec![None]).push(Some(logprobs));
    }

    /// Offers what is new to the client.
    ///
    /// # Errors
    /// If nobody listens any more.
    pub(crate) fn emit(&mut self) -> Result<(), ClientGone> {
        let prompt_done = self.num_computed(self.lane.answered_by()) >= self.prompt.len();
        let last = self.finished.map(|reason| Event::Finished(Finished { reason, usage: self.usage }));
        self.outbox.flush(prompt_done, last)
    }

    /// True once the client has been handed everything.
    pub(crate) fn is_delivered(&self) -> bool {
        self.outbox.delivered
    }

    /// Tells the client that the sequence failed, as far as there is room.
    pub(crate) fn fail(mut self, error: EngineError) -> BlockTable {
        // A client too slow for one more event finds its channel closed instead.
        let _ = self.outbox.sink.try_send(Event::Failed(error));
        self.block_table
    }
}

/// Nobody listens to a sequence's events any more.
#[derive(Debug)]
pub(crate) struct ClientGone;

/// What has been committed and not yet been handed to the client.
struct Outbox {
    sink: Box<dyn EventSink>,
    prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    /// Unsent output, in chunks that each fit one event.
    tokens: std::collections::VecDeque<TokenChunk>,
    with_logprobs: bool,
    delivered: bool,
}

impl Outbox {
    fn new(sink: Box<dyn EventSink>, params: &SamplingParams) -> Self {
        Outbox {
            sink,
            // The first prompt token has no distribution; a one-token prompt reports just that.
            prompt_logprobs: params.prompt_logprobs.map(|_| vec![None]),
            tokens: std::collections::VecDeque::with_capacity(2),
            with_logprobs: params.logprobs.is_some(),
            delivered: false,
        }
    }

    fn push(&mut self, token: OutputToken, logprobs: Option<TokenLogprobs>) {
        if self.tokens.back().is_none_or(|chunk| chunk.tokens.is_full()) {
            self.tokens.push_back(TokenChunk::default());
        }
        let chunk = self.tokens.back_mut().expect("a chunk was just made sure of: this is a bug");
        chunk.tokens.push(token);
        if self.with_logprobs {
            chunk.logprobs.extend(logprobs);
        }
    }

    fn flush(&mut self, prompt_done: bool, last: Option<Event>) -> Result<(), ClientGone> {
        if self.delivered {
            return Ok(());
        }
        if prompt_done && let Some(logprobs) = self.prompt_logprobs.take() {
            match self.sink.try_send(Event::PromptLogprobs(logprobs)) {
                Ok(()) => {}
                Err(SinkError::Full(Event::PromptLogprobs(logprobs))) => {
                    self.prompt_logprobs = Some(logprobs);
                    return Ok(());
                }
                Err(_) => return Err(ClientGone),
            }
        }
        while let Some(chunk) = self.tokens.pop_front() {
            match self.sink.try_send(Event::Tokens(chunk)) {
                Ok(()) => {}
                Err(SinkError::Full(Event::Tokens(chunk))) => {
                    self.tokens.push_front(chunk);
                    return Ok(());
                }
                Err(_) => return Err(ClientGone),
            }
        }
        if let Some(event) = last {
            match self.sink.try_send(event) {
                Ok(()) => self.delivered = true,
                Err(SinkError::Full(_)) => {}
                Err(SinkError::Closed) => return Err(ClientGone),
            }
        }
        Ok(())
    }
}
