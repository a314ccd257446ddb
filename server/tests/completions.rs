//! `/v1/completions` over the real engine: what is asked for is what comes back, streamed or not.

mod support;

use serde_json::{Value, json};
use support::{CheckpointSpec, TestOptions, TestServer};

const PATH: &str = "/v1/completions";

/// A completion that runs its full length.
fn body(extra: Value) -> Value {
    let mut body = json!({
        "model": "deep", "prompt": "def add(a, b):", "max_tokens": 24, "temperature": 0.8, "seed": 5,
        "ignore_eos": true,
    });
    let object = body.as_object_mut().expect("an object");
    object.extend(extra.as_object().expect("an object").clone());
    body
}

fn text(events: &[Value], index: u64) -> String {
    events
        .iter()
        .flat_map(|event| event["choices"].as_array().expect("choices").clone())
        .filter(|choice| choice["index"] == index)
        .map(|choice| choice["text"].as_str().expect("text").to_owned())
        .collect()
}

#[tokio::test]
async fn a_completion_has_text_usage_timings_and_seed() {
    let server = TestServer::plain().await;
    let answer = server.post(PATH, &body(json!({}))).await;
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    assert_eq!(answer.headers["x-tandem-lane"], "deep");
    assert_eq!(answer.headers["x-tandem-seed"], "5");
    let answer = answer.json();
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["model"], "deep");
    assert_eq!(answer["seed"], 5);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert!(!answer["choices"][0]["text"].as_str().expect("text").is_empty());
    let usage = &answer["usage"];
    let num_prompt_tokens = server.tokenizer.encode("def add(a, b):", true).expect("encodes").len();
    assert_eq!(usage["prompt_tokens"], num_prompt_tokens);
    assert_eq!(usage["completion_tokens"], 24);
    assert_eq!(usage["total_tokens"], num_prompt_tokens + 24);
    let details = &usage["completion_tokens_details"];
    assert_eq!(details["accepted_prediction_tokens"], 0, "nothing was predicted");
    assert_eq!(details["rejected_prediction_tokens"], 0, "nothing was predicted");
    let drafted = answer["timings"]["draft_n"].as_u64().expect("a count");
    let accepted = answer["timings"]["draft_n_accepted"].as_u64().expect("a count");
    assert!(drafted > 0 && accepted <= drafted, "the deep lane speculates");
    assert_eq!(answer["timings"]["cache_n"], usage["prompt_tokens_details"]["cached_tokens"]);
    for time in ["queue_ms", "prompt_ms", "predicted_ms", "predicted_per_second"] {
        assert!(answer["timings"][time].as_f64().expect("a number") >= 0.0);
    }
    server.stop().await;
}

#[tokio::test]
async fn streamed_and_whole_answers_are_the_same_text() {
    let server = TestServer::uncached().await;
    for lane in ["fast", "deep"] {
        let whole = server.post(PATH, &body(json!({ "model": lane }))).await.json();
        let stream = json!({ "model": lane, "stream": true, "stream_options": { "include_usage": true } });
        let events = server.post(PATH, &body(stream)).await.events();
        assert_eq!(text(&events, 0), whole["choices"][0]["text"].as_str().expect("text"));
        let last = events.last().expect("events");
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"], whole["usage"]);
        assert_eq!(last["seed"], 5);
        assert!(last["timings"].is_object());
        assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], "length");
        assert!(events[..events.len() - 1].iter().all(|event| event["usage"].is_null()));
    }
    server.stop().await;
}

#[tokio::test]
async fn speculation_can_be_turned_off_and_changes_nothing_but_the_count() {
    let server = TestServer::plain().await;
    let on = server.post(PATH, &body(json!({}))).await.json();
    let off = server.post(PATH, &body(json!({ "speculative": { "max_draft_tokens": 0 } }))).await.json();
    assert_eq!(on["choices"], off["choices"]);
    assert_eq!(off["timings"]["draft_n"], 0);
    server.stop().await;
}

#[tokio::test]
async fn a_drawn_seed_is_returned_and_repeats_the_answer() {
    let server = TestServer::plain().await;
    let mut request = body(json!({}));
    request.as_object_mut().expect("an object").remove("seed");
    let first = server.post(PATH, &request).await.json();
    let other = server.post(PATH, &request).await.json();
    assert_ne!(first["seed"], other["seed"]);
    request["seed"] = first["seed"].clone();
    let again = server.post(PATH, &request).await.json();
    assert_eq!(again["choices"], first["choices"]);
    server.stop().await;
}

#[tokio::test]
async fn choices_and_prompts_come_in_order_and_each_equals_its_single_request() {
    let server = TestServer::plain().await;
    let mut many = body(json!({ "prompt": ["def add", "for item"], "n": 2, "model": "fast" }));
    let answer = server.post(PATH, &many).await.json();
    many["stream"] = json!(true);
    let events = server.post(PATH, &many).await.events();
    assert_eq!(answer["usage"]["completion_tokens"], 4 * 24);
    for (index, (prompt, seed)) in
        [("def add", 5), ("def add", 6), ("for item", 5), ("for item", 6)].into_iter().enumerate()
    {
        let single = body(json!({ "prompt": prompt, "seed": seed, "model": "fast" }));
        let single = server.post(PATH, &single).await.json();
        assert_eq!(answer["choices"][index]["index"], index);
        assert_eq!(answer["choices"][index]["text"], single["choices"][0]["text"], "choice {index}");
        assert_eq!(text(&events, index as u64), single["choices"][0]["text"].as_str().expect("text"));
    }
    server.stop().await;
}

#[tokio::test]
async fn token_ids_and_text_are_the_same_prompt() {
    let server = TestServer::plain().await;
    let tokens = server.tokenizer.encode("def add(a, b):", true).expect("encodes");
    let by_text = server.post(PATH, &body(json!({}))).await.json();
    for prompt in [json!(tokens), json!([tokens])] {
        let by_tokens = server.post(PATH, &body(json!({ "prompt": prompt }))).await.json();
        assert_eq!(by_tokens["choices"], by_text["choices"]);
    }
    server.stop().await;
}

#[tokio::test]
async fn a_stop_string_cuts_the_answer_before_it() {
    let server = TestServer::plain().await;
    let free = server.post(PATH, &body(json!({}))).await.json();
    let free = free["choices"][0]["text"].as_str().expect("text").to_owned();
    let chars: Vec<char> = free.chars().collect();
    // Two characters from the middle, so that tokens end before, inside and after the stop string.
    let stop: String = chars[chars.len() / 2..chars.len() / 2 + 2].iter().collect();
    let kept = &free[..free.find(&stop).expect("it came from there")];
    for stream in [false, true] {
        let request = body(json!({ "stop": [stop, "never in there"], "stream": stream }));
        let answer = server.post(PATH, &request).await;
        let (answer, reason) = if stream {
            let events = answer.events();
            let reason = events.last().expect("events")["choices"][0]["finish_reason"].clone();
            (text(&events, 0), reason)
        } else {
            let choice = answer.json()["choices"][0].clone();
            (choice["text"].as_str().expect("text").to_owned(), choice["finish_reason"].clone())
        };
        assert_eq!(answer, kept);
        assert_eq!(reason, "stop");
    }
    server.until("the stopped sequences are freed", |stats| stats.num_running == 0).await;
    server.stop().await;
}

#[tokio::test]
async fn logprobs_line_up_with_tokens_and_text() {
    let server = TestServer::plain().await;
    let answer = server.post(PATH, &body(json!({ "logprobs": 3, "echo": true }))).await.json();
    let choice = &answer["choices"][0];
    let prompt = server.tokenizer.encode("def add(a, b):", true).expect("encodes");
    let logprobs = &choice["logprobs"];
    let lengths: Vec<usize> = ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
        .iter()
        .map(|field| logprobs[field].as_array().expect("an array").len())
        .collect();
    assert_eq!(lengths, [prompt.len() + 24; 4]);
    assert!(choice["text"].as_str().expect("text").starts_with("def add(a, b):"));
    assert!(logprobs["token_logprobs"][0].is_null(), "nothing predicts the first token");
    for (i, logprob) in logprobs["token_logprobs"].as_array().expect("an array").iter().enumerate().skip(1) {
        let logprob = logprob.as_f64().expect("a number");
        assert!(logprob <= 0.0);
        let top = logprobs["top_logprobs"][i].as_object().expect("an object");
        assert!((1..=4).contains(&top.len()));
        let own = &top[logprobs["tokens"][i].as_str().expect("a token")];
        assert_eq!(own.as_f64(), Some(logprob));
    }
    let prompt_tokens: String =
        (0..prompt.len()).map(|i| logprobs["tokens"][i].as_str().expect("a token")).collect();
    assert_eq!(prompt_tokens, "def add(a, b):");
    assert_eq!(logprobs["text_offset"][0], 0);
    assert_eq!(logprobs["text_offset"][prompt.len()], "def add(a, b):".len());

    let request = body(json!({ "logprobs": 3, "echo": true, "stream": true }));
    let events = server.post(PATH, &request).await.events();
    assert_eq!(text(&events, 0), choice["text"].as_str().expect("text"));
    for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let streamed: Vec<Value> = events
            .iter()
            .flat_map(|event| event["choices"][0]["logprobs"][field].as_array().expect("an array").clone())
            .collect();
        assert_eq!(Value::Array(streamed), logprobs[field], "{field}");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_prompt_can_be_scored_without_an_answer() {
    let server = TestServer::plain().await;
    let request = body(json!({ "logprobs": 1, "echo": true, "max_tokens": 0 }));
    let answer = server.post(PATH, &request).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "def add(a, b):");
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    assert_eq!(
        choice["logprobs"]["tokens"].as_array().map(Vec::len),
        answer["usage"]["prompt_tokens"].as_u64().map(|n| n as usize)
    );
    server.stop().await;
}

#[tokio::test]
async fn a_suffix_makes_a_fill_in_the_middle_prompt() {
    let server = TestServer::plain().await;
    let filled = server
        .post(PATH, &body(json!({ "prompt": "def ", "suffix": "return a", "fill": "raw" })))
        .await
        .json();
    let by_hand = json!({ "prompt": "<|fim_prefix|>def <|fim_suffix|>return a<|fim_middle|>" });
    let by_hand = server.post(PATH, &body(by_hand)).await.json();
    assert_eq!(filled["choices"][0]["text"], by_hand["choices"][0]["text"]);
    assert_eq!(filled["usage"]["prompt_tokens"], by_hand["usage"]["prompt_tokens"]);
    // Text that spells a control token stays text.
    let spelled = body(json!({ "prompt": "def ", "suffix": "<|fim_middle|>" }));
    let spelled = server.post(PATH, &spelled).await.json();
    assert!(spelled["usage"]["prompt_tokens"].as_u64() > Some(5), "{}", spelled["usage"]);
    server.stop().await;

    let checkpoint = CheckpointSpec { fim_order: Some("spm"), ..CheckpointSpec::default() };
    let server = TestServer::start(TestOptions { checkpoint, ..TestOptions::default() }).await;
    let filled = server
        .post(PATH, &body(json!({ "prompt": "def ", "suffix": "return a", "fill": "raw" })))
        .await
        .json();
    let by_hand = json!({ "prompt": "<|fim_prefix|><|fim_suffix|>return a<|fim_middle|>def " });
    let by_hand = server.post(PATH, &body(by_hand)).await.json();
    assert_eq!(filled["choices"][0]["text"], by_hand["choices"][0]["text"]);
    server.stop().await;

    let checkpoint = CheckpointSpec { with_fim: false, ..CheckpointSpec::default() };
    let server = TestServer::start(TestOptions { checkpoint, ..TestOptions::default() }).await;
    let refused = server.post(PATH, &body(json!({ "suffix": "return a" }))).await;
    assert_eq!(refused.status, 400);
    assert_eq!(refused.error()["param"], "suffix");
    let empty = server.post(PATH, &body(json!({ "suffix": "" }))).await;
    assert_eq!(empty.status, 200, "an empty suffix is none");
    server.stop().await;
}

#[tokio::test]
async fn auto_picks_a_lane_and_keeps_the_clients_name() {
    let server = TestServer::plain().await;
    for (model, max_tokens, lane) in [
        (json!("auto"), 16, "fast"),
        (json!("auto"), 100, "deep"),
        (Value::Null, 16, "fast"),
        (json!("big-model"), 16, "deep"),
        (json!("small-model"), 16, "fast"),
    ] {
        let answer = server.post(PATH, &body(json!({ "model": model, "max_tokens": max_tokens }))).await;
        assert_eq!(answer.headers["x-tandem-lane"], lane, "{model} with {max_tokens} tokens");
        assert_eq!(answer.json()["model"], if model.is_null() { json!("auto") } else { model });
    }
    server.stop().await;

    let server = TestServer::start(TestOptions { with_draft: false, ..TestOptions::default() }).await;
    let answer = server.post(PATH, &body(json!({ "model": "auto", "max_tokens": 4 }))).await;
    assert_eq!(answer.headers["x-tandem-lane"], "deep", "the only lane there is");
    assert_eq!(server.post(PATH, &body(json!({ "model": "fast" }))).await.status, 404);
    server.stop().await;
}

#[tokio::test]
async fn defaults_come_from_the_models_generation_config() {
    let generation_config = json!({ "temperature": 0.0 });
    let checkpoint = CheckpointSpec { generation_config, ..CheckpointSpec::default() };
    let server = TestServer::start(TestOptions { checkpoint, ..TestOptions::default() }).await;
    let mut request = body(json!({ "temperature": null, "seed": 1 }));
    let first = server.post(PATH, &request).await.json();
    request["seed"] = json!(2);
    let second = server.post(PATH, &request).await.json();
    assert_eq!(first["choices"], second["choices"], "at temperature 0 the seed does not matter");
    request["temperature"] = json!(1.0);
    let sampled = server.post(PATH, &request).await.json();
    assert_ne!(first["choices"], sampled["choices"]);
    server.stop().await;
}

#[tokio::test]
async fn sampling_fields_reach_the_engine() {
    let server = TestServer::plain().await;
    let id = server.tokenizer.encode("a", false).expect("encodes")[0];
    let forced = body(json!({ "logit_bias": { id.to_string(): 100 }, "max_tokens": 5 }));
    assert_eq!(server.post(PATH, &forced).await.json()["choices"][0]["text"], "aaaaa");
    let stopped = body(json!({ "logit_bias": { id.to_string(): 100 }, "stop_token_ids": [id] }));
    let stopped = server.post(PATH, &stopped).await.json();
    assert_eq!(stopped["choices"][0]["text"], "");
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    server.stop().await;
}
