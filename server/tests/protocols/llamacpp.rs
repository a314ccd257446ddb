//! llama.cpp's own protocol, and Mistral's fill-in-the-middle.

use serde_json::{Value, json};

use crate::support::{Answer, CheckpointSpec, TestOptions, TestServer};
use crate::{HERMES, TOKENS};

/// A stream without an end mark.
fn events(answer: &Answer) -> Vec<Value> {
    let text = std::str::from_utf8(&answer.body).expect("UTF-8");
    let event =
        |event: &str| serde_json::from_str(event.strip_prefix("data: ").expect("data")).expect("JSON");
    text.split_terminator("\n\n").map(event).collect()
}

#[tokio::test]
async fn an_infill_is_the_completion_with_a_suffix() {
    let server = TestServer::uncached().await;
    let sampling = json!({ "temperature": 0.7, "seed": 3 });
    let with = |extra: Value| {
        let mut body = sampling.clone();
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        body
    };
    let infill = with(
        json!({ "input_prefix": "def add(a, b):\n", "prompt": "    return ", "input_suffix": "\n\nprint",
        "fill": "raw", "n_predict": 12, "n_indent": 4, "t_max_prompt_ms": 500, "t_max_predict_ms": 60_000, "samplers": ["top_k"] }),
    );
    let answer = server.post("/infill", &infill).await;
    assert_eq!(answer.headers["x-tandem-lane"], "fast", "an editor waits for it");
    let answer = answer.json();
    let chunks = events(
        &server
            .post("/infill", &{
                let mut infill = infill.clone();
                infill["stream"] = json!(true);
                infill
            })
            .await,
    );
    let (last, chunks) = chunks.split_last().expect("chunks");
    assert!(chunks.iter().all(|chunk| chunk["stop"] == false) && last["stop"] == true);
    let text: String = chunks.iter().map(|chunk| chunk["content"].as_str().expect("text")).collect();
    assert_eq!(text, answer["content"].as_str().expect("text"));
    assert_eq!(last["stop_type"], answer["stop_type"]);
    assert!(last["timings"]["predicted_n"].as_u64().expect("a count") > 0, "{last}");
    // The text before the cursor follows the middle token.
    let ids = |text: &str| server.tokenizer.encode(text, false).expect("encodes");
    let prompt = ids("<|fim_prefix|>def add(a, b):\n<|fim_suffix|>\n\nprint<|fim_middle|>    return ");
    let stops = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
        .map(|token| server.tokenizer.token_to_id(token));
    let completion =
        with(json!({ "model": "fast", "prompt": prompt, "max_tokens": 12, "stop_token_ids": stops }));
    let completion = server.post("/v1/completions", &completion).await.json();
    assert_eq!(completion["choices"][0]["text"], answer["content"], "{completion}");
    assert_eq!(completion["usage"]["prompt_tokens"], answer["tokens_evaluated"]);

    // Mistral's endpoint asks for the same, without the begun line.
    let fim = json!({ "prompt": "def add(a, b):\n", "suffix": "\n\nprint", "fill": "raw", "max_tokens": 12, "temperature": 0.7,
        "random_seed": 3 });
    let fim = server.post("/v1/fim/completions", &fim).await.json();
    assert_eq!(fim["object"], "chat.completion", "{fim}");
    let plain = with(
        json!({ "model": "fast", "prompt": "def add(a, b):\n", "suffix": "\n\nprint", "fill": "raw", "max_tokens": 12 }),
    );
    let plain = server.post("/v1/completions", &plain).await.json();
    assert_eq!(fim["choices"][0]["message"]["content"], plain["choices"][0]["text"]);
    server.stop().await;
}

#[tokio::test]
async fn a_filled_gap_ends_where_it_meets_what_follows() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    let infill = async |before: &str, after: &str, extra: Value| {
        let mut body =
            json!({ "model": "deep", "input_prefix": before, "input_suffix": after, "temperature": 0 });
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        let answer = server.post("/infill", &body).await.json();
        (answer["content"].as_str().expect("text").to_owned(), answer["stop_type"].clone())
    };
    // A bracket that the text after the gap closes.
    server.say("a, f(b))\nprint(c)");
    assert_eq!(infill("print(", ")\n", json!({})).await, ("a, f(b)".into(), json!("limit")));
    let raw = ("a, f(b))\nprint(c)".into(), json!("eos"));
    assert_eq!(infill("print(", ")\n", json!({ "fill": "raw" })).await, raw);
    // The text after the gap once more.
    server.say(" = 1\n    return value\n\n\ndef g():");
    let (before, after) = ("def f():\n    value", "\n    return value\n");
    assert_eq!(infill(before, after, json!({})).await, (" = 1".into(), json!("limit")));
    // Lines with less indentation.
    server.say(" = 1\n    b\nc");
    assert_eq!(infill("    a", "", json!({ "n_indent": 4 })).await, (" = 1\n    b".into(), json!("limit")));
    assert_eq!(infill("    a", "", json!({})).await, (" = 1\n    b\nc".into(), json!("eos")));

    server.say("a, b)\nprint(c)");
    let body = json!({ "model": "deep", "prompt": "print(", "suffix": ")\n", "temperature": 0 });
    let completion = server.post("/v1/completions", &body).await.json();
    assert_eq!(completion["choices"][0]["text"], "a, b", "{completion}");
    assert_eq!(completion["choices"][0]["finish_reason"], "stop");
    let chat = server.post("/v1/fim/completions", &body).await.json();
    assert_eq!(chat["choices"][0]["message"]["content"], "a, b", "{chat}");
    let mut wrong = body.clone();
    wrong["fill"] = json!("loose");
    let error = server.post("/v1/completions", &wrong).await.error();
    assert_eq!(error["param"], "fill", "{error}");
    server.stop().await;
}

#[tokio::test]
async fn nothing_predicted_warms_the_cache() {
    let server = TestServer::plain().await;
    let long = "def add(a, b):\n    return a + b\n\n".repeat(3);
    let body = |n_predict: i64| json!({ "input_prefix": long, "input_suffix": "", "n_predict": n_predict, "temperature": 0 });
    let cold = server.post("/infill", &body(0)).await.json();
    assert_eq!((&cold["content"], &cold["tokens_predicted"]), (&json!(""), &json!(0)), "{cold}");
    server.until("the sequence is retired", |stats| stats.num_running == 0).await;
    let warm = server.post("/infill", &body(4)).await.json();
    assert!(warm["timings"]["cache_n"].as_u64().expect("a count") >= 16, "{warm}");
    server.stop().await;
}

#[tokio::test]
async fn other_files_and_long_texts_take_the_room_there_is() {
    let server = TestServer::plain().await;
    let extra = |text: String| json!([{ "filename": "a.py", "text": text }, { "text": "x = 1\n" }]);
    let body = |extra: Value, prefix: String| json!({ "input_prefix": prefix, "input_suffix": "end", "input_extra": extra, "n_predict": 8, "temperature": 0 });
    let evaluated = async |body: Value| {
        let answer = server.post("/infill", &body).await;
        assert_eq!(answer.status, 200, "{:?}", answer.body);
        answer.json()["tokens_evaluated"].as_u64().expect("a count")
    };
    let bare = evaluated(body(Value::Null, "a = 1\n".into())).await;
    let with_files = evaluated(body(extra("y = 2\n".into()), "a = 1\n".into())).await;
    let without_first = evaluated(body(extra("y = 2\n".repeat(500)), "a = 1\n".into())).await;
    assert!(bare < without_first && without_first < with_files, "{bare} {without_first} {with_files}");
    // Whole lines, of four tokens at most.
    let filled = evaluated(body(Value::Null, "a = 1\n".repeat(5000))).await;
    assert!((256 - 8 - 3..=256 - 8).contains(&filled), "{filled}");
    server.stop().await;
}

#[tokio::test]
async fn completions_have_llamas_ends() {
    let server = TestServer::plain().await;
    let ask = async |extra: Value| {
        let mut body = json!({ "prompt": "def add", "temperature": 0, "n_predict": 6, "ignore_eos": true });
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        server.post("/completion", &body).await.json()
    };
    let whole = ask(json!({})).await;
    assert_eq!((&whole["stop_type"], &whole["tokens_predicted"]), (&json!("limit"), &json!(6)));
    let text = whole["content"].as_str().expect("text");
    let word = text.chars().last().expect("text").to_string();
    let cut = ask(json!({ "stop": [word] })).await;
    assert_eq!((&cut["stop_type"], &cut["stopping_word"]), (&json!("word"), &json!(word)));
    assert_eq!(cut["content"], text[..text.find(&word).expect("it is there")]);
    let endless = ask(json!({ "n_predict": -1, "seed": -1 })).await;
    assert_eq!(
        endless["tokens_predicted"].as_u64().zip(endless["tokens_evaluated"].as_u64()).map(|(a, b)| a + b),
        Some(256)
    );
    server.stop().await;
}

#[tokio::test]
async fn text_tokens_and_templates_can_be_asked_for() {
    let server = TestServer::plain().await;
    let text = "def add(a):\n  世";
    let tokens = server.post("/tokenize", &json!({ "content": text })).await.json();
    let ids: Vec<u32> = serde_json::from_value(tokens["tokens"].clone()).expect("ids");
    assert_eq!(ids, server.tokenizer.encode(text, false).expect("encodes"));
    assert_eq!(server.post("/detokenize", &tokens).await.json(), json!({ "content": text }));
    let pieces = server.post("/tokenize", &json!({ "content": text, "with_pieces": true })).await.json();
    assert_eq!(pieces["tokens"].as_array().map(Vec::len), Some(ids.len()));
    let special = |parse: bool| json!({ "content": "<|im_start|>", "parse_special": parse });
    let count = async |parse: bool| {
        server.post("/tokenize", &special(parse)).await.json()["tokens"].as_array().map_or(0, Vec::len)
    };
    assert_eq!(count(true).await, 1);
    assert!(count(false).await > 1);

    let messages = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    let prompt = server.post("/apply-template", &messages).await.json();
    assert_eq!(prompt, json!({ "prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" }));
    let props = server.get("/props").await.json();
    assert_eq!(props["default_generation_settings"]["n_ctx"], 256);
    let slots = server.get("/slots").await.json();
    assert_eq!(slots.as_array().map(|slots| json!(slots.len())), Some(props["total_slots"].clone()));
    server.stop().await;
}

#[tokio::test]
async fn wrong_numbers_and_models_are_named_in_llamas_shape() {
    let checkpoint = CheckpointSpec { with_fim: false, ..CheckpointSpec::default() };
    let server = TestServer::start(TestOptions { checkpoint, ..TestOptions::default() }).await;
    for (path, body, word) in [
        ("/completion", json!({ "prompt": "a", "n_predict": -2 }), "n_predict"),
        ("/completion", json!({ "prompt": "a", "n_predict": 2_147_483_648_u64 }), "n_predict"),
        ("/completion", json!({ "prompt": "a", "n_predict": 1e308 }), "n_predict"),
        ("/completion", json!({ "prompt": "a", "repeat_penalty": -1 }), "repetition_penalty"),
        ("/completion", json!({ "prompt": ["a", "b"] }), "2 prompts"),
        ("/completion", json!({ "prompt": "a", "t_max_prompt_ms": -2 }), "t_max_prompt_ms"),
        ("/infill", json!({ "input_prefix": "a", "n_indent": 9_223_372_036_854_775_808_u64 }), "n_indent"),
        ("/infill", json!({ "input_prefix": "a" }), "fill-in-the-middle"),
        ("/infill", json!({ "input_prefix": 7 }), "input_prefix"),
        ("/tokenize", json!({}), "content"),
        ("/detokenize", json!({ "tokens": [4_000_000] }), "4000000"),
        ("/detokenize", json!({ "tokens": "a" }), "array of token ids"),
        ("/apply-template", json!({}), "messages"),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 400, "{path} {body} gave {:?}", answer.body);
        let error = &answer.json()["error"];
        assert_eq!((&error["code"], &error["type"]), (&json!(400), &json!("invalid_request_error")));
        assert!(error["message"].as_str().expect("a message").contains(word), "{error}");
    }
    server.stop().await;
}
