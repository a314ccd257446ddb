//! What a protocol gives to answer with: how its events and its whole answers are written.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use rand::Rng;
use serde::Serialize;

use super::error::ApiError;
use super::generation::{Account, CompletedChoice, Generation, Progress};
use super::intake::Reply;
use super::metrics::milliseconds;
use super::stream;

/// Server-sent events.
pub(super) const EVENT_STREAM: &str = "text/event-stream";

/// Turns a generation into a protocol's bytes, as events or as one answer.
pub(super) trait Wire: Send + Unpin + 'static {
    /// What a stream of it is.
    fn content_type(&self) -> &'static str {
        EVENT_STREAM
    }
    /// Appends what is sent before anything is generated.
    fn begin(&mut self, _generation: &Generation, _out: &mut Vec<u8>) {}
    /// Appends the events for one step of one choice.
    fn progress(&mut self, generation: &Generation, progress: Progress, out: &mut Vec<u8>);
    /// Appends what follows the last choice's end.
    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>);
    /// Appends the event for a failure after the response began; nothing follows.
    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>);
    /// Appends what shows that the server is still at work; browsers and clients pass comments over.
    fn keep_alive(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(b": still at work\n\n");
    }
    /// Appends the JSON of all answers, for a client that wants no stream.
    fn whole(&mut self, generation: &Generation, answers: Vec<CompletedChoice>, out: &mut Vec<u8>);
}

/// The response: a stream if the client wants one, else a body of JSON when all is there.
///
/// # Errors
/// If a sequence fails before anything was sent.
pub(super) async fn respond<W: Wire>(
    mut generation: Generation,
    mut wire: W,
    reply: &Reply,
) -> Result<Response, ApiError> {
    let mut response = if reply.stream {
        stream::respond(generation, wire)
    } else {
        let answers = generation.collect().await?;
        let mut body = Vec::new();
        wire.whole(&generation, answers, &mut body);
        let mut response = Body::from(body).into_response();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    };
    reply.add_headers(&mut response);
    Ok(response)
}

/// Where the time went, in llama.cpp's words.
#[derive(Serialize)]
pub(super) struct Timings {
    queue_ms: f64,
    cache_n: u64,
    prompt_n: u64,
    prompt_ms: f64,
    predicted_n: u64,
    predicted_ms: f64,
    predicted_per_second: f64,
    draft_n: u64,
    draft_n_accepted: u64,
    lane: &'static str,
    lane_reason: String,
}

impl Timings {
    pub(super) fn of(generation: &Generation, account: &Account) -> Self {
        Timings {
            queue_ms: milliseconds(account.queue_time),
            cache_n: account.num_cached_tokens,
            prompt_n: account.num_prompt_tokens,
            prompt_ms: milliseconds(account.prefill_time),
            predicted_n: account.num_output_tokens,
            predicted_ms: milliseconds(account.decode_time),
            predicted_per_second: account.tokens_per_second(generation.num_sequences()),
            draft_n: account.num_draft_tokens,
            draft_n_accepted: account.num_accepted_tokens,
            lane: generation.lane(),
            lane_reason: generation.lane_reason().to_string(),
        }
    }
}

/// A fresh id.
pub(super) fn random_id(prefix: &str) -> String {
    format!("{prefix}{:016x}{:016x}", rand::rng().next_u64(), rand::rng().next_u64())
}

/// Appends a named event.
pub(super) fn named_event<T: Serialize + ?Sized>(out: &mut Vec<u8>, name: &str, data: &T) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\ndata: ");
    json(out, data);
    out.extend_from_slice(b"\n\n");
}

/// Appends `value` as JSON.
pub(super) fn json<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(out, value).expect("plain data always serialises: this is a bug");
}
