//! Reading a request's JSON body, bounded in size and time.

use std::any::Any;
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
use super::fields::CommonFields;
use super::state::AppState;

/// A body parsed as JSON, twice: once for the fields that several endpoints share and once for the
/// endpoint's own. (`#[serde(flatten)]` would lose the place of a fault and the width of integers.)
/// Faults name the field, the line and the column.
pub(super) struct JsonBody<A, B> {
    pub(super) common: A,
    pub(super) fields: B,
    /// Length of the body: nothing that was read from it is longer.
    pub(super) size_bytes: usize,
}

/// Bodies longer than this are parsed off the async threads.
const INLINE_BODY_BYTES: usize = 64 << 10;

/// A fault that quotes the client is cut to about this length.
const MAX_MESSAGE_BYTES: usize = 512;

impl<A, B> FromRequest<Arc<AppState>> for JsonBody<A, B>
where
    A: DeserializeOwned + Send + 'static,
    B: DeserializeOwned + Send + 'static,
{
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<AppState>) -> Result<Self, ApiError> {
        check_content_type(request.headers())?;
        let limits = &state.limits;
        let bytes = read_body(request, limits.max_body_bytes, limits.body_timeout).await?;
        JsonBody::parse(state, bytes).await
    }
}

impl<A, B> JsonBody<A, B>
where
    A: DeserializeOwned + Send + 'static,
    B: DeserializeOwned + Send + 'static,
{
    /// Parses what was read.
    ///
    /// # Errors
    /// The 400 that names the field, the line and the column.
    pub(super) async fn parse(state: &AppState, bytes: Bytes) -> Result<Self, ApiError> {
        let size_bytes = bytes.len();
        let parse = move || {
            let mut common: A = parse(&bytes)?;
            if let Some(common) = (&mut common as &mut dyn Any).downcast_mut::<CommonFields>() {
                common.take_hints(&bytes);
            }
            Ok(JsonBody { common, fields: parse(&bytes)?, size_bytes })
        };
        state.heavy.run_if(size_bytes > INLINE_BODY_BYTES, parse).await
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
        // Its last part may be a key of the client's own.
        let path = shortened(&error.path().to_string());
        let inner = error.into_inner();
        let is_syntax = !inner.is_data();
        let inner = in_plain_words(&inner.to_string(), may_be_quoted(&path));
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

/// Fields that hold what people write. Errors end up in logs, so they never quote from these.
const PRIVATE_FIELDS: [&str; 16] = [
    "prompt",
    "suffix",
    "messages",
    "system",
    "input",
    "instructions",
    "input_prefix",
    "input_suffix",
    "input_extra",
    "content",
    "segments",
    "tools",
    "functions",
    "prediction",
    "stop",
    "metadata",
];

/// True of a field whose values are settings, and not what people write. `path`: such as `messages[0].role`.
fn may_be_quoted(path: &str) -> bool {
    let field = path.split(['.', '[']).next().unwrap_or_default();
    !field.is_empty() && !PRIVATE_FIELDS.contains(&field)
}

/// A fault of serde's with JSON's words in place of Rust's, and with quotations cut, or left out.
fn in_plain_words(message: &str, may_quote: bool) -> String {
    const FOUND: [(&str, &str); 4] =
        [("map", "object"), ("sequence", "array"), ("floating point", "number"), ("unit value", "null")];
    const INTEGERS: [&str; 12] =
        ["i8", "i16", "i32", "i64", "i128", "isize", "u8", "u16", "u32", "u64", "u128", "usize"];
    // What the client wrote may hold these words, too: what was expected comes last.
    let Some((found, rest)) = message.rsplit_once(", expected ") else {
        return if may_quote { shortened(message) } else { without_quotations(message) };
    };
    let (wanted, place) = match rest.rfind(" at line ") {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    let wanted = match wanted {
        "f32" | "f64" => "a number",
        "a sequence" => "an array",
        "a map" => "an object",
        _ if INTEGERS.contains(&wanted) => "an integer",
        _ if wanted.starts_with("struct ") => "an object",
        _ => wanted,
    };
    let mut found = found.to_owned();
    for (theirs, plain) in FOUND {
        let start = format!("invalid type: {theirs}");
        if let Some(rest) = found.strip_prefix(&start) {
            found = format!("invalid type: {plain}{rest}");
            break;
        }
    }
    let found = if may_quote { shortened(&found) } else { without_quotations(&found) };
    format!("{found}, expected {wanted}{place}")
}

/// Everything up to the first quotation mark, which is what serde's words are, and the place that ends a fault.
fn without_quotations(message: &str) -> String {
    // These name a field of ours.
    if message.starts_with("missing field `") || message.starts_with("duplicate field `") {
        return shortened(message);
    }
    let place = message.rfind(" at line ").map_or("", |at| &message[at..]);
    match message.find(['"', '`']) {
        Some(at) if !place.contains(['"', '`']) => format!("{}{place}", message[..at].trim_end()),
        Some(at) => message[..at].trim_end().to_owned(),
        None => message.to_owned(),
    }
}

fn shortened(text: &str) -> String {
    if text.len() <= MAX_MESSAGE_BYTES {
        return text.to_owned();
    }
    let end = (0..=MAX_MESSAGE_BYTES).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    format!("{}...", &text[..end])
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
    use super::{in_plain_words, may_be_quoted, parse};

    #[derive(Debug, serde::Deserialize)]
    struct Sample {
        #[allow(dead_code, reason = "only its parsing is looked at")]
        temperature: Option<f32>,
    }

    #[test]
    fn type_faults_speak_json_and_not_rust() {
        for (theirs, plain) in [
            (
                "invalid type: string \"x\", expected f64 at line 1 column 2",
                "invalid type: string \"x\", expected a number at line 1 column 2",
            ),
            ("invalid type: map, expected struct SharedFields", "invalid type: object, expected an object"),
            ("invalid type: sequence, expected a map", "invalid type: array, expected an object"),
            (
                "invalid type: floating point `1.5`, expected u32",
                "invalid type: number `1.5`, expected an integer",
            ),
            (
                "invalid type: string \", expected f64\", expected a boolean",
                "invalid type: string \", expected f64\", expected a boolean",
            ),
        ] {
            assert_eq!(in_plain_words(theirs, true), plain);
        }
    }

    #[test]
    fn what_people_write_is_not_quoted() {
        for (theirs, plain) in [
            (
                "invalid type: string \"secret, expected x\", expected a sequence at line 1 column 2",
                "invalid type: string, expected an array at line 1 column 2",
            ),
            (
                "unknown variant `secret`, expected one of `a`, `b`",
                "unknown variant, expected one of `a`, `b`",
            ),
            ("missing field `text` at line 3 column 4", "missing field `text` at line 3 column 4"),
            ("unknown field `secret` at line 3 column 4", "unknown field at line 3 column 4"),
            ("missing something at line \"1", "missing something at line"),
        ] {
            assert_eq!(in_plain_words(theirs, false), plain);
        }
        assert!(may_be_quoted("temperature") && may_be_quoted("stream_options.include_usage"));
        assert!(!may_be_quoted("messages[0].role") && !may_be_quoted(".") && !may_be_quoted("prompt"));
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
        let quoted = format!("{{\"temperature\": \"{}\"}}", "x".repeat(1 << 20));
        let message = parse::<Sample>(quoted.as_bytes()).unwrap_err().message;
        assert!(message.len() < 1000 && message.contains("expected a number at line 1"), "{message}");
        let deep = format!("{{\"a\":{}", "[".repeat(10_000));
        assert!(parse::<serde_json::Value>(deep.as_bytes()).unwrap_err().message.contains("recursion"));
    }
}
