//! Streams: a response body that writes a [`Generation`] through a protocol's [`Wire`], as
//! server-sent events or as lines of JSON.
//!
//! All events that are ready go out in one body frame, so a client that reads slowly, or a step that
//! yields several tokens, costs one write. The scratch buffer is reused; a frame costs one copy.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::response::{IntoResponse, Response};
use http::HeaderValue;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http_body::Frame;
use tokio::time::{Instant, Sleep};

use super::generation::Generation;
use super::wire::Wire;

/// A frame is sent once it has this much, even if more is ready.
const FRAME_BYTES: usize = 32 << 10;

/// Silence, as in a long prefill, that proxies and clients still bear with.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

struct StreamBody<W> {
    /// `None` after the end: the sequences are freed before the client has read the last byte.
    generation: Option<Generation>,
    wire: W,
    scratch: Vec<u8>,
    has_begun: bool,
    /// Ends when something must be said.
    silence: Pin<Box<Sleep>>,
}

impl<W: Wire> http_body::Body for StreamBody<W> {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        let Some(generation) = &mut this.generation else {
            return Poll::Ready(None);
        };
        this.scratch.clear();
        if !std::mem::replace(&mut this.has_begun, true) {
            this.wire.begin(generation, &mut this.scratch);
        }
        let has_ended = loop {
            if this.scratch.len() >= FRAME_BYTES {
                break false;
            }
            match generation.poll_next(cx) {
                Poll::Ready(Some(Ok(progress))) => {
                    this.wire.progress(generation, progress, &mut this.scratch);
                }
                Poll::Ready(Some(Err(error))) => {
                    this.wire.error(&error, &mut this.scratch);
                    break true;
                }
                Poll::Ready(None) => {
                    this.wire.end(generation, &mut this.scratch);
                    break true;
                }
                Poll::Pending if this.scratch.is_empty() => {
                    if this.silence.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    this.wire.keep_alive(&mut this.scratch);
                    if this.scratch.is_empty() {
                        // Nothing that the protocol's clients would pass over can be said.
                        this.silence.as_mut().reset(Instant::now() + KEEP_ALIVE);
                        continue;
                    }
                    break false;
                }
                Poll::Pending => break false,
            }
        };
        if has_ended {
            this.generation = None;
        }
        this.silence.as_mut().reset(Instant::now() + KEEP_ALIVE);
        Poll::Ready(Some(Ok(Frame::data(Bytes::copy_from_slice(&this.scratch)))))
    }

    fn is_end_stream(&self) -> bool {
        self.generation.is_none()
    }
}

/// The response that streams `generation`.
pub(super) fn respond<W: Wire>(generation: Generation, wire: W) -> Response {
    let content_type = wire.content_type();
    let body = StreamBody {
        generation: Some(generation),
        wire,
        scratch: Vec::with_capacity(1024),
        has_begun: false,
        silence: Box::pin(tokio::time::sleep(KEEP_ALIVE)),
    };
    let mut response = Body::new(body).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Asks nginx not to gather the events.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
