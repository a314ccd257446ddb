//! Requests that read one sequence together. Where two must meet, all seats are taken first: the
//! sequence that they share then waits until both are there.

mod support;

use http::Response;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};
use support::{Answer, TestOptions, TestServer, finish};

const PATH: &str = "/v1/completions";

async fn server(options: TestOptions) -> TestServer {
    TestServer::start(TestOptions { max_model_len: 8192, ..options }).await
}

fn greedy(extra: Value) -> Value {
    let mut body = json!({
        "model": "deep", "prompt": "def add(a, b):", "max_tokens": 24, "temperature": 0,
        "ignore_eos": true, "stream": true, "stream_options": { "include_usage": true },
    });
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

/// Takes all eight seats of the deep lane.
async fn take_seats(server: &TestServer, headers: &[(&str, &str)]) -> Vec<Response<Incoming>> {
    let mut streams = Vec::new();
    for seed in 1..=8 {
        let endless = greedy(json!({ "prompt": "a", "max_tokens": 8000, "temperature": 1, "seed": seed }));
        streams.push(server.post_open(PATH, headers, &endless).await);
        server.until("it runs", |stats| stats.num_running == seed).await;
    }
    streams
}

fn kind(response: &Response<Incoming>) -> Option<&str> {
    response.headers().get("x-tandem-shared").map(|value| value.to_str().expect("text"))
}

fn text(answer: &Answer) -> String {
    let events = answer.events();
    let choices = events.iter().flat_map(|event| event["choices"].as_array().expect("choices"));
    choices.map(|choice| choice["text"].as_str().expect("text")).collect()
}

fn usage(answer: &Answer) -> Value {
    answer.events().last().expect("events")["usage"].clone()
}

/// The text of a request that has the server to itself.
async fn alone(server: &TestServer, body: &Value) -> String {
    server.until("the server is idle", |stats| stats.num_running + stats.num_waiting == 0).await;
    let response = server.post_open(PATH, &[], body).await;
    assert_eq!(kind(&response), None);
    text(&finish(response).await)
}

async fn metric(server: &TestServer, line: &str) -> u64 {
    let page = String::from_utf8(server.get("/metrics").await.body.to_vec()).expect("text");
    let found = page.lines().find_map(|have| have.strip_prefix(line));
    found.unwrap_or_else(|| panic!("{line} is not in\n{page}")).trim().parse().expect("a count")
}

#[tokio::test]
async fn identical_greedy_requests_run_one_sequence() {
    let server = server(TestOptions::default()).await;
    let seats = take_seats(&server, &[]).await;
    let first = server.post_open(PATH, &[], &greedy(json!({}))).await;
    server.until("the first waits", |stats| stats.num_waiting == 1).await;
    // At temperature 0 seeds say nothing; neither do priority, prediction and stop strings.
    let extras = [
        json!({}),
        json!({ "seed": 5 }),
        json!({ "priority": "batch" }),
        json!({ "prediction": { "type": "content", "content": "return a + b" } }),
        json!({ "stop": "\u{1}\u{2}" }),
    ];
    let mut others = Vec::new();
    for extra in &extras {
        others.push(server.post_open(PATH, &[], &greedy(extra.clone())).await);
    }
    assert_eq!(kind(&first), None);
    assert!(others.iter().all(|other| kind(other) == Some("identical")));
    assert_eq!(server.engine.stats().num_waiting, 1);
    let line = "tandem_sequences_shared_total{kind=\"identical\"}";
    assert_eq!(metric(&server, line).await, extras.len() as u64);
    drop(seats);
    let first = finish(first).await;
    for other in others {
        let other = finish(other).await;
        assert_eq!(text(&other), text(&first));
        assert_eq!(usage(&other)["completion_tokens"], 24);
        let usage = usage(&other);
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]);
    }
    server.until("it is counted", |stats| stats.num_finished == 1).await;
    assert_eq!(alone(&server, &greedy(json!({}))).await, text(&first));
    server.stop().await;
}

#[tokio::test]
async fn what_is_not_the_same_request_gets_a_sequence_of_its_own() {
    let api_keys = vec!["one".to_owned(), "two".to_owned()];
    let server = server(TestOptions { api_keys, ..TestOptions::default() }).await;
    let one = [("x-api-key", "one")];
    let seats = take_seats(&server, &one).await;
    let sampled = |seed: Value| greedy(json!({ "temperature": 0.8, "seed": seed }));
    let requests = [
        ("one", greedy(json!({}))),
        ("two", greedy(json!({}))),
        ("one", greedy(json!({ "cache_salt": "mine" }))),
        ("one", greedy(json!({ "model": "fast" }))),
        ("one", greedy(json!({ "prompt": "def add(a, b) :" }))),
        ("one", greedy(json!({ "presence_penalty": 0.5 }))),
        ("one", greedy(json!({ "logprobs": 1 }))),
        ("one", greedy(json!({ "stop_token_ids": [1] }))),
        ("one", sampled(json!(1))),
        ("one", sampled(json!(2))),
        ("one", sampled(Value::Null)),
        ("one", sampled(Value::Null)),
    ];
    let mut waiting = Vec::new();
    for (key, body) in &requests {
        let response = server.post_open(PATH, &[("x-api-key", key)], body).await;
        assert_eq!(kind(&response), None, "{body}");
        waiting.push(response);
    }
    let again = server.post_open(PATH, &one, &sampled(json!(2))).await;
    assert_eq!(kind(&again), Some("identical"), "the same named seed");
    drop(seats);
    let mut texts = Vec::new();
    for response in waiting {
        texts.push(text(&finish(response).await));
    }
    assert_eq!(texts[0], texts[1], "other tenants get the same answer all the same");
    assert_ne!(texts[8], texts[9], "other seeds");
    assert_eq!(text(&finish(again).await), texts[9]);
    server.stop().await;
}

#[tokio::test]
async fn sharing_can_be_switched_off() {
    let server = server(TestOptions { sharing: false, ..TestOptions::default() }).await;
    let seats = take_seats(&server, &[]).await;
    let first = server.post_open(PATH, &[], &greedy(json!({}))).await;
    let second = server.post_open(PATH, &[], &greedy(json!({}))).await;
    server.until("both wait", |stats| stats.num_waiting == 2).await;
    assert_eq!((kind(&first), kind(&second)), (None, None));
    drop(seats);
    assert_eq!(text(&finish(first).await), text(&finish(second).await));
    server.stop().await;
}

#[tokio::test]
async fn a_reader_that_leaves_does_not_disturb_the_other() {
    for leaver in [0, 1] {
        let server = server(TestOptions::default()).await;
        let seats = take_seats(&server, &[]).await;
        let mut readers = Vec::new();
        for _ in 0..2 {
            readers.push(server.post_open(PATH, &[], &greedy(json!({}))).await);
        }
        assert_eq!(kind(&readers[1]), Some("identical"));
        drop(readers.remove(leaver));
        drop(seats);
        server.until("the seats are free", |stats| stats.num_aborted == 8).await;
        let left = finish(readers.remove(0)).await;
        assert_eq!(usage(&left)["completion_tokens"], 24);
        assert_eq!(text(&left), alone(&server, &greedy(json!({}))).await);
        assert_eq!(server.engine.stats().num_aborted, 8, "the shared sequence was not");
        server.stop().await;
    }
}

#[tokio::test]
async fn a_sequence_that_nobody_reads_any_more_is_freed() {
    let server = server(TestOptions::default()).await;
    let seats = take_seats(&server, &[]).await;
    let first = server.post_open(PATH, &[], &greedy(json!({}))).await;
    let second = server.post_open(PATH, &[], &greedy(json!({}))).await;
    server.until("it waits", |stats| stats.num_waiting == 1).await;
    drop(first);
    drop(second);
    server.until("it is gone", |stats| stats.num_waiting == 0).await;
    // What is being freed is not joined.
    let third = server.post_open(PATH, &[], &greedy(json!({}))).await;
    assert_eq!(kind(&third), None);
    drop(seats);
    assert_eq!(usage(&finish(third).await)["completion_tokens"], 24);
    server.stop().await;
}

#[tokio::test]
async fn every_reader_has_its_own_length_and_stop_strings() {
    let server = server(TestOptions::default()).await;
    let whole = alone(&server, &greedy(json!({ "max_tokens": 60 }))).await;
    let middle = whole.char_indices().nth(whole.chars().count() / 2).expect("text").0;
    let stop = whole[middle..].chars().take(3).collect::<String>();
    let kept = &whole[..whole.find(&stop).expect("it is there")];
    let seats = take_seats(&server, &[]).await;
    let requests = [
        greedy(json!({ "max_tokens": 24 })),
        greedy(json!({ "max_tokens": 60 })),
        greedy(json!({ "max_tokens": 60, "stop": stop })),
        greedy(json!({ "max_tokens": 9 })),
    ];
    let mut readers = Vec::new();
    for body in &requests {
        readers.push(server.post_open(PATH, &[], body).await);
    }
    assert!(readers[1..].iter().all(|reader| kind(reader) == Some("identical")));
    drop(seats);
    let mut answers = Vec::new();
    for reader in readers {
        answers.push(finish(reader).await);
    }
    assert_eq!(text(&answers[1]), whole);
    assert_eq!(text(&answers[2]), kept);
    for (answer, max_tokens) in [(&answers[0], 24), (&answers[3], 9)] {
        assert_eq!(usage(answer)["completion_tokens"], max_tokens);
        let own = alone(&server, &greedy(json!({ "max_tokens": max_tokens }))).await;
        assert_eq!(text(answer), own);
    }
    server.stop().await;
}

#[tokio::test]
async fn equal_greedy_choices_are_one_sequence() {
    let server = server(TestOptions::default()).await;
    let seats = take_seats(&server, &[]).await;
    let response = server.post_open(PATH, &[], &greedy(json!({ "n": 3 }))).await;
    assert_eq!(kind(&response), Some("identical"));
    drop(seats);
    let answer = finish(response).await;
    let text = |index: u64| -> String {
        let events = answer.events();
        let choices = events.iter().flat_map(|event| event["choices"].as_array().expect("choices"));
        let own = choices.filter(|choice| choice["index"] == index);
        own.map(|choice| choice["text"].as_str().expect("text")).collect()
    };
    assert!(!text(0).is_empty());
    assert_eq!((text(1), text(2)), (text(0), text(0)));
    assert_eq!(usage(&answer)["completion_tokens"], 3 * 24);
    server.until("it is counted", |stats| stats.num_finished == 1).await;
    server.stop().await;
}

/// Reads a stream until it has brought so many characters.
async fn read_chars(response: &mut Response<Incoming>, count: usize) -> String {
    let (mut received, mut text) = (String::new(), String::new());
    while text.chars().count() < count {
        let frame = response.body_mut().frame().await.expect("more").expect("no error");
        received.push_str(std::str::from_utf8(frame.data_ref().expect("data")).expect("UTF-8"));
        let whole = received.rfind("\n\n").map_or(0, |end| end + 2);
        for event in received.drain(..whole).collect::<String>().split_terminator("\n\n") {
            let event: Value =
                serde_json::from_str(event.strip_prefix("data: ").expect("data")).expect("JSON");
            text.push_str(event["choices"][0]["text"].as_str().expect("text"));
        }
    }
    text
}

#[tokio::test]
async fn typing_what_a_running_completion_proposed_goes_on_with_it() {
    for suffix in [Value::Null, json!("\nreturn a")] {
        let server = server(TestOptions::default()).await;
        let prompt = "def add(a, b):";
        let request = |typed: &str, extra: Value| {
            let mut body =
                greedy(json!({ "prompt": format!("{prompt}{typed}"), "suffix": suffix, "fill": "raw" }));
            body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
            body
        };
        let mut first = server.post_open(PATH, &[], &request("", json!({ "max_tokens": 7000 }))).await;
        let begun = read_chars(&mut first, 12).await;
        for num_typed in [1, 4, 7] {
            let typed: String = begun.chars().take(num_typed).collect();
            let second = server.post_open(PATH, &[], &request(&typed, json!({ "max_tokens": 40 }))).await;
            assert_eq!(kind(&second), Some("continuation"), "typed {typed:?}");
            let second = finish(second).await;
            let usage = usage(&second);
            assert_eq!(usage["completion_tokens"], 40);
            assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]);
            let rest = text(&second);
            assert!(!rest.is_empty());
            let both = format!("{typed}{rest}");
            let shorter = both.len().min(begun.len());
            assert_eq!(both[..shorter], begun[..shorter]);
        }
        // Somebody who types something else, or asks for what sharing cannot give.
        let typed: String = begun.chars().take(3).collect();
        for (typed, extra) in [
            (format!("{typed}#"), json!({})),
            (typed.clone(), json!({ "seed": 3 })),
            (typed.clone(), json!({ "logprobs": 1 })),
            (typed.clone(), json!({ "n": 2 })),
            (typed.clone(), json!({ "suffix": "other" })),
            (typed.clone(), json!({ "cache_salt": "other" })),
            (typed.clone(), json!({ "min_tokens": 2 })),
        ] {
            let mut body = request(&typed, extra.clone());
            body["max_tokens"] = json!(7000);
            let other = server.post_open(PATH, &[], &body).await;
            assert_ne!(kind(&other), Some("continuation"), "{extra}");
        }
        assert_eq!(server.engine.stats().num_finished, 0, "the first one still runs");
        drop(first);
        server.stop().await;
    }
}

#[tokio::test]
async fn a_continuation_outlives_the_request_that_it_joined() {
    let server = server(TestOptions::default()).await;
    let whole = alone(&server, &greedy(json!({ "max_tokens": 600 }))).await;
    let mut first = server.post_open(PATH, &[], &greedy(json!({ "max_tokens": 7000 }))).await;
    let typed: String = read_chars(&mut first, 8).await.chars().take(5).collect();
    let prompt = format!("def add(a, b):{typed}");
    let second = server.post_open(PATH, &[], &greedy(json!({ "prompt": prompt, "max_tokens": 500 }))).await;
    assert_eq!(kind(&second), Some("continuation"));
    drop(first);
    let second = finish(second).await;
    assert_eq!(usage(&second)["completion_tokens"], 500);
    let both = format!("{typed}{}", text(&second));
    assert!(whole.starts_with(&both), "{both:?} is not the beginning of {whole:?}");
    server.until("nobody reads the rest", |stats| stats.num_running == 0).await;
    server.stop().await;
}

#[tokio::test]
async fn who_started_the_sequence_and_ends_first_reports_what_was_so_up_to_then() {
    let server = server(TestOptions::default()).await;
    let extra = json!({
        "prompt": "def add(a, b):\n    return a + b\n\n".repeat(8), "max_tokens": 400,
        "speculative": { "max_draft_tokens": 4 },
    });
    let whole = alone(&server, &greedy(extra.clone())).await;
    let seats = take_seats(&server, &[]).await;
    let mut ends_first = extra.clone();
    ends_first["stop"] = json!(whole.chars().skip(30).take(3).collect::<String>());
    let first = server.post_open(PATH, &[], &greedy(ends_first)).await;
    server.until("the first waits", |stats| stats.num_waiting == 1).await;
    let other = server.post_open(PATH, &[], &greedy(extra)).await;
    assert_eq!((kind(&first), kind(&other)), (None, Some("identical")));
    drop(seats);
    let first = finish(first).await;
    let usage = usage(&first);
    let count = |value: &Value| value.as_u64().expect("a count");
    assert!(count(&usage["prompt_tokens_details"]["cached_tokens"]) > 0, "{usage}");
    let timings =
        first.events().into_iter().rev().map(|event| event["timings"].clone()).find(Value::is_object);
    let timings = timings.expect("timings");
    assert!(count(&timings["draft_n"]) > 0, "{timings}");
    assert_eq!(text(&finish(other).await), whole);
    server.stop().await;
}
