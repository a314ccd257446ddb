//! Tool calls and reasoning over the real server and engine: a scripted model writes them in its
//! family's format, clients get them in OpenAI's.

use crate::support::TestServer;
use crate::{CALL, HERMES, TOKENS};
use serde_json::{Value, json};

const PATH: &str = "/v1/chat/completions";

fn body(extra: Value) -> Value {
    let function = |name: &str| {
        json!({ "type": "function", "function": { "name": name, "parameters": {
        "type": "object", "properties": { "city": { "type": "string" } } } } })
    };
    let mut body = json!({
        "messages": [{ "role": "user", "content": "How is the weather?" }], "temperature": 0,
        "tools": [function("weather"), function("now")],
    });
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

/// What a stream's deltas add up to.
fn joined(events: &[Value]) -> Value {
    let (mut content, mut reasoning, mut reason) = (String::new(), String::new(), Value::Null);
    let mut calls: Vec<Value> = Vec::new();
    for choice in events.iter().filter_map(|event| event["choices"].get(0)) {
        let delta = &choice["delta"];
        content.push_str(delta["content"].as_str().unwrap_or(""));
        reasoning.push_str(delta["reasoning_content"].as_str().unwrap_or(""));
        for part in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = part["index"].as_u64().expect("an index") as usize;
            if index == calls.len() {
                assert_eq!(part["type"], "function");
                calls.push(part.clone());
                continue;
            }
            let arguments = &mut calls[index]["function"]["arguments"];
            let so_far = arguments.as_str().expect("a string").to_owned();
            *arguments = json!(so_far + part["function"]["arguments"].as_str().expect("a string"));
        }
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
    }
    for call in &mut calls {
        call.as_object_mut().expect("a call").remove("index");
    }
    json!({ "content": content, "reasoning_content": reasoning, "tool_calls": calls, "finish_reason": reason })
}

fn without_ids(calls: &Value) -> Value {
    let mut calls = calls.clone();
    for call in calls.as_array_mut().expect("calls") {
        let id = call.as_object_mut().expect("a call").remove("id").expect("an id");
        assert!(id.as_str().expect("a string").starts_with("call_"), "{id}");
    }
    calls
}

#[tokio::test]
async fn calls_and_reasoning_are_told_apart_from_text() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say(CALL);
    let answer = server.post(PATH, &body(json!({}))).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    assert_eq!(choice["message"]["content"], "Let me look.");
    assert_eq!(choice["message"]["reasoning_content"], "Which city?");
    let calls = json!([
        { "type": "function", "function": { "name": "weather", "arguments": "{\"city\": \"Paris\"}" } },
        { "type": "function", "function": { "name": "now", "arguments": "{}" } },
    ]);
    assert_eq!(without_ids(&choice["message"]["tool_calls"]), calls);

    let streamed = joined(&server.post(PATH, &body(json!({ "stream": true }))).await.events());
    assert_eq!(streamed["content"], "Let me look.");
    assert_eq!(streamed["reasoning_content"], "Which city?");
    assert_eq!(without_ids(&streamed["tool_calls"]), calls);
    assert_eq!(streamed["finish_reason"], "tool_calls");

    let one = server.post(PATH, &body(json!({ "parallel_tool_calls": false }))).await.json();
    assert_eq!(one["choices"][0]["message"]["tool_calls"].as_array().map(Vec::len), Some(1));

    // Nobody asked for calls: they are text.
    for plain in [json!({ "tools": null }), json!({ "tool_choice": "none" })] {
        let answer = server.post(PATH, &body(plain)).await.json();
        let message = &answer["choices"][0]["message"];
        assert!(message.get("tool_calls").is_none(), "{message}");
        assert!(message["content"].as_str().expect("text").contains("<tool_call>"), "{message}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_call_and_its_result_reach_the_template() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say("It is sunny.");
    let call = json!({ "id": "call_1", "type": "function",
        "function": { "name": "weather", "arguments": "{\"city\": \"Paris\"}" } });
    let messages = json!([
        { "role": "developer", "content": [{ "type": "text", "text": "Be brief." }] },
        { "role": "user", "content": "How is the weather?" },
        { "role": "assistant", "content": null, "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "call_1", "content": "sunny" },
    ]);
    let request = body(json!({ "messages": messages, "tools": [], "max_tokens": 64 }));
    let answer = server.post(PATH, &request).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "It is sunny.");
    let prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow is the weather?<|im_end|>\n\
        <|im_start|>assistant\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call><|im_end|>\n\
        <|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n";
    let completion = json!({ "model": "deep", "prompt": prompt, "temperature": 0, "max_tokens": 64 });
    let completion = server.post("/v1/completions", &completion).await.json();
    assert_eq!(completion["usage"]["prompt_tokens"], answer["usage"]["prompt_tokens"]);
    server.stop().await;
}

#[tokio::test]
async fn a_call_can_be_forced() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say(" {\"city\": \"Rome\"}}\n</tool_call>");
    let named = json!({ "type": "function", "function": { "name": "weather" } });
    let request = body(json!({ "tool_choice": named, "reasoning_effort": "none" }));
    let answer = server.post(PATH, &request).await.json();
    let call = &answer["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(*call, json!({ "name": "weather", "arguments": "{\"city\": \"Rome\"}" }), "{answer}");
    server.say("now\", \"arguments\": {}}\n</tool_call>");
    let request = body(json!({ "tool_choice": "required", "stream": true, "reasoning_effort": "none" }));
    let streamed = joined(&server.post(PATH, &request).await.events());
    assert_eq!(streamed["tool_calls"][0]["function"]["name"], "now", "{streamed}");
    assert_eq!(streamed["finish_reason"], "tool_calls");
    server.stop().await;
}

#[tokio::test]
async fn broken_calls_and_wrong_tools_have_an_answer() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say(CALL);
    // Every place to break off.
    for max_tokens in (1..120).step_by(7) {
        let answer = server.post(PATH, &body(json!({ "max_tokens": max_tokens }))).await;
        assert_eq!(answer.status, 200, "{max_tokens}");
    }
    for (extra, param, word) in [
        (json!({ "tools": 7 }), "tools", "array"),
        (json!({ "tools": [7] }), "tools[0]", "object"),
        (json!({ "tools": [{ "type": "function" }] }), "tools[0].function", "object"),
        (
            json!({ "tools": [{ "type": "function", "function": { "name": "" } }] }),
            "tools[0].function.name",
            "1 to 256",
        ),
        (json!({ "tool_choice": "maybe" }), "tool_choice", "required"),
        (
            json!({ "tool_choice": { "type": "function", "function": { "name": "nope" } } }),
            "tool_choice",
            "nope",
        ),
        (json!({ "tool_choice": "required", "tools": [] }), "tool_choice", "none"),
        (json!({ "reasoning_effort": "huge" }), "reasoning_effort", "low"),
        (json!({ "response_format": { "type": "yaml" } }), "response_format.type", "json_object"),
        (
            json!({ "messages": [{ "role": "assistant", "tool_calls": [{}] }] }),
            "messages[0].tool_calls[0].function",
            "name",
        ),
    ] {
        let answer = server.post(PATH, &body(extra.clone())).await;
        assert_eq!(answer.status, 400, "{extra}");
        let error = answer.error();
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().expect("a message").contains(word), "{error}");
    }
    // Tools that run elsewhere are passed over.
    let answer = server.post(PATH, &body(json!({ "tools": [{ "type": "web_search" }] }))).await;
    assert_eq!(answer.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn many_small_values_are_refused_before_they_cost_memory() {
    let server = TestServer::plain().await;
    let text = format!("{{\"messages\": [{}]}}", vec!["{}"; 300_000].join(","));
    let answer = server.post_text(PATH, &text).await;
    assert_eq!(answer.status, 400);
    assert!(answer.error()["message"].as_str().expect("a message").contains("262144 values"));
    server.stop().await;
}

#[tokio::test]
async fn usage_can_come_with_every_chunk() {
    let server = TestServer::plain().await;
    let options = json!({ "include_usage": true, "continuous_usage_stats": true });
    let body = json!({ "messages": [{ "role": "user", "content": "a" }], "stream": true, "max_tokens": 6,
        "ignore_eos": true, "stream_options": options });
    let events = server.post(PATH, &body).await.events();
    let counts: Vec<u64> =
        events.iter().map(|event| event["usage"]["completion_tokens"].as_u64().expect("a count")).collect();
    assert!(counts.is_sorted() && *counts.last().expect("chunks") == 6, "{counts:?}");
    server.stop().await;
}

/// As those that take instructions once, and first.
const STRICT: &str = "{% for message in messages %}{% if message.role == 'system' and not loop.first %}\
    {{ raise_exception('the system message must be the first') }}{% endif %}\
    <|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n";

#[tokio::test]
async fn instructions_between_turns_reach_templates_that_take_them_once() {
    let server = TestServer::scripted(STRICT, TOKENS).await;
    let message = |role: &str, content: &str| json!({ "role": role, "content": content });
    let apply = async |messages: &[Value]| {
        server.post("/apply-template", &json!({ "messages": messages })).await.json()["prompt"].clone()
    };
    let scattered = [
        message("system", "One."),
        message("developer", "Two."),
        message("user", "Hello."),
        message("system", "Three."),
        message("user", "Go on."),
    ];
    let joined = [
        message("system", "One.\n\nTwo."),
        message("user", "Hello."),
        message("user", "Three."),
        message("user", "Go on."),
    ];
    let prompt = apply(&scattered).await;
    assert!(prompt.is_string());
    assert_eq!(prompt, apply(&joined).await);
    server.stop().await;
}
