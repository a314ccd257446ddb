//! The one error that handlers answer with. Written in OpenAI's shape,
//! `{"error":{"message","type","param","code"}}`; `error_shape` turns it to other protocols' own.

use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, StatusCode};
use serde::Serialize;
use tandem_engine::EngineError;

/// What kind of fault it is; decides status and `type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request is wrong: 400.
    InvalidRequest,
    /// No or an unknown API key: 401.
    Unauthorized,
    /// A web page of another origin: 403.
    Forbidden,
    /// No such path or model: 404.
    NotFound,
    /// The path exists, the method does not: 405.
    MethodNotAllowed,
    /// The body did not arrive in time: 408.
    RequestTimeout,
    /// The body is too large: 413.
    BodyTooLarge,
    /// The body is not JSON by its own account: 415.
    UnsupportedMediaType,
    /// Too much work waits: 429.
    Busy,
    /// The server is stopping: 503.
    ShuttingDown,
    /// Our fault: 500.
    Internal,
}

impl ErrorKind {
    pub(super) fn status(self) -> StatusCode {
        match self {
            ErrorKind::InvalidRequest => StatusCode::BAD_REQUEST,
            ErrorKind::Unauthorized => StatusCode::UNAUTHORIZED,
            ErrorKind::Forbidden => StatusCode::FORBIDDEN,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            ErrorKind::RequestTimeout => StatusCode::REQUEST_TIMEOUT,
            ErrorKind::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ErrorKind::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ErrorKind::Busy => StatusCode::TOO_MANY_REQUESTS,
            ErrorKind::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            ErrorKind::Unauthorized => "authentication_error",
            ErrorKind::Forbidden => "permission_error",
            ErrorKind::Busy => "rate_limit_error",
            ErrorKind::ShuttingDown => "service_unavailable_error",
            ErrorKind::Internal => "server_error",
            _ => "invalid_request_error",
        }
    }
}

/// An error as the client sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// Status and `type`.
    pub kind: ErrorKind,
    /// What was wrong and what would be right.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
    /// Seconds to wait before another try; sent as `Retry-After`.
    pub retry_after: Option<u32>,
}

impl ApiError {
    /// An error of this kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        ApiError { kind, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// A 400 that names the field at fault.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        ApiError { param: Some(param.into()), ..ApiError::new(ErrorKind::InvalidRequest, message) }
    }

    /// The same with a `code`.
    pub fn with_code(self, code: &'static str) -> Self {
        ApiError { code: Some(code), ..self }
    }

    /// `{"error":{...}}`, as in the response's body or an event of a broken stream.
    pub fn to_json(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Envelope<'a> {
            error: Inner<'a>,
        }
        #[derive(Serialize)]
        struct Inner<'a> {
            message: &'a str,
            r#type: &'a str,
            param: Option<&'a str>,
            code: Option<&'a str>,
        }
        let inner = Inner {
            message: &self.message,
            r#type: self.kind.name(),
            param: self.param.as_deref(),
            code: self.code,
        };
        serde_json::to_vec(&Envelope { error: inner }).expect("strings always serialise: this is a bug")
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::InvalidParameter { name, .. } => ApiError::invalid(name, message),
            EngineError::LaneUnavailable(_) => ApiError::invalid("model", message),
            EngineError::EmptyPrompt | EngineError::TokenOutOfRange { .. } => {
                ApiError::invalid("prompt", message)
            }
            EngineError::PromptTooLong { .. } | EngineError::KvCacheTooSmall { .. } => {
                ApiError::invalid("prompt", message).with_code("context_length_exceeded")
            }
            EngineError::QueueFull { retry_after, .. } => ApiError {
                code: Some("queue_full"),
                retry_after: Some(whole_seconds(retry_after)),
                ..ApiError::new(ErrorKind::Busy, message)
            },
            // Its client wrote it.
            EngineError::Constraint(_) => ApiError::new(ErrorKind::InvalidRequest, message),
            EngineError::ShuttingDown => ApiError::shutting_down(),
            EngineError::NonFiniteLogits
            | EngineError::Forward(_)
            | EngineError::Integrity(_)
            | EngineError::VocabularyTooSmall { .. } => ApiError::new(ErrorKind::Internal, message),
        }
    }
}

/// Rounded up: a client that comes back early is refused again.
fn whole_seconds(time: Duration) -> u32 {
    let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    u32::try_from(seconds).unwrap_or(u32::MAX)
}

impl ApiError {
    /// The 503 of a server that is stopping.
    pub fn shutting_down() -> Self {
        ApiError {
            code: Some("shutting_down"),
            retry_after: Some(5),
            ..ApiError::new(ErrorKind::ShuttingDown, EngineError::ShuttingDown.to_string())
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.kind.status(), self.to_json()).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        // A 405's `Allow` is axum's, which knows the path's methods.
        if self.kind == ErrorKind::Unauthorized {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(self);
        response
    }
}
