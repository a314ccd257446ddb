//! Traces from outside: what a collector gets of requests, and what it never gets.

mod support;

use axum::Router;
use axum::body::Bytes;
use axum::routing::post;
use http::{HeaderMap, Method};
use serde_json::{Value, json};
use support::{TestOptions, TestServer};
use tandem::http::traces::{Exporting, Tracer};
use tokio::sync::mpsc;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// A collector; what it is sent comes out of the receiver.
async fn collector() -> (String, mpsc::UnboundedReceiver<Value>) {
    let (sender, received) = mpsc::unbounded_channel();
    let take = async move |headers: HeaderMap, body: Bytes| {
        assert_eq!(headers["content-type"], "application/json");
        sender.send(serde_json::from_slice(&body).expect("JSON")).expect("the test listens");
        "{}"
    };
    let app = Router::new().route("/v1/traces", post(take));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}/v1/traces", listener.local_addr().expect("bound"));
    let connections = async move {
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            let app = hyper_util::service::TowerToHyperService::new(app.clone());
            let io = hyper_util::rt::TokioIo::new(stream);
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, app));
        }
    };
    tokio::spawn(connections);
    (url, received)
}

struct Traced {
    server: TestServer,
    exporting: Exporting,
    received: mpsc::UnboundedReceiver<Value>,
}

impl Traced {
    async fn start(options: TestOptions) -> Traced {
        let (url, received) = collector().await;
        let (tracer, exporting) = Tracer::start(url.parse().expect("an address"), "editors".to_owned());
        let server = TestServer::start(TestOptions { tracer: Some(tracer), ..options }).await;
        Traced { server, exporting, received }
    }

    async fn post(&self, path: &str, headers: &[(&str, &str)], body: Value) -> support::Answer {
        self.server.request(Method::POST, path, headers, &body.to_string()).await
    }

    /// All spans, by their place in time, after the server has stopped.
    async fn spans(mut self) -> Vec<Value> {
        self.server.stop().await;
        self.exporting.finish().await;
        let mut spans = Vec::new();
        while let Ok(request) = self.received.try_recv() {
            let resource = &request["resourceSpans"][0];
            assert_eq!(attribute(&resource["resource"], "service.name"), json!("editors"));
            spans.extend(resource["scopeSpans"][0]["spans"].as_array().expect("spans").clone());
        }
        spans.sort_by_key(|span| {
            span["startTimeUnixNano"].as_str().map(|text| text.parse::<u64>().expect("digits"))
        });
        spans
    }
}

/// The one value of an attribute.
fn attribute(of: &Value, key: &str) -> Value {
    let mut found =
        of["attributes"].as_array().expect("attributes").iter().filter(|entry| entry["key"] == key);
    let value =
        found.next().map(|entry| entry["value"].clone()).unwrap_or_else(|| panic!("{key} is not in {of}"));
    assert!(found.next().is_none(), "{key} is there twice");
    value.as_object().and_then(|value| value.values().next()).expect("a value").clone()
}

#[tokio::test]
async fn every_request_for_work_is_a_span() {
    let traced = Traced::start(TestOptions::default()).await;
    let chat = json!({
        "model": "deep", "messages": [{ "role": "user", "content": "canary in a mine" }], "max_tokens": 5,
        "ignore_eos": true, "stream": true, "seed": 1,
    });
    let headers = [("traceparent", PARENT), ("tracestate", "vendor=1")];
    assert_eq!(traced.post("/v1/chat/completions", &headers, chat).await.status, 200);
    let body = json!({ "prompt": "canary", "max_tokens": 3, "ignore_eos": true, "n": 2 });
    assert_eq!(traced.post("/v1/completions", &[], body).await.status, 200);
    assert_eq!(traced.post("/v1/embeddings", &[], json!({ "input": "canary" })).await.status, 200);
    assert_eq!(traced.post("/v1/completions", &[], json!({ "prompt": "canary", "n": 0 })).await.status, 400);
    traced.server.get("/v1/models").await;
    let not_recorded = [("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")];
    assert_eq!(traced.post("/v1/embeddings", &not_recorded, json!({ "input": "a" })).await.status, 200);

    let spans = traced.spans().await;
    assert!(!json!(spans).to_string().contains("canary"), "what people write is in no span");
    let [chat, completion, embedding, refused] = spans.as_slice() else { panic!("{spans:#?}") };
    assert_eq!((&chat["name"], &chat["kind"]), (&json!("chat deep"), &json!(2)));
    assert_eq!(chat["traceId"], "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(
        (&chat["parentSpanId"], &chat["traceState"]),
        (&json!("b7ad6b7169203331"), &json!("vendor=1"))
    );
    for (key, value) in [
        ("http.route", json!("/v1/chat/completions")),
        ("http.response.status_code", json!("200")),
        ("gen_ai.operation.name", json!("chat")),
        ("gen_ai.request.model", json!("deep")),
        ("gen_ai.response.model", json!("big-model")),
        ("gen_ai.request.max_tokens", json!("5")),
        ("gen_ai.usage.output_tokens", json!("5")),
        ("gen_ai.response.finish_reasons", json!({ "values": [{ "stringValue": "length" }] })),
        ("tandem.lane", json!("deep")),
        ("tandem.lane_reason", json!("named")),
    ] {
        assert_eq!(attribute(chat, key), value, "{key}");
    }
    let first_token = attribute(chat, "gen_ai.latency.time_to_first_token").as_f64().expect("a number");
    let time = |name: &str| chat[name].as_str().and_then(|text| text.parse::<u64>().ok()).expect("digits");
    let whole = (time("endTimeUnixNano") - time("startTimeUnixNano")) as f64 / 1e9;
    assert!(first_token > 0.0 && first_token <= whole, "{first_token} of {whole}");

    assert_eq!(completion["name"], "text_completion auto");
    assert_eq!(attribute(completion, "gen_ai.usage.output_tokens"), "6");
    assert_ne!(completion["traceId"], chat["traceId"]);
    assert!(completion.get("parentSpanId").is_none());
    assert_eq!(embedding["name"], "embeddings auto");
    assert_eq!(attribute(embedding, "gen_ai.response.model"), "small-model");
    assert_eq!(refused["name"], "POST /v1/completions");
    assert_eq!(attribute(refused, "error.type"), "invalid_request_error");
    assert_eq!(refused["status"], json!({}));
}

#[tokio::test]
async fn who_has_no_key_makes_no_span_and_who_leaves_does() {
    let options = TestOptions { api_keys: vec!["right".to_owned()], ..TestOptions::default() };
    let traced = Traced::start(options).await;
    assert_eq!(traced.post("/v1/completions", &[], json!({ "prompt": "a" })).await.status, 401);
    let body =
        json!({ "model": "deep", "prompt": "a", "max_tokens": 200, "ignore_eos": true, "stream": true });
    let response =
        traced.server.post_open("/v1/completions", &[("authorization", "Bearer right")], &body).await;
    assert_eq!(response.status(), 200);
    drop(response);
    traced.server.until("it is cancelled", |stats| stats.num_aborted + stats.num_finished == 1).await;
    let spans = traced.spans().await;
    let [left] = spans.as_slice() else { panic!("{spans:#?}") };
    assert!(["499", "200"].map(Value::from).contains(&attribute(left, "http.response.status_code")));
    assert_eq!(attribute(left, "gen_ai.request.model"), "deep");
}

#[tokio::test]
async fn a_collector_that_is_away_costs_spans_and_nothing_else() {
    // A port that nobody listens at any more.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    drop(listener);
    let (tracer, exporting) = Tracer::start(url.parse().expect("an address"), "tandem".to_owned());
    let server = TestServer::start(TestOptions { tracer: Some(tracer), ..TestOptions::default() }).await;
    let answer = server.post("/v1/completions", &json!({ "prompt": "a", "max_tokens": 2 })).await;
    assert_eq!(answer.status, 200);
    server.stop().await;
    exporting.finish().await;
}
