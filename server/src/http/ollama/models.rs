//! What Ollama's clients ask about the server and its models.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::fields::plain_name;
use super::wire::timestamp;
use crate::http::body::JsonBody;
use crate::http::error::ApiError;
use crate::http::lanes::{available, resolve};
use crate::http::state::{AppState, ServedModel};

/// The version of Ollama whose protocol this is; clients refuse to talk to old ones.
const SPOKEN_VERSION: &str = "0.12.0";

pub(super) async fn version() -> Json<Value> {
    Json(json!({ "version": SPOKEN_VERSION }))
}

/// Every name that can be asked for.
fn listed(state: &AppState) -> Vec<Value> {
    let model = |(name, served): (&str, Option<&ServedModel>)| {
        let root = served.map(|served| served.model.name.as_str());
        json!({
            "name": name, "model": name, "modified_at": timestamp(state.started_at), "size": 0, "digest": "",
            "details": details(root), "expires_at": timestamp(u64::from(u32::MAX)), "size_vram": 0,
            "context_length": state.engine.max_model_len(),
        })
    };
    available(state).into_iter().map(model).collect()
}

/// `parent_model` is the real name of what answers; null where the policy decides.
fn details(root: Option<&str>) -> Value {
    json!({ "parent_model": root, "format": "", "family": "", "families": [], "parameter_size": "",
        "quantization_level": "" })
}

pub(super) async fn tags(State(state): State<Arc<AppState>>) -> Json<Value> {
    Json(json!({ "models": listed(&state) }))
}

/// All of them are loaded, always.
pub(super) async fn running(State(state): State<Arc<AppState>>) -> Json<Value> {
    tags(State(state)).await
}

#[derive(Deserialize, ToSchema)]
pub(super) struct NameFields {
    model: Option<String>,
    /// Its older name.
    name: Option<String>,
}

#[derive(Deserialize, ToSchema)]
pub(super) struct NoFields {}

pub(super) async fn show(
    State(state): State<Arc<AppState>>,
    JsonBody { common, .. }: JsonBody<NameFields, NoFields>,
) -> Result<Json<Value>, ApiError> {
    let Some(name) = common.model.or(common.name) else {
        return Err(ApiError::invalid("model", "model is missing; it must name a model"));
    };
    let served = resolve(&state, Some(plain_name(&name)))?;
    let mut capabilities = vec!["completion", "embedding"];
    if served.model.fim.is_some() {
        capabilities.push("insert");
    }
    if served.dialect.format().is_some() {
        capabilities.push("tools");
    }
    Ok(Json(json!({
        "modelfile": "", "parameters": "", "license": "", "template": "",
        "modified_at": timestamp(state.started_at), "details": details(Some(&served.model.name)),
        // Clients look for the key that ends so.
        "model_info": { "general.architecture": "tandem", "tandem.context_length": state.engine.max_model_len(),
            "tandem.embedding_length": state.engine.hidden_size(served.lane) },
        "capabilities": capabilities,
    })))
}
