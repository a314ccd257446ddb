//! Anthropic's protocol: messages and counting their tokens.

mod messages;
mod request;
mod wire;

use serde_json::{Value, json};

use super::api::{Api, Operation};
use super::error::{ApiError, ErrorKind};
use super::fields::CommonFields;
use super::wire::EVENT_STREAM;
use request::MessagesFields;

/// The protocol's paths.
pub(super) fn routes() -> Api {
    Api::new("Anthropic")
        .post("/v1/messages", messages::messages, {
            Operation::new("Goes on with a conversation")
                .reads::<CommonFields, MessagesFields>()
                .streams(EVENT_STREAM)
        })
        .post("/v1/messages/count_tokens", messages::count_tokens, {
            Operation::new("Counts the tokens of a conversation").reads::<CommonFields, MessagesFields>()
        })
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
