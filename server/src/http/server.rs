//! The accept loop. Ours, because `axum::serve` neither closes a half-sent request head nor a
//! connection whose client stopped reading.
//!
//! Invariants: at most `max_connections` sockets are open; every wait for a peer is bounded
//! ([`super::io`], [`super::body`]); `serve` returns only after every connection task has ended.

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tower::Service;

use super::io::{Activity, ActivityGuard, IoTimeouts, TimedIo};
use super::router::router;
use super::state::AppState;

/// How long to wait for peers, and for how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServeOptions {
    /// From the first byte of a request head to its last; also for a connection's first byte.
    pub header_timeout: Duration,
    /// Between two requests of one connection.
    pub idle_timeout: Duration,
    /// Without the client taking a single byte of a response.
    pub write_timeout: Duration,
    /// Connections open at a time; more wait in the listener's backlog.
    pub max_connections: usize,
    /// For running responses after the server was asked to stop.
    pub grace_period: Duration,
}

impl Default for ServeOptions {
    fn default() -> Self {
        ServeOptions {
            header_timeout: Duration::from_secs(10),
            // Longer than the 60 s after which common proxies give up an idle upstream.
            idle_timeout: Duration::from_secs(75),
            write_timeout: Duration::from_secs(30),
            max_connections: 8192,
            grace_period: Duration::from_secs(30),
        }
    }
}

/// Serves until `shutdown` resolves, then refuses new work, lets running responses finish for at
/// most `grace_period`, tells the engine to end and returns.
///
/// # Errors
/// If the listener's socket fails for good. Failures of single connections are logged.
pub async fn serve(
    listener: TcpListener,
    state: Arc<AppState>,
    options: ServeOptions,
    shutdown: impl Future<Output = ()>,
) -> std::io::Result<()> {
    let app = router(state.clone());
    let permits = Arc::new(Semaphore::new(options.max_connections));
    let (stop, stopping) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    let accepted = loop {
        let permit = tokio::select! {
            biased;
            () = &mut shutdown => break Ok(()),
            permit = permits.clone().acquire_owned() => permit.expect("the semaphore is never closed: this is a bug"),
        };
        let stream = tokio::select! {
            biased;
            () = &mut shutdown => break Ok(()),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) if is_passing(&error) => {
                    tracing::warn!(%error, "cannot accept a connection; trying again");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
                Err(error) => break Err(error),
            },
        };
        while connections.try_join_next().is_some() {}
        connections.spawn(serve_connection(stream, app.clone(), options, stopping.clone(), permit));
    };
    drop(listener);
    state.start_draining();
    state.engine.drain();
    stop.send_replace(true);
    let all_ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(options.grace_period, all_ended).await.is_err() {
        tracing::warn!("the grace period is over; closing {} connections", connections.len());
    }
    state.engine.shutdown();
    connections.shutdown().await;
    accepted
}

/// Resolves at the first Ctrl-C or SIGTERM. The second ends the process at once, with exit code 130.
///
/// # Panics
/// If the handlers cannot be installed.
pub async fn shutdown_signal() {
    next_signal().await;
    tokio::spawn(async {
        next_signal().await;
        std::process::exit(130);
    });
}

async fn next_signal() {
    let interrupt = async {
        tokio::signal::ctrl_c().await.expect("cannot listen for Ctrl-C");
    };
    #[cfg(unix)]
    let terminate = async {
        use tokio::signal::unix::{SignalKind, signal};
        signal(SignalKind::terminate()).expect("cannot listen for SIGTERM").recv().await;
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending::<()>();
    tokio::select! {
        () = interrupt => {}
        () = terminate => {}
    }
}

/// Errors of `accept` that say nothing about the listener: out of descriptors, or a connection that
/// was gone before it was taken.
fn is_passing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    const OUT_OF_DESCRIPTORS: [i32; 2] = [23, 24]; // ENFILE, EMFILE on every Unix
    matches!(
        error.kind(),
        ErrorKind::ConnectionAborted
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionRefused
            | ErrorKind::Interrupted
            | ErrorKind::OutOfMemory
    ) || error.raw_os_error().is_some_and(|code| OUT_OF_DESCRIPTORS.contains(&code))
}

async fn serve_connection(
    stream: TcpStream,
    app: Router,
    options: ServeOptions,
    mut stopping: watch::Receiver<bool>,
    place: OwnedSemaphorePermit,
) {
    // Tokens are small writes that must not wait for each other's acknowledgement.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY was refused");
    }
    let activity = Arc::new(Activity::default());
    let timeouts = IoTimeouts {
        header: options.header_timeout,
        idle: options.idle_timeout,
        write: options.write_timeout,
    };
    let io = TokioIo::new(TimedIo::new(stream, timeouts, activity.clone()).holding(place));
    let service = service_fn(move |mut request: Request<Incoming>| {
        let guard = activity.begin();
        // For handlers that take the connection over.
        request.extensions_mut().insert(activity.clone());
        let answer = app.clone().call(request.map(Body::new));
        async move {
            let response: Response<Body> = answer.await?;
            Ok::<_, Infallible>(response.map(|inner| AnswerBody { inner, _guard: guard }))
        }
    });
    let mut connection = pin!(
        hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            // The strict bounds are TimedIo's. This one only makes hyper poll an idle socket, so that
            // those are looked at.
            .header_read_timeout(options.header_timeout + options.idle_timeout)
            .serve_connection(io, service)
            .with_upgrades()
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        // The value itself must not be held: it is a lock.
        _ = stopping.wait_for(|stopping| *stopping) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection closed");
    }
}

/// A response body that keeps its connection's [`Activity`] busy until it is sent or dropped.
struct AnswerBody {
    inner: Body,
    _guard: ActivityGuard,
}

impl http_body::Body for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
