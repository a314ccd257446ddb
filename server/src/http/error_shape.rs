//! Errors as each protocol has them. Faults are found in many places (keys, bodies, routes, handlers)
//! that do not know for whom; the path says it.

use axum::body::Body;
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use serde_json::json;

use super::error::ApiError;
use super::{anthropic, ollama};

/// Whose shape a path's errors have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    OpenAi,
    Anthropic,
    LlamaCpp,
    Ollama,
}

impl Shape {
    fn of(path: &str) -> Shape {
        const LLAMA_CPP: [&str; 10] = [
            "/completion",
            "/completions",
            "/infill",
            "/tokenize",
            "/detokenize",
            "/apply-template",
            "/embedding",
            "/embeddings",
            "/props",
            "/slots",
        ];
        if path == "/v1/messages" || path.starts_with("/v1/messages/") {
            Shape::Anthropic
        } else if LLAMA_CPP.contains(&path) {
            Shape::LlamaCpp
        } else if path.starts_with("/api/") {
            Shape::Ollama
        } else {
            Shape::OpenAi
        }
    }
}

/// Stands before everything that can fail, and writes its errors once more where need be.
pub(super) async fn as_the_protocol_has_it(request: Request, next: Next) -> Response {
    let shape = Shape::of(request.uri().path());
    let mut response = next.run(request).await;
    let Some(error) = response.extensions_mut().remove::<ApiError>() else { return response };
    let body = match shape {
        Shape::OpenAi => return response,
        Shape::Anthropic => anthropic::error_json(&error),
        Shape::Ollama => ollama::error_json(&error),
        Shape::LlamaCpp => json!({ "error": {
            "code": error.kind.status().as_u16(), "message": error.message, "type": error.kind.name(),
        } }),
    };
    response.headers_mut().remove(http::header::CONTENT_LENGTH);
    *response.body_mut() = Body::from(body.to_string());
    response
}

#[cfg(test)]
mod tests {
    use super::Shape;

    #[test]
    fn the_path_says_whose_errors_are_wanted() {
        for (path, shape) in [
            ("/v1/messages", Shape::Anthropic),
            ("/v1/messages/count_tokens", Shape::Anthropic),
            ("/v1/messages2", Shape::OpenAi),
            ("/v1/completions", Shape::OpenAi),
            ("/completion", Shape::LlamaCpp),
            ("/api/chat", Shape::Ollama),
            ("/health", Shape::OpenAi),
        ] {
            assert_eq!(Shape::of(path), shape, "{path}");
        }
    }
}
