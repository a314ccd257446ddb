//! What Tabby's plug-ins ask and tell besides.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::http::body::JsonBody;
use crate::http::state::AppState;

pub(super) async fn health(State(state): State<Arc<AppState>>) -> Json<Value> {
    let name =
        |served: Option<&crate::http::state::ServedModel>| served.map(|served| served.model.name.clone());
    let (target, draft) = (name(state.target.as_ref()), name(state.draft.as_ref()));
    let num_cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Json(json!({
        "model": draft.or(target.clone()), "chat_model": target, "device": "cpu", "arch": std::env::consts::ARCH,
        "cpu_info": "", "cpu_count": num_cpus, "cuda_devices": [],
        "version": { "build_date": "", "build_timestamp": "", "git_sha": "",
            "git_describe": concat!("tandem-", env!("CARGO_PKG_VERSION")) },
    }))
}

#[derive(Deserialize, ToSchema)]
pub(super) struct EventFields {}

/// What the user did with a completion. Nothing is kept of it.
pub(super) async fn event(_: JsonBody<EventFields, EventFields>) -> Json<Value> {
    Json(json!({}))
}

pub(super) async fn server_setting() -> Json<Value> {
    Json(json!({ "disable_client_side_telemetry": true }))
}
