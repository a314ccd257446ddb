//! Embeddings for every protocol: texts in, vectors out.
//!
//! A vector is the mean of the last hidden states of a text's tokens: those of the draft, which is quick and
//! loaded anyway, or of the target where there is no draft. It is a function of the model's weights, the type of its
//! keys and values and the tokens alone, bit for bit: neither the other texts of a request nor the server's other work show in it.
//!
//! The engine gets a few texts of a request at a time, as batch work: so one request with thousands of texts
//! leaves the queue and the seats to others. Dropping the future cancels those that run.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue};
use serde::{Deserialize, Deserializer};
use tandem_engine::{
    EmbedRequest, EngineError, EngineHandle, Event, EventSink, Priority, SequenceId, SinkError,
};
use tokio::sync::oneshot;

use super::auth;
use super::error::ApiError;
use super::fields::in_range;
use super::generation::Account;
use super::heavy::HeavyWork;
use super::lanes::{self, LANE_HEADER, lane_name};
use super::prompt::{INLINE_TEXT_BYTES, PromptInput, check_text_fits, encode, inputs};
use super::state::{AppState, ServedModel};
use super::traces::{ModelWork, WorkRecord};
use crate::keys::Client;

/// Most texts of a request: OpenAI's bound.
pub(super) const MAX_INPUTS: usize = 2048;

/// Answers of more values than this are scaled and written off the async thread: about a millisecond of everybody's
/// tokens.
const INLINE_VALUES: usize = 8 << 10;

/// Texts of one request that the engine has at a time: enough that short ones fill a pass together.
const MAX_RUNNING: usize = 8;

/// How long a request that has vectors already waits for room in the queue before what it has is given up, and how
/// often it looks.
const ROOM_PATIENCE: Duration = Duration::from_secs(30);
const ROOM_INTERVAL: Duration = Duration::from_millis(20);

/// What is to be embedded: a string, an array of strings, an array of token ids, or an array of such arrays.
#[derive(Debug)]
pub(super) struct EmbeddingInput(pub(super) Vec<PromptInput>);

impl<'de> Deserialize<'de> for EmbeddingInput {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        inputs(deserializer, MAX_INPUTS).map(EmbeddingInput)
    }
}

/// A request for embeddings, admitted.
pub(super) struct Embedder<'a> {
    state: &'a Arc<AppState>,
    served: &'a ServedModel,
    client: Option<Arc<Client>>,
    /// The name that the client used.
    asked: Option<String>,
}

/// What became of it.
pub(super) struct Embedded {
    /// One a text, in their order; `[hidden_size]` each, not normalised.
    pub(super) vectors: Vec<Vec<f32>>,
    /// Tokens of all texts.
    pub(super) num_tokens: u64,
    /// Who made them.
    lane: &'static str,
    /// For the request's span.
    record: Option<WorkRecord>,
}

impl<'a> Embedder<'a> {
    /// Finds who embeds: the draft, or the target if there is none, whichever of the served names a client
    /// uses, so that all vectors can be compared.
    ///
    /// # Errors
    /// If the key is no longer valid or does not open that model's lane, or nothing of that name is served.
    pub(super) fn new(
        state: &'a Arc<AppState>,
        headers: &HeaderMap,
        model: Option<&str>,
    ) -> Result<Self, ApiError> {
        let client = auth::client(state, headers)?;
        lanes::resolve(state, model)?;
        let served = state.draft.as_ref().or(state.target.as_ref());
        let served = served.expect("a state has a model: this is a bug");
        let opened = client.as_ref().is_none_or(|client| client.rules().lanes.allows(served.lane));
        if !opened {
            let lanes = client.map_or(crate::keys::Lanes::ALL, |client| client.rules().lanes);
            return Err(lanes::closed_lane(served.lane, lanes));
        }
        Ok(Embedder { state, served, client, asked: model.map(str::to_owned) })
    }

    /// The real name of the model that embeds.
    pub(super) fn model(&self) -> &str {
        &self.served.model.name
    }

    /// How many values of a vector are wanted: as many as the client says, or all.
    ///
    /// # Errors
    /// If there are not so many.
    pub(super) fn dimensions(&self, param: &str, asked: Option<i128>) -> Result<usize, ApiError> {
        let most = self.state.engine.hidden_size(self.served.lane);
        let asked = asked.map(|asked| in_range(param, asked, 1, most as i128)).transpose()?;
        Ok(asked.map_or(most, |asked| asked as usize))
    }

    /// Embeds all texts, once all are found to be fit for it. `param` names the field that they stand in; `truncates`: of a text that is longer than
    /// the context its beginning is taken.
    ///
    /// # Errors
    /// If a text cannot be tokenized or is too long, the client's budget is spent, or the engine refuses or
    /// fails.
    pub(super) async fn embed(
        self,
        param: &'static str,
        texts: Vec<PromptInput>,
        truncates: bool,
    ) -> Result<Embedded, ApiError> {
        let texts = self.tokenize(param, texts, truncates).await?;
        let num_tokens = texts.iter().map(|tokens| tokens.len() as u64).sum();
        if let Some(client) = &self.client {
            auth::spend_prompt(client, num_tokens)?;
        }
        let engine = &self.state.engine;
        let mut vectors = Vec::with_capacity(texts.len());
        let mut running: VecDeque<Running<'_>> = VecDeque::with_capacity(MAX_RUNNING);
        for (index, tokens) in texts.into_iter().enumerate() {
            if running.len() == MAX_RUNNING {
                vectors.extend(next(&mut running).await?);
            }
            let start = || Running::start(engine, self.served, tokens.clone());
            let mut started = start();
            // There will be room when one of our own has ended.
            while matches!(started, Err(EngineError::QueueFull { .. })) && !running.is_empty() {
                vectors.extend(next(&mut running).await?);
                started = start();
            }
            if !vectors.is_empty() {
                started = with_room(started, start).await;
            }
            running.push_back(started.map_err(|error| at_input(param, index, error.into()))?);
        }
        while let Some(vector) = next(&mut running).await? {
            vectors.push(vector);
        }
        let lane = lane_name(self.served.lane);
        let record = self.state.tracer.is_some().then(|| {
            WorkRecord::new(ModelWork {
                request_model: self.asked.unwrap_or_else(|| lanes::AUTO.to_owned()),
                model: self.served.model.name.clone(),
                lane,
                account: Account { num_prompt_tokens: num_tokens, ..Account::default() },
                ..ModelWork::default()
            })
        });
        Ok(Embedded { vectors, num_tokens, lane, record })
    }

    /// The tokens of all texts, each of which can be embedded: nothing is spent before that is known.
    async fn tokenize(
        &self,
        param: &'static str,
        texts: Vec<PromptInput>,
        truncates: bool,
    ) -> Result<Vec<Arc<[u32]>>, ApiError> {
        let max_model_len = self.state.engine.max_model_len();
        let mut size_bytes = 0;
        for text in &texts {
            match text {
                PromptInput::Text(text) => {
                    if !truncates {
                        check_text_fits(param, text.len(), self.served, max_model_len)?;
                    }
                    size_bytes += text.len();
                }
                PromptInput::Tokens(tokens) => size_bytes += tokens.len(),
            }
        }
        let (engine, lane) = (self.state.engine.clone(), self.served.lane);
        let tokenizer = self.served.model.tokenizer.clone();
        // A longer beginning than the context can hold is not read.
        let most_bytes = max_model_len.saturating_mul(self.served.max_token_bytes);
        let work = move || {
            let tokenize = |(index, text): (usize, PromptInput)| {
                let mut tokens = match text {
                    PromptInput::Tokens(tokens) => tokens,
                    PromptInput::Text(text) => {
                        let text = if truncates { beginning(&text, most_bytes) } else { &text };
                        encode(&tokenizer, text, true).map_err(|error| at_input(param, index, error))?
                    }
                };
                if truncates {
                    tokens.truncate(max_model_len);
                }
                engine.check_embed(lane, &tokens).map_err(|error| at_input(param, index, error.into()))?;
                Ok(tokens.into())
            };
            texts.into_iter().enumerate().map(tokenize).collect()
        };
        self.state.heavy.run_if(size_bytes > INLINE_TEXT_BYTES, work).await
    }
}

/// The first `most_bytes` of a text, or as many less as are part of a character.
fn beginning(text: &str, most_bytes: usize) -> &str {
    let most_bytes = most_bytes.min(text.len());
    let end = (0..=most_bytes).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    &text[..end]
}

/// What `start` gives once the queue has room, of which `started` says whether it has.
///
/// # Errors
/// As `start`; that the queue is full only if it stays so.
async fn with_room<T>(
    mut started: Result<T, EngineError>,
    mut start: impl FnMut() -> Result<T, EngineError>,
) -> Result<T, EngineError> {
    let mut left = ROOM_PATIENCE;
    while matches!(started, Err(EngineError::QueueFull { .. })) && !left.is_zero() {
        tokio::time::sleep(ROOM_INTERVAL).await;
        left = left.saturating_sub(ROOM_INTERVAL);
        started = start();
    }
    started
}

/// The vector of the text that was begun first; `None` if none runs.
async fn next(running: &mut VecDeque<Running<'_>>) -> Result<Option<Vec<f32>>, ApiError> {
    match running.front_mut() {
        Some(first) => {
            let vector = first.vector().await?;
            running.pop_front();
            Ok(Some(vector))
        }
        None => Ok(None),
    }
}

/// Says which of several texts is at fault.
fn at_input(param: &str, index: usize, error: ApiError) -> ApiError {
    if error.param.is_none() {
        return error;
    }
    ApiError {
        param: Some(param.to_owned()),
        message: format!("{param} {index}: {}", error.message),
        ..error
    }
}

/// A text that the engine has. Dropped before its end, it is cancelled.
struct Running<'a> {
    engine: &'a EngineHandle,
    id: SequenceId,
    outcome: oneshot::Receiver<Result<Vec<f32>, EngineError>>,
    has_ended: bool,
}

impl<'a> Running<'a> {
    fn start(
        engine: &'a EngineHandle,
        served: &ServedModel,
        tokens: Arc<[u32]>,
    ) -> Result<Self, EngineError> {
        let id = engine.next_id();
        let (sender, outcome) = oneshot::channel();
        let events = Box::new(VectorSink(Some(sender)));
        engine.embed(EmbedRequest { id, lane: served.lane, tokens, priority: Priority::Batch, events })?;
        Ok(Running { engine, id, outcome, has_ended: false })
    }

    async fn vector(&mut self) -> Result<Vec<f32>, ApiError> {
        let outcome = (&mut self.outcome).await;
        self.has_ended = true;
        // The engine lets go without a word only when it ends.
        outcome.unwrap_or(Err(EngineError::ShuttingDown)).map_err(ApiError::from)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if !self.has_ended {
            // If the engine cannot be told, it finds nobody listening.
            let _ = self.engine.abort(self.id);
        }
    }
}

/// The engine's end of it.
struct VectorSink(Option<oneshot::Sender<Result<Vec<f32>, EngineError>>>);

impl EventSink for VectorSink {
    fn try_send(&mut self, event: Event) -> Result<(), SinkError> {
        let outcome = match event {
            Event::Embedding(vector) => Ok(vector),
            Event::Failed(error) => Err(error),
            // What the sender is dropped for, if no vector came before.
            _ => return Ok(()),
        };
        match self.0.take().map(|sender| sender.send(outcome)) {
            Some(Err(_)) => Err(SinkError::Closed),
            _ => Ok(()),
        }
    }
}

impl Embedded {
    /// The response with the JSON that `write` appends.
    ///
    /// # Errors
    /// If `write` panics on a thread of its own.
    pub(super) async fn respond(
        mut self,
        heavy: &HeavyWork,
        write: impl FnOnce(&mut Embedded, &mut Vec<u8>) + Send + 'static,
    ) -> Result<Response, ApiError> {
        let (lane, record) = (self.lane, self.record.take());
        let num_values: usize = self.vectors.iter().map(Vec::len).sum();
        let work = move || {
            let mut body = Vec::new();
            write(&mut self, &mut body);
            Ok(body)
        };
        let body = heavy.run_if(num_values > INLINE_VALUES, work).await?;
        let mut response = Response::new(Body::from(body));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(LANE_HEADER, HeaderValue::from_static(lane));
        if let Some(record) = record {
            response.extensions_mut().insert(record);
        }
        Ok(response)
    }

    /// Makes every vector one of length 1.
    pub(super) fn normalize(&mut self) {
        self.vectors.iter_mut().for_each(|vector| normalize(vector));
    }

    /// Keeps the first `dimensions` values of every vector and makes it one of length 1.
    pub(super) fn shorten(&mut self, dimensions: usize) {
        self.vectors.iter_mut().for_each(|vector| vector.truncate(dimensions));
        self.normalize();
    }
}

/// Makes a vector one of length 1; one without length stays as it is.
pub(super) fn normalize(vector: &mut [f32]) {
    let square: f64 = vector.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
    if square > 0.0 {
        let factor = square.sqrt().recip();
        vector.iter_mut().for_each(|value| *value = (f64::from(*value) * factor) as f32);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread::ThreadId;
    use std::time::Duration;

    use super::{Embedded, EngineError, HeavyWork, INLINE_VALUES, beginning, normalize, with_room};

    /// The thread that an answer of so many values is written on.
    async fn writer_of(num_values: usize) -> ThreadId {
        let vectors = vec![vec![0.5; num_values]];
        let embedded = Embedded { vectors, num_tokens: 1, lane: "fast", record: None };
        let (sender, threads) = mpsc::channel();
        let write = move |_: &mut Embedded, _: &mut Vec<u8>| {
            sender.send(std::thread::current().id()).expect("somebody listens");
        };
        let response = embedded.respond(&HeavyWork::new(), write).await.expect("it is written");
        assert_eq!(response.headers()["content-type"], "application/json");
        threads.recv().expect("it was written")
    }

    #[tokio::test]
    async fn room_in_the_queue_is_waited_for_and_nothing_else_is() {
        let full = || Err(EngineError::QueueFull { waiting: 1, retry_after: Duration::ZERO });
        let mut refusals = 2;
        let start = || {
            refusals -= 1;
            if refusals > 0 { full() } else { Ok("started") }
        };
        assert_eq!(with_room(full(), start).await.expect("there is room at last"), "started");
        assert_eq!(refusals, 0);
        let unasked = || -> Result<(), EngineError> { unreachable!("there is nothing to wait for") };
        assert!(with_room(Ok(()), unasked).await.is_ok());
        let ended = with_room(Err(EngineError::ShuttingDown), unasked).await;
        assert!(matches!(ended, Err(EngineError::ShuttingDown)));
    }

    #[tokio::test]
    async fn large_answers_are_written_off_the_async_thread() {
        let here = std::thread::current().id();
        assert_eq!(writer_of(INLINE_VALUES).await, here);
        assert_ne!(writer_of(INLINE_VALUES + 1).await, here);
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!((beginning("aä", 2), beginning("aä", 3), beginning("aä", 9)), ("a", "aä", "aä"));
        assert_eq!((beginning("ä", 1), beginning("", 0)), ("", ""));
    }

    #[test]
    fn vectors_are_made_one_long() {
        let mut vector = [3.0, -4.0];
        normalize(&mut vector);
        assert_eq!(vector, [0.6, -0.8]);
        let mut tiny = [3e-30, 4e-30];
        normalize(&mut tiny);
        assert_eq!(tiny, [0.6, 0.8]);
        let mut none = [0.0, 0.0];
        normalize(&mut none);
        assert_eq!(none, [0.0, 0.0]);
    }
}
