//! OpenAI's protocol: models, completions, chat completions.

mod chat;
mod completions;
mod logprobs;
mod models;
mod params;
mod prompt;
mod speculation;
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
}
