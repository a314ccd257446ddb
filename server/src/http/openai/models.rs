//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;

use crate::http::error::ApiError;
use crate::http::lanes::{available, lane_name, unknown_model};
use crate::http::state::{AppState, ServedModel};

#[derive(Serialize)]
pub(super) struct ModelList {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Serialize)]
pub(super) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// The lane that answers; null where the policy decides.
    lane: Option<&'static str>,
    /// The real name of the model behind it.
    root: Option<String>,
    max_model_len: usize,
}

impl Model {
    fn new(state: &AppState, id: &str, served: Option<&ServedModel>) -> Self {
        Model {
            id: id.to_owned(),
            object: "model",
            created: state.started_at,
            owned_by: "tandem",
            lane: served.map(|served| lane_name(served.lane)),
            root: served.map(|served| served.model.name.clone()),
            max_model_len: state.engine.max_model_len(),
        }
    }
}

pub(super) async fn list(State(state): State<Arc<AppState>>) -> Json<ModelList> {
    let names = available(&state).into_iter();
    let data = names.map(|(id, served)| Model::new(&state, id, served)).collect();
    Json(ModelList { object: "list", data })
}

pub(super) async fn one(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
) -> Result<Json<Model>, ApiError> {
    match available(&state).into_iter().find(|(name, _)| *name == id) {
        Some((name, served)) => Ok(Json(Model::new(&state, name, served))),
        None => Err(unknown_model(&state, &id)),
    }
}
