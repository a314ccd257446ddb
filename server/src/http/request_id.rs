//! `x-request-id`: a client's own name for its request comes back with the answer, and one that has none is given
//! one, so that both sides' logs can be laid beside each other.

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderName, HeaderValue};

use super::wire::random_id;

const HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// Longer ones are not sent back.
const MAX_BYTES: usize = 256;

/// Stands before everything, so that errors have it too.
pub(super) async fn echo(request: Request, next: Next) -> Response {
    let given = request.headers().get(&HEADER).filter(|value| value.len() <= MAX_BYTES).cloned();
    let mut response = next.run(request).await;
    let id = given.unwrap_or_else(|| {
        HeaderValue::from_str(&random_id("req_"))
            .expect("hexadecimal digits are a header value: this is a bug")
    });
    response.headers_mut().insert(HEADER, id);
    response
}
