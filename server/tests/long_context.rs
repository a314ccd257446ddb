//! A context far beyond what the model's files say, filled over HTTP: every path that a prompt takes is the same
//! at this length as at any other. `long_context.py` does the same with 120,000 tokens of the demo pair.

mod support;

use serde_json::{Value, json};
use support::{CheckpointSpec, TestOptions, TestServer};
use tandem_models::KvType;

/// What the checkpoint says, and what is made of it.
const ORIGINAL: usize = 512;
const SCALING: &str = "yarn:32";
const CONTEXT: usize = 32 * ORIGINAL;

async fn stretched(kv_type: KvType) -> TestServer {
    TestServer::start(TestOptions {
        checkpoint: CheckpointSpec { context: ORIGINAL, ..CheckpointSpec::default() },
        rope_scaling: Some(SCALING),
        kv_type,
        max_model_len: CONTEXT,
        ..TestOptions::default()
    })
    .await
}

/// Lines that differ, so that no part of the prompt stands for another; a token each letter or two.
fn lines(num_bytes: usize) -> String {
    let mut text = String::new();
    for number in 0.. {
        if text.len() >= num_bytes {
            break;
        }
        text.push_str(&format!("def line_{number}(item):\n    return item + {}\n", number * 7919 % 1000));
    }
    text
}

fn body(lane: &str, prompt: &str, max_draft_tokens: Option<usize>) -> Value {
    let mut body =
        json!({ "model": lane, "prompt": prompt, "max_tokens": 12, "seed": 3, "ignore_eos": true });
    if let Some(count) = max_draft_tokens {
        body["speculative"] = json!({ "max_draft_tokens": count });
    }
    body
}

async fn answer(server: &TestServer, body: &Value) -> Value {
    let answer = server.post("/v1/completions", body).await;
    assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    answer.json()
}

#[tokio::test]
async fn a_stretched_context_is_filled_on_both_lanes() {
    for kv_type in [KvType::F16, KvType::Q8] {
        let server = stretched(kv_type).await;
        let prompt = lines(CONTEXT * 3 / 4);
        for lane in ["fast", "deep"] {
            let first = answer(&server, &body(lane, &prompt, None)).await;
            let num_tokens = first["usage"]["prompt_tokens"].as_u64().expect("a count");
            assert!(num_tokens > 8 * ORIGINAL as u64 && num_tokens < CONTEXT as u64, "{num_tokens} tokens");
            let plain = answer(&server, &body(lane, &prompt, Some(0))).await;
            assert_eq!(plain["choices"], first["choices"], "{lane}, {kv_type:?}");
            // The next turn adds to what there is, and computes only that.
            let said = first["choices"][0]["text"].as_str().expect("text");
            let second = answer(&server, &body(lane, &format!("{prompt}{said}\n# In short:\n"), None)).await;
            assert!(second["timings"]["cache_n"].as_u64().expect("a count") + 64 > num_tokens, "{second}");
        }
        server.stop().await;
    }
}

#[tokio::test]
async fn what_is_longer_than_the_stretched_context_is_refused_by_its_length() {
    let server = stretched(KvType::F16).await;
    let answer = server.post("/v1/completions", &body("deep", &lines(4 * CONTEXT), None)).await;
    let error = answer.error();
    assert_eq!((answer.status.as_u16(), &error["code"]), (400, &json!("context_length_exceeded")), "{error}");
    assert!(error["message"].as_str().expect("text").contains(&CONTEXT.to_string()), "{error}");
    server.stop().await;
}
