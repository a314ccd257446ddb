//! `/api`, as Ollama's clients ask.

use serde_json::{Value, json};

use crate::support::{Answer, TestServer};
use crate::{CALL, HERMES, TOKENS};

fn lines(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.headers["content-type"], "application/x-ndjson");
    let text = std::str::from_utf8(&answer.body).expect("UTF-8");
    assert!(text.ends_with('\n'));
    text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

fn chat(extra: Value) -> Value {
    let tool = |name: &str| json!({ "type": "function", "function": { "name": name, "parameters": { "type": "object" } } });
    let mut body = json!({
        "model": "deep:latest", "options": { "temperature": 0, "num_ctx": 4096 }, "keep_alive": "5m",
        "messages": [{ "role": "user", "content": "How is the weather?" }], "tools": [tool("weather"), tool("now")],
    });
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

#[tokio::test]
async fn a_chat_is_the_same_in_lines_and_whole() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say(CALL);
    let whole = server.post("/api/chat", &chat(json!({ "stream": false }))).await.json();
    let message = &whole["message"];
    assert_eq!((&message["content"], &message["thinking"]), (&json!("Let me look."), &json!("Which city?")));
    let calls = json!([{ "function": { "name": "weather", "arguments": { "city": "Paris" } } },
        { "function": { "name": "now", "arguments": {} } }]);
    assert_eq!(message["tool_calls"], calls);
    assert_eq!((&whole["done"], &whole["done_reason"]), (&json!(true), &json!("stop")));
    assert!(whole["eval_count"].as_u64() > Some(0) && whole["prompt_eval_count"].as_u64() > Some(0));

    let lines = lines(&server.post("/api/chat", &chat(json!({}))).await);
    let joined =
        |field: &str| -> String { lines.iter().filter_map(|line| line["message"][field].as_str()).collect() };
    assert_eq!((joined("content"), joined("thinking")), ("Let me look.".into(), "Which city?".into()));
    let streamed = lines.iter().filter_map(|line| line["message"]["tool_calls"].as_array()).flatten();
    assert_eq!(Value::Array(streamed.cloned().collect()), calls);
    let (last, rest) = lines.split_last().expect("lines");
    assert!(rest.iter().all(|line| line["done"] == false) && last["done"] == true);
    assert_eq!(last["eval_count"], whole["eval_count"]);

    // The result of a call, by the name of its tool.
    server.say("It is sunny.");
    let messages = json!([{ "role": "user", "content": "How is the weather?" }, message,
        { "role": "tool", "tool_name": "weather", "content": "sunny" }]);
    let answer =
        server.post("/api/chat", &chat(json!({ "stream": false, "messages": messages }))).await.json();
    assert_eq!(answer["message"]["content"], "It is sunny.");
    server.stop().await;
}

#[tokio::test]
async fn generate_asks_continues_and_fills() {
    let server = TestServer::plain().await;
    let generate = async |extra: Value| {
        let mut body = json!({ "model": "fast", "prompt": "def add", "stream": false,
            "options": { "num_predict": 6, "temperature": 0, "seed": 1 } });
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        server.post("/api/generate", &body).await.json()
    };
    let completion = |extra: Value| {
        let mut body = json!({ "model": "fast", "prompt": "def add", "max_tokens": 6, "temperature": 0 });
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        body
    };
    let raw = generate(json!({ "raw": true })).await;
    let ours = server.post("/v1/completions", &completion(json!({}))).await.json();
    assert_eq!(raw["response"], ours["choices"][0]["text"]);
    assert_eq!((&raw["done_reason"], &raw["eval_count"]), (&json!("length"), &json!(6)));
    let filled = generate(json!({ "suffix": "\nprint(1)" })).await;
    let ours = server.post("/v1/completions", &completion(json!({ "suffix": "\nprint(1)" }))).await.json();
    assert_eq!(filled["response"], ours["choices"][0]["text"]);
    let asked = generate(json!({ "system": "Be brief." })).await;
    assert!(asked["prompt_eval_count"].as_u64() > raw["prompt_eval_count"].as_u64());
    server.stop().await;
}

#[tokio::test]
async fn models_are_listed_and_shown_and_faults_have_its_shape() {
    let server = TestServer::plain().await;
    assert!(server.get("/api/version").await.json()["version"].is_string());
    let tags = server.get("/api/tags").await.json();
    let names: Vec<&str> = tags["models"]
        .as_array()
        .expect("models")
        .iter()
        .filter_map(|model| model["name"].as_str())
        .collect();
    assert!(["fast", "deep", "auto"].iter().all(|name| names.contains(name)), "{names:?}");
    assert_eq!(server.get("/api/ps").await.status, 200);
    let shown = server.post("/api/show", &json!({ "model": "fast:latest" })).await.json();
    assert_eq!(shown["model_info"]["tandem.context_length"], 256);
    assert_eq!(shown["capabilities"], json!(["completion", "embedding", "insert"]));
    for (path, body, status) in [
        ("/api/chat", json!({ "messages": [] }), 400),
        ("/api/chat", json!({ "model": "none", "messages": [] }), 404),
        ("/api/chat", chat(json!({ "options": { "num_predict": -3 } })), 400),
        ("/api/chat", chat(json!({ "options": { "temperature": "hot" } })), 400),
        ("/api/chat", chat(json!({ "think": 7 })), 400),
        ("/api/chat", chat(json!({ "format": 3 })), 400),
        ("/api/generate", json!({ "prompt": "a" }), 400),
        ("/api/show", json!({}), 400),
        ("/api/pull", json!({}), 404),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, status, "{path} {body}");
        assert!(answer.json()["error"].is_string(), "{path} {body}");
    }
    server.stop().await;
}
