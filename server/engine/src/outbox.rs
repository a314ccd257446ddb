//! What of a sequence is final and has not been handed to its client yet.
//!
//! Nothing here waits: a client whose channel is full is offered the same again, in the same order, at the next
//! step, and what comes meanwhile is kept in chunks that each fit one event. So a slow reader costs the memory of
//! its own answer, and nobody else anything.

use std::collections::VecDeque;

use crate::api::{
    EngineError, Event, EventSink, OutputToken, SamplingParams, SinkError, TokenChunk, TokenLogprobs, Usage,
};

/// Nobody listens to a sequence's events any more.
#[derive(Debug)]
pub(crate) struct ClientGone;

/// What a sequence still has to tell its client, and where it goes.
pub(crate) struct Outbox {
    sink: Box<dyn EventSink>,
    prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    /// Prompt tokens whose successor has been scored, from the start.
    num_scored: usize,
    embedding: Option<Vec<f32>>,
    /// Unsent output, in chunks that each fit one event.
    tokens: VecDeque<TokenChunk>,
    with_logprobs: bool,
    delivered: bool,
}

impl Outbox {
    /// For a sequence with these parameters.
    pub(crate) fn new(sink: Box<dyn EventSink>, params: &SamplingParams) -> Self {
        Outbox {
            sink,
            // The first prompt token has no distribution; a one-token prompt reports just that.
            prompt_logprobs: params.prompt_logprobs.map(|_| vec![None]),
            num_scored: 0,
            embedding: None,
            tokens: VecDeque::with_capacity(2),
            with_logprobs: params.logprobs.is_some(),
            delivered: false,
        }
    }

    /// Takes a token that is final.
    pub(crate) fn push(&mut self, token: OutputToken, logprobs: Option<TokenLogprobs>) {
        if self.tokens.back().is_none_or(|chunk| chunk.tokens.is_full()) {
            self.tokens.push_back(TokenChunk::default());
        }
        let chunk = self.tokens.back_mut().expect("a chunk was just made sure of: this is a bug");
        chunk.tokens.push(token);
        if self.with_logprobs {
            chunk.logprobs.extend(logprobs);
        }
    }

    /// Takes how sure the model was of the token that came last.
    pub(crate) fn push_margin(&mut self, margin: f32) {
        if let Some(chunk) = self.tokens.back_mut() {
            chunk.margins.push(margin);
        }
    }

    /// Takes the score of the next prompt token.
    pub(crate) fn push_prompt_logprobs(&mut self, logprobs: TokenLogprobs) {
        self.prompt_logprobs.get_or_insert_with(|| vec![None]).push(Some(logprobs));
        self.num_scored += 1;
    }

    /// Prompt tokens whose successor has been scored, from the start.
    pub(crate) fn num_scored(&self) -> usize {
        self.num_scored
    }

    /// Takes the text's embedding.
    pub(crate) fn push_embedding(&mut self, embedding: Vec<f32>) {
        self.embedding = Some(embedding);
    }

    /// True once the client has been handed everything.
    pub(crate) fn is_delivered(&self) -> bool {
        self.delivered
    }

    /// Tells the client that the sequence failed. One too slow for one more event finds its channel closed instead.
    pub(crate) fn fail(mut self, error: EngineError) {
        let _ = self.sink.try_send(Event::Failed(error));
    }

    /// Offers what is there, in order, as far as the client has room; `last` after all else, once. Prompt scores go
    /// out together, when `prompt_done`; tokens with the account so far.
    ///
    /// # Errors
    /// If nobody listens any more.
    pub(crate) fn flush(
        &mut self,
        prompt_done: bool,
        usage: Usage,
        last: Option<Event>,
    ) -> Result<(), ClientGone> {
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
        if let Some(embedding) = self.embedding.take() {
            match self.sink.try_send(Event::Embedding(embedding)) {
                Ok(()) => {}
                Err(SinkError::Full(Event::Embedding(embedding))) => {
                    self.embedding = Some(embedding);
                    return Ok(());
                }
                Err(_) => return Err(ClientGone),
            }
        }
        while let Some(mut chunk) = self.tokens.pop_front() {
            chunk.usage = usage;
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
