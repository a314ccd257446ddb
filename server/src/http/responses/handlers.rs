//! `POST /v1/responses`, and what can be asked about a response that was stored.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use serde_json::{Value, json};

use super::record::not_found;
use super::store::Stored;
use super::turn::{ResponseBody, Turn};
use crate::http::error::ApiError;
use crate::http::state::AppState;
use crate::http::wire::respond;

pub(super) async fn create(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    body: ResponseBody,
) -> Result<Response, ApiError> {
    let Turn { generation, wire, reply } = Turn::begin(&state, &headers, body, None).await?;
    respond(generation, wire, &reply).await
}

fn stored(state: &AppState, headers: &HeaderMap, id: &str) -> Result<Arc<Stored>, ApiError> {
    state.responses.get(state.cache_salt(headers, None), id).ok_or_else(|| not_found(id))
}

pub(super) async fn retrieve(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let turn = stored(&state, &headers, &id)?;
    Ok(([(CONTENT_TYPE, "application/json")], turn.response.clone()).into_response())
}

pub(super) async fn delete(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    match state.responses.remove(state.cache_salt(&headers, None), &id) {
        true => Ok(Json(json!({ "id": id, "object": "response", "deleted": true }))),
        false => Err(not_found(&id)),
    }
}

/// What the client said in that turn. The latest comes first, as with OpenAI.
pub(super) async fn input_items(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let turn = stored(&state, &headers, &id)?;
    let mut items: Vec<Value> =
        serde_json::from_str(&turn.input).expect("it was written as an array: this is a bug");
    items.reverse();
    let id_of = |item: Option<&Value>| item.map(|item| item["id"].clone()).unwrap_or_default();
    let (first_id, last_id) = (id_of(items.first()), id_of(items.last()));
    Ok(Json(json!({
        "object": "list", "data": items, "first_id": first_id, "last_id": last_id, "has_more": false,
    })))
}

/// Only responses made in the background can be cancelled, and there are none: a client that waits for its
/// answer cancels it by closing the connection.
pub(super) async fn cancel(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    stored(&state, &headers, &id)?;
    let message = "the response was not made in the background, so it has ended; close the connection to \
                   cancel one that runs";
    Err(ApiError::invalid("response_id", message))
}
