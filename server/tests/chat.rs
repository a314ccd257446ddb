//! `/v1/chat/completions` over the real engine.

mod support;

use serde_json::{Value, json};
use support::{CheckpointSpec, TestOptions, TestServer};

const PATH: &str = "/v1/chat/completions";

fn body(extra: Value) -> Value {
    let mut body = json!({
        "model": "auto", "messages": [{ "role": "user", "content": "add two numbers" }],
        "max_tokens": 20, "temperature": 0.7, "seed": 11, "ignore_eos": true,
    });
    let object = body.as_object_mut().expect("an object");
    object.extend(extra.as_object().expect("an object").clone());
    body
}

#[tokio::test]
async fn a_chat_answer_is_the_completion_of_the_rendered_template() {
    let server = TestServer::uncached().await;
    let answer = server.post(PATH, &body(json!({}))).await;
    assert_eq!(answer.headers["x-tandem-lane"], "deep", "chats are deep work");
    let answer = answer.json();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let completion = json!({
        "model": "deep", "max_tokens": 20, "temperature": 0.7, "seed": 11, "ignore_eos": true,
        "prompt": "<|im_start|>user\nadd two numbers<|im_end|>\n<|im_start|>assistant\n",
    });
    let completion = server.post("/v1/completions", &completion).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], completion["choices"][0]["text"]);
    assert_eq!(answer["usage"], completion["usage"]);
    server.stop().await;
}

#[tokio::test]
async fn a_stream_has_role_text_end_and_usage() {
    let server = TestServer::uncached().await;
    let whole = server.post(PATH, &body(json!({}))).await.json();
    for include_usage in [false, true] {
        let request = body(json!({ "stream": true, "stream_options": { "include_usage": include_usage } }));
        let mut events = server.post(PATH, &request).await.events();
        assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk"));
        let last = events.last().expect("events").clone();
        assert!(last["timings"].is_object() && last["seed"] == 11, "{last}");
        if include_usage {
            assert_eq!(last["usage"], whole["usage"]);
            events.pop();
        } else {
            assert!(events.iter().all(|event| event.get("usage").is_none()));
        }
        let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]).collect();
        assert_eq!(deltas[0]["role"], "assistant");
        let text: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
        assert_eq!(text, whole["choices"][0]["message"]["content"].as_str().expect("text"));
        let reasons: Vec<&Value> = events.iter().map(|e| &e["choices"][0]["finish_reason"]).collect();
        assert_eq!(reasons.last(), Some(&&json!("length")));
        assert!(reasons[..reasons.len() - 1].iter().all(|reason| reason.is_null()));
    }
    server.stop().await;
}

#[tokio::test]
async fn text_parts_are_joined() {
    let server = TestServer::plain().await;
    let parts = json!([{ "type": "text", "text": "add two" }, { "type": "text", "text": " numbers" }]);
    let parts = body(json!({ "messages": [{ "role": "user", "content": parts }] }));
    let joined = server.post(PATH, &parts).await.json();
    let plain = server.post(PATH, &body(json!({}))).await.json();
    assert_eq!(joined["choices"], plain["choices"]);

    let image = json!([{ "type": "image_url", "image_url": { "url": "http://localhost/x.png" } }]);
    let refused =
        server.post(PATH, &body(json!({ "messages": [{ "role": "user", "content": image }] }))).await;
    assert_eq!(refused.status, 400);
    assert_eq!(refused.error()["param"], "messages[0].content[0]");
    server.stop().await;
}

#[tokio::test]
async fn logprobs_spell_the_answer() {
    let server = TestServer::plain().await;
    let request = body(json!({ "logprobs": true, "top_logprobs": 2, "n": 2 }));
    let answer = server.post(PATH, &request).await.json();
    for choice in answer["choices"].as_array().expect("choices") {
        let content = choice["logprobs"]["content"].as_array().expect("tokens");
        assert_eq!(content.len(), 20);
        let mut bytes = Vec::new();
        for token in content {
            assert!(token["logprob"].as_f64().expect("a number") <= 0.0);
            assert_eq!(token["top_logprobs"].as_array().map(Vec::len), Some(2));
            bytes.extend(
                token["bytes"].as_array().expect("bytes").iter().map(|b| b.as_u64().expect("a byte") as u8),
            );
        }
        // Control tokens have bytes and no text; everything else is the text.
        let spelled = String::from_utf8_lossy(&bytes).replace("<|endoftext|>", "");
        let text = choice["message"]["content"].as_str().expect("text");
        if !spelled.contains("<|") {
            assert_eq!(spelled, text);
        }
    }
    let mut request = request;
    request["stream"] = json!(true);
    let events = server.post(PATH, &request).await.events();
    for index in 0..2 {
        let streamed: Vec<Value> = events
            .iter()
            .filter(|event| event["choices"][0]["index"] == index)
            .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array().cloned())
            .flatten()
            .collect();
        assert_eq!(Value::Array(streamed), answer["choices"][index]["logprobs"]["content"]);
    }
    server.stop().await;
}

#[tokio::test]
async fn a_template_that_refuses_is_the_clients_fault() {
    let server = TestServer::plain().await;
    let refused =
        server.post(PATH, &body(json!({ "messages": [{ "role": "oracle", "content": "hm" }] }))).await;
    assert_eq!(refused.status, 400);
    let message = refused.error()["message"].as_str().expect("a message").to_owned();
    assert!(message.contains("unknown role oracle"), "{message}");
    server.stop().await;

    let checkpoint = CheckpointSpec { with_chat_template: false, ..CheckpointSpec::default() };
    let server = TestServer::start(TestOptions { checkpoint, ..TestOptions::default() }).await;
    let refused = server.post(PATH, &body(json!({}))).await;
    assert_eq!(refused.status, 400);
    assert!(refused.error()["message"].as_str().expect("a message").contains("chat template"));
    server.stop().await;
}

#[tokio::test]
async fn the_rest_of_the_context_bounds_an_answer_whatever_was_asked_for() {
    let server = TestServer::plain().await;
    let free = server.post(PATH, &body(json!({ "max_tokens": null }))).await.json();
    assert_eq!(free["usage"]["total_tokens"], 256);
    let prompt = free["usage"]["prompt_tokens"].as_i64().expect("a count");
    for asked in [256 - prompt, 257 - prompt, 32_000] {
        let answer = server.post(PATH, &body(json!({ "max_completion_tokens": asked }))).await.json();
        assert_eq!(answer["usage"]["total_tokens"], 256, "{asked}");
    }
    server.stop().await;
}
