//! Request fields that steer the engine: what is cached and for whom, who goes first, how long an
//! answer may take, what it is expected to be. None of them changes an answer.

mod support;

use http_body_util::BodyExt;
use serde_json::{Value, json};
use support::{TestOptions, TestServer};

const PATH: &str = "/v1/completions";
/// Several blocks of the KV cache.
const LONG_PROMPT: &str = "def add(a, b):\n    return a + b\n\nfor item in items:\n    print(item)\n\n\
    fn add(a: i32, b: i32) -> i32 {\n    a + b\n}\n";

fn body(extra: Value) -> Value {
    let mut body = json!({
        "model": "deep", "prompt": LONG_PROMPT, "max_tokens": 24, "temperature": 0.8, "seed": 5,
        "ignore_eos": true,
    });
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

async fn ask(server: &TestServer, key: &str, body: &Value) -> Value {
    let response = server.post_open(PATH, &[("x-api-key", key)], body).await;
    assert_eq!(response.status(), 200);
    let answer = support::finish(response).await.json();
    // So that the blocks of one request are there for the next.
    server.until("the sequence is retired", |stats| stats.num_running == 0).await;
    answer
}

fn cached(answer: &Value) -> u64 {
    let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count");
    assert_eq!(answer["timings"]["cache_n"], cached);
    cached
}

#[tokio::test]
async fn cached_work_is_used_by_its_own_tenant_alone() {
    let api_keys = vec!["one".to_owned(), "two".to_owned()];
    let server = TestServer::start(TestOptions { api_keys, ..TestOptions::default() }).await;
    for model in ["fast", "deep"] {
        let plain = body(json!({ "model": model }));
        let salted = body(json!({ "model": model, "cache_salt": "mine" }));
        let first = ask(&server, "one", &plain).await;
        assert_eq!(cached(&first), 0, "{model}");
        let again = ask(&server, "one", &plain).await;
        assert!(cached(&again) >= 16, "{model}: {again}");
        for (key, request) in [("two", &plain), ("one", &salted), ("two", &salted)] {
            let other = ask(&server, key, request).await;
            assert_eq!(cached(&other), 0, "{model}, {key}");
            assert_eq!(other["choices"], first["choices"]);
        }
        assert!(cached(&ask(&server, "one", &salted).await) >= 16, "{model}");
        assert_eq!(again["choices"], first["choices"]);
    }
    server.stop().await;
}

#[tokio::test]
async fn without_keys_everybody_is_one_tenant() {
    let server = TestServer::plain().await;
    assert_eq!(cached(&ask(&server, "whatever", &body(json!({}))).await), 0);
    assert!(cached(&ask(&server, "something else", &body(json!({}))).await) >= 16);
    assert_eq!(cached(&ask(&server, "", &body(json!({ "cache_salt": "mine" }))).await), 0);
    server.stop().await;
}

#[tokio::test]
async fn the_prefix_cache_can_be_switched_off() {
    let server = TestServer::start(TestOptions { prefix_cache: false, ..TestOptions::default() }).await;
    let first = ask(&server, "", &body(json!({}))).await;
    let again = ask(&server, "", &body(json!({}))).await;
    assert_eq!((cached(&first), cached(&again)), (0, 0));
    assert_eq!(first["choices"], again["choices"]);
    server.stop().await;
}

#[tokio::test]
async fn when_the_time_is_over_what_is_there_is_the_answer() {
    let server = TestServer::start(TestOptions { max_model_len: 8192, ..TestOptions::default() }).await;
    for model in ["fast", "deep"] {
        let endless = json!({ "model": model, "max_tokens": 8000, "t_max_predict_ms": 1 });
        let answer = ask(&server, "", &body(endless)).await;
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
        let num_tokens = answer["usage"]["completion_tokens"].as_u64().expect("a count");
        assert!((1..8000).contains(&num_tokens), "{num_tokens} tokens");
        for no_limit in [-1, 0] {
            let answer =
                ask(&server, "", &body(json!({ "model": model, "t_max_predict_ms": no_limit }))).await;
            assert_eq!(answer["usage"]["completion_tokens"], 24);
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn interactive_work_goes_before_batch_work_that_came_first() {
    let server = TestServer::start(TestOptions { max_model_len: 8192, ..TestOptions::default() }).await;
    let endless = |priority: &str, seed: u64| {
        let fields = json!({ "prompt": "a", "max_tokens": 8000, "stream": true, "seed": seed });
        let mut body = body(fields);
        body["priority"] = json!(priority);
        body
    };
    let mut seats = Vec::new();
    for seed in 1..=8 {
        seats.push(server.post_open(PATH, &[], &endless("interactive", seed)).await);
        server.until("it runs", |stats| stats.num_running == seed).await;
    }
    let batch = server.post_open(PATH, &[], &endless("batch", 9)).await;
    server.until("it waits", |stats| stats.num_waiting == 1).await;
    let mut interactive = server.post_open(PATH, &[], &endless("interactive", 10)).await;
    server.until("both wait", |stats| stats.num_waiting == 2).await;
    drop(seats.pop());
    interactive.body_mut().frame().await.expect("its first tokens").expect("no error");
    server
        .until("the batch request waits on", |stats| (stats.num_running, stats.num_waiting) == (8, 1))
        .await;
    drop((seats, batch, interactive));
    server.until("all is freed", |stats| stats.num_running + stats.num_waiting == 0).await;
    server.stop().await;
}

#[tokio::test]
async fn a_prediction_is_tried_and_changes_nothing_but_the_counts() {
    let server = TestServer::plain().await;
    let a = server.tokenizer.encode("a", false).expect("encodes")[0];
    let forced = |extra: Value| {
        let mut body = body(json!({ "logit_bias": { a.to_string(): 100 }, "temperature": 0 }));
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        body
    };
    let plain = ask(&server, "", &forced(json!({}))).await;
    assert_eq!(plain["choices"][0]["text"], "a".repeat(24));
    let details = |answer: &Value, field: &str| {
        answer["usage"]["completion_tokens_details"][field].as_u64().expect("a count")
    };
    let speculative = json!({ "max_draft_tokens": 4, "sources": ["prediction"] });
    for content in [json!("a".repeat(40)), json!([{ "type": "text", "text": "aaaaaaaaaaaa" }])] {
        let prediction = json!({ "type": "content", "content": content });
        let request = forced(json!({ "prediction": prediction, "speculative": speculative }));
        let predicted = ask(&server, "", &request).await;
        assert_eq!(predicted["choices"], plain["choices"]);
        let accepted = details(&predicted, "accepted_prediction_tokens");
        assert!(accepted > 0, "{predicted}");
        assert_eq!(predicted["timings"]["draft_n_accepted"], accepted, "nobody else may propose");
        let drafted = accepted + details(&predicted, "rejected_prediction_tokens");
        assert_eq!(predicted["timings"]["draft_n"], drafted);
    }
    let prediction = json!({ "type": "content", "content": "return return return" });
    let wrong =
        ask(&server, "", &forced(json!({ "prediction": prediction, "speculative": speculative }))).await;
    assert_eq!(wrong["choices"], plain["choices"]);
    assert_eq!(details(&wrong, "accepted_prediction_tokens"), 0);
    let none = ask(&server, "", &forced(json!({ "speculative": { "sources": [] } }))).await;
    assert_eq!(none["timings"]["draft_n"], 0);
    assert_eq!(none["choices"], plain["choices"]);
    server.stop().await;
}

#[tokio::test]
async fn chats_take_the_same_fields() {
    let server = TestServer::plain().await;
    let chat = json!({
        "messages": [{ "role": "user", "content": "add two numbers" }], "max_tokens": 12, "temperature": 0,
        "priority": "batch", "t_max_predict_ms": 60_000, "cache_salt": "mine",
        "prediction": { "type": "content", "content": "def add" },
        "speculative": { "max_draft_tokens": 2, "sources": ["draft", "prediction"] },
    });
    let answer = server.post("/v1/chat/completions", &chat).await;
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    let mut plain = chat.clone();
    for field in ["priority", "t_max_predict_ms", "cache_salt", "prediction", "speculative"] {
        plain.as_object_mut().expect("an object").remove(field);
        let mut wrong = chat.clone();
        wrong[field] = json!([3]);
        assert_eq!(server.post("/v1/chat/completions", &wrong).await.status, 400, "{field}");
    }
    let plain = server.post("/v1/chat/completions", &plain).await.json();
    assert_eq!(answer.json()["choices"], plain["choices"]);
    server.stop().await;
}
