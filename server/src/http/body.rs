//! Reading a request's JSON body, bounded in size and time.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use bytes::BytesMut;
use http::HeaderMap;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use super::error::{ApiError, ErrorKind};
use super::state::AppState;

/// A body parsed as JSON, twice: once for the fields that several endpoints share and once for the
/// endpoint's own. (`#[serde(flatten)]` would lose the place of a fault and the width of integers.)
/// Faults name the field, the line and the column.
pub(super) struct JsonBody<A, B>(pub(super) A, pub(super) B);

impl<A: DeserializeOwned, B: DeserializeOwned> FromRequest<Arc<AppState>> for JsonBody<A, B> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<AppState>) -> Result<Self, ApiError> {
        check_content_type(request.headers())?;
        let limits = &state.limits;
        let bytes = read_body(request, limits.max_body_bytes, limits.body_timeout).await?;
        Ok(JsonBody(parse(&bytes)?, parse(&bytes)?))
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    if bytes.is_empty() {
        return Err(ApiError::new(ErrorKind::InvalidRequest, "the body is empty; it must be a JSON object"));
    }
    // A struct can also be read from an array, field by field; nobody means that.
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        let message = "the body is a JSON array; it must be an object";
        return Err(ApiError::new(ErrorKind::InvalidRequest, message));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        let is_syntax = !inner.is_data();
        // "." is the path of the whole document.
        if is_syntax || path == "." {
            let message = if is_syntax {
                format!("the body is not valid JSON: {inner}")
            } else {
                format!("the body does not fit this endpoint: {inner}")
            };
            ApiError::new(ErrorKind::InvalidRequest, message)
        } else {
            ApiError::invalid(path.clone(), format!("{path}: {inner}"))
        }
    })?;
    deserializer.end().map_err(|error| {
        ApiError::new(ErrorKind::InvalidRequest, format!("the body is not valid JSON: {error}"))
    })?;
    Ok(value)
}

/// No content type passes: small tools leave it out.
fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(CONTENT_TYPE) else {
        return Ok(());
    };
    let value = String::from_utf8_lossy(value.as_bytes());
    let essence = value.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorKind::UnsupportedMediaType,
        format!("the Content-Type is {value:?}; it must be \"application/json\""),
    ))
}

async fn read_body(request: Request, max_bytes: usize, timeout: Duration) -> Result<Bytes, ApiError> {
    let announced = request
        .headers()
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.parse::<usize>().ok())
        .unwrap_or(0);
    let waits_for_continue = request.headers().contains_key(EXPECT);
    if announced > max_bytes && (waits_for_continue || announced > max_bytes.saturating_mul(2)) {
        return Err(too_large(announced, max_bytes));
    }
    let mut body = request.into_body();
    match tokio::time::timeout(timeout, collect(&mut body, announced, max_bytes)).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::new(
            ErrorKind::RequestTimeout,
            format!("the body did not arrive within {} seconds", timeout.as_secs_f32()),
        )),
    }
}

async fn collect(body: &mut Body, announced: usize, max_bytes: usize) -> Result<Bytes, ApiError> {
    // The announced length is the client's word: trust it for no more than a small buffer.
    let mut collected = BytesMut::with_capacity(announced.min(max_bytes).min(64 << 10));
    let mut size = 0usize;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            ApiError::new(ErrorKind::InvalidRequest, format!("the body broke off: {error}"))
        })?;
        let Some(data) = frame.data_ref() else { continue };
        size = size.saturating_add(data.len());
        if size <= max_bytes && announced <= max_bytes {
            collected.extend_from_slice(data);
        } else if size > max_bytes.saturating_mul(2) {
            break;
        }
        // Past the limit the rest is read and thrown away, up to as much again: a client that is
        // still sending would otherwise see a reset instead of the answer.
    }
    if size > max_bytes || announced > max_bytes {
        return Err(too_large(size.max(announced), max_bytes));
    }
    Ok(collected.freeze())
}

fn too_large(size_bytes: usize, max_bytes: usize) -> ApiError {
    ApiError::new(
        ErrorKind::BodyTooLarge,
        format!("the body has {size_bytes} bytes or more; at most {max_bytes} are taken"),
    )
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[derive(Debug, serde::Deserialize)]
    struct Sample {
        #[allow(dead_code, reason = "only its parsing is looked at")]
        temperature: Option<f32>,
    }

    #[test]
    fn faults_name_the_field_the_line_and_the_column() {
        for (body, wanted, param) in [
            ("{\"temperature\":\n \"NaN\"}", "line 2 column", Some("temperature")),
            ("{\"temperature\": NaN}", "line 1 column", None),
            ("{\"temperature\": 1e999}", "number out of range", None),
            ("{\"temperature\": 1} x", "trailing characters", None),
            ("{\"temperature\": ", "EOF", None),
            ("[1]", "array", None),
            ("7", "line 1 column 1", None),
            ("", "empty", None),
        ] {
            let error = parse::<Sample>(body.as_bytes()).unwrap_err();
            assert!(error.message.contains(wanted), "{body:?} gave {}", error.message);
            assert_eq!(error.param.as_deref(), param, "{body:?}");
        }
        let deep = format!("{{\"a\":{}", "[".repeat(10_000));
        assert!(parse::<serde_json::Value>(deep.as_bytes()).unwrap_err().message.contains("recursion"));
    }
}
