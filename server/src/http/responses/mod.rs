//! OpenAI's Responses: items in, items out, and earlier responses to go on from.

mod handlers;
mod request;
mod store;
mod wire;

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post};

use super::state::AppState;
pub(super) use store::ResponseStore;

/// The protocol's paths.
pub(super) fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/v1/responses", post(handlers::create))
        .route("/v1/responses/{id}", get(handlers::retrieve).delete(handlers::delete))
}
