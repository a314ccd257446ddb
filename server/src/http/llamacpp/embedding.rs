//! `POST /embedding` and `/embeddings`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::http::body::JsonBody;
use crate::http::embeddings::{Embedded, Embedder, EmbeddingInput};
use crate::http::error::ApiError;
use crate::http::fields::{ModelField, in_range, integer};
use crate::http::state::AppState;
use crate::http::wire;

#[derive(Deserialize, ToSchema)]
pub(super) struct EmbeddingContent {
    content: Option<EmbeddingInput>,
    input: Option<EmbeddingInput>,
    #[serde(default, deserialize_with = "integer")]
    embd_normalize: Option<i128>,
}

#[derive(Serialize)]
struct Item<'a> {
    index: usize,
    /// A vector for each of the rows that are left of a text; pooled, that is one.
    embedding: [&'a [f32]; 1],
}

/// Length 1, as everywhere here.
const EUCLIDEAN: i128 = 2;

pub(super) async fn embedding(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { common, fields, .. }: JsonBody<ModelField, EmbeddingContent>,
) -> Result<Response, ApiError> {
    let embedder = Embedder::new(&state, &headers, common.model.as_deref())?;
    let norm = in_range("embd_normalize", fields.embd_normalize.unwrap_or(EUCLIDEAN), -1, EUCLIDEAN)?;
    if norm != EUCLIDEAN && norm != -1 {
        let message = format!("embd_normalize is {norm}; it must be -1 (none) or 2 (a length of 1)");
        return Err(ApiError::invalid("embd_normalize", message));
    }
    let texts = fields.content.or(fields.input).map(|EmbeddingInput(texts)| texts).unwrap_or_default();
    if texts.is_empty() {
        let message = "content is missing or empty; it must be a string, an array of strings or token ids";
        return Err(ApiError::invalid("content", message));
    }
    let embedded = embedder.embed("content", texts, false).await?;
    let write = move |embedded: &mut Embedded, body: &mut Vec<u8>| {
        if norm == EUCLIDEAN {
            embedded.normalize();
        }
        let items = embedded.vectors.iter().enumerate();
        let items: Vec<Item<'_>> = items.map(|(index, vector)| Item { index, embedding: [vector] }).collect();
        wire::json(body, &items);
    };
    embedded.respond(&state.heavy, write).await
}
