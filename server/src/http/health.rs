//! `/health`: never waits for the engine, needs no key.

use std::sync::Arc;

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

/// `GET /health`: 200 while requests can be answered, 503 while draining or when the engine is not
/// well.
pub(super) async fn health(State(state): State<Arc<AppState>>) -> Response {
    let (code, status) = if !state.engine.is_healthy() {
        (StatusCode::SERVICE_UNAVAILABLE, "unhealthy")
    } else if state.is_draining() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining")
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
