//! API keys: one of the configured keys as `Authorization: Bearer KEY` or `x-api-key: KEY`.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use subtle::ConstantTimeEq;

use super::error::{ApiError, ErrorKind};
use super::state::AppState;

/// The only path that answers without a key: probes have none.
const OPEN_PATH: &str = "/health";

/// Stands before the whole router, so a new route cannot forget it.
pub(super) async fn require_key(
    State(state): State<Arc<AppState>>,
    request: Request,
    next: Next,
) -> Response {
    if state.api_keys.is_empty() || request.uri().path() == OPEN_PATH {
        return next.run(request).await;
    }
    match offered_key(request.headers()) {
        Some(key) if is_known(&state.api_keys, key) => next.run(request).await,
        offered => {
            let message = match offered {
                Some(_) => "this API key is not known here",
                None => "an API key is needed: send `Authorization: Bearer KEY` or `x-api-key: KEY`",
            };
            ApiError::new(ErrorKind::Unauthorized, message).with_code("invalid_api_key").into_response()
        }
    }
}

/// The key that a request offers, known or not.
pub(super) fn offered_key(headers: &HeaderMap) -> Option<&[u8]> {
    if let Some(value) = headers.get(AUTHORIZATION) {
        let value = value.as_bytes();
        let (scheme, key) = value.split_at_checked(7)?;
        return scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii());
    }
    headers.get("x-api-key").map(|value| value.as_bytes().trim_ascii())
}

/// Compares with every key and in constant time each, so that timing tells neither how much of a
/// key was right nor which one it was.
fn is_known(keys: &[String], offered: &[u8]) -> bool {
    let mut known = subtle::Choice::from(0);
    for key in keys {
        known |= key.as_bytes().ct_eq(offered);
    }
    known.into()
}
