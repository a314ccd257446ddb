//! Server-sent events: a response body that writes a [`Generation`] through a protocol's encoder.
//!
//! All events that are ready go out in one body frame, so a client that reads slowly, or a step that
//! yields several tokens, costs one write. The scratch buffer is reused; a frame costs one copy.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::response::{IntoResponse, Response};
use http::HeaderValue;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http_body::Frame;

use super::error::ApiError;
use super::generation::{Generation, Progress};

/// Turns a generation's progress into a protocol's events.
pub(super) trait EventEncoder: Send + Unpin + 'static {
    /// Appends the events for one step of one choice.
    fn progress(&mut self, generation: &Generation, progress: Progress, out: &mut Vec<u8>);
    /// Appends what follows the last choice's end.
    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>);
    /// Appends the event for a failure after the response began; nothing follows.
    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>);
}

/// A frame is sent once it has this much, even if more is ready.
const FRAME_BYTES: usize = 32 << 10;

struct SseBody<E> {
    /// `None` after the end: the sequences are freed before the client has read the last byte.
    generation: Option<Generation>,
    encoder: E,
    scratch: Vec<u8>,
}

impl<E: EventEncoder> http_body::Body for SseBody<E> {
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
        let has_ended = loop {
            if this.scratch.len() >= FRAME_BYTES {
                break false;
            }
            match generation.poll_next(cx) {
                Poll::Ready(Some(Ok(progress))) => {
                    this.encoder.progress(generation, progress, &mut this.scratch);
                }
                Poll::Ready(Some(Err(error))) => {
                    this.encoder.error(&error, &mut this.scratch);
                    break true;
                }
                Poll::Ready(None) => {
                    this.encoder.end(generation, &mut this.scratch);
                    break true;
                }
                Poll::Pending if this.scratch.is_empty() => return Poll::Pending,
                Poll::Pending => break false,
            }
        };
        if has_ended {
            this.generation = None;
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::copy_from_slice(&this.scratch)))))
    }

    fn is_end_stream(&self) -> bool {
        self.generation.is_none()
    }
}

/// The response that streams `generation`.
pub(super) fn respond<E: EventEncoder>(generation: Generation, encoder: E) -> Response {
    let body = SseBody { generation: Some(generation), encoder, scratch: Vec::with_capacity(1024) };
    let mut response = Body::new(body).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Asks nginx not to gather the events.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
