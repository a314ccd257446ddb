//! A socket that is not waited on for ever.
//!
//! Three ways a peer can hold a connection, and the bound on each: a request head that never ends
//! (`header_timeout`, counted from its first byte, so that trickling does not help), silence between
//! requests (`idle_timeout`), and a response that is not read (`write_timeout` without any byte
//! taken). Time while a request is being answered is the handler's business.
//!
//! Costs one `Option` check a read and a write; timers are armed only while something is awaited.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Sleep, sleep};

/// Bounds on waiting for the peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct IoTimeouts {
    pub(super) header: Duration,
    pub(super) idle: Duration,
    pub(super) write: Duration,
}

/// What the connection's service tells its socket: whether a request is being answered.
#[derive(Debug, Default)]
pub(super) struct Activity {
    /// Requests being answered, and a WebSocket that took the connection over.
    num_busy: AtomicU64,
    num_requests: AtomicU64,
}

impl Activity {
    /// A request arrived; it is being answered until the guard is dropped.
    pub(super) fn begin(self: &Arc<Self>) -> ActivityGuard {
        self.num_requests.fetch_add(1, Ordering::Relaxed);
        self.num_busy.fetch_add(1, Ordering::Relaxed);
        ActivityGuard(self.clone())
    }

    fn is_busy(&self) -> bool {
        self.num_busy.load(Ordering::Relaxed) > 0
    }
}

/// See [`Activity::begin`].
pub(super) struct ActivityGuard(Arc<Activity>);

impl Drop for ActivityGuard {
    fn drop(&mut self) {
        self.0.num_busy.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream with [`IoTimeouts`]; a timeout is an error of kind `TimedOut`, after which hyper closes.
pub(super) struct TimedIo<T> {
    inner: T,
    timeouts: IoTimeouts,
    activity: Arc<Activity>,
    /// `num_requests` when the read deadline was armed; another value makes it stale.
    seen_requests: u64,
    head_started: bool,
    read_deadline: Option<Pin<Box<Sleep>>>,
    write_deadline: Option<Pin<Box<Sleep>>>,
    /// Given back when the socket closes, whoever has it by then.
    _place: Option<OwnedSemaphorePermit>,
}

impl<T> TimedIo<T> {
    pub(super) fn new(inner: T, timeouts: IoTimeouts, activity: Arc<Activity>) -> Self {
        TimedIo {
            inner,
            timeouts,
            activity,
            seen_requests: 0,
            head_started: false,
            read_deadline: None,
            write_deadline: None,
            _place: None,
        }
    }

    /// The socket takes this place among all that may be open.
    pub(super) fn holding(mut self, place: OwnedSemaphorePermit) -> Self {
        self._place = Some(place);
        self
    }

    /// Called when no byte can be read now.
    fn poll_read_deadline(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.forget_earlier_request();
        if self.activity.is_busy() {
            self.read_deadline = None;
            return Poll::Pending;
        }
        // A connection that has not sent anything yet is as suspect as one that stopped half-way.
        let is_first = self.seen_requests == 0;
        let timeout = if is_first { self.timeouts.header } else { self.timeouts.idle };
        let deadline = self.read_deadline.get_or_insert_with(|| Box::pin(sleep(timeout)));
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the client sent no complete request in time",
        )))
    }

    fn forget_earlier_request(&mut self) {
        let num_requests = self.activity.num_requests.load(Ordering::Relaxed);
        if num_requests != self.seen_requests {
            self.seen_requests = num_requests;
            self.head_started = false;
            self.read_deadline = None;
        }
    }

    fn bytes_arrived(&mut self) {
        self.forget_earlier_request();
        if !self.head_started && !self.activity.is_busy() {
            self.head_started = true;
            self.read_deadline = Some(Box::pin(sleep(self.timeouts.header)));
        }
    }

    /// Turns a write that stays pending for too long into an error.
    fn bound_write<R>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if result.is_ready() {
            self.write_deadline = None;
            return result;
        }
        let timeout = self.timeouts.write;
        let deadline = self.write_deadline.get_or_insert_with(|| Box::pin(sleep(timeout)));
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client stopped reading its response")))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for TimedIo<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled_before = buffer.filled().len();
        match Pin::new(&mut self.inner).poll_read(cx, buffer) {
            Poll::Pending => self.poll_read_deadline(cx),
            Poll::Ready(result) => {
                if buffer.filled().len() > filled_before {
                    self.bytes_arrived();
                }
                Poll::Ready(result)
            }
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for TimedIo<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.bound_write(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, slices);
        self.bound_write(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A socket's flush does nothing: what counts is that bytes are taken, so the write deadline
        // is left as it stands.
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.bound_write(cx, result)
    }
}
