//! A response's end: when the last of its body has been taken, or its client has left before.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::response::Response;
use http_body::{Frame, SizeHint};

/// Nginx's code for a client that left before it had the whole answer.
pub(super) const CLIENT_LEFT: u16 = 499;

/// Who keeps the account of a request. It is dropped with the response's body, and has been told of the end if
/// there was one.
pub(super) trait OnEnd: Send + Unpin + 'static {
    /// The whole response has been taken; `status` is its own.
    fn ended(&mut self, status: u16);
}

/// The response, whose body tells `account` of its end.
pub(super) fn note_end(response: Response, mut account: impl OnEnd) -> Response {
    let status = response.status().as_u16();
    response.map(|inner| {
        // Nobody polls a body that is empty.
        if http_body::Body::is_end_stream(&inner) {
            account.ended(status);
        }
        Body::new(NotedBody { inner, status, account })
    })
}

struct NotedBody<A> {
    inner: Body,
    /// The response's.
    status: u16,
    account: A,
}

impl<A: OnEnd> http_body::Body for NotedBody<A> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if matches!(polled, Poll::Ready(None)) || self.inner.is_end_stream() {
            let status = self.status;
            self.account.ended(status);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
