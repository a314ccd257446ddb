//! Tabby's plug-ins, which share a path with OpenAI's clients.

use serde_json::json;

use crate::support::TestServer;

#[tokio::test]
async fn segments_are_a_gap_with_other_files() {
    let server = TestServer::plain().await;
    let segments = json!({ "prefix": "def add(a, b):\n    return ", "suffix": "\n",
        "filepath": "calc.py", "git_url": "https://example.org/x.git", "clipboard": "x",
        "declarations": [{ "filepath": "a.py", "body": "def sub(a, b): ..." }],
        "relevant_snippets_from_changed_files": [{ "filepath": "b.py", "body": "x = 1", "score": 0.5 }] });
    let body =
        json!({ "language": "python", "segments": segments, "user": "u", "temperature": 0, "seed": 3 });
    let answer = server.post("/v1/completions", &body).await;
    assert_eq!(answer.headers["x-tandem-lane"], "fast");
    let answer = answer.json();
    assert!(answer["id"].as_str().is_some_and(|id| id.starts_with("cmpl-")), "{answer}");
    // The same as llama.cpp's clients would ask.
    let infill = json!({ "prompt": segments["prefix"], "input_suffix": "\n", "n_predict": 64, "temperature": 0,
        "input_extra": [{ "filename": "b.py", "text": "x = 1" }, { "filename": "a.py", "text": "def sub(a, b): ..." }] });
    let infill = server.post("/infill", &infill).await.json();
    assert_eq!(answer["choices"], json!([{ "index": 0, "text": infill["content"] }]));
    let wrong = server.post("/v1/completions", &json!({ "segments": { "prefix": 7 } })).await;
    assert_eq!((wrong.status.as_u16(), &wrong.error()["param"]), (400, &json!("segments.prefix")));
    server.stop().await;
}

#[tokio::test]
async fn plug_ins_find_what_they_ask_for() {
    let server = TestServer::plain().await;
    let health = server.get("/v1/health").await.json();
    assert!(health["model"].is_string() && health["version"]["git_describe"].is_string(), "{health}");
    let event = json!({ "type": "view", "completion_id": "cmpl-1", "choice_index": 0 });
    assert_eq!(server.post("/v1/events?select_kind=line", &event).await.status, 200);
    assert_eq!(server.get("/v1beta/server_setting").await.json()["disable_client_side_telemetry"], true);
    server.stop().await;
}
