//! `POST /api/embed`, and `POST /api/embeddings`, its older form with one text.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::fields::plain_name;
use crate::http::body::JsonBody;
use crate::http::embeddings::{Embedded, Embedder, EmbeddingInput};
use crate::http::error::ApiError;
use crate::http::fields::{ModelField, integer};
use crate::http::prompt::PromptInput;
use crate::http::state::AppState;
use crate::http::wire;

#[derive(Deserialize, ToSchema)]
pub(super) struct EmbedFields {
    input: Option<EmbeddingInput>,
    truncate: Option<bool>,
    #[serde(default, deserialize_with = "integer")]
    dimensions: Option<i128>,
}

#[derive(Serialize)]
struct EmbedAnswer<'a> {
    model: Option<&'a str>,
    embeddings: &'a [Vec<f32>],
    /// Nanoseconds, as the next.
    total_duration: u64,
    load_duration: u64,
    prompt_eval_count: u64,
}

#[derive(Serialize)]
struct OneAnswer<'a> {
    embedding: &'a [f32],
}

fn name(field: &ModelField) -> Result<&str, ApiError> {
    let name = field.model.as_deref().map(plain_name);
    name.ok_or_else(|| ApiError::invalid("model", "model is missing; it must name a model"))
}

pub(super) async fn embed(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { common, fields, .. }: JsonBody<ModelField, EmbedFields>,
) -> Result<Response, ApiError> {
    let start = Instant::now();
    let embedder = Embedder::new(&state, &headers, Some(name(&common)?))?;
    // 0 is absent.
    let dimensions = fields.dimensions.filter(|dimensions| *dimensions != 0);
    let dimensions = embedder.dimensions("dimensions", dimensions)?;
    let Some(EmbeddingInput(texts)) = fields.input else {
        return Err(ApiError::invalid(
            "input",
            "input is missing; it must be a string or an array of strings",
        ));
    };
    let embedded = embedder.embed("input", texts, fields.truncate.unwrap_or(true)).await?;
    let write = move |embedded: &mut Embedded, body: &mut Vec<u8>| {
        embedded.shorten(dimensions);
        let answer = EmbedAnswer {
            model: common.model.as_deref(),
            embeddings: &embedded.vectors,
            total_duration: u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX),
            load_duration: 0,
            prompt_eval_count: embedded.num_tokens,
        };
        wire::json(body, &answer);
    };
    embedded.respond(&state.heavy, write).await
}

#[derive(Deserialize, ToSchema)]
pub(super) struct EmbedPrompt {
    prompt: Option<String>,
}

pub(super) async fn embed_one(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { common, fields, .. }: JsonBody<ModelField, EmbedPrompt>,
) -> Result<Response, ApiError> {
    let embedder = Embedder::new(&state, &headers, Some(name(&common)?))?;
    let texts = match fields.prompt {
        // So clients have a model loaded.
        None => vec![],
        Some(text) if text.is_empty() => vec![],
        Some(text) => vec![PromptInput::Text(text)],
    };
    let embedded = embedder.embed("prompt", texts, true).await?;
    let write = |embedded: &mut Embedded, body: &mut Vec<u8>| {
        embedded.normalize();
        let embedding = embedded.vectors.first().map_or(&[][..], Vec::as_slice);
        wire::json(body, &OneAnswer { embedding });
    };
    embedded.respond(&state.heavy, write).await
}
