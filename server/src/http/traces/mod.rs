//! Traces: a span for every request that asks for work, sent to an OpenTelemetry collector.
//!
//! Names follow OpenTelemetry's semantic conventions for HTTP servers and for generative AI; latencies have the
//! names that vLLM gives them. What people write and what models answer is never in a span. A request's
//! `traceparent` is taken over: its trace goes on here, unless whoever began it does not record it.
//!
//! Off unless a collector is named. Then a request costs a record of a few hundred bytes and one message to the
//! exporter's task, which nobody waits for: what comes faster than it can be sent is dropped and counted.

mod context;
mod exporter;
mod otlp;

use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::Method;

use super::error::ApiError;
use super::generation::{Account, EndReason};
use super::response_end::{CLIENT_LEFT, OnEnd, note_end};
use super::state::AppState;
use context::TraceContext;
pub use exporter::{CollectorUrl, CollectorUrlError, Exporting, Tracer};

/// What a span tells of how a request was answered by a model.
#[derive(Clone, Debug, Default)]
pub(super) struct ModelWork {
    /// As the client named it.
    pub(super) request_model: String,
    /// The real name of who answered.
    pub(super) model: String,
    pub(super) lane: &'static str,
    pub(super) lane_reason: String,
    pub(super) temperature: f32,
    pub(super) top_p: f32,
    /// The bound on an answer.
    pub(super) max_tokens: u32,
    pub(super) num_choices: usize,
    pub(super) account: Account,
    pub(super) finish_reasons: Vec<EndReason>,
}

/// Written by who answers, read when the response has ended.
#[derive(Clone, Debug, Default)]
pub(super) struct WorkRecord(Arc<Mutex<ModelWork>>);

impl WorkRecord {
    pub(super) fn new(work: ModelWork) -> Self {
        WorkRecord(Arc::new(Mutex::new(work)))
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut ModelWork)) {
        change(&mut self.0.lock().expect("no holder of this lock panics: this is a bug"));
    }

    fn take(&self) -> ModelWork {
        std::mem::take(&mut self.0.lock().expect("no holder of this lock panics: this is a bug"))
    }
}

/// A request that was answered, or whose client left.
struct Span {
    context: TraceContext,
    method: Method,
    route: String,
    start: SystemTime,
    end: SystemTime,
    /// Nginx's 499 if the client left before the end.
    status: u16,
    /// The kind of error, if the response is one.
    error: Option<&'static str>,
    work: Option<ModelWork>,
}

/// Stands behind the check of keys, so that nobody without one makes spans.
pub(super) async fn trace(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    let Some(tracer) = state.tracer.clone().filter(|_| request.method() == Method::POST) else {
        return next.run(request).await;
    };
    let Some(context) = TraceContext::of(request.headers()) else {
        return next.run(request).await;
    };
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let start = SystemTime::now();
    let mut open = OpenSpan {
        tracer,
        span: Some(Span {
            context,
            method: request.method().clone(),
            route,
            start,
            end: start,
            status: CLIENT_LEFT,
            error: None,
            work: None,
        }),
        record: None,
        since: Instant::now(),
    };
    let mut response = next.run(request).await;
    open.record = response.extensions_mut().remove::<WorkRecord>();
    if let Some(span) = &mut open.span {
        span.error = response.extensions().get::<ApiError>().map(|error| error.kind.name());
    }
    note_end(response, open)
}

/// Sends its span when it is dropped.
struct OpenSpan {
    tracer: Tracer,
    /// `None` once it is sent.
    span: Option<Span>,
    record: Option<WorkRecord>,
    since: Instant,
}

impl OnEnd for OpenSpan {
    fn ended(&mut self, status: u16) {
        if let Some(span) = &mut self.span {
            span.status = status;
        }
    }
}

impl Drop for OpenSpan {
    fn drop(&mut self) {
        let Some(mut span) = self.span.take() else { return };
        // The clock on the wall may have been set meanwhile.
        span.end = span.start + self.since.elapsed();
        span.work = self.record.as_ref().map(WorkRecord::take);
        self.tracer.send(span);
    }
}
