//! What people write stays between them and the model: random words put into every field that holds text, in
//! requests that work and in those that fail, show up in no log (at the default level), no metric and no error.
//! Nor do keys.

mod support;

use std::io::Write;
use std::sync::{Arc, Mutex};

use http::Method;
use serde_json::{Value, json};
use support::{TestOptions, TestServer};

/// Everything that is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no holder panics").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Words nobody says, each only once. Plain letters, so that no way of writing text changes them.
fn canary() -> String {
    let bits: u64 = rand::random();
    let letters = (0..13).map(|i| char::from(b'a' + ((bits >> (4 * i)) & 15) as u8));
    letters.collect()
}

/// The fields in which clients send text.
const FIELDS: [&str; 12] = [
    "prompt",
    "suffix",
    "messages",
    "system",
    "input",
    "instructions",
    "input_prefix",
    "input_suffix",
    "input_extra",
    "content",
    "tools",
    "stop",
];

/// Every field in a form that some endpoint takes.
fn good(word: &str) -> Value {
    let messages = json!([
        { "role": "system", "content": word },
        { "role": "user", "content": [{ "type": "text", "text": word }] },
    ]);
    json!({
        "prompt": word, "suffix": word, "messages": messages, "system": word, "input": word, "instructions": word,
        "input_prefix": word, "input_suffix": word, "input_extra": [{ "filename": "f", "text": word }],
        "content": word, "tokens": [1, 2], "stop": [word], "cache_salt": word, "user": word,
        "max_tokens": 6, "n_predict": 6, "max_output_tokens": 6, "prediction": { "type": "content", "content": word },
        "tools": [{ "type": "function", "function": { "name": "f", "description": word, "parameters": {} } }],
    })
}

/// Texts that are wrong in one way each.
fn bad(word: &str) -> Vec<String> {
    let mut bodies = vec![
        format!("{{\"prompt\": \"{word}"),
        format!("{{\"prompt\": \"{word}\"}} {word}"),
        format!("{{\"prompt\": \"{word}\", \"max_tokens\": {word}}}"),
        format!("[\"{word}\"]"),
        format!("\"{word}\""),
        word.to_owned(),
        format!("{{\"{word}\": \"\\ud800\", \"prompt\": \"{word}\\x\"}}"),
    ];
    let wrong = [
        json!(word),
        json!(7),
        json!({ word: word }),
        json!([word, 1]),
        json!([{ word: word }]),
        json!([[word]]),
        json!([{ "role": "user", "content": { word: word } }]),
        json!([{ "role": "user", "content": [{ "type": "odd", "text": word }] }]),
        json!([{ "role": "tool", "content": word, "tool_calls": word }]),
        json!([{ "role": "assistant", "content": word, "tool_calls": [{ "function": { "arguments": word } }] }]),
        json!([{ "type": "function", "function": { "name": word, "description": word, "parameters": word } }]),
        json!([{ "type": "message", "role": "user", "content": word }, { "type": "function_call_output", "output": word }]),
        json!([{ "type": "function_call", "name": word, "arguments": word, "call_id": word }]),
        json!(vec![word; 200]),
        json!(word.repeat(2000)),
    ];
    for field in FIELDS {
        for value in &wrong {
            let mut body = good(word);
            body[field] = value.clone();
            bodies.push(body.to_string());
        }
    }
    bodies
}

#[tokio::test]
async fn texts_and_keys_are_in_no_log_metric_or_error() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt().with_env_filter("info").with_writer(move || writer.clone()).init();
    let key = canary();
    let options = TestOptions { api_keys: vec![key.clone()], max_model_len: 512, ..TestOptions::default() };
    let server = TestServer::start(options).await;
    let shown = format!("{:?}", tandem::http::router(server.state.clone()));
    let paths: Vec<&str> =
        shown.split('"').filter(|text| text.starts_with('/') && !text.contains('{')).collect();
    assert!(paths.len() > 10, "{paths:?}");

    let word = canary();
    let mut bodies = bad(&word);
    for stream in [false, true] {
        let mut body = good(&word);
        body["stream"] = json!(stream);
        bodies.push(body.to_string());
        for leave_out in [&["prompt", "content"][..], &["messages", "input"], &["suffix"], &["tools", "stop"]]
        {
            let mut body = body.clone();
            leave_out.iter().for_each(|field| drop(body.as_object_mut().expect("an object").remove(*field)));
            bodies.push(body.to_string());
        }
    }
    let bearer = format!("Bearer {key}");
    let (mut num_good, mut num_bad) = (0, 0);
    for path in &paths {
        for body in &bodies {
            let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
            let answer = server.request(Method::POST, path, &headers, body).await;
            let text = String::from_utf8_lossy(&answer.body);
            assert!(!text.contains(&key), "the key is in an answer of {path}");
            if answer.status.is_success() {
                num_good += 1;
            } else {
                num_bad += 1;
                assert!(!text.contains(&word), "{path} with {body:.300} answered {}: {text}", answer.status);
            }
        }
    }
    assert!(num_good > 50 && num_bad > 500, "{num_good} answers and {num_bad} errors");

    // Keys that are refused, and text where none is looked for.
    for headers in [
        [("authorization", format!("Bearer {word}"))],
        [("x-api-key", word.clone())],
        [("cookie", word.clone())],
    ] {
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let answer =
            server.request(Method::POST, "/v1/completions", &headers, &good(&word).to_string()).await;
        assert_eq!(answer.status, 401);
        assert!(!String::from_utf8_lossy(&answer.body).contains(&word));
    }

    let page = server.request(Method::GET, "/metrics", &[("authorization", &bearer)], "").await;
    let page = String::from_utf8(page.body.to_vec()).expect("text");
    server.stop().await;
    tracing::warn!("the log is on");
    let log = String::from_utf8(log.0.lock().expect("no holder panics").clone()).expect("text");
    assert!(log.contains("the log is on"));
    for secret in [&word, &key] {
        assert!(!page.contains(secret), "{page}");
        assert!(!log.contains(secret), "{log}");
    }
}
