//! One engine sequence's output, read by any number of answers.
//!
//! The engine appends to a log; every reader has its own place in it, so a slow one holds up nobody.
//! The log grows to `max_tokens` tokens (and their log-probabilities, if asked for) and is freed with
//! the last reader. A sequence that nobody reads any more is aborted.
//!
//! Costs one uncontended lock an event for the engine and one for each reader.

use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tandem_engine::{
    CacheSalt, EngineError, EngineHandle, Event, EventSink, Finished, Lane, OutputToken, Priority,
    SamplingParams, SequenceId, SinkError, SpeculationParams, SubmitRequest, TokenLogprobs, Usage,
};

use super::PromptText;
use crate::text::grammar::Grammar;

/// What a sequence is asked to do.
#[derive(Clone)]
pub(super) struct FlightPlan {
    pub(super) lane: Lane,
    pub(super) prompt: Arc<[u32]>,
    /// What the prompt was made of, if it was text.
    pub(super) text: Option<PromptText>,
    pub(super) params: SamplingParams,
    /// The client named `params.seed`.
    pub(super) names_seed: bool,
    pub(super) priority: Priority,
    pub(super) cache_salt: CacheSalt,
    pub(super) max_predict_time: Option<Duration>,
    pub(super) speculation: SpeculationParams,
    /// The form of the output.
    pub(super) grammar: Option<Arc<Grammar>>,
}

/// A sequence and what it has said so far.
pub(super) struct Flight {
    pub(super) plan: FlightPlan,
    engine: EngineHandle,
    id: SequenceId,
    log: Mutex<Log>,
}

struct Log {
    tokens: Vec<OutputToken>,
    /// One entry a token, or none at all.
    logprobs: Vec<TokenLogprobs>,
    /// Of the first tokens, if they were asked for.
    margins: Vec<f32>,
    prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    /// As of the last tokens.
    usage: Usage,
    end: Option<End>,
    /// The engine's bound, which readers that want more can raise.
    max_tokens: u32,
    num_readers: usize,
    /// Nobody may join any more.
    closed: bool,
    /// The engine is to take its next event for an abort.
    abandoned: bool,
    next_reader: u64,
    /// Readers that wait, each at most once.
    wakers: Vec<(u64, Waker)>,
}

impl Log {
    /// Has a reader woken by what comes next.
    fn wait(&mut self, reader: u64, cx: &Context<'_>) {
        match self.wakers.iter_mut().find(|(key, _)| *key == reader) {
            Some((_, waker)) => waker.clone_from(cx.waker()),
            None => self.wakers.push((reader, cx.waker().clone())),
        }
    }
}

/// How a sequence ended.
#[derive(Clone, Debug)]
pub(super) enum End {
    Finished(Finished),
    Failed(EngineError),
    /// The engine let go of it without a word.
    Lost,
}

/// What a reader finds next.
pub(super) enum News {
    PromptLogprobs(Vec<Option<TokenLogprobs>>),
    /// They were appended to the reader's buffers.
    Tokens,
    End(End),
}

impl Flight {
    /// Submits the sequence.
    ///
    /// # Errors
    /// What the engine refuses.
    pub(super) fn launch(engine: &EngineHandle, plan: FlightPlan) -> Result<Reader, EngineError> {
        let log = Log {
            tokens: Vec::new(),
            logprobs: Vec::new(),
            margins: Vec::new(),
            prompt_logprobs: None,
            usage: Usage::default(),
            end: None,
            max_tokens: plan.params.max_tokens,
            num_readers: 0,
            closed: false,
            abandoned: false,
            next_reader: 0,
            wakers: Vec::new(),
        };
        let id = engine.next_id();
        let flight = Arc::new(Flight { plan, engine: engine.clone(), id, log: Mutex::new(log) });
        let plan = flight.plan.clone();
        engine.submit(SubmitRequest {
            id,
            lane: plan.lane,
            prompt: plan.prompt,
            params: plan.params,
            priority: plan.priority,
            cache_salt: plan.cache_salt,
            max_predict_time: plan.max_predict_time,
            speculation: plan.speculation,
            constraint: plan.grammar.map(|grammar| grammar.start()),
            events: Box::new(FlightSink(flight.clone())),
        })?;
        Ok(flight.read().expect("nobody else can have closed it: this is a bug"))
    }

    /// A reader that begins at the first token; `None` if it is too late to join.
    pub(super) fn read(self: &Arc<Self>) -> Option<Reader> {
        let mut log = self.log();
        if log.closed {
            return None;
        }
        log.num_readers += 1;
        log.next_reader += 1;
        let key = log.next_reader;
        Some(Reader { flight: self.clone(), key, num_read: 0, read_prompt_logprobs: false })
    }

    /// True until the sequence ends or is about to.
    pub(super) fn is_joinable(&self) -> bool {
        let log = self.log();
        !log.closed && log.end.is_none()
    }

    /// The first tokens of the output so far, at most `most`.
    pub(super) fn first_tokens(&self, most: usize) -> Vec<u32> {
        self.log().tokens.iter().take(most).map(|token| token.id).collect()
    }

    /// The engine's account, as of the last tokens.
    pub(super) fn usage(&self) -> Usage {
        self.log().usage
    }

    /// The bound on the output.
    pub(super) fn max_tokens(&self) -> u32 {
        self.log().max_tokens
    }

    /// Asks the engine for an output of up to `max_tokens`. It may come too late.
    pub(super) fn extend(&self, max_tokens: u32) {
        let mut log = self.log();
        if max_tokens > log.max_tokens && log.end.is_none() && self.engine.extend(self.id, max_tokens) {
            log.max_tokens = max_tokens;
        }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().expect("no holder of this lock panics: this is a bug")
    }
}

/// The engine's end of a flight.
struct FlightSink(Arc<Flight>);

impl EventSink for FlightSink {
    fn try_send(&mut self, event: Event) -> Result<(), SinkError> {
        let mut log = self.0.log();
        if log.num_readers == 0 && log.next_reader > 0 || log.abandoned {
            return Err(SinkError::Closed);
        }
        match event {
            Event::PromptLogprobs(scores) => log.prompt_logprobs = Some(scores),
            Event::Tokens(chunk) => {
                log.tokens.extend(chunk.tokens);
                log.logprobs.extend(chunk.logprobs);
                log.margins.extend(chunk.margins);
                log.usage = chunk.usage;
            }
            Event::Finished(finished) => log.end = Some(End::Finished(finished)),
            // Nobody asks a sequence of text for one.
            Event::Embedding(_) => {}
            Event::Failed(error) => log.end = Some(End::Failed(error)),
        }
        wake(log);
        Ok(())
    }
}

impl Drop for FlightSink {
    fn drop(&mut self) {
        let mut log = self.0.log();
        if log.end.is_none() {
            log.end = Some(End::Lost);
            wake(log);
        }
    }
}

/// Wakes everybody who waits, without the lock.
fn wake(mut log: MutexGuard<'_, Log>) {
    let wakers = std::mem::take(&mut log.wakers);
    drop(log);
    for (_, waker) in wakers {
        waker.wake();
    }
}

/// One reader of a flight. The last to go aborts the sequence if it still runs.
pub(super) struct Reader {
    flight: Arc<Flight>,
    key: u64,
    num_read: usize,
    read_prompt_logprobs: bool,
}

impl Reader {
    pub(super) fn flight(&self) -> &Arc<Flight> {
        &self.flight
    }

    /// Waits for what comes next. Tokens and their log-probabilities are appended to the buffers.
    pub(super) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        tokens: &mut Vec<OutputToken>,
        logprobs: &mut Vec<TokenLogprobs>,
    ) -> Poll<News> {
        let mut log = self.flight.log();
        if let Some(scores) = log.prompt_logprobs.as_ref().filter(|_| !self.read_prompt_logprobs) {
            self.read_prompt_logprobs = true;
            return Poll::Ready(News::PromptLogprobs(scores.clone()));
        }
        if log.tokens.len() > self.num_read {
            tokens.extend_from_slice(&log.tokens[self.num_read..]);
            if !log.logprobs.is_empty() {
                logprobs.extend_from_slice(&log.logprobs[self.num_read..]);
            }
            self.num_read = log.tokens.len();
            return Poll::Ready(News::Tokens);
        }
        if let Some(end) = &log.end {
            return Poll::Ready(News::End(end.clone()));
        }
        log.wait(self.key, cx);
        Poll::Pending
    }

    /// Waits for the margins of the first tokens: as many as are asked for, or all that there are.
    pub(super) fn poll_margins(&mut self, cx: &mut Context<'_>, num_tokens: usize) -> Poll<Vec<f32>> {
        let mut log = self.flight.log();
        if log.margins.len() < num_tokens && log.end.is_none() {
            log.wait(self.key, cx);
            return Poll::Pending;
        }
        Poll::Ready(log.margins.clone())
    }

    /// Aborts the sequence if nobody else reads it; its end comes as news then. False if it goes on.
    pub(super) fn abort_if_alone(&self) -> bool {
        let mut log = self.flight.log();
        if log.num_readers > 1 {
            return false;
        }
        log.closed = true;
        if log.end.is_none() && !self.flight.engine.abort(self.flight.id) {
            log.abandoned = true;
        }
        true
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut log = self.flight.log();
        log.num_readers -= 1;
        log.wakers.retain(|(key, _)| *key != self.key);
        if log.num_readers > 0 {
            return;
        }
        log.closed = true;
        if log.end.is_none() {
            // If the engine cannot be told, it finds nobody reading.
            let _ = self.flight.engine.abort(self.flight.id);
        }
    }
}
