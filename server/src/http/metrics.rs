//! `/metrics`: the engine's counters, HTTP requests, time to first token and inter-token latency.
//!
//! Engine counters are read when scraped. The rest costs a mutex and a bucket search an
//! observation; handles are taken once a request, so that no label is looked up per token.

mod keys;
mod vllm;

use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tandem_engine::{DraftSource, EngineHandle, EngineStats, Lane};

use keys::ShownKeys;
use vllm::VllmCollector;

use super::auth;
use super::error::{ApiError, ErrorKind};
use super::generation::Shared;
use super::lanes::lane_name;
use super::response_end::{CLIENT_LEFT, OnEnd, note_end};
use super::state::{AppState, unix_seconds};

/// Everything that `/metrics` shows.
pub struct Metrics {
    registry: Registry,
    /// Names that are not ours.
    foreign: Registry,
    requests: Family<RequestLabels, Counter>,
    request_seconds: Family<RouteLabels, Histogram, fn() -> Histogram>,
    in_flight: Gauge<i64, AtomicI64>,
    shared: Family<SharedLabels, Counter>,
    lanes: Family<ReasonLabels, Counter>,
    fast: LaneMetrics,
    deep: LaneMetrics,
    keys: ShownKeys,
}

/// Latencies of one lane.
#[derive(Clone)]
pub struct LaneMetrics {
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RouteLabels {
    route: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct LaneLabels {
    lane: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SharedLabels {
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabels {
    lane: &'static str,
    reason: &'static str,
}

const REQUEST_SECONDS: [f64; 14] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
const FIRST_TOKEN_SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
const INTER_TOKEN_SECONDS: [f64; 13] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0];

impl Metrics {
    /// Registers everything.
    pub fn new(engine: EngineHandle) -> Self {
        let mut registry = Registry::with_prefix("tandem");
        registry.register_collector(Box::new(EngineCollector(engine.clone())));
        let mut foreign = Registry::default();
        foreign.register_collector(Box::new(VllmCollector(engine)));

        let requests = Family::default();
        registry.register("http_requests", "Requests answered, by route and status", requests.clone());
        let request_seconds =
            Family::new_with_constructor((|| Histogram::new(REQUEST_SECONDS)) as fn() -> Histogram);
        registry.register_with_unit(
            "http_request_duration",
            "From a request's head to the end of its response",
            Unit::Seconds,
            request_seconds.clone(),
        );
        let in_flight = Gauge::default();
        registry.register("http_requests_in_flight", "Requests being answered", in_flight.clone());

        let shared = Family::<SharedLabels, Counter>::default();
        for kind in [Shared::Identical, Shared::Continuation] {
            // Shows as 0 from the start.
            drop(shared.get_or_create(&SharedLabels { kind: kind.name() }));
        }
        let help = "Answers read from a sequence that another request had started";
        registry.register("sequences_shared", help, shared.clone());

        let lanes = Family::<ReasonLabels, Counter>::default();
        for reason in ["unsure", "outgrown"] {
            drop(lanes.get_or_create(&ReasonLabels { lane: "deep", reason }));
        }
        registry.register("lane_choices", "Requests, by the lane that answered and why", lanes.clone());

        let first =
            Family::<LaneLabels, Histogram, _>::new_with_constructor(|| Histogram::new(FIRST_TOKEN_SECONDS));
        let between =
            Family::<LaneLabels, Histogram, _>::new_with_constructor(|| Histogram::new(INTER_TOKEN_SECONDS));
        registry.register_with_unit(
            "time_to_first_token",
            "From a sequence's submission to its first token",
            Unit::Seconds,
            first.clone(),
        );
        registry.register_with_unit(
            "inter_token_latency",
            "Time between a sequence's tokens; tokens that came together share it evenly and count once",
            Unit::Seconds,
            between.clone(),
        );
        let lane = |lane| LaneMetrics {
            time_to_first_token: first.get_or_create_owned(&LaneLabels { lane }),
            inter_token_latency: between.get_or_create_owned(&LaneLabels { lane }),
        };
        let (fast, deep) = (lane("fast"), lane("deep"));
        let keys = ShownKeys::default();
        Metrics { registry, foreign, requests, request_seconds, in_flight, shared, lanes, fast, deep, keys }
    }

    /// Counts an answer that is read from somebody else's sequence.
    pub(super) fn sequence_shared(&self, shared: Shared) {
        self.shared.get_or_create(&SharedLabels { kind: shared.name() }).inc();
    }

    /// Counts a request by who answers it, and why.
    pub(super) fn lane_chosen(&self, lane: Lane, reason: &'static str) {
        self.lanes.get_or_create(&ReasonLabels { lane: lane_name(lane), reason }).inc();
    }

    /// Where a lane's sequences report their latencies.
    pub fn lane(&self, lane: Lane) -> LaneMetrics {
        match lane {
            Lane::Fast => self.fast.clone(),
            Lane::Deep => self.deep.clone(),
        }
    }
}

/// Watches one sequence's token times.
pub struct TokenClock {
    metrics: LaneMetrics,
    start: Instant,
    /// When the first and the latest token came.
    tokens: Option<(Instant, Instant)>,
}

impl TokenClock {
    /// Starts at the sequence's submission.
    pub fn start(metrics: LaneMetrics) -> Self {
        TokenClock { metrics, start: Instant::now(), tokens: None }
    }

    /// `num_tokens` came together.
    pub fn tokens(&mut self, num_tokens: usize) {
        let now = Instant::now();
        match &mut self.tokens {
            None => {
                self.tokens = Some((now, now));
                self.metrics.time_to_first_token.observe((now - self.start).as_secs_f64());
            }
            Some((_, last)) => {
                let elapsed = (now - *last).as_secs_f64();
                *last = now;
                self.metrics.inter_token_latency.observe(elapsed / num_tokens.max(1) as f64);
            }
        }
    }

    /// From the start to the first token.
    pub fn time_to_first(&self) -> Duration {
        self.tokens.map_or(Duration::ZERO, |(first, _)| first - self.start)
    }

    /// From the first token to the latest.
    pub fn decode_time(&self) -> Duration {
        self.tokens.map_or(Duration::ZERO, |(first, last)| last - first)
    }
}

/// Counts and times a request until its response is sent or dropped.
pub(super) async fn measure(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "unmatched".to_owned(), |path| path.as_str().to_owned());
    let metrics = &state.metrics;
    metrics.in_flight.inc();
    let guard = RequestGuard {
        in_flight: metrics.in_flight.clone(),
        seconds: metrics.request_seconds.get_or_create_owned(&RouteLabels { route: route.clone() }),
        status: CLIENT_LEFT,
        route,
        start: Instant::now(),
        requests: metrics.requests.clone(),
    };
    note_end(next.run(request).await, guard)
}

struct RequestGuard {
    route: String,
    /// [`CLIENT_LEFT`] until the response has ended.
    status: u16,
    start: Instant,
    requests: Family<RequestLabels, Counter>,
    seconds: Histogram,
    in_flight: Gauge<i64, AtomicI64>,
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.in_flight.dec();
        self.seconds.observe(self.start.elapsed().as_secs_f64());
        let labels = RequestLabels { route: std::mem::take(&mut self.route), status: self.status };
        self.requests.get_or_create(&labels).inc();
    }
}

impl OnEnd for RequestGuard {
    fn ended(&mut self, status: u16) {
        self.status = status;
    }
}

/// `GET /metrics`
pub(super) async fn metrics(State(state): State<Arc<AppState>>, headers: HeaderMap) -> Response {
    let client = match auth::client(&state, &headers) {
        Ok(client) => client,
        Err(error) => return error.into_response(),
    };
    let mut page = String::new();
    let metrics = &state.metrics;
    let keys = client.map(|client| metrics.keys.registry(&state.keys, &client, unix_seconds()));
    let written = text::encode_registry(&mut page, &metrics.registry)
        .and_then(|()| keys.map_or(Ok(()), |keys| text::encode_registry(&mut page, &keys)))
        .and_then(|()| text::encode_registry(&mut page, &metrics.foreign))
        .and_then(|()| text::encode_eof(&mut page));
    match written {
        Ok(()) => {
            let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(CONTENT_TYPE, content_type)], page).into_response()
        }
        Err(_) => ApiError::new(ErrorKind::Internal, "the metrics could not be written").into_response(),
    }
}

struct EngineCollector(EngineHandle);

impl std::fmt::Debug for EngineCollector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EngineCollector")
    }
}

impl Collector for EngineCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let stats = self.0.stats();
        for (name, help, value) in gauges(&stats) {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let longest = stats.queue_wait_ms_by_lane.into_iter().max().unwrap_or(0);
        let wait = ConstGauge::new(longest as f64 / 1000.0);
        let help = "How long a sequence that begins to wait now would wait, in the slower lane";
        wait.encode(encoder.encode_descriptor(
            "queue_wait",
            help,
            Some(&Unit::Seconds),
            wait.metric_type(),
        )?)?;
        for (name, help, value) in counters(&stats) {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        let tokens = [("fast", stats.num_fast_tokens), ("deep", stats.num_deep_tokens)];
        labelled(&mut encoder, "output_tokens", "Output tokens, by lane", "lane", tokens)?;
        let passes = [("target", stats.num_target_passes), ("draft", stats.num_draft_passes)];
        labelled(&mut encoder, "forward_passes", "Forward passes, by model", "model", passes)?;
        let ends =
            [("finished", stats.num_finished), ("aborted", stats.num_aborted), ("failed", stats.num_failed)];
        labelled(&mut encoder, "sequences_ended", "Sequences that ended, by how", "reason", ends)?;
        let by_source =
            |counts: [u64; 3]| DraftSource::ALL.map(|source| (source_name(source), counts[source as usize]));
        let (offered, accepted) = (by_source(stats.num_draft_tokens), by_source(stats.num_accepted_tokens));
        labelled(
            &mut encoder,
            "draft_tokens",
            "Draft tokens offered to the target, by who proposed them",
            "source",
            offered,
        )?;
        let help = "Draft tokens that the target accepted, by who proposed them";
        labelled(&mut encoder, "draft_tokens_accepted", help, "source", accepted)?;
        let (offered, accepted) = (stats.num_draft_tokens_at, stats.num_accepted_tokens_at);
        by_position(
            &mut encoder,
            "draft_tokens_at",
            "Draft tokens offered, by position in the draft",
            &offered,
        )?;
        let help = "Draft tokens that the target accepted, by position in the draft";
        by_position(&mut encoder, "draft_tokens_accepted_at", help, &accepted)
    }
}

/// Positions up to the last that had any.
fn by_position(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    counts: &[u64],
) -> Result<(), std::fmt::Error> {
    let metric_type = prometheus_client::metrics::MetricType::Counter;
    let mut descriptor = encoder.encode_descriptor(name, help, None, metric_type)?;
    let num_positions = counts.iter().rposition(|count| *count > 0).map_or(1, |last| last + 1);
    for (position, &count) in counts[..num_positions].iter().enumerate() {
        ConstCounter::new(count).encode(descriptor.encode_family(&[("position", position as u64)])?)?;
    }
    Ok(())
}

fn source_name(source: DraftSource) -> &'static str {
    match source {
        DraftSource::Draft => "draft",
        DraftSource::Ngram => "ngram",
        DraftSource::Prediction => "prediction",
    }
}

fn gauges(stats: &EngineStats) -> [(&'static str, &'static str, u64); 5] {
    [
        ("sequences_waiting", "Sequences waiting for room", stats.num_waiting),
        ("sequences_running", "Sequences running", stats.num_running),
        ("kv_blocks", "Blocks of the KV cache", stats.num_total_blocks),
        ("kv_blocks_free", "Blocks of the KV cache that hold nothing", stats.num_free_blocks),
        ("kv_blocks_cached", "Blocks of the prefix cache that no sequence uses", stats.num_cached_blocks),
    ]
}

fn counters(stats: &EngineStats) -> [(&'static str, &'static str, u64); 7] {
    [
        ("engine_steps", "Steps of the engine", stats.num_steps),
        ("prompt_tokens", "Prompt tokens computed", stats.num_prompt_tokens),
        ("prompt_tokens_cached", "Prompt tokens found in the prefix cache", stats.num_cached_tokens),
        ("embeddings", "Texts embedded", stats.num_embeddings),
        ("embedding_tokens", "Their tokens, which are prompt tokens too", stats.num_embedding_tokens),
        ("preemptions", "Sequences that gave up their blocks to be computed again", stats.num_preemptions),
        ("cache_evictions", "Blocks of the prefix cache given to somebody else", stats.num_evictions),
    ]
}

fn labelled<const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &'static str,
    values: [(&'static str, u64); N],
) -> Result<(), std::fmt::Error> {
    let metric_type = prometheus_client::metrics::MetricType::Counter;
    let mut descriptor = encoder.encode_descriptor(name, help, None, metric_type)?;
    for (value, count) in values {
        let labels = [(label, value)];
        ConstCounter::new(count).encode(descriptor.encode_family(&labels)?)?;
    }
    Ok(())
}

/// The time as milliseconds with microsecond resolution, for responses.
pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}
