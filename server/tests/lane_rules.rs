//! Who answers `auto`, by rules; escalation from the draft to the target; what responses say about it.

mod support;

use http::HeaderValue;
use serde_json::{Value, json};
use support::{TestOptions, TestServer};
use tandem::http::lanes::{Conditions, Escalation, LanePolicy, LaneRule, WorkKind};
use tandem_engine::Lane;

fn rule(name: &str, when: Conditions, lane: Lane, escalation: Option<Escalation>) -> LaneRule {
    LaneRule { name: name.into(), when, lane, escalation }
}

async fn server(rules: Vec<LaneRule>, fast_context: Option<usize>) -> TestServer {
    let policy = LanePolicy { rules, fast_context };
    TestServer::start(TestOptions { policy, prefix_cache: false, sharing: false, ..TestOptions::default() })
        .await
}

fn fast_with(margin: f32, tokens: u32) -> Vec<LaneRule> {
    vec![rule("quick", Conditions::default(), Lane::Fast, Some(Escalation { margin, tokens }))]
}

/// Lane, reason, text.
async fn complete(server: &TestServer, body: &Value) -> (String, String, String) {
    let answer = server.post("/v1/completions", body).await;
    assert_eq!(answer.status, 200, "{:?}", String::from_utf8_lossy(&answer.body));
    let header = |name: &str| answer.headers[name].to_str().expect("text").to_owned();
    let (lane, reason) = (header("x-tandem-lane"), header("x-tandem-lane-reason"));
    let text = if body["stream"] == true {
        let events = answer.events();
        let timings = &events.last().expect("an event")["timings"];
        assert_eq!((&timings["lane"], &timings["lane_reason"]), (&json!(lane), &json!(reason)));
        events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect()
    } else {
        let timings = &answer.json()["timings"];
        assert_eq!((&timings["lane"], &timings["lane_reason"]), (&json!(lane), &json!(reason)));
        answer.json()["choices"][0]["text"].as_str().expect("text").to_owned()
    };
    (lane, reason, text)
}

fn body(model: &str, stream: bool) -> Value {
    json!({ "model": model, "prompt": "def add(a, b):", "max_tokens": 24, "ignore_eos": true, "seed": 5, "stream": stream })
}

#[tokio::test]
async fn the_first_rule_that_matches_counts_and_is_named() {
    let rules = vec![
        rule(
            "tools are for the target",
            Conditions { tools: Some(true), ..Conditions::default() },
            Lane::Deep,
            None,
        ),
        rule(
            "little chats",
            Conditions {
                work: vec![WorkKind::Chat],
                max_tokens: Some("..8".parse().expect("a span")),
                prompt_bytes: Some("..40".parse().expect("a span")),
                ..Conditions::default()
            },
            Lane::Fast,
            None,
        ),
        rule(
            "effort",
            Conditions { reasoning_effort: vec!["minimal".to_owned()], ..Conditions::default() },
            Lane::Fast,
            None,
        ),
        rule(
            "by path",
            Conditions { endpoints: vec!["/v1/mess*".to_owned()], ..Conditions::default() },
            Lane::Fast,
            None,
        ),
    ];
    let server = server(rules, None).await;
    let messages = json!([{ "role": "user", "content": "hello" }]);
    let tool = json!([{ "type": "function", "function": { "name": "f", "parameters": {} } }]);
    for (path, fields, lane, reason) in [
        ("/v1/chat/completions", json!({ "max_tokens": 4 }), "fast", "rule little chats"),
        ("/v1/chat/completions", json!({ "max_completion_tokens": 4 }), "fast", "rule little chats"),
        (
            "/v1/chat/completions",
            json!({ "max_tokens": 4, "tools": tool }),
            "deep",
            "rule tools are for the target",
        ),
        ("/v1/chat/completions", json!({ "max_tokens": 9 }), "deep", "no rule"),
        (
            "/v1/chat/completions",
            json!({ "max_tokens": 9, "reasoning_effort": "minimal" }),
            "fast",
            "rule effort",
        ),
        ("/v1/chat/completions", json!({ "max_tokens": 4, "model": "deep" }), "deep", "named"),
        ("/v1/messages", json!({ "max_tokens": 9 }), "fast", "rule by path"),
    ] {
        let mut body = fields;
        body["messages"] = messages.clone();
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 200, "{body} {:?}", String::from_utf8_lossy(&answer.body));
        assert_eq!(
            (&answer.headers["x-tandem-lane"], &answer.headers["x-tandem-lane-reason"]),
            (&HeaderValue::from_static(lane), &HeaderValue::from_static(reason)),
            "{body}"
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn a_client_may_ask_for_a_lane_in_a_header_and_cannot_forge_its_path() {
    let server = TestServer::plain().await;
    let body = json!({ "prompt": "a", "max_tokens": 2 }).to_string();
    for (headers, lane, reason) in [
        (&[("x-tandem-lane", "deep")][..], "deep", "rule header-deep"),
        (&[("x-tandem-lane", "fast")], "fast", "rule header-fast"),
        (&[("x-tandem-lane", "nonsense")], "fast", "rule short-completion"),
        (&[("x-tandem-endpoint", "/v1/messages")], "fast", "rule short-completion"),
    ] {
        let answer = server.request(http::Method::POST, "/v1/completions", headers, &body).await;
        assert_eq!(
            (&answer.headers["x-tandem-lane"], &answer.headers["x-tandem-lane-reason"]),
            (&HeaderValue::from_static(lane), &HeaderValue::from_static(reason))
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn an_unsure_draft_gives_way_and_the_answer_is_the_targets() {
    let server = server(fast_with(100.0, 4), None).await;
    for stream in [false, true] {
        let (lane, reason, deep) = complete(&server, &body("deep", stream)).await;
        assert_eq!((lane.as_str(), reason.as_str()), ("deep", "named"));
        let (lane, reason, escalated) = complete(&server, &body("auto", stream)).await;
        assert_eq!((lane.as_str(), reason.as_str()), ("deep", "escalated: unsure; rule quick"));
        assert_eq!(escalated, deep);
    }
    // The draft's sequences have ended, too: they were given up, if they had not said it all by then.
    server.until("all have ended", |stats| stats.num_running == 0).await;
    let page = String::from_utf8(server.get("/metrics").await.body.to_vec()).expect("text");
    let line = "tandem_lane_choices_total{lane=\"deep\",reason=\"unsure\"} 2";
    assert!(page.lines().any(|have| have == line), "{page}");
    server.stop().await;
}

#[tokio::test]
async fn a_draft_that_is_sure_answers() {
    let server = server(fast_with(1e-6, 4), None).await;
    let (_, _, fast) = complete(&server, &body("fast", true)).await;
    let (lane, reason, text) = complete(&server, &body("auto", true)).await;
    assert_eq!((lane.as_str(), reason.as_str()), ("fast", "rule quick"));
    assert_eq!(text, fast, "looking at the margins changes nothing");
    // Fewer tokens than are to be looked at.
    let mut short = body("auto", false);
    short["max_tokens"] = json!(1);
    assert_eq!(complete(&server, &short).await.0, "fast");
    server.stop().await;
}

#[tokio::test]
async fn a_request_that_outgrows_the_fast_lane_goes_to_the_other() {
    let rules = vec![rule("quick", Conditions::default(), Lane::Fast, None)];
    let server = server(rules, Some(64)).await;
    let mut body = body("auto", false);
    assert_eq!(complete(&server, &body).await.0, "fast");
    body["max_tokens"] = json!(64);
    let (lane, reason, text) = complete(&server, &body).await;
    assert_eq!((lane.as_str(), reason.as_str()), ("deep", "escalated: outgrown; rule quick"));
    body["model"] = json!("deep");
    assert_eq!(complete(&server, &body).await.2, text);
    body["model"] = json!("fast");
    assert_eq!(complete(&server, &body).await.0, "fast", "who names a lane gets it");
    server.stop().await;
}
