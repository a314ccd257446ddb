//! Nobody gets past the door without a key: every route that is registered, by every method, and every path
//! that is none.

mod support;

use std::collections::BTreeSet;

use http::Method;
use serde_json::Value;
use support::{TestOptions, TestServer};

/// The paths of the router itself, from what it shows of itself: a new route is walked without being listed.
fn registered(server: &TestServer) -> BTreeSet<String> {
    let shown = format!("{:?}", tandem::http::router(server.state.clone()));
    let paths = shown.split('"').filter(|text| text.starts_with('/')).map(str::to_owned);
    paths.collect()
}

/// A path that the pattern stands for.
fn example(pattern: &str) -> String {
    let parts = pattern.split('/').map(|part| if part.starts_with('{') { "some-id" } else { part });
    parts.collect::<Vec<_>>().join("/")
}

fn methods() -> Vec<Method> {
    let mut methods = vec![
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::PATCH,
        Method::DELETE,
        Method::OPTIONS,
        Method::TRACE,
    ];
    methods.push(Method::from_bytes(b"PROPFIND").expect("a method"));
    methods
}

#[tokio::test]
async fn every_route_but_health_wants_a_key() {
    let options = TestOptions { api_keys: vec!["right".to_owned()], ..TestOptions::default() };
    let server = TestServer::start(options).await;
    let mut paths: Vec<String> = registered(&server).iter().map(|pattern| example(pattern)).collect();
    // One of each protocol: the walk would be worth nothing if it saw no routes.
    for known in [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/infill",
        "/metrics",
        "/",
    ] {
        assert!(paths.iter().any(|path| path == known), "{known} is not among {paths:?}");
    }
    let open = paths.iter().position(|path| path == "/health").expect("it is a route");
    paths.swap_remove(open);
    paths.extend(
        [
            "/nothing",
            "/health/",
            "/health/x",
            "/HEALTH",
            "//health",
            "/v1",
            "/v1/messages/x",
            "/%68ealth",
            "/health%2f",
        ]
        .map(str::to_owned),
    );
    for path in &paths {
        for method in methods() {
            for headers in [&[][..], &[("authorization", "Bearer wrong")], &[("x-api-key", "wrong")]] {
                let answer = server.request(method.clone(), path, headers, "{}").await;
                assert_eq!(answer.status, 401, "{method} {path} with {headers:?}");
                assert_eq!(answer.headers["www-authenticate"], "Bearer");
                if method != Method::HEAD {
                    check_shape(path, &answer.json());
                }
            }
        }
    }
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(server.get("/health?x=1").await.status, 200);
    let right = [("authorization", "Bearer right")];
    assert_eq!(server.request(Method::GET, "/nothing", &right, "").await.status, 404);
    server.stop().await;
}

/// The error has its protocol's own shape.
fn check_shape(path: &str, error: &Value) {
    match path {
        "/v1/messages" | "/v1/messages/count_tokens" => {
            assert_eq!(error["type"], "error", "{path}: {error}");
            assert_eq!(error["error"]["type"], "authentication_error", "{path}: {error}");
        }
        "/infill" | "/completion" | "/tokenize" | "/props" => {
            assert_eq!(error["error"]["code"], 401, "{path}: {error}");
        }
        "/v1/completions" | "/v1/chat/completions" | "/v1/responses" | "/v1/models" => {
            assert_eq!(error["error"]["code"], "invalid_api_key", "{path}: {error}");
        }
        _ => assert!(!error["error"].is_null(), "{path}: {error}"),
    }
}
