//! One sequence's events turned into text.
//!
//! Tokens become text when their UTF-8 is whole, text is released when it can no longer be part of a
//! stop string, and a scored token is released with the first byte of its text. After a stop string
//! the sequence is aborted and its end awaited, which takes at most one engine step.

use std::collections::VecDeque;
use std::task::{Context, Poll, ready};

use tandem_engine::{Event, FinishReason, TokenChunk, TokenLogprobs, Usage};
use tandem_models::Detokenizer;
use tokio::sync::mpsc;

use super::{Account, Delta, EndReason, RunningSequence, ScoredToken};
use crate::http::error::{ApiError, ErrorKind};
use crate::http::metrics::TokenClock;
use crate::http::state::ServedModel;
use crate::text::StopMatcher;

pub(super) struct Choice {
    sequence: RunningSequence,
    events: mpsc::Receiver<Event>,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    clock: TokenClock,
    pub(super) delta: Delta,
    /// Scored tokens whose text is held back, with the place in the output where it begins.
    held_tokens: VecDeque<(usize, ScoredToken)>,
    /// Bytes of text that the detokenizer gave so far.
    num_decoded_bytes: usize,
    /// Of those, handed on.
    num_released_bytes: usize,
    /// Tokens up to the end, or up to the one that completed a stop string.
    num_tokens: u32,
    usage: Usage,
}

impl Choice {
    pub(super) fn new(
        sequence: RunningSequence,
        events: mpsc::Receiver<Event>,
        served: &ServedModel,
        stop: &[String],
        clock: TokenClock,
        prompt: &[u32],
    ) -> Self {
        Choice {
            sequence,
            events,
            detokenizer: Detokenizer::continuing(served.model.tokenizer.clone(), prompt, true),
            stop: StopMatcher::new(stop),
            clock,
            delta: Delta::default(),
            held_tokens: VecDeque::new(),
            num_decoded_bytes: 0,
            num_released_bytes: 0,
            num_tokens: 0,
            usage: Usage {
                num_prompt_tokens: u32::try_from(prompt.len()).unwrap_or(u32::MAX),
                ..Usage::default()
            },
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.sequence.ended
    }

    /// Fills [`Choice::delta`] from the next event that brings something.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<EndReason>, ApiError>> {
        self.delta.text.clear();
        self.delta.tokens.clear();
        self.delta.prompt_logprobs = None;
        loop {
            match ready!(self.events.poll_recv(cx)) {
                Some(Event::PromptLogprobs(scores)) => {
                    self.delta.prompt_logprobs = Some(scores);
                    return Poll::Ready(Ok(None));
                }
                Some(Event::Tokens(chunk)) => {
                    // What still arrives after a stop string is not part of the answer.
                    if self.stop.stopped() {
                        continue;
                    }
                    self.clock.tokens(chunk.tokens.len());
                    self.absorb(chunk)?;
                    // The closing account comes over the same channel, so it is only closed to tell an
                    // engine that cannot be told otherwise.
                    if self.stop.stopped() && !self.sequence.abort() {
                        self.events.close();
                    }
                    if !self.delta.text.is_empty() || !self.delta.tokens.is_empty() {
                        return Poll::Ready(Ok(None));
                    }
                }
                Some(Event::Finished(finished)) => {
                    self.sequence.ended = true;
                    self.usage = finished.usage;
                    return Poll::Ready(self.end(Some(finished.reason)).map(Some));
                }
                Some(Event::Failed(error)) => {
                    self.sequence.ended = true;
                    return Poll::Ready(Err(error.into()));
                }
                None => {
                    self.sequence.ended = true;
                    return Poll::Ready(self.end(None).map(Some));
                }
            }
        }
    }

    fn absorb(&mut self, chunk: TokenChunk) -> Result<(), ApiError> {
        let mut scores = chunk.logprobs.into_iter();
        for token in &chunk.tokens {
            self.num_tokens += 1;
            if let Some(logprobs) = scores.next() {
                self.hold(token.id, logprobs);
            }
            let text = self.detokenizer.push(token.id).map_err(|error| {
                ApiError::new(ErrorKind::Internal, format!("token {} has no text: {error}", token.id))
            })?;
            if let Some(text) = text {
                self.release(&text);
            }
            if self.stop.stopped() {
                break;
            }
        }
        Ok(())
    }

    fn hold(&mut self, id: u32, logprobs: TokenLogprobs) {
        self.held_tokens.push_back((self.num_decoded_bytes, ScoredToken { id, logprobs }));
    }

    fn release(&mut self, text: &str) {
        let before = self.delta.text.len();
        self.num_decoded_bytes += text.len();
        self.stop.push(text, &mut self.delta.text);
        self.num_released_bytes += self.delta.text.len() - before;
        while self.held_tokens.front().is_some_and(|(start, _)| *start < self.num_released_bytes) {
            self.delta.tokens.extend(self.held_tokens.pop_front().map(|(_, token)| token));
        }
    }

    fn end(&mut self, reason: Option<FinishReason>) -> Result<EndReason, ApiError> {
        if !self.stop.stopped()
            && let Some(text) = self.detokenizer.flush()
        {
            self.release(&text);
        }
        if self.stop.stopped() {
            self.held_tokens.clear();
            return Ok(EndReason::Stop);
        }
        self.stop.finish(&mut self.delta.text);
        self.delta.tokens.extend(self.held_tokens.drain(..).map(|(_, token)| token));
        match reason {
            Some(FinishReason::Stop(_)) => Ok(EndReason::Stop),
            Some(FinishReason::Length) => Ok(EndReason::Length),
            // Nobody but the server's own shutdown aborts a sequence that has a listener.
            Some(FinishReason::Aborted) => Err(ApiError::shutting_down()),
            None => Err(ApiError::new(ErrorKind::Internal, "the engine ended before this answer was whole")),
        }
    }

    /// Final once the choice has ended.
    pub(super) fn account(&self) -> Account {
        let usage = &self.usage;
        Account {
            num_prompt_tokens: usage.num_prompt_tokens.into(),
            num_cached_tokens: usage.num_cached_tokens.into(),
            num_output_tokens: self.num_tokens.into(),
            num_draft_tokens: usage.num_draft_tokens.into(),
            num_accepted_tokens: usage.num_accepted_tokens.into(),
            queue_time: usage.queue_time,
            prefill_time: usage.prefill_time,
            decode_time: usage.decode_time,
        }
    }
}
