//! `GET /props` and `GET /slots`. Nothing of what anybody asks for is shown.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::http::error::ApiError;
use crate::http::lanes::{available, resolve};
use crate::http::state::AppState;

/// Most slots that are listed.
const MAX_SLOTS: usize = 1024;

pub(super) async fn props(State(state): State<Arc<AppState>>) -> Result<Json<Value>, ApiError> {
    let served = resolve(&state, None)?;
    let tokenizer = &served.model.tokenizer;
    let names: Vec<&str> = available(&state).iter().map(|(name, _)| *name).collect();
    Ok(Json(json!({
        "default_generation_settings": { "n_ctx": state.engine.max_model_len() },
        "total_slots": state.engine.max_sequences(),
        "model_alias": served.model.name,
        "models": names,
        "bos_token": tokenizer.bos_token().unwrap_or(""),
        "eos_token": tokenizer.eos_token().unwrap_or(""),
        "modalities": { "vision": false, "audio": false },
        "build_info": concat!("tandem-", env!("CARGO_PKG_VERSION")),
    })))
}

/// A slot is room for one sequence. Sequences have no slots of their own here; the first ones stand for
/// those that run.
pub(super) async fn slots(State(state): State<Arc<AppState>>) -> Json<Value> {
    let num_running = state.engine.stats().num_running as usize;
    let n_ctx = state.engine.max_model_len();
    let slots = (0..state.engine.max_sequences().min(MAX_SLOTS))
        .map(|id| json!({ "id": id, "n_ctx": n_ctx, "is_processing": id < num_running }));
    Json(Value::Array(slots.collect()))
}
