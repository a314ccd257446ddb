//! llama.cpp's own protocol: completion, infill, and what its clients ask about the server.

mod completion;
mod fields;
mod info;
mod tokens;
mod wire;

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post};

use super::state::AppState;

/// The protocol's paths.
pub(super) fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/completion", post(completion::completion))
        .route("/completions", post(completion::completion))
        .route("/infill", post(completion::infill))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/apply-template", post(tokens::apply_template))
        .route("/props", get(info::props))
        .route("/slots", get(info::slots))
}
