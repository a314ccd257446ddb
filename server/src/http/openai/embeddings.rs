//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::http::body::JsonBody;
use crate::http::embeddings::{Embedded, Embedder, EmbeddingInput};
use crate::http::error::ApiError;
use crate::http::fields::{ModelField, integer, one_of};
use crate::http::state::AppState;

/// The fields of this endpoint beside `model`.
#[derive(Deserialize, ToSchema)]
pub(super) struct EmbeddingFields {
    input: Option<EmbeddingInput>,
    encoding_format: Option<String>,
    #[serde(default, deserialize_with = "integer")]
    dimensions: Option<i128>,
}

#[derive(Serialize)]
struct EmbeddingList<'a> {
    object: &'static str,
    data: Vec<Item<'a>>,
    model: &'a str,
    usage: EmbeddingUsage,
}

#[derive(Serialize)]
struct Item<'a> {
    object: &'static str,
    index: usize,
    embedding: Values<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Values<'a> {
    Numbers(&'a [f32]),
    /// The numbers' bytes, little-endian.
    Base64(String),
}

impl<'a> Item<'a> {
    fn of(index: usize, vector: &'a [f32], is_base64: bool) -> Self {
        Item { object: "embedding", index, embedding: Values::of(vector, is_base64) }
    }
}

impl<'a> Values<'a> {
    fn of(vector: &'a [f32], is_base64: bool) -> Self {
        if !is_base64 {
            return Values::Numbers(vector);
        }
        let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
        Values::Base64(STANDARD.encode(bytes))
    }
}

#[derive(Serialize)]
struct EmbeddingUsage {
    prompt_tokens: u64,
    total_tokens: u64,
}

pub(super) async fn embeddings(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { common, fields, .. }: JsonBody<ModelField, EmbeddingFields>,
) -> Result<Response, ApiError> {
    let embedder = Embedder::new(&state, &headers, common.model.as_deref())?;
    let formats = [("float", false), ("base64", true)];
    let format = fields.encoding_format.as_deref().unwrap_or("float");
    let is_base64 = one_of("encoding_format", format, &formats)?;
    let dimensions = embedder.dimensions("dimensions", fields.dimensions)?;
    let texts = fields.input.map(|EmbeddingInput(texts)| texts).unwrap_or_default();
    if texts.is_empty() {
        let message = "input is missing or empty; it must be a string, an array of strings, an array of token \
                       ids, or an array of arrays of token ids";
        return Err(ApiError::invalid("input", message));
    }
    let model = embedder.model().to_owned();
    let embedded = embedder.embed("input", texts, false).await?;
    let write = move |embedded: &mut Embedded, body: &mut Vec<u8>| {
        embedded.shorten(dimensions);
        let items = embedded.vectors.iter().enumerate();
        let items = items.map(|(index, vector)| Item::of(index, vector, is_base64));
        let list = EmbeddingList {
            object: "list",
            data: items.collect(),
            model: &model,
            usage: EmbeddingUsage { prompt_tokens: embedded.num_tokens, total_tokens: embedded.num_tokens },
        };
        crate::http::wire::json(body, &list);
    };
    embedded.respond(&state.heavy, write).await
}
