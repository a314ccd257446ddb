//! One answer: a sequence's tokens turned into text.
//!
//! Tokens become text when their UTF-8 is whole, text is released when it is certain to stand before the
//! answer's [`Ending`], and a scored token is released with the first byte of its text. After the end
//! the sequence is aborted and its end awaited, which takes at most one engine step.
//!
//! A sequence may have other readers. Then it can go on past what this answer wants, which is cut
//! here, or end before, and then the rest comes from a sequence of this answer's own.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tandem_engine::{
    DraftSource, EngineHandle, FinishReason, Finished, OutputToken, SamplingParams, TokenLogprobs, Usage,
};
use tandem_models::{Detokenizer, Tokenizer};

use super::flight::{End, Flight, FlightPlan, News, Reader};
use super::sharing::{Boarding, Shared};
use super::{Account, Delta, EndReason, ScoredToken};
use crate::http::error::{ApiError, ErrorKind};
use crate::http::metrics::TokenClock;
use crate::text::{Ending, GapRules};

/// How tokens become text.
pub(super) struct TextRules<'a> {
    pub(super) tokenizer: &'a Arc<Tokenizer>,
    pub(super) stop: &'a [String],
    pub(super) gap: Option<&'a GapRules>,
    pub(super) markers: &'a Arc<[u32]>,
}

pub(super) struct Choice {
    engine: EngineHandle,
    /// What this answer's own sequence is asked, or would be.
    plan: FlightPlan,
    /// `None` after the end.
    reader: Option<Reader>,
    shared: Option<Shared>,
    /// Bytes at the beginning of the sequence's text that are part of the prompt.
    num_typed_bytes: usize,
    tokens: Vec<OutputToken>,
    logprobs: Vec<TokenLogprobs>,
    detokenizer: Detokenizer,
    tokenizer: Arc<Tokenizer>,
    ending: Ending,
    /// Control tokens that show in the text.
    markers: Arc<[u32]>,
    clock: TokenClock,
    pub(super) delta: Delta,
    /// Scored tokens whose text is held back, with the place in the output where it begins.
    held_tokens: VecDeque<(usize, ScoredToken)>,
    /// Bytes of text that the detokenizer gave so far.
    num_decoded_bytes: usize,
    /// Of those, handed on.
    num_released_bytes: usize,
    /// Tokens up to the end, or up to the one that brought it about.
    num_tokens: u32,
    /// Tokens of the present sequence that were looked at.
    num_taken: u32,
    /// The engine's account, once this answer, for which the sequence was started, has ended.
    usage: Option<Usage>,
}

impl Choice {
    pub(super) fn new(
        engine: &EngineHandle,
        boarding: Boarding,
        plan: FlightPlan,
        text: TextRules<'_>,
        clock: TokenClock,
    ) -> Self {
        let Boarding { reader, shared, num_typed_bytes } = boarding;
        let prompt = &reader.flight().plan.prompt;
        Choice {
            engine: engine.clone(),
            detokenizer: Detokenizer::continuing(text.tokenizer.clone(), prompt, true),
            plan,
            reader: Some(reader),
            shared,
            num_typed_bytes,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            ending: Ending::new(text.stop, text.gap),
            markers: text.markers.clone(),
            tokenizer: text.tokenizer.clone(),
            clock,
            delta: Delta::default(),
            held_tokens: VecDeque::new(),
            num_decoded_bytes: 0,
            num_released_bytes: 0,
            num_tokens: 0,
            num_taken: 0,
            usage: None,
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.reader.is_none()
    }

    /// Tokens of the answer so far.
    pub(super) fn num_tokens(&self) -> u32 {
        self.num_tokens
    }

    /// Waits for the margins of the first tokens: as many as are asked for, or all that there are.
    pub(super) fn poll_margins(&mut self, cx: &mut Context<'_>, num_tokens: usize) -> Poll<Vec<f32>> {
        self.reader.as_mut().map_or(Poll::Ready(vec![]), |reader| reader.poll_margins(cx, num_tokens))
    }

    pub(super) fn shared(&self) -> Option<Shared> {
        self.shared
    }

    pub(super) fn joined_seed(&self) -> Option<u64> {
        let reader = self.reader.as_ref().filter(|_| self.shared == Some(Shared::Continuation))?;
        let params = &reader.flight().plan.params;
        (params.temperature > 0.0).then_some(params.seed)
    }

    /// Fills [`Choice::delta`] from the next event that brings something.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<EndReason>, ApiError>> {
        self.delta.text.clear();
        self.delta.tokens.clear();
        self.delta.prompt_logprobs = None;
        loop {
            let Some(reader) = &mut self.reader else {
                return Poll::Ready(Ok(None));
            };
            match ready!(reader.poll_next(cx, &mut self.tokens, &mut self.logprobs)) {
                News::PromptLogprobs(scores) => {
                    self.delta.prompt_logprobs = Some(scores);
                    return Poll::Ready(Ok(None));
                }
                News::Tokens => {
                    let is_cut = self.take_tokens()?;
                    if is_cut {
                        self.usage = self.usage_so_far();
                        return Poll::Ready(self.end(Some(FinishReason::Length)).map(Some));
                    }
                    if !self.delta.text.is_empty() || !self.delta.tokens.is_empty() {
                        return Poll::Ready(Ok(None));
                    }
                }
                News::End(End::Failed(error)) => {
                    self.reader = None;
                    return Poll::Ready(Err(error.into()));
                }
                News::End(End::Lost) => return Poll::Ready(self.end(None).map(Some)),
                News::End(End::Finished(finished)) => {
                    if self.is_cut_short(&finished) && self.go_on_alone() {
                        continue;
                    }
                    if self.shared.is_none() {
                        self.usage = Some(finished.usage);
                    }
                    return Poll::Ready(self.end(Some(finished.reason)).map(Some));
                }
            }
        }
    }

    /// The engine's account of a sequence that was started for this answer and goes on for others.
    fn usage_so_far(&self) -> Option<Usage> {
        let reader = self.reader.as_ref().filter(|_| self.shared.is_none());
        reader.map(|reader| reader.flight().usage())
    }

    /// True if the answer is whole although the sequence goes on.
    fn take_tokens(&mut self) -> Result<bool, ApiError> {
        let (mut tokens, mut logprobs) =
            (std::mem::take(&mut self.tokens), std::mem::take(&mut self.logprobs));
        // What still arrives after the end is not part of the answer.
        if !self.ending.has_ended() {
            self.clock.tokens(tokens.len());
            self.absorb(&tokens, &mut logprobs)?;
        }
        tokens.clear();
        logprobs.clear();
        (self.tokens, self.logprobs) = (tokens, logprobs);

        let reader = self.reader.as_ref().expect("tokens come from a reader: this is a bug");
        if self.ending.has_ended() {
            // The closing account is waited for unless others keep the sequence running.
            return Ok(!reader.abort_if_alone());
        }
        let has_all = self.num_tokens >= self.plan.params.max_tokens;
        let goes_on = reader.flight().max_tokens() > self.num_taken;
        let is_late = self.shared.is_some()
            && self.plan.max_predict_time.is_some_and(|limit| self.clock.decode_time() >= limit);
        Ok((has_all && goes_on) || is_late)
    }

    /// True if a sequence that was started for somebody else ended before this answer was whole.
    fn is_cut_short(&self, finished: &Finished) -> bool {
        self.shared.is_some()
            && !self.ending.has_ended()
            && matches!(finished.reason, FinishReason::Length | FinishReason::Deadline)
            && self.num_tokens < self.plan.params.max_tokens
    }

    /// Takes the rest of the answer from a sequence of its own, which starts where the present one
    /// ended. False if there is no room for one; what is there is the answer then.
    fn go_on_alone(&mut self) -> bool {
        let Some(reader) = &self.reader else { return false };
        let flight = reader.flight();
        let mut prompt = flight.plan.prompt.to_vec();
        prompt.extend(flight.first_tokens(self.num_taken as usize));
        let plan = FlightPlan {
            prompt: prompt.into(),
            params: SamplingParams {
                max_tokens: self.plan.params.max_tokens - self.num_tokens,
                prompt_logprobs: None,
                seed: flight.plan.params.seed,
                ..self.plan.params.clone()
            },
            // This answer's clock goes on.
            max_predict_time: None,
            ..self.plan.clone()
        };
        match Flight::launch(&self.engine, plan) {
            Ok(reader) => {
                self.reader = Some(reader);
                self.num_taken = 0;
                true
            }
            Err(error) => {
                tracing::debug!(%error, "a shared answer ends early");
                false
            }
        }
    }

    fn absorb(&mut self, tokens: &[OutputToken], logprobs: &mut Vec<TokenLogprobs>) -> Result<(), ApiError> {
        let mut scores = logprobs.drain(..);
        for token in tokens {
            if self.num_tokens >= self.plan.params.max_tokens {
                break;
            }
            self.num_taken += 1;
            let score = scores.next();
            let is_typed = self.num_typed_bytes > 0;
            if !is_typed {
                self.num_tokens += 1;
                if let Some(logprobs) = score {
                    self.held_tokens
                        .push_back((self.num_decoded_bytes, ScoredToken { id: token.id, logprobs }));
                }
            }
            let Some(text) = self.text_of(token.id)? else { continue };
            let num_typed = self.num_typed_bytes.min(text.len());
            self.num_typed_bytes -= num_typed;
            // The token that ends the typed text counts if the answer begins with its rest.
            self.num_tokens += u32::from(is_typed && text.len() > num_typed);
            self.release(&text[num_typed..]);
            if self.ending.has_ended() {
                break;
            }
        }
        Ok(())
    }

    fn text_of(&mut self, id: u32) -> Result<Option<String>, ApiError> {
        if self.markers.contains(&id) {
            let mut text = self.detokenizer.flush().unwrap_or_default();
            text.push_str(&self.tokenizer.id_to_token(id).unwrap_or_default());
            return Ok(Some(text));
        }
        self.detokenizer
            .push(id)
            .map_err(|error| ApiError::new(ErrorKind::Internal, format!("token {id} has no text: {error}")))
    }

    pub(super) fn stop_string(&self) -> Option<&str> {
        self.ending.stop_string()
    }

    fn release(&mut self, text: &str) {
        let before = self.delta.text.len();
        self.num_decoded_bytes += text.len();
        self.ending.push(text, &mut self.delta.text);
        self.num_released_bytes += self.delta.text.len() - before;
        while self.held_tokens.front().is_some_and(|(start, _)| *start < self.num_released_bytes) {
            self.delta.tokens.extend(self.held_tokens.pop_front().map(|(_, token)| token));
        }
    }

    fn end(&mut self, reason: Option<FinishReason>) -> Result<EndReason, ApiError> {
        self.reader = None;
        if !self.ending.has_ended()
            && let Some(text) = self.detokenizer.flush()
        {
            self.release(&text);
        }
        self.ending.finish(&mut self.delta.text);
        if self.ending.has_ended() {
            self.held_tokens.clear();
            let is_stop_string = self.ending.stop_string().is_some();
            return Ok(if is_stop_string { EndReason::StopString } else { EndReason::GapFilled });
        }
        self.delta.tokens.extend(self.held_tokens.drain(..).map(|(_, token)| token));
        match reason {
            Some(FinishReason::Stop(_) | FinishReason::Complete) => Ok(EndReason::Stop),
            Some(FinishReason::Length | FinishReason::Deadline) => Ok(EndReason::Length),
            // Nobody but the server's own shutdown aborts a sequence that has a listener.
            Some(FinishReason::Aborted) => Err(ApiError::shutting_down()),
            None => Err(ApiError::new(ErrorKind::Internal, "the engine ended before this answer was whole")),
        }
    }

    /// Final once the choice has ended. The engine's account, if it ran a sequence for this answer to
    /// the end; otherwise what can be seen from here.
    pub(super) fn account(&self) -> Account {
        let num_prompt_tokens = self.plan.prompt.len() as u64;
        let seen =
            Account { num_prompt_tokens, num_output_tokens: self.num_tokens.into(), ..Account::default() };
        let Some(usage) = &self.usage else {
            return Account {
                num_cached_tokens: if self.shared.is_some() { num_prompt_tokens } else { 0 },
                prefill_time: self.clock.time_to_first(),
                decode_time: self.clock.decode_time(),
                ..seen
            };
        };
        let prediction = DraftSource::Prediction as usize;
        Account {
            num_cached_tokens: usage.num_cached_tokens.into(),
            num_draft_tokens: usage.total_draft_tokens().into(),
            num_accepted_tokens: usage.total_accepted_tokens().into(),
            num_prediction_tokens: usage.num_draft_tokens[prediction].into(),
            num_accepted_prediction_tokens: usage.num_accepted_tokens[prediction].into(),
            queue_time: usage.queue_time,
            prefill_time: usage.prefill_time,
            decode_time: usage.decode_time,
            ..seen
        }
    }
}
