//! OpenAI's protocol: models, completions, chat completions; and Mistral's fill-in-the-middle, which
//! answers as they do.

mod chat;
mod completions;
mod fim;
mod logprobs;
mod models;
mod types;
mod write;

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post};

use super::state::AppState;

/// The protocol's paths.
pub(super) fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/fim/completions", post(fim::fim_completions))
}
