//! Streamed chunks written by hand.
//!
//! What does not change between chunks is rendered once; a token costs its escaped text and two
//! copies. Only the last chunk is serialised as a whole.

use rand::Rng;
use serde::Serialize;

use super::types::{Timings, Usage};
use crate::http::error::ApiError;
use crate::http::generation::{Generation, Shared};
use crate::http::lanes::{AUTO, LANE_HEADER};
use crate::http::state::unix_seconds;
use axum::response::Response;
use http::HeaderValue;

/// Says which seed an answer can be repeated with.
const SEED_HEADER: &str = "x-tandem-seed";

/// What every body of one response carries.
pub(super) struct Identity {
    pub(super) id: String,
    pub(super) object: &'static str,
    pub(super) created: u64,
    /// The name that the client used.
    pub(super) model: String,
    pub(super) seed: i128,
}

impl Identity {
    /// `model`: as the client named it; nobody named is `auto`.
    pub(super) fn new(id: String, object: &'static str, model: Option<String>, seed: i128) -> Self {
        let model = model.unwrap_or_else(|| AUTO.to_owned());
        Identity { id, object, created: unix_seconds(), model, seed }
    }
}

/// How a request wants to be answered.
pub(super) struct Reply {
    /// As the client named it.
    pub(super) model: Option<String>,
    pub(super) lane: &'static str,
    pub(super) seed: i128,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

impl Reply {
    /// The seed that the answer can be repeated with: a joined sequence has its own.
    pub(super) fn seed(&self, generation: &Generation) -> i128 {
        generation.joined_seed().map_or(self.seed, i128::from)
    }
}

/// A fresh response id.
pub(super) fn response_id(prefix: &str) -> String {
    format!("{prefix}-{:016x}{:016x}", rand::rng().next_u64(), rand::rng().next_u64())
}

/// Says that the answer is read from a sequence that another request had started.
const SHARED_HEADER: &str = "x-tandem-shared";

/// Adds lane, seed and sharing to a response's headers.
pub(super) fn with_headers(
    mut response: Response,
    lane: &'static str,
    seed: i128,
    shared: Option<Shared>,
) -> Response {
    let headers = response.headers_mut();
    headers.insert(LANE_HEADER, HeaderValue::from_static(lane));
    let seed = HeaderValue::from_str(&seed.to_string()).expect("digits are a header value: this is a bug");
    headers.insert(SEED_HEADER, seed);
    if let Some(shared) = shared {
        headers.insert(SHARED_HEADER, HeaderValue::from_static(shared.name()));
    }
    response
}

/// Writes chunks of one stream.
pub(super) struct ChunkWriter {
    /// `data: {"id":...,"model":"...",` up to `"choices":[`
    head: Vec<u8>,
    seed: i128,
    include_usage: bool,
    num_ended: usize,
}

impl ChunkWriter {
    pub(super) fn new(identity: &Identity, include_usage: bool) -> Self {
        #[derive(Serialize)]
        struct Head<'a> {
            id: &'a str,
            object: &'a str,
            created: u64,
            model: &'a str,
        }
        let Identity { id, object, created, model, seed } = identity;
        let mut head = b"data: ".to_vec();
        json(&mut head, &Head { id, object, created: *created, model });
        head.pop();
        head.extend_from_slice(b",\"choices\":[");
        ChunkWriter { head, seed: *seed, include_usage, num_ended: 0 }
    }

    /// Opens a chunk for one choice: `...{"index":N,`.
    pub(super) fn open(&self, index: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.head);
        out.extend_from_slice(b"{\"index\":");
        json(out, &index);
        out.push(b',');
    }

    /// Closes what [`ChunkWriter::open`] opened. The chunk that ends the last choice carries the
    /// seed and the timings, unless a usage chunk follows to carry them.
    pub(super) fn close(
        &mut self,
        generation: &Generation,
        finish_reason: Option<&'static str>,
        out: &mut Vec<u8>,
    ) {
        out.extend_from_slice(b",\"finish_reason\":");
        json(out, &finish_reason);
        out.extend_from_slice(b"}]");
        if self.include_usage {
            out.extend_from_slice(b",\"usage\":null");
        }
        self.num_ended += usize::from(finish_reason.is_some());
        if finish_reason.is_some() && self.num_ended == generation.num_sequences() && !self.include_usage {
            self.closing_fields(generation, out);
        }
        out.extend_from_slice(b"}\n\n");
    }

    fn closing_fields(&self, generation: &Generation, out: &mut Vec<u8>) {
        out.extend_from_slice(b",\"seed\":");
        json(out, &self.seed);
        out.extend_from_slice(b",\"timings\":");
        json(out, &Timings::of(generation, &generation.account()));
    }

    /// The usage chunk, if asked for, and the end mark.
    pub(super) fn end(&self, generation: &Generation, out: &mut Vec<u8>) {
        if self.include_usage {
            out.extend_from_slice(&self.head);
            out.extend_from_slice(b"],\"usage\":");
            json(out, &Usage::from(&generation.account()));
            self.closing_fields(generation, out);
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// A failure after the stream began. No end mark follows: the answer is not whole.
    pub(super) fn error(error: &ApiError, out: &mut Vec<u8>) {
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(&error.to_json());
        out.extend_from_slice(b"\n\n");
    }
}

/// Appends `value` as JSON.
pub(super) fn json<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(out, value).expect("plain data always serialises: this is a bug");
}
