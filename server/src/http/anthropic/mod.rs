//! Anthropic's protocol: messages and counting their tokens.

mod messages;
mod request;
mod wire;

use std::sync::Arc;

use axum::Router;
use axum::routing::post;
use serde_json::{Value, json};

use super::error::{ApiError, ErrorKind};
use super::state::AppState;

/// The protocol's paths.
pub(super) fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/v1/messages", post(messages::messages))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
}

/// `{"type": "error", "error": {"type", "message"}}`
pub(super) fn error_json(error: &ApiError) -> Value {
    let kind = match error.kind {
        ErrorKind::Unauthorized => "authentication_error",
        ErrorKind::Forbidden => "permission_error",
        ErrorKind::NotFound => "not_found_error",
        ErrorKind::BodyTooLarge => "request_too_large",
        ErrorKind::Busy => "rate_limit_error",
        ErrorKind::ShuttingDown => "overloaded_error",
        ErrorKind::Internal => "api_error",
        _ => "invalid_request_error",
    };
    json!({ "type": "error", "error": { "type": kind, "message": error.message } })
}
