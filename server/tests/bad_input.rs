//! Bad input gets a clear error in OpenAI's shape, and the server goes on.

mod support;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};
use support::{TestOptions, TestServer};
use tandem::http::Limits;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Asserts a 400 whose message holds every one of `words`.
async fn refused(server: &TestServer, path: &str, body: &str, param: Option<&str>, words: &[&str]) {
    let answer = server.post_text(path, body).await;
    let body = &body[..body.len().min(200)];
    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body} gave {:?}", answer.body);
    let error = answer.error();
    assert_eq!(error["type"], "invalid_request_error");
    assert_eq!(error["param"].as_str(), param, "{body} gave {error}");
    let message = error["message"].as_str().expect("a message");
    for word in words {
        assert!(message.contains(word), "{body} gave {message:?}, without {word:?}");
    }
}

#[tokio::test]
async fn every_fault_is_named() {
    let server = TestServer::plain().await;
    let long = format!("{{\"prompt\": \"{}\"}}", "x y ".repeat(400));
    let long_salt = format!("{{\"prompt\": \"a\", \"cache_salt\": \"{}\"}}", "s".repeat(257));
    let predicting = |text: String| {
        json!({ "prompt": "a", "prediction": { "type": "content", "content": text } }).to_string()
    };
    let (long_prediction, longer_prediction) =
        (predicting("x y ".repeat(200)), predicting("x".repeat(1 << 20)));
    let cases: &[(&str, Option<&str>, &[&str])] = &[
        ("", None, &["empty"]),
        ("{\"prompt\": \"a\",\n \"n\" 1}", None, &["line 2 column"]),
        ("{\"prompt\": \"a\"} {}", None, &["trailing"]),
        ("[1]", None, &["array"]),
        ("7", None, &["fit", "expected an object"]),
        ("{}", Some("prompt"), &["prompt"]),
        ("{\"prompt\": \"\"}", Some("prompt"), &["empty"]),
        ("{\"prompt\": []}", Some("prompt"), &["prompt"]),
        ("{\"prompt\": [[]]}", Some("prompt"), &["empty"]),
        ("{\"prompt\": 7}", Some("prompt"), &["array of token ids"]),
        ("{\"prompt\": [-1]}", Some("prompt[0]"), &["array of token ids"]),
        ("{\"prompt\": [4000000000]}", Some("prompt"), &["4000000000", "vocabulary"]),
        (&long, Some("prompt"), &["256"]),
        ("{\"prompt\": \"a\", \"max_tokens\": -1}", Some("max_tokens"), &["-1", "1 to 9223372036854775807"]),
        ("{\"prompt\": \"a\", \"max_tokens\": 0}", Some("max_tokens"), &["0", "1 to 9223372036854775807"]),
        (
            "{\"prompt\": \"a\", \"max_tokens\": 9223372036854775808}",
            Some("max_tokens"),
            &["9223372036854775808"],
        ),
        ("{\"prompt\": \"a\", \"max_tokens\": 1.5}", Some("max_tokens"), &["1.5"]),
        ("{\"prompt\": \"a\", \"max_tokens\": \"many\"}", Some("max_tokens"), &["many"]),
        ("{\"prompt\": \"a\", \"temperature\": \"NaN\"}", Some("temperature"), &["NaN"]),
        ("{\"prompt\": \"a\", \"temperature\": NaN}", None, &["line 1 column"]),
        ("{\"prompt\": \"a\", \"temperature\": 1e999}", None, &["out of range"]),
        ("{\"prompt\": \"a\", \"temperature\": 1e308}", Some("temperature"), &["smaller"]),
        ("{\"prompt\": \"a\", \"temperature\": -0.1}", Some("temperature"), &["0 to 100"]),
        ("{\"prompt\": \"a\", \"top_p\": 0}", Some("top_p"), &["0"]),
        ("{\"prompt\": \"a\", \"top_k\": -2}", Some("top_k"), &["-2"]),
        ("{\"prompt\": \"a\", \"min_p\": 1.5}", Some("min_p"), &["1.5"]),
        ("{\"prompt\": \"a\", \"presence_penalty\": 3}", Some("presence_penalty"), &["3", "2"]),
        ("{\"prompt\": \"a\", \"repetition_penalty\": 0}", Some("repetition_penalty"), &["0"]),
        ("{\"prompt\": \"a\", \"n\": 0}", Some("n"), &["0"]),
        ("{\"prompt\": \"a\", \"n\": 1000000}", Some("n"), &["1000000", "32"]),
        ("{\"prompt\": \"a\", \"n\": 2, \"best_of\": 3}", Some("best_of"), &["best_of is 3", "n is 2"]),
        ("{\"prompt\": \"a\", \"logprobs\": 21}", Some("logprobs"), &["21", "20"]),
        ("{\"prompt\": \"a\", \"stop\": \"\"}", Some("stop"), &["0 bytes"]),
        ("{\"prompt\": \"a\", \"stop\": 3}", Some("stop"), &["array of strings"]),
        ("{\"prompt\": \"a\", \"stop_token_ids\": [-1]}", Some("stop_token_ids"), &["-1"]),
        ("{\"prompt\": \"a\", \"logit_bias\": {\"x\": 1}}", Some("logit_bias"), &["\"x\""]),
        ("{\"prompt\": \"a\", \"logit_bias\": {\"05\": 1}}", Some("logit_bias"), &["\"05\"", "plain digits"]),
        ("{\"prompt\": \"a\", \"logit_bias\": {\"+5\": 1}}", Some("logit_bias"), &["\"+5\"", "plain digits"]),
        ("{\"prompt\": \"a\", \"logit_bias\": {\"\": 1}}", Some("logit_bias"), &["plain digits"]),
        (
            "{\"prompt\": \"a\", \"logit_bias\": {\"5\": 1, \"6\": 1, \"5\": 2}}",
            Some("logit_bias"),
            &["\"5\"", "more than once"],
        ),
        (
            "{\"prompt\": \"a\", \"logit_bias\": [1]}",
            Some("logit_bias"),
            &["expected an object of token ids"],
        ),
        ("{\"prompt\": \"a\", \"top_p\": \"x\"}", Some("top_p"), &["expected a number at line 1"]),
        ("{\"prompt\": \"a\", \"speculative\": 3}", Some("speculative"), &["expected an object at line 1"]),
        ("{\"prompt\": \"a\", \"logit_bias\": {\"999999\": 1}}", Some("logit_bias"), &["999999"]),
        ("{\"prompt\": \"a\", \"logit_bias\": {\"1\": 101}}", Some("logit_bias"), &["101"]),
        ("{\"prompt\": \"a\", \"seed\": 1e40}", Some("seed"), &["seed"]),
        ("{\"prompt\": \"a\", \"seed\": 36893488147419103232}", Some("seed"), &["seed"]),
        (
            "{\"prompt\": \"a\", \"speculative\": {\"max_draft_tokens\": 99}}",
            Some("speculative.max_draft_tokens"),
            &["99", "32"],
        ),
        (
            "{\"prompt\": \"a\", \"speculative\": {\"sources\": [\"draft\", \"oracle\"]}}",
            Some("speculative.sources"),
            &["oracle", "\"ngram\""],
        ),
        (
            "{\"prompt\": \"a\", \"priority\": \"urgent\"}",
            Some("priority"),
            &["urgent", "\"interactive\" or \"batch\""],
        ),
        (
            "{\"prompt\": \"a\", \"priority\": 3}",
            Some("priority"),
            &["integer `3`", "expected \"interactive\" or \"batch\""],
        ),
        (
            "{\"prompt\": \"a\", \"speculative\": {\"num_speculative_tokens\": 3}}",
            Some("speculative.num_speculative_tokens"),
            &["unknown field `num_speculative_tokens`", "`max_draft_tokens` or `sources`"],
        ),
        (
            "{\"prompt\": \"a\", \"t_max_predict_ms\": -2}",
            Some("t_max_predict_ms"),
            &["-2", "-1 to 86400000"],
        ),
        ("{\"prompt\": \"a\", \"cache_salt\": \"\"}", Some("cache_salt"), &["0 bytes", "1 to 256"]),
        ("{\"prompt\": \"a\", \"cache_salt\": 7}", Some("cache_salt"), &["expected a string"]),
        ("{\"prompt\": \"a\", \"prediction\": \"b\"}", Some("prediction"), &["expected an object"]),
        (
            "{\"prompt\": \"a\", \"prediction\": {\"type\": \"file\", \"content\": \"b\"}}",
            Some("prediction.type"),
            &["file", "\"content\""],
        ),
        (
            "{\"prompt\": \"a\", \"prediction\": {\"type\": \"content\"}}",
            Some("prediction"),
            &["missing field `content`"],
        ),
        (
            "{\"prompt\": \"a\", \"prediction\": {\"type\": \"content\", \"content\": 5}}",
            Some("prediction.content"),
            &["array of text parts"],
        ),
        (
            "{\"prompt\": \"a\", \"prediction\": {\"type\": \"content\", \"content\": [{\"type\": \"image\"}]}}",
            Some("prediction.content[0]"),
            &["missing field `text`"],
        ),
        (&long_salt, Some("cache_salt"), &["257 bytes"]),
        (
            "{\"prompt\": \"a\", \"prediction\": {\"type\": \"content\", \"content\": [{\"type\": \"image\", \"text\": \"b\"}]}}",
            Some("prediction.content"),
            &["another type than text, the only one understood"],
        ),
        (&long_prediction, Some("prediction.content"), &["tokens", "256"]),
        (&longer_prediction, Some("prediction.content"), &["bytes of text", "256"]),
        ("{\"prompt\": \"a\", \"suffix\": \"b\", \"echo\": true}", Some("echo"), &["suffix"]),
    ];
    for (body, param, words) in cases {
        refused(&server, COMPLETIONS, body, *param, words).await;
    }
    let deep = format!("{{\"prompt\": {}{}}}", "[".repeat(1000), "]".repeat(1000));
    refused(&server, COMPLETIONS, &deep, Some("prompt[0][0]"), &["expected a token id"]).await;
    let deep = deep.replace("prompt", "tools");
    refused(&server, CHAT, &deep, None, &["recursion"]).await;

    let long_role = format!("{{\"messages\": [{{\"role\": \"{}\"}}]}}", "u".repeat(65));
    let cases: &[(&str, Option<&str>, &[&str])] = &[
        ("{}", Some("messages"), &["empty"]),
        ("{\"messages\": []}", Some("messages"), &["empty"]),
        ("{\"messages\": \"hello\"}", Some("messages"), &["string"]),
        ("{\"messages\": [{}]}", Some("messages[0].role"), &["role"]),
        (&long_role, Some("messages[0].role"), &["65 bytes", "at most 64"]),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": 5}]}",
            Some("messages[0].content"),
            &["text parts"],
        ),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"max_tokens\": 0}",
            Some("max_tokens"),
            &["0"],
        ),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"top_logprobs\": 3}",
            Some("top_logprobs"),
            &["logprobs"],
        ),
    ];
    for (body, param, words) in cases {
        refused(&server, CHAT, body, *param, words).await;
    }
    // It is alive and nothing is left behind. (The engine publishes its counts after it has sent the
    // last token, so they may be a moment behind the answer.)
    let answer = server.post(COMPLETIONS, &json!({ "prompt": "a", "unknown": { "field": [1] } })).await;
    assert_eq!(answer.status, 200);
    server.until("all is freed", |stats| stats.num_running + stats.num_waiting == 0).await;
    server.stop().await;
}

#[tokio::test]
async fn unknown_models_and_paths_and_wrong_methods_are_json() {
    let server = TestServer::plain().await;
    for path in [COMPLETIONS, CHAT] {
        let request =
            json!({ "model": "gpt-4", "prompt": "a", "messages": [{ "role": "user", "content": "a" }] });
        let answer = server.post(path, &request).await;
        assert_eq!(answer.status, 404);
        let error = answer.error();
        assert_eq!(error["code"], "model_not_found");
        for name in ["fast", "deep", "auto", "big-model", "small-model"] {
            assert!(error["message"].as_str().expect("a message").contains(name), "{error}");
        }
    }
    let missing = server.get("/v1/nothing").await;
    assert_eq!(missing.status, 404);
    assert!(missing.error()["message"].as_str().expect("a message").contains("/v1/nothing"));
    let wrong = server.get(COMPLETIONS).await;
    assert_eq!(wrong.status, 405);
    assert_eq!(wrong.headers["allow"], "POST");
    assert_eq!(wrong.error()["code"], "method_not_allowed");
    let typed = server.request(Method::POST, COMPLETIONS, &[("content-type", "text/plain")], "{}").await;
    assert_eq!(typed.status, 415);
    assert!(typed.error()["message"].as_str().expect("a message").contains("text/plain"));
    server.stop().await;
}

#[tokio::test]
async fn a_large_body_is_refused_with_an_answer() {
    let limits = Limits { max_body_bytes: 1000, ..Limits::default() };
    let server = TestServer::start(TestOptions { limits, ..TestOptions::default() }).await;
    for size in [1001, 1500, 100_000] {
        let body = format!("{{\"prompt\": \"{}\"}}", "x".repeat(size - 14));
        let answer = server.post_text(COMPLETIONS, &body).await;
        assert_eq!(answer.status, 413, "{size} bytes");
        assert!(answer.error()["message"].as_str().expect("a message").contains("1000"));
    }
    server.stop().await;
}

#[tokio::test]
async fn a_full_queue_asks_to_come_back() {
    let options = TestOptions { max_waiting: 2, max_model_len: 8192, ..TestOptions::default() };
    let server = TestServer::start(options).await;
    let endless = json!({ "prompt": "a", "max_tokens": 8000, "ignore_eos": true, "stream": true });
    let mut streams = Vec::new();
    // Eight run and two wait.
    for count in 1..=10 {
        let request = Request::post(COMPLETIONS)
            .header("host", "test")
            .body(Full::new(Bytes::from(endless.to_string())))
            .expect("a request");
        streams.push(server.send(request).await);
        server.until("it is taken", |stats| stats.num_running + stats.num_waiting == count).await;
    }
    let answer = server.post(COMPLETIONS, &endless).await;
    assert_eq!(answer.status, 429);
    assert_eq!(answer.error()["code"], "queue_full");
    let seconds: u32 = answer.headers["retry-after"].to_str().expect("text").parse().expect("seconds");
    assert!((1..=60).contains(&seconds));
    drop(streams);
    server
        .until("the refused request's sequences are gone", |stats| stats.num_running + stats.num_waiting == 0)
        .await;
    server.stop().await;
}

/// A 429 would send the client back with the same request for ever.
#[tokio::test]
async fn more_answers_than_the_server_holds_are_a_bad_request() {
    let server = TestServer::start(TestOptions { max_waiting: 2, ..TestOptions::default() }).await;
    let completion = json!({ "prompt": ["a", "b"], "n": 6 });
    let chat = json!({ "messages": [{ "role": "user", "content": "a" }], "n": 11 });
    for (path, body, count) in [(COMPLETIONS, completion, "12 answers"), (CHAT, chat, "11 answers")] {
        refused(&server, path, &body.to_string(), Some("n"), &[count, "at most 10"]).await;
    }
    let prompts = json!({ "prompt": vec!["a"; 11] });
    refused(&server, COMPLETIONS, &prompts.to_string(), Some("prompt"), &["11 answers", "at most 10"]).await;
    server.stop().await;
}

#[tokio::test]
async fn text_that_cannot_fit_is_refused_by_its_length() {
    let server = TestServer::plain().await;
    let long = "x".repeat(1 << 20);
    for (path, body, param) in [
        (COMPLETIONS, json!({ "prompt": long }), "prompt"),
        (COMPLETIONS, json!({ "prompt": ["a", long] }), "prompt"),
        (COMPLETIONS, json!({ "prompt": "a", "suffix": long }), "prompt"),
        (CHAT, json!({ "messages": [{ "role": "user", "content": long }] }), "messages"),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 400);
        let error = answer.error();
        assert_eq!(error["code"], "context_length_exceeded");
        assert_eq!(error["param"], param);
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains("bytes of text") && message.contains("256 tokens"), "{message}");
    }
    // What the template leaves out costs nothing and is no fault.
    let body = json!({ "messages": [{ "role": "user", "content": "a", "extra": long }], "max_tokens": 2 });
    assert_eq!(server.post(CHAT, &body).await.status, 200);
    // One prompt too many tokens long, but not too many bytes, is told in tokens.
    let body = json!({ "prompt": ["a", "x y ".repeat(200)], "max_tokens": 2 });
    let error = server.post(COMPLETIONS, &body).await.error();
    assert_eq!(error["code"], "context_length_exceeded");
    assert!(!error["message"].as_str().expect("a message").contains("bytes"), "{error}");
    server.stop().await;
}

#[tokio::test]
async fn lists_past_the_caps_are_refused_while_reading() {
    let server = TestServer::plain().await;
    let many = format!("{{\"prompt\": [{}]}}", vec!["[]"; 100_000].join(","));
    refused(&server, COMPLETIONS, &many, Some("prompt"), &["128"]).await;
    for (field, element) in [("stop", "\"\""), ("stop_token_ids", "1")] {
        for (count, wanted) in [(17, "at most 16"), (100_000, "more than 1024")] {
            let body = format!("{{\"{field}\": [{}]}}", vec![element; count].join(","));
            refused(&server, COMPLETIONS, &body, Some(field), &[wanted]).await;
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn numbers_at_the_edges_never_break_the_server() {
    let server = TestServer::plain().await;
    let fields = [
        "max_tokens",
        "n",
        "seed",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "min_tokens",
        "logprobs",
        "best_of",
    ];
    let values = ["-1", "0", "2147483648", "9223372036854775808", "1e308", "-1e308", "\"NaN\"", "null"];
    for field in fields {
        for value in values {
            let body = format!("{{\"prompt\": \"a\", \"max_tokens\": 2, \"{field}\": {value}}}");
            let body = if field == "max_tokens" { body.replacen("\"max_tokens\": 2, ", "", 1) } else { body };
            let answer = server.post_text(COMPLETIONS, &body).await;
            let is_handled = answer.status == 200 || answer.status == 400;
            assert!(is_handled, "{body} gave {} {:?}", answer.status, answer.body);
            let _: Value = answer.json();
        }
    }
    server.stop().await;
}
