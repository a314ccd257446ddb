//! Models, health, metrics, keys, cross-origin requests.

mod support;

use http::Method;
use serde_json::{Value, json};
use support::{TestOptions, TestServer};

#[tokio::test]
async fn models_are_listed_and_found_by_name() {
    let server = TestServer::plain().await;
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let models = list["data"].as_array().expect("models").clone();
    let ids: Vec<&str> = models.iter().map(|model| model["id"].as_str().expect("an id")).collect();
    assert_eq!(ids, ["fast", "deep", "auto", "big-model", "small-model"]);
    for model in &models {
        let id = model["id"].as_str().expect("an id");
        assert_eq!(&server.get(&format!("/v1/models/{id}")).await.json(), model);
        assert_eq!(model["max_model_len"], 256);
    }
    assert_eq!(models[0]["root"], "small-model");
    assert_eq!(models[1]["root"], "big-model");
    let missing = server.get("/v1/models/org/other").await;
    assert_eq!(missing.status, 404);
    assert_eq!(missing.error()["code"], "model_not_found");
    server.stop().await;
}

#[tokio::test]
async fn health_says_what_is_served() {
    let server = TestServer::plain().await;
    let answer = server.get("/health").await;
    assert_eq!(answer.status, 200);
    let health = answer.json();
    assert_eq!(health["status"], "ok");
    assert_eq!(health["lanes"], json!(["fast", "deep"]));
    server.engine.drain();
    let refused = server.post("/v1/completions", &json!({ "prompt": "a" })).await;
    assert_eq!(refused.status, 503);
    assert_eq!(refused.error()["code"], "shutting_down");
    assert!(refused.headers.contains_key("retry-after"));
    server.stop().await;
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let server = TestServer::plain().await;
    for model in ["fast", "deep"] {
        let body = json!({ "model": model, "prompt": "a", "max_tokens": 8, "ignore_eos": true });
        assert_eq!(server.post("/v1/completions", &body).await.status, 200);
    }
    assert_eq!(server.post("/v1/completions", &json!({})).await.status, 400);
    server.until("the engine has published its counters", |stats| stats.num_finished == 2).await;
    let page = server.get("/metrics").await;
    assert!(page.headers["content-type"].to_str().expect("text").starts_with("application/openmetrics-text"));
    let page = String::from_utf8(page.body.to_vec()).expect("text");
    for line in [
        "tandem_output_tokens_total{lane=\"fast\"} 8",
        "tandem_output_tokens_total{lane=\"deep\"} 8",
        "tandem_sequences_ended_total{reason=\"finished\"} 2",
        "tandem_sequences_running 0",
        "tandem_queue_wait_seconds 0.0",
        "tandem_draft_tokens_total{source=\"prediction\"} 0",
        "tandem_draft_tokens_accepted_total{source=\"prediction\"} 0",
        "tandem_preemptions_total 0",
        "tandem_cache_evictions_total 0",
        "tandem_prompt_tokens_cached_total 0",
        "tandem_http_requests_total{route=\"/v1/completions\",status=\"200\"} 2",
        "tandem_http_requests_total{route=\"/v1/completions\",status=\"400\"} 1",
        "tandem_http_request_duration_seconds_count{route=\"/v1/completions\"} 3",
        "tandem_time_to_first_token_seconds_count{lane=\"deep\"} 1",
        "tandem_time_to_first_token_seconds_count{lane=\"fast\"} 1",
        "tandem_http_requests_in_flight 1",
    ] {
        assert!(page.lines().any(|have| have == line), "{line:?} is not in\n{page}");
    }
    assert!(page.contains("tandem_inter_token_latency_seconds_bucket{le=\"0.001\",lane=\"deep\"}"), "{page}");
    assert!(page.ends_with("# EOF\n"));
    server.stop().await;
}

#[tokio::test]
async fn an_aborted_stream_counts_as_499() {
    let server = TestServer::start(TestOptions { max_model_len: 8192, ..TestOptions::default() }).await;
    let body = json!({ "prompt": "a", "max_tokens": 8000, "ignore_eos": true, "stream": true });
    let request = http::Request::post("/v1/completions")
        .header("host", "test")
        .body(http_body_util::Full::new(bytes::Bytes::from(body.to_string())))
        .expect("a request");
    let response = server.send(request).await;
    assert_eq!(response.status(), 200);
    server.until("it runs", |stats| stats.num_running == 1).await;
    drop(response);
    server.until("it is freed", |stats| stats.num_aborted == 1).await;
    let whole = json!({ "prompt": "a", "max_tokens": 4, "ignore_eos": true, "stream": true });
    assert_eq!(server.post("/v1/completions", &whole).await.status, 200);
    let page = String::from_utf8(server.get("/metrics").await.body.to_vec()).expect("text");
    for line in ["status=\"499\"} 1", "status=\"200\"} 1"] {
        let line = format!("tandem_http_requests_total{{route=\"/v1/completions\",{line}");
        assert!(page.lines().any(|have| have == line), "{line:?} is not in\n{page}");
    }
    server.stop().await;
}

#[tokio::test]
async fn only_health_answers_without_a_key() {
    let api_keys = vec!["first-key".to_owned(), "second-key".to_owned()];
    let server = TestServer::start(TestOptions { api_keys, ..TestOptions::default() }).await;
    assert_eq!(server.get("/health").await.status, 200);
    for (method, path) in [
        (Method::GET, "/v1/models"),
        (Method::GET, "/v1/models/fast"),
        (Method::GET, "/metrics"),
        (Method::POST, "/v1/completions"),
        (Method::POST, "/v1/chat/completions"),
        (Method::GET, "/v1/nothing"),
        (Method::DELETE, "/v1/completions"),
        (Method::GET, "/health/"),
    ] {
        let refused: Vec<&[(&str, &str)]> = vec![
            &[],
            &[("authorization", "Bearer wrong-key")],
            &[("authorization", "Bearer first-ke")],
            &[("authorization", "Bearer first-key2")],
            &[("authorization", "Bearer")],
            &[("authorization", "Basic first-key")],
            &[("x-api-key", "")],
        ];
        for headers in refused {
            let answer = server.request(method.clone(), path, headers, "{}").await;
            assert_eq!(answer.status, 401, "{method} {path} with {headers:?}");
            assert_eq!(answer.error()["code"], "invalid_api_key");
        }
    }
    let accepted: [&[(&str, &str)]; 4] = [
        &[("authorization", "Bearer first-key")],
        &[("authorization", "bearer second-key")],
        &[("x-api-key", "first-key")],
        &[("x-api-key", "second-key")],
    ];
    for headers in accepted {
        assert_eq!(server.request(Method::GET, "/v1/models", headers, "").await.status, 200, "{headers:?}");
    }
    server.stop().await;
}

#[tokio::test]
async fn pages_of_other_origins_are_let_in_only_if_configured() {
    let preflight = [
        ("origin", "https://example.org"),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,content-type"),
    ];
    let server = TestServer::plain().await;
    let answer = server.request(Method::OPTIONS, "/v1/completions", &preflight, "").await;
    assert!(!answer.headers.contains_key("access-control-allow-origin"));
    // What a page may send without asking first, and would not be able to read.
    let body = "{\"prompt\": \"a\", \"max_tokens\": 1}";
    let foreign: [&[(&str, &str)]; 3] =
        [&[("origin", "https://example.org")], &[("origin", "null")], &[("sec-fetch-site", "cross-site")]];
    for headers in foreign {
        let refused = server.request(Method::POST, "/v1/completions", headers, body).await;
        assert_eq!(refused.status, 403, "{headers:?}");
        assert_eq!(refused.error()["code"], "origin_not_allowed");
    }
    for headers in [&[][..], &[("origin", "http://test")], &[("sec-fetch-site", "same-origin")]] {
        let answer = server.request(Method::POST, "/v1/completions", headers, body).await;
        assert_eq!(answer.status, 200, "{headers:?}");
    }
    server.until("only those that were let in did work", |stats| stats.num_prompt_tokens == 3).await;
    server.stop().await;

    let options = TestOptions { cors: true, api_keys: vec!["key".to_owned()], ..TestOptions::default() };
    let server = TestServer::start(options).await;
    let answer = server.request(Method::OPTIONS, "/v1/completions", &preflight, "").await;
    assert_eq!(answer.status, 200, "a preflight carries no key");
    assert!(answer.headers.contains_key("access-control-allow-origin"));
    let refused = server.request(Method::GET, "/v1/models", &preflight[..1], "").await;
    assert_eq!(refused.status, 401);
    let error: Value = refused.error();
    assert_eq!(error["type"], "authentication_error");
    assert!(
        refused.headers.contains_key("access-control-allow-origin"),
        "so that the page can read the error"
    );
    server.stop().await;
}
