//! A server whose model says what a script says: with it, whole tool loops of real client programs can be
//! driven without a model that is clever enough for them.
//!
//!   cargo run -p tandem --example scripted -- SCRIPT.json
//!
//! The script is `[{"when": ["text", ...], "say": "answer"}, ...]`. The first entry whose texts all stand in
//! the prompt is said. Calls are written as Hermes and Qwen write them. Prints the address and serves until
//! its standard input ends. Everything but the model is the real thing.

#[path = "../tests/support/mod.rs"]
mod support;

use std::io::Read as _;

use serde::Deserialize;
use support::scripted::{HERMES, HERMES_TOKENS};
use support::{CheckpointSpec, TestOptions, TestServer};

/// Agents' prompts, in tokens of little more than a byte.
const CONTEXT: usize = 1 << 18;

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    when: Vec<String>,
    say: String,
}

#[tokio::main]
async fn main() {
    let path = std::env::args().nth(1).expect("the script's path is the first argument");
    let script = std::fs::read(&path).expect("the script can be read");
    let script: Vec<Entry> = serde_json::from_slice(&script).expect("the script is JSON");
    let checkpoint = CheckpointSpec {
        chat_template: Some(HERMES),
        tokens: HERMES_TOKENS,
        context: CONTEXT,
        ..CheckpointSpec::default()
    };
    let options = TestOptions {
        checkpoint,
        scripted: true,
        with_draft: false,
        max_model_len: CONTEXT,
        api_keys: std::env::var("TANDEM_API_KEY").into_iter().collect(),
        ..TestOptions::default()
    };
    let server = TestServer::start(options).await;
    let when: Vec<Vec<&str>> =
        script.iter().map(|entry| entry.when.iter().map(String::as_str).collect()).collect();
    let lines: Vec<(&[&str], &str)> =
        when.iter().zip(&script).map(|(when, entry)| (when.as_slice(), entry.say.as_str())).collect();
    server.say_when(&lines);
    println!("scripted on http://{}", server.address);
    let until_closed = || std::io::stdin().read_to_end(&mut Vec::new());
    let _ = tokio::task::spawn_blocking(until_closed).await;
    server.stop().await;
}
