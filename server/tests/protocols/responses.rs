//! `/v1/responses`.

use http::Method;
use serde_json::{Value, json};

use crate::support::{Answer, TestOptions, TestServer};
use crate::{CALL, HERMES, TOKENS};

const PATH: &str = "/v1/responses";

fn body(extra: Value) -> Value {
    let tool = |name: &str| {
        json!({ "type": "function", "name": name, "description": "A tool", "strict": false,
        "parameters": { "type": "object", "properties": { "city": { "type": "string" } } } })
    };
    let mut body = json!({
        "model": "deep", "temperature": 0, "input": "How is the weather?",
        "tools": [tool("weather"), { "type": "web_search" }, { "type": "namespace", "name": "x" }, tool("now")],
    });
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

fn events(answer: &Answer) -> Vec<Value> {
    let text = std::str::from_utf8(&answer.body).expect("UTF-8");
    let (text, end) = text.trim_end().rsplit_once("\n\n").expect("events");
    assert_eq!(end, "data: [DONE]");
    let events: Vec<Value> = text
        .split("\n\n")
        .map(|event| {
            let (name, data) = event.split_once("\ndata: ").expect("a name and data");
            let data: Value = serde_json::from_str(data).expect("JSON");
            assert_eq!(data["type"], name.strip_prefix("event: ").expect("a name"));
            data
        })
        .collect();
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], i);
    }
    events
}

/// Without ids and times.
fn comparable(output: &Value) -> Value {
    let mut output = output.clone();
    for item in output.as_array_mut().expect("items") {
        let item = item.as_object_mut().expect("an item");
        assert!(item.remove("id").is_some_and(|id| id.is_string()));
        item.remove("call_id");
    }
    output
}

fn wanted_output() -> Value {
    let call = |name: &str, arguments: &str| {
        json!({ "type": "function_call", "status": "completed",
        "name": name, "arguments": arguments })
    };
    json!([
        { "type": "reasoning", "status": "completed", "summary": [], "encrypted_content": null,
          "content": [{ "type": "reasoning_text", "text": "Which city?" }] },
        { "type": "message", "status": "completed", "role": "assistant",
          "content": [{ "type": "output_text", "text": "Let me look.", "annotations": [], "logprobs": [] }] },
        call("weather", "{\"city\": \"Paris\"}"),
        call("now", "{}"),
    ])
}

#[tokio::test]
async fn items_are_the_same_streamed_and_whole() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say(CALL);
    let whole = server.post(PATH, &body(json!({}))).await.json();
    assert_eq!((&whole["object"], &whole["status"]), (&json!("response"), &json!("completed")), "{whole}");
    assert_eq!(comparable(&whole["output"]), wanted_output());
    let reasoning = server.tokenizer.encode("Which city?", false).expect("tokens").len();
    assert_eq!(whole["usage"]["output_tokens_details"]["reasoning_tokens"], reasoning);
    assert!(whole["usage"]["total_tokens"].as_u64() > whole["usage"]["output_tokens"].as_u64());

    let events = events(&server.post(PATH, &body(json!({ "stream": true }))).await);
    assert_eq!(events[0]["type"], "response.created");
    assert_eq!(events[1]["type"], "response.in_progress");
    let last = events.last().expect("events");
    assert_eq!(last["type"], "response.completed");
    assert_eq!(comparable(&last["response"]["output"]), wanted_output());
    // What was built up on the way is what is said at the end.
    let output = last["response"]["output"].as_array().expect("items");
    for (index, item) in output.iter().enumerate() {
        let about = |event: &&Value| event["output_index"] == index;
        let mine: Vec<&Value> = events.iter().filter(about).collect();
        assert_eq!(mine[0]["type"], "response.output_item.added");
        assert_eq!(mine[0]["item"]["id"], item["id"]);
        let done = mine.last().expect("events");
        assert_eq!((&done["type"], &done["item"]), (&json!("response.output_item.done"), item));
        let deltas: String = mine.iter().filter_map(|event| event["delta"].as_str()).collect();
        let text = item["arguments"].as_str().or_else(|| item["content"][0]["text"].as_str());
        assert_eq!(Some(deltas.as_str()), text);
        assert!(mine[1..mine.len() - 1].iter().all(|event| event["item_id"] == item["id"]));
    }
    let cut = server.post(PATH, &body(json!({ "max_output_tokens": 3 }))).await.json();
    assert_eq!(cut["status"], "incomplete");
    assert_eq!(cut["incomplete_details"], json!({ "reason": "max_output_tokens" }));
    server.stop().await;
}

#[tokio::test]
async fn a_response_goes_on_from_an_earlier_one_or_from_its_items() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say(CALL);
    let first = server.post(PATH, &body(json!({ "instructions": "Be brief." }))).await.json();
    let call_id = first["output"][2]["call_id"].clone();
    server.say("It is sunny.");
    let results = json!([{ "type": "function_call_output", "call_id": call_id, "output": "sunny" },
        { "type": "function_call_output", "call_id": first["output"][3]["call_id"], "output": [{ "type": "input_text", "text": "noon" }] }]);
    let by_id = json!({ "input": results, "previous_response_id": first["id"], "instructions": "Be brief.", "store": false });
    let by_id = server.post(PATH, &body(by_id)).await.json();
    assert_eq!(by_id["output"][0]["content"][0]["text"], "It is sunny.", "{by_id}");

    let mut items =
        vec![json!({ "role": "user", "content": [{ "type": "input_text", "text": "How is the weather?" }] })];
    items.extend(first["output"].as_array().expect("items").clone());
    items.push(json!({ "type": "web_search_call", "id": "ws_1" }));
    items.extend(results.as_array().expect("items").clone());
    let by_items = json!({ "input": items, "instructions": "Be brief." });
    let by_items = server.post(PATH, &body(by_items)).await.json();
    assert_eq!(by_items["usage"]["input_tokens"], by_id["usage"]["input_tokens"]);
    assert_eq!(comparable(&by_items["output"]), comparable(&by_id["output"]));

    let path = format!("{PATH}/{}", first["id"].as_str().expect("an id"));
    assert_eq!(server.get(&path).await.json(), first);
    let deleted = server.request(Method::DELETE, &path, &[], "").await.json();
    assert_eq!(deleted["deleted"], true);
    assert_eq!(server.get(&path).await.status, 404);
    let unstored = format!("{PATH}/{}", by_id["id"].as_str().expect("an id"));
    assert_eq!(server.get(&unstored).await.error()["code"], "response_not_found");
    server.stop().await;
}

#[tokio::test]
async fn nobody_sees_the_responses_of_another_key() {
    let api_keys = vec!["one".to_owned(), "two".to_owned()];
    let server = TestServer::start(TestOptions { api_keys, ..TestOptions::default() }).await;
    let request = json!({ "input": "a", "max_output_tokens": 2 }).to_string();
    let ask = async |method: Method, path: &str, key: &str, body: &str| {
        server.request(method, path, &[("x-api-key", key)], body).await
    };
    let mine = ask(Method::POST, PATH, "one", &request).await.json();
    let path = format!("{PATH}/{}", mine["id"].as_str().expect("an id"));
    assert_eq!(ask(Method::GET, &path, "two", "").await.status, 404);
    assert_eq!(ask(Method::DELETE, &path, "two", "").await.status, 404);
    let from = json!({ "input": "a", "previous_response_id": mine["id"] }).to_string();
    let refused = ask(Method::POST, PATH, "two", &from).await;
    assert_eq!((refused.status.as_u16(), &refused.error()["param"]), (400, &json!("previous_response_id")));
    assert_eq!(refused.error()["code"], "previous_response_not_found");
    assert_eq!(ask(Method::GET, &path, "one", "").await.status, 200);
    let items = format!("{path}/input_items");
    assert_eq!(ask(Method::GET, &items, "two", "").await.status, 404);
    server.stop().await;
}

#[tokio::test]
async fn what_was_said_can_be_listed_and_what_has_ended_not_be_cancelled() {
    let server = TestServer::plain().await;
    let request = json!({ "max_output_tokens": 2, "input": [
        { "role": "user", "content": "a" },
        { "role": "user", "content": [{ "type": "input_text", "text": "b" },
            { "type": "input_image", "image_url": "data:image/png;base64,AAAA" }], "id": "msg_mine" },
    ] });
    let made = server.post(PATH, &request).await.json();
    let path = format!("{PATH}/{}", made["id"].as_str().expect("an id"));
    let items = server.get(&format!("{path}/input_items")).await.json();
    assert_eq!((&items["object"], &items["first_id"]), (&json!("list"), &json!("msg_mine")));
    assert_eq!(items["data"][1]["content"], json!([{ "type": "input_text", "text": "a" }]));
    assert!(items["last_id"].as_str().is_some_and(|id| id.starts_with("msg_")));
    let cancelled = server.post(&format!("{path}/cancel"), &json!({})).await;
    assert_eq!((cancelled.status.as_u16(), &cancelled.error()["param"]), (400, &json!("response_id")));
    assert_eq!(server.post(&format!("{PATH}/resp_none/cancel"), &json!({})).await.status, 404);
    server.stop().await;
}

#[tokio::test]
async fn a_compacted_conversation_goes_on() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say_when(&[
        (&["The launch is on Tuesday", "What was said before"], "On Tuesday."),
        (&["Summarise this conversation"], "The launch is on Tuesday."),
    ]);
    let input =
        json!([{ "role": "user", "content": "When is it?" }, { "role": "assistant", "content": "Tuesday." }]);
    let path = format!("{PATH}/compact");
    let compacted =
        server.post(&path, &json!({ "model": "deep", "temperature": 0, "input": input })).await.json();
    assert_eq!(compacted["object"], "response.compaction", "{compacted}");
    assert_eq!(compacted["output"][0]["type"], "compaction");
    let mut items = compacted["output"].as_array().expect("items").clone();
    items.push(json!({ "role": "user", "content": "So, when?" }));
    let answer =
        server.post(PATH, &json!({ "model": "deep", "temperature": 0, "input": items })).await.json();
    assert_eq!(answer["output"][0]["content"][0]["text"], "On Tuesday.", "{answer}");
    assert_eq!(server.post(&path, &json!({ "input": input })).await.error()["param"], "model");
    server.stop().await;
}

#[tokio::test]
async fn faults_name_the_item() {
    let server = TestServer::plain().await;
    for (extra, param) in [
        (json!({ "input": 7 }), "input"),
        (json!({ "input": [] }), "input"),
        (json!({ "input": [7] }), "input[0]"),
        (json!({ "input": [{ "role": "user" }] }), "input[0].content"),
        (
            json!({ "input": [{ "role": "user", "content": [{ "type": "input_file" }] }] }),
            "input[0].content[0]",
        ),
        (json!({ "input": [{ "type": "function_call", "call_id": "a" }] }), "input[0].name"),
        (json!({ "input": [{ "type": "function_call_output", "call_id": "none", "output": "" }] }), "input"),
        (json!({ "max_output_tokens": 0 }), "max_output_tokens"),
        (json!({ "max_output_tokens": -1 }), "max_output_tokens"),
        (json!({ "max_output_tokens": 9_223_372_036_854_775_808_u64 }), "max_output_tokens"),
        (json!({ "max_output_tokens": 1e308 }), "max_output_tokens"),
        (json!({ "background": true }), "background"),
        (json!({ "reasoning": { "effort": "huge" } }), "reasoning_effort"),
        (json!({ "text": { "format": { "type": "json_schema" } } }), "text.format"),
    ] {
        let answer = server.post(PATH, &body(extra.clone())).await;
        assert_eq!(answer.status, 400, "{extra}");
        assert_eq!(answer.error()["param"], param, "{extra}");
    }
    server.stop().await;
}
