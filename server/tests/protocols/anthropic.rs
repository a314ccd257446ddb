//! `/v1/messages`.

use http::Method;
use serde_json::{Value, json};

use crate::support::{Answer, TestOptions, TestServer};
use crate::{CALL, HERMES, TOKENS};

const PATH: &str = "/v1/messages";

fn body(extra: Value) -> Value {
    let tool = |name: &str| {
        json!({ "name": name, "description": "A tool",
        "input_schema": { "type": "object", "properties": { "city": { "type": "string" } } } })
    };
    let mut body = json!({
        "model": "deep", "max_tokens": 256, "temperature": 0, "tools": [tool("weather"), tool("now")],
        "messages": [{ "role": "user", "content": "How is the weather?" }],
    });
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

/// The named events of a stream, each of which names itself once more in its data.
fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let text = std::str::from_utf8(&answer.body).expect("UTF-8");
    let event = |event: &str| {
        let (name, data) = event.split_once("\ndata: ").expect("a name and data");
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!(data["type"], name.strip_prefix("event: ").expect("a name"));
        data
    };
    text.split_terminator("\n\n").map(event).filter(|event| event["type"] != "ping").collect()
}

/// The message that the events add up to.
fn joined(events: &[Value]) -> Value {
    assert_eq!(events[0]["type"], "message_start");
    assert_eq!(events.last().expect("events")["type"], "message_stop");
    let mut message = events[0]["message"].clone();
    let mut inputs = Vec::new();
    let mut open = None;
    for event in events {
        let index = event["index"].as_u64().unwrap_or(0) as usize;
        match event["type"].as_str().expect("a type") {
            "content_block_start" => {
                assert_eq!(open.replace(index), None);
                assert_eq!(index, inputs.len());
                inputs.push(String::new());
                message["content"].as_array_mut().expect("blocks").push(event["content_block"].clone());
            }
            "content_block_delta" => {
                assert_eq!(open, Some(index));
                let (delta, block) = (&event["delta"], &mut message["content"][index]);
                for (kind, field) in [("text_delta", "text"), ("thinking_delta", "thinking")] {
                    if delta["type"] == kind {
                        let so_far = block[field].as_str().expect("text").to_owned();
                        block[field] = json!(so_far + delta[field].as_str().expect("text"));
                    }
                }
                if delta["type"] == "input_json_delta" {
                    inputs[index].push_str(delta["partial_json"].as_str().expect("text"));
                }
            }
            "content_block_stop" => {
                assert_eq!(open.take(), Some(index));
                if message["content"][index]["type"] == "tool_use" {
                    message["content"][index]["input"] = serde_json::from_str(&inputs[index]).expect("JSON");
                }
            }
            "message_delta" => {
                message["stop_reason"] = event["delta"]["stop_reason"].clone();
                message["stop_sequence"] = event["delta"]["stop_sequence"].clone();
                message["usage"] = event["usage"].clone();
            }
            _ => {}
        }
    }
    message
}

/// Without what is new each time.
fn comparable(message: &Value) -> Value {
    let mut message = message.clone();
    message.as_object_mut().expect("an object").remove("id");
    message.as_object_mut().expect("an object").remove("usage");
    for block in message["content"].as_array_mut().expect("blocks") {
        let id = block.as_object_mut().expect("a block").remove("id");
        assert!(id.is_none_or(|id| id.as_str().expect("a string").starts_with("toolu_")));
    }
    message
}

#[tokio::test]
async fn blocks_are_the_same_streamed_and_whole() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say(CALL);
    for thinking in [true, false] {
        let kind = if thinking { "enabled" } else { "disabled" };
        let request = body(json!({ "thinking": { "type": kind, "budget_tokens": 1024 } }));
        let whole = server.post(PATH, &request).await.json();
        let mut content = vec![
            json!({ "type": "thinking", "thinking": "Which city?", "signature": "" }),
            json!({ "type": "text", "text": "Let me look." }),
            json!({ "type": "tool_use", "name": "weather", "input": { "city": "Paris" } }),
            json!({ "type": "tool_use", "name": "now", "input": {} }),
        ];
        if !thinking {
            content.remove(0);
        }
        let wanted = json!({ "type": "message", "role": "assistant", "model": "deep", "content": content,
            "stop_reason": "tool_use", "stop_sequence": null });
        assert_eq!(comparable(&whole), wanted);
        let mut request = request;
        request["stream"] = json!(true);
        let answer = server.post(PATH, &request).await;
        assert_eq!(comparable(&joined(&events(&answer))), wanted);
        let usage = &whole["usage"];
        let num_prompt = usage["input_tokens"].as_u64().expect("a count")
            + usage["cache_read_input_tokens"].as_u64().expect("a count");
        let counted = server.post("/v1/messages/count_tokens", &request).await.json();
        assert_eq!(counted, json!({ "input_tokens": num_prompt }));
    }
    let one = body(json!({ "tool_choice": { "type": "auto", "disable_parallel_tool_use": true } }));
    let one = server.post(PATH, &one).await.json();
    assert_eq!(one["content"].as_array().map(Vec::len), Some(2), "{one}");
    server.stop().await;
}

#[tokio::test]
async fn ends_have_their_reasons() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say("one two three");
    let ends = [
        (json!({}), "end_turn", Value::Null, "one two three"),
        (json!({ "stop_sequences": ["x", " three"] }), "stop_sequence", json!(" three"), "one two"),
        (json!({ "max_tokens": 1 }), "max_tokens", Value::Null, ""),
    ];
    for (extra, reason, sequence, text) in ends {
        let whole = server.post(PATH, &body(extra.clone())).await.json();
        assert_eq!((&whole["stop_reason"], &whole["stop_sequence"]), (&json!(reason), &sequence), "{whole}");
        if !text.is_empty() {
            assert_eq!(whole["content"][0]["text"], text);
        }
        let mut request = body(extra);
        request["stream"] = json!(true);
        let streamed = joined(&events(&server.post(PATH, &request).await));
        assert_eq!(comparable(&streamed), comparable(&whole));
    }
    server.stop().await;
}

#[tokio::test]
async fn a_whole_tool_loop_reaches_the_template() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say("It is sunny.");
    let messages = json!([
        { "role": "user", "content": [{ "type": "text", "text": "How is the weather?" }] },
        { "role": "assistant", "content": [
            { "type": "thinking", "thinking": "Hm.", "signature": "" },
            { "type": "tool_use", "id": "toolu_1", "name": "weather", "input": { "city": "Paris" } },
        ] },
        { "role": "user", "content": [
            { "type": "tool_result", "tool_use_id": "toolu_1", "content": [{ "type": "text", "text": "sunny" }] },
            { "type": "text", "text": "Well?" },
        ] },
    ]);
    let system = json!([{ "type": "text", "text": "Be", "cache_control": { "type": "ephemeral" } }, { "type": "text", "text": "brief." }]);
    let request = body(json!({ "messages": messages, "system": system, "tools": [] }));
    let answer = server.post(PATH, &request).await.json();
    assert_eq!(answer["content"][0]["text"], "It is sunny.", "{answer}");
    let prompt = "<|im_start|>system\nBe\nbrief.<|im_end|>\n<|im_start|>user\nHow is the weather?<|im_end|>\n\
        <|im_start|>assistant\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call><|im_end|>\n\
        <|im_start|>tool\nsunny<|im_end|>\n<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";
    let num_tokens = server.tokenizer.encode(prompt, false).expect("encodes").len();
    let counted = server.post("/v1/messages/count_tokens", &request).await.json();
    assert_eq!(counted["input_tokens"], num_tokens);

    // The client's own beginning of the answer is not said again.
    server.say(" sunny.");
    let begun = json!([{ "role": "user", "content": "Well?" }, { "role": "assistant", "content": "It is" }]);
    let answer = server.post(PATH, &body(json!({ "messages": begun }))).await.json();
    assert_eq!(answer["content"][0]["text"], " sunny.", "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn errors_have_anthropics_shape() {
    let api_keys = vec!["secret".to_owned()];
    let server = TestServer::start(TestOptions { api_keys, ..TestOptions::default() }).await;
    let error = |answer: &Answer, kind: &str| {
        let body = answer.json();
        assert_eq!(body["type"], "error", "{body}");
        assert_eq!(body["error"]["type"], kind, "{body}");
        body["error"]["message"].as_str().expect("a message").to_owned()
    };
    let answer = server.post(PATH, &body(json!({}))).await;
    assert_eq!(answer.status, 401);
    error(&answer, "authentication_error");
    let ask = async |body: &str| {
        let headers = [("x-api-key", "secret"), ("anthropic-version", "2023-06-01")];
        server.request(Method::POST, PATH, &headers, body).await
    };
    for (extra, status, kind, word) in [
        (json!({ "max_tokens": null }), 400, "invalid_request_error", "max_tokens"),
        (json!({ "max_tokens": 0 }), 400, "invalid_request_error", "integer from 1"),
        (json!({ "max_tokens": 1e308 }), 400, "invalid_request_error", "integer from 1"),
        (json!({ "model": "claude" }), 404, "not_found_error", "deep"),
        (json!({ "messages": [] }), 400, "invalid_request_error", "empty"),
        (
            json!({ "messages": [{ "role": "robot", "content": "a" }] }),
            400,
            "invalid_request_error",
            "messages[0].role",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "document" }] }] }),
            400,
            "invalid_request_error",
            "document",
        ),
        (json!({ "system": 7 }), 400, "invalid_request_error", "system"),
        (json!({ "temperature": -1 }), 400, "invalid_request_error", "temperature"),
        (
            json!({ "tools": [{ "name": "a", "input_schema": 7 }] }),
            400,
            "invalid_request_error",
            "tools[0].input_schema",
        ),
        (
            json!({ "tool_choice": { "type": "any" }, "tools": [] }),
            400,
            "invalid_request_error",
            "tool_choice",
        ),
        (json!({ "thinking": { "type": "hard" } }), 400, "invalid_request_error", "thinking.type"),
    ] {
        let answer = ask(&body(extra.clone()).to_string()).await;
        assert_eq!(answer.status, status, "{extra} gave {:?}", answer.body);
        let message = error(&answer, kind);
        assert!(message.contains(word), "{message}");
    }
    error(&ask("{").await, "invalid_request_error");
    // A model's own bound, larger than this context, is lowered.
    let large = body(
        json!({ "max_tokens": 2_147_483_648_u32, "stop_sequences": ["a", "e", "t", "<"], "tools": null }),
    );
    assert_eq!(ask(&large.to_string()).await.status, 200);
    let head = server.request(Method::HEAD, "/", &[("x-api-key", "secret")], "").await;
    assert_eq!(head.status, 200);
    server.stop().await;
}
