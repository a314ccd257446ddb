//! What a request would be answered from.

use serde_json::json;

use crate::support::TestServer;

#[tokio::test]
async fn rendered_ids_are_those_that_are_answered() {
    let server = TestServer::plain().await;
    let chat = json!({ "model": "deep", "messages": [{ "role": "user", "content": "Say hello." }],
        "max_tokens": 4, "temperature": 0 });
    let rendered = server.post("/v1/chat/completions/render", &chat).await.json();
    let ids = rendered["token_ids"].as_array().expect("ids").clone();
    assert_eq!((&rendered["lane"], &rendered["sampling_params"]["max_tokens"]), (&json!("deep"), &json!(4)));
    let answered = server.post("/v1/chat/completions", &chat).await.json();
    assert_eq!(answered["usage"]["prompt_tokens"], ids.len());
    let again = json!({ "model": "deep", "prompt": ids, "max_tokens": 4, "temperature": 0 });
    let again = server.post("/v1/completions", &again).await.json();
    assert_eq!(again["choices"][0]["text"], answered["choices"][0]["message"]["content"]);

    let prompts = json!({ "prompt": ["def add", "a"], "suffix": null });
    let rendered = server.post("/v1/completions/render", &prompts).await.json();
    assert_eq!(rendered.as_array().expect("one a prompt").len(), 2);
    let wanted = server.tokenizer.encode("def add", true).expect("tokens");
    assert_eq!(rendered[0]["token_ids"], json!(wanted));
    assert_eq!(server.post("/v1/completions/render", &json!({})).await.error()["param"], "prompt");
    server.stop().await;
}
