//! Structured output over the real server, engine and demo pair: whatever the schema and the seed, what comes is
//! valid by an independent validator, and the same with speculation and without.

#[path = "../support/mod.rs"]
mod support;

mod calls;
mod fields;
mod grammar;

use serde_json::{Value, json};
use support::{TestOptions, TestServer};

/// Answers to each of the fifty schemas; the whole measure is 10, by `TANDEM_STRUCTURED_ANSWERS`.
const ANSWERS_PER_SCHEMA: usize = 1;

/// The schemas allow no answer nearly as long.
const MAX_TOKENS: usize = 600;

pub(crate) async fn demo() -> TestServer {
    TestServer::start(TestOptions { demo: true, max_model_len: 1024, ..TestOptions::default() }).await
}

fn request(schema: &Value, seed: usize) -> Value {
    json!({
        "model": "deep", "prompt": "# An example, as JSON:\n", "max_tokens": MAX_TOKENS, "seed": seed,
        "temperature": if seed.is_multiple_of(3) { 0.0 } else { 1.0 }, "top_p": 1.0,
        "response_format": { "type": "json_schema", "json_schema": { "name": "it", "strict": true, "schema": schema } },
    })
}

#[tokio::test]
async fn every_answer_is_valid_and_the_same_without_speculation() {
    let schemas: Value = serde_json::from_str(include_str!("schemas.json")).expect("the schemas are JSON");
    let schemas = schemas.as_array().expect("a list");
    assert_eq!(schemas.len(), 50);
    let answers = std::env::var("TANDEM_STRUCTURED_ANSWERS").ok().and_then(|count| count.parse().ok());
    let answers: usize = answers.unwrap_or(ANSWERS_PER_SCHEMA);
    let server = demo().await;
    let (mut num_tokens, mut num_drafted, mut num_accepted) = (0, 0, 0);
    for (i, entry) in schemas.iter().enumerate() {
        let (name, schema) = (&entry["name"], &entry["schema"]);
        let validator = jsonschema::options()
            .should_validate_formats(true)
            .build(schema)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        for seed in (0..answers).map(|n| n * schemas.len() + i) {
            let mut asked = request(schema, seed);
            let answer = server.post("/v1/completions", &asked).await;
            assert_eq!(answer.status, 200, "{name}: {:?}", String::from_utf8_lossy(&answer.body));
            let answer = answer.json();
            let choice = &answer["choices"][0];
            let text = choice["text"].as_str().expect("text");
            assert_eq!(choice["finish_reason"], "stop", "{name}, seed {seed}: {text}");
            let value: Value = serde_json::from_str(text)
                .unwrap_or_else(|error| panic!("{name}, seed {seed}: {error} in {text}"));
            if let Err(error) = validator.validate(&value) {
                panic!("{name}, seed {seed}: {error} in {text}");
            }
            asked["speculative"] = json!({ "max_draft_tokens": 0 });
            let plain = server.post("/v1/completions", &asked).await.json();
            assert_eq!(plain["choices"], answer["choices"], "{name}, seed {seed}, without speculation");
            assert_eq!(plain["usage"]["completion_tokens"], answer["usage"]["completion_tokens"]);
            num_tokens += answer["usage"]["completion_tokens"].as_u64().expect("a count");
            num_drafted += answer["timings"]["draft_n"].as_u64().expect("a count");
            num_accepted += answer["timings"]["draft_n_accepted"].as_u64().expect("a count");
        }
    }
    println!("{num_tokens} tokens; {num_accepted} of {num_drafted} draft tokens accepted");
    assert!(num_accepted > 0, "nothing was ever drafted");
    server.stop().await;
}

#[tokio::test]
async fn answers_of_a_batch_are_those_of_each_alone() {
    let schemas: Value = serde_json::from_str(include_str!("schemas.json")).expect("the schemas are JSON");
    let server = demo().await;
    let asked: Vec<Value> = (0..8).map(|i| request(&schemas[i * 6]["schema"], i)).collect();
    let mut alone = Vec::new();
    for request in &asked {
        alone.push(server.post("/v1/completions", request).await.json()["choices"].clone());
    }
    let together = asked.iter().map(|request| server.post("/v1/completions", request));
    let together = all_of(together).await;
    for (answer, alone) in together.iter().zip(&alone) {
        assert_eq!(answer.json()["choices"], *alone);
    }
    server.stop().await;
}

/// All at once.
async fn all_of<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut futures: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|cx| {
        for (future, output) in &mut futures {
            if output.is_none()
                && let std::task::Poll::Ready(ready) = future.as_mut().poll(cx)
            {
                *output = Some(ready);
            }
        }
        let all = futures.iter().all(|(_, output)| output.is_some());
        if all { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    futures.into_iter().filter_map(|(_, output)| output).collect()
}
