//! The OpenAPI document: in step with `docs/openapi.json`, and true of the server.

mod support;

use serde_json::{Value, json};
use support::{TestOptions, TestServer};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");

/// Numbers that nobody means, as they stand in a body.
const NUMBERS: &[&str] = &[
    "-1",
    "0",
    "2147483648",
    "9223372036854775808",
    "18446744073709551616",
    "NaN",
    "1e308",
    "-1e308",
    "0.5",
];

/// A body that each path takes. A path that takes none, or no numbers, has none.
fn body(path: &str) -> Option<Value> {
    let messages = json!([{ "role": "user", "content": "a" }]);
    Some(match path {
        "/v1/completions" | "/v1/completions/render" => json!({ "prompt": "a" }),
        "/v1/chat/completions" | "/v1/chat/completions/render" | "/apply-template" => {
            json!({ "messages": messages })
        }
        "/v1/fim/completions" => json!({ "prompt": "a", "suffix": "b" }),
        "/v1/responses" => json!({ "input": "a" }),
        "/v1/responses/compact" => json!({ "model": "fast", "input": "a" }),
        "/v1/messages" | "/v1/messages/count_tokens" => json!({ "messages": messages, "max_tokens": 2 }),
        "/completion" | "/completions" => json!({ "prompt": "a" }),
        "/v1/embeddings" => json!({ "input": "a" }),
        "/embedding" | "/embeddings" => json!({ "content": "a" }),
        "/api/embed" => json!({ "model": "fast", "input": "a" }),
        "/api/embeddings" => json!({ "model": "fast", "prompt": "a" }),
        "/infill" => json!({ "input_prefix": "a", "input_suffix": "b" }),
        "/api/generate" => json!({ "model": "fast", "prompt": "a", "stream": false }),
        "/api/chat" => json!({ "model": "fast", "messages": messages, "stream": false }),
        "/tokenize"
        | "/detokenize"
        | "/api/show"
        | "/v1/events"
        | "/v1/health"
        | "/v1/responses/{id}/cancel" => {
            return None;
        }
        other => panic!("{other} is new: what is a right body of it?"),
    })
}

/// The places of all numeric fields of a schema, as keys from the body's root.
fn numeric_fields(document: &Value, schema: &Value, within: &[String], found: &mut Vec<Vec<String>>) {
    if let Some(name) = schema["$ref"].as_str() {
        let name = name.rsplit('/').next().expect("a name");
        return numeric_fields(document, &document["components"]["schemas"][name], within, found);
    }
    for part in ["allOf", "oneOf", "anyOf"].iter().filter_map(|word| schema[word].as_array()).flatten() {
        numeric_fields(document, part, within, found);
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let place = [within, std::slice::from_ref(name)].concat();
        let is_type = |kind: &str| {
            let types = &property["type"];
            types == kind || types.as_array().is_some_and(|types| types.iter().any(|found| found == kind))
        };
        if is_type("integer") || is_type("number") {
            found.push(place);
        } else if place.len() < 4 {
            numeric_fields(document, property, &place, found);
        }
    }
}

/// `body` with a number at this place, which JSON's own writer would not write.
fn with_number(body: &Value, place: &[String], number: &str) -> String {
    const MARK: &str = "the number stands here";
    let mut body = body.clone();
    let bounds = ["max_tokens", "n_predict", "max_output_tokens"];
    for bound in bounds {
        let object = body.as_object_mut().expect("an object");
        object.entry(bound).or_insert(json!(2));
    }
    if body["stream"] == false {
        // Ollama's, whose bound stands in there.
        body["options"] = json!({ "num_predict": 2 });
    }
    let (last, path) = place.split_last().expect("a place");
    let mut at = &mut body;
    for key in path {
        at = at.as_object_mut().expect("an object").entry(key.as_str()).or_insert_with(|| json!({}));
    }
    at[last.as_str()] = Value::from(MARK);
    body.to_string().replace(&format!("\"{MARK}\""), number)
}

#[tokio::test]
async fn the_file_is_what_the_server_says() {
    let server = TestServer::plain().await;
    let answer = server.get("/openapi.json").await;
    let served = std::str::from_utf8(&answer.body).expect("UTF-8");
    if std::env::var_os("TANDEM_WRITE_OPENAPI").is_some() {
        std::fs::write(FILE, served).expect("the file is written");
    }
    let kept = std::fs::read_to_string(FILE).unwrap_or_default();
    assert!(
        kept == served,
        "docs/openapi.json is stale; TANDEM_WRITE_OPENAPI=1 cargo test -p tandem --test openapi writes it"
    );
    server.stop().await;
}

#[tokio::test]
async fn what_is_described_is_there() {
    let server = TestServer::plain().await;
    let document = server.get("/openapi.json").await.json();
    let paths = document["paths"].as_object().expect("paths");
    for path in ["/v1/chat/completions", "/v1/messages", "/infill", "/api/chat", "/v1/responses", "/health"] {
        assert!(paths.contains_key(path), "{path}");
    }
    for (path, operations) in paths {
        for method in operations.as_object().expect("operations").keys() {
            let method = method.to_uppercase().parse().expect("a method");
            let answer = server.request(method, &path.replace("{id}", "fast"), &[], "").await;
            let status = answer.status.as_u16();
            let code = answer.headers["content-type"] == "application/json";
            let unknown = code && answer.json()["error"]["code"] == "unknown_path";
            assert!(status != 405 && !unknown && status < 500, "{path}: {status}");
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn any_number_in_any_field_is_refused_or_honoured() {
    let options = TestOptions { max_model_len: 64, ..TestOptions::default() };
    let server = TestServer::start(options).await;
    let document = server.get("/openapi.json").await.json();
    let (mut num_fields, mut num_honoured) = (0, 0);
    for (path, operations) in document["paths"].as_object().expect("paths") {
        let Some(operation) = operations.get("post") else { continue };
        let Some(body) = body(path) else { continue };
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let mut places = Vec::new();
        numeric_fields(&document, schema, &[], &mut places);
        num_fields += places.len();
        for place in &places {
            for number in NUMBERS {
                let body = with_number(&body, place, number);
                let answer = server.post_text(path, &body).await;
                let status = answer.status.as_u16();
                assert!(status == 200 || status == 400, "{path} {body}: {status} {:?}", answer.body);
                assert!(*number != "NaN" || status == 400, "{path} {body}: {status}");
                let answer = answer.json();
                num_honoured += usize::from(status == 200);
                if status == 400 {
                    let error = &answer["error"];
                    assert!(error["message"].is_string() || error.is_string(), "{path} {body}: {answer}");
                }
            }
        }
    }
    assert!(num_fields > 150, "the document names them: {num_fields}");
    assert!(
        num_honoured > num_fields,
        "the bodies themselves are right: {num_honoured} of {num_fields} fields"
    );
    server.stop().await;
}
