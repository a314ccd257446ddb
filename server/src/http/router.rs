//! The route table, and what stands before every route: keys, origins, metrics, CORS, errors as JSON.

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::middleware::{from_fn, from_fn_with_state, map_request, map_response};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Uri};
use tower_http::cors::CorsLayer;

use super::api::{Api, Operation};
use super::error::{ApiError, ErrorKind};
use super::state::AppState;
use super::{
    anthropic, auth, error_shape, health, lanes, llamacpp, metrics, ollama, openai, origin, request_id,
    responses, tabby, traces,
};

/// All of the server's routes over `state`.
pub fn router(state: Arc<AppState>) -> Router {
    let cors = state.cors;
    let (routes, document) = api().finish();
    let document = document.to_pretty_json().expect("plain data always serialises: this is a bug") + "\n";
    let document = get(async move || ([(CONTENT_TYPE, "application/json")], document.clone()));
    let app = routes
        .route("/openapi.json", document)
        .fallback(no_such_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(map_request(name_endpoint))
        .layer(from_fn_with_state(state.clone(), traces::trace))
        .layer(from_fn_with_state(state.clone(), auth::require_key))
        .layer(from_fn_with_state(state.clone(), origin::refuse_others))
        .layer(from_fn_with_state(state.clone(), metrics::measure))
        .layer(from_fn(error_shape::as_the_protocol_has_it))
        .layer(map_response(no_sniffing))
        .layer(from_fn(request_id::echo))
        .with_state(state);
    // Outermost: a preflight request carries no key.
    if cors { app.layer(CorsLayer::very_permissive().allow_credentials(false)) } else { app }
}

/// Puts the path among the headers, for the rules that pick a lane.
async fn name_endpoint(mut request: Request) -> Request {
    // A path is visible ASCII, as is a header's value.
    if let Ok(path) = HeaderValue::from_str(request.uri().path()) {
        request.headers_mut().insert(lanes::ENDPOINT_HEADER, path);
    }
    request
}

/// All routes but the document about them.
fn api() -> Api {
    Api::new("Server")
        .merge(openai::routes())
        .merge(anthropic::routes())
        .merge(llamacpp::routes())
        .merge(responses::routes())
        .merge(ollama::routes())
        .merge(tabby::routes())
        .get("/", root, Operation::new("Somebody is at home").gives("text/plain"))
        .get("/health", health::health, Operation::new("Whether requests can be answered"))
        .get(
            "/metrics",
            metrics::metrics,
            Operation::new("For Prometheus").gives("application/openmetrics-text"),
        )
}

/// Clients look here whether anybody is at home.
async fn root() -> &'static str {
    "Tandem is running\n"
}

async fn no_such_path(method: Method, uri: Uri) -> Response {
    let message = format!("there is no {method} {}; see docs/API.md for the paths there are", uri.path());
    ApiError::new(ErrorKind::NotFound, message).with_code("unknown_path").into_response()
}

async fn wrong_method(method: Method, uri: Uri) -> Response {
    let message = format!("{} does not take {method}; the Allow header names what it takes", uri.path());
    ApiError::new(ErrorKind::MethodNotAllowed, message).with_code("method_not_allowed").into_response()
}

/// Model output is never to be taken for a page.
async fn no_sniffing(mut response: Response) -> Response {
    let value = http::HeaderValue::from_static("nosniff");
    response.headers_mut().insert(http::header::X_CONTENT_TYPE_OPTIONS, value);
    response
}
