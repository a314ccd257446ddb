//! `/health`: never waits for the engine, needs no key.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Serialize;

use super::lanes::lane_name;
use super::state::AppState;

#[derive(Serialize)]
struct Health {
    status: &'static str,
    version: &'static str,
    lanes: Vec<&'static str>,
    sequences_running: u64,
    sequences_waiting: u64,
}

/// `GET /health`: 200 while requests can be answered, 503 while draining, or when the engine is not well or has
/// work and does not get on with it.
pub(super) async fn health(State(state): State<Arc<AppState>>) -> Response {
    let (code, status) = if !state.engine.is_healthy() {
        (StatusCode::SERVICE_UNAVAILABLE, "unhealthy")
    } else if state.is_draining() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining")
    } else if state.is_stalled() {
        (StatusCode::SERVICE_UNAVAILABLE, "stalled")
    } else {
        (StatusCode::OK, "ok")
    };
    let stats = state.engine.stats();
    let lanes = [&state.draft, &state.target].into_iter().flatten().map(|served| lane_name(served.lane));
    let health = Health {
        status,
        version: env!("CARGO_PKG_VERSION"),
        lanes: lanes.collect(),
        sequences_running: stats.num_running,
        sequences_waiting: stats.num_waiting,
    };
    (code, Json(health)).into_response()
}

/// Watches the engine for as long as it is polled: it has stalled when there is work and nothing of it was done
/// for `limit`, and is well again as soon as something is.
pub(super) async fn watch_engine(state: &AppState, limit: Duration) {
    let mut interval =
        tokio::time::interval((limit / 8).clamp(Duration::from_millis(5), Duration::from_secs(1)));
    let (mut heartbeat, mut since) = (state.engine.heartbeat(), Instant::now());
    loop {
        interval.tick().await;
        let now = state.engine.heartbeat();
        if now != heartbeat || !state.engine.has_work() {
            (heartbeat, since) = (now, Instant::now());
        }
        let is_stalled = since.elapsed() >= limit;
        if state.set_stalled(is_stalled) != is_stalled {
            if is_stalled {
                tracing::error!("the engine has work and has done nothing for {} s", limit.as_secs_f32());
            } else {
                tracing::warn!("the engine goes on");
            }
        }
    }
}
