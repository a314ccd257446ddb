//! API keys, as `Authorization: Bearer KEY` or `x-api-key: KEY`, and what they may spend.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName, HeaderValue, Method};

use super::error::{ApiError, ErrorKind};
use super::state::{AppState, unix_seconds};
use crate::keys::{Client, Refusal, Standing};

/// The only path that answers without a key: probes have none.
const OPEN_PATH: &str = "/health";

/// Stands before the whole router, so a new route cannot forget it. Every POST counts as a request of its
/// key; what only looks does not.
pub(super) async fn require_key(
    State(state): State<Arc<AppState>>,
    request: Request,
    next: Next,
) -> Response {
    if state.keys.is_open() || request.uri().path() == OPEN_PATH {
        return next.run(request).await;
    }
    let client = match client(&state, request.headers()) {
        Ok(client) => client,
        Err(error) => return error.into_response(),
    };
    let admitted = if request.method() == Method::POST { admit(client.as_deref()) } else { Ok(()) };
    let mut response = match admitted {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    if let Some(client) = client {
        show_standings(&client, response.headers_mut());
    }
    response
}

/// Counts a request of this client's.
///
/// # Errors
/// The 429 of a client that has spent its budget.
pub(super) fn admit(client: Option<&Client>) -> Result<(), ApiError> {
    client.map_or(Ok(()), |client| client.admit(unix_seconds())).map_err(|refusal| spent(refusal, None))
}

/// Spends the tokens of a client's prompts.
///
/// # Errors
/// The 429 of a client that has fewer left; a 400 if it never has so many.
pub(super) fn spend_prompt(client: &Client, num_tokens: u64) -> Result<(), ApiError> {
    client.spend_prompt(num_tokens, unix_seconds()).map_err(|refusal| spent(refusal, Some(num_tokens)))
}

/// Whose request this is; `None` where no key is needed.
///
/// # Errors
/// The 401 of a request without a valid key.
pub(super) fn client(state: &AppState, headers: &HeaderMap) -> Result<Option<Arc<Client>>, ApiError> {
    if state.keys.is_open() {
        return Ok(None);
    }
    let message = match offered_key(headers) {
        Some(key) => match state.keys.find(key, unix_seconds()) {
            Some(client) => return Ok(Some(client)),
            None => "this API key is not known here, or no longer valid",
        },
        None => "an API key is needed: send `Authorization: Bearer KEY` or `x-api-key: KEY`",
    };
    Err(ApiError::new(ErrorKind::Unauthorized, message).with_code("invalid_api_key"))
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

fn spent(refusal: Refusal, num_prompt_tokens: Option<u64>) -> ApiError {
    let (what, standing) = match refusal {
        Refusal::Requests(standing) => ("requests", standing),
        Refusal::Tokens(standing) => ("tokens", standing),
    };
    let Standing { limit, remaining, reset } = standing;
    let wanted = num_prompt_tokens.map_or(String::new(), |count| format!("; the prompt has {count}"));
    if num_prompt_tokens.is_some_and(|count| count > limit) {
        let message = format!("this key has a budget of {limit} tokens{wanted}, more than it can ever hold");
        return ApiError::new(ErrorKind::InvalidRequest, message).with_code("rate_limit_exceeded");
    }
    let message = format!(
        "this key has {remaining} of its {limit} {what} left{wanted}; the next window begins in {}",
        short(reset)
    );
    ApiError {
        code: Some("rate_limit_exceeded"),
        retry_after: Some(u32::try_from(reset).unwrap_or(u32::MAX)),
        ..ApiError::new(ErrorKind::Busy, message)
    }
}

/// Adds OpenAI's headers for the budgets that the client has.
fn show_standings(client: &Client, headers: &mut HeaderMap) {
    let (requests, tokens) = client.standings(unix_seconds());
    let names = [
        (
            requests,
            ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"],
        ),
        (tokens, ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"]),
    ];
    for (standing, [limit, remaining, reset]) in names {
        let Some(standing) = standing else { continue };
        headers.insert(HeaderName::from_static(limit), HeaderValue::from(standing.limit));
        headers.insert(HeaderName::from_static(remaining), HeaderValue::from(standing.remaining));
        let time = HeaderValue::from_str(&short(standing.reset)).expect("digits and letters: this is a bug");
        headers.insert(HeaderName::from_static(reset), time);
    }
}

/// A time as OpenAI writes it: `1h2m3s`, without what is zero before it.
fn short(seconds: u64) -> String {
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::short;

    #[test]
    fn times_are_written_as_openai_does() {
        assert_eq!(short(1), "1s");
        assert_eq!(short(60), "1m0s");
        assert_eq!(short(86_399), "23h59m59s");
        assert_eq!(short(7_200), "2h0m0s");
    }
}
