//! `/v1/responses` over WebSocket.

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::support::{TestOptions, TestServer};
use crate::{CALL, HERMES, TOKENS};

struct Client(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Client {
    async fn connect(server: &TestServer, key: Option<&str>) -> Result<Client, u16> {
        let url = format!("ws://{}/v1/responses", server.address);
        let mut request = url.into_client_request().expect("a request");
        if let Some(key) = key {
            let value = format!("Bearer {key}").parse().expect("a header");
            request.headers_mut().insert("authorization", value);
        }
        match connect_async(request).await {
            Ok((stream, _)) => Ok(Client(stream)),
            Err(tokio_tungstenite::tungstenite::Error::Http(response)) => Err(response.status().as_u16()),
            Err(error) => panic!("{error}"),
        }
    }

    async fn send(&mut self, message: &str) {
        self.0.send(Message::text(message)).await.expect("the server reads");
    }

    async fn receive(&mut self) -> Value {
        loop {
            let message = self.0.next().await.expect("the connection stays").expect("a message");
            if let Message::Text(text) = message {
                return serde_json::from_str(&text).expect("JSON");
            }
        }
    }

    /// A turn's events up to the last.
    async fn turn(&mut self, extra: Value) -> Vec<Value> {
        let mut body =
            json!({ "type": "response.create", "model": "deep", "temperature": 0, "store": false });
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        self.send(&body.to_string()).await;
        let mut events = Vec::new();
        loop {
            events.push(self.receive().await);
            let kind = events.last().expect("one")["type"].as_str().expect("a type").to_owned();
            let ends = ["response.completed", "response.incomplete", "response.failed", "error"];
            if ends.contains(&kind.as_str()) {
                return events;
            }
        }
    }
}

fn response(events: &[Value]) -> &Value {
    &events.last().expect("events")["response"]
}

fn code(events: &[Value]) -> &Value {
    &events.last().expect("events")["error"]["code"]
}

fn tools() -> Value {
    json!([{ "type": "function", "name": "weather", "parameters": { "type": "object" } },
        { "type": "function", "name": "now", "parameters": { "type": "object" } }])
}

#[tokio::test]
async fn one_connection_takes_many_turns_that_need_not_be_stored() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say_when(&[(&["<|im_start|>tool\nsunny"], "It is sunny."), (&[], CALL)]);
    let mut client = Client::connect(&server, None).await.expect("a connection");
    let first = client.turn(json!({ "input": "How is the weather?", "tools": tools() })).await;
    assert_eq!(first[0]["type"], "response.created");
    for (i, event) in first.iter().enumerate() {
        assert_eq!(event["sequence_number"], i);
    }
    let calls = response(&first)["output"].as_array().expect("items");
    let results: Vec<Value> = calls
        .iter()
        .filter(|item| item["type"] == "function_call")
        .map(|call| json!({ "type": "function_call_output", "call_id": call["call_id"], "output": "sunny" }))
        .collect();
    assert_eq!(results.len(), 2);
    let id = response(&first)["id"].as_str().expect("an id").to_owned();
    assert_eq!(server.get(&format!("/v1/responses/{id}")).await.status, 404);
    let go_on = json!({ "input": results, "tools": tools(), "previous_response_id": id });
    let second = client.turn(go_on.clone()).await;
    assert_eq!(response(&second)["output"][0]["content"][0]["text"], "It is sunny.", "{second:?}");
    assert!(response(&second)["usage"]["input_tokens_details"]["cached_tokens"].as_u64() > Some(0));
    // A third one goes on from the second, with all that was said before it.
    let id = response(&second)["id"].clone();
    let third = client.turn(json!({ "input": "Sure?", "tools": tools(), "previous_response_id": id })).await;
    let input_tokens = |events: &[Value]| response(events)["usage"]["input_tokens"].as_u64();
    assert!(input_tokens(&third) > input_tokens(&second));
    // Another connection knows none of them.
    let mut other = Client::connect(&server, None).await.expect("a connection");
    assert_eq!(code(&other.turn(go_on).await), "previous_response_not_found");
    server.stop().await;
}

#[tokio::test]
async fn a_turn_that_fails_leaves_the_connection_and_nothing_to_go_on_from() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say("OK.");
    let mut client = Client::connect(&server, None).await.expect("a connection");
    for (message, wanted) in [
        ("{", "invalid_request_error"),
        ("[]", "invalid_request_error"),
        ("{}", "invalid_request_error"),
        ("{\"type\": \"response.cancel\"}", "invalid_request_error"),
        ("{\"type\": \"response.create\", \"model\": \"none\", \"input\": \"a\"}", "model_not_found"),
        ("{\"type\": \"response.create\", \"input\": 7}", "invalid_request_error"),
    ] {
        client.send(message).await;
        let error = client.receive().await;
        assert_eq!((&error["type"], &error["error"]["code"]), (&json!("error"), &json!(wanted)), "{message}");
        assert!(error["status"].is_u64() && error["error"]["message"].is_string(), "{error}");
    }
    let first = client.turn(json!({ "input": "a" })).await;
    let id = response(&first)["id"].clone();
    let stray = json!([{ "type": "function_call_output", "call_id": "none", "output": "" }]);
    let failed = client.turn(json!({ "input": stray, "previous_response_id": id })).await;
    assert_eq!(failed.last().expect("events")["error"]["param"], "input");
    let again = client.turn(json!({ "input": "b", "previous_response_id": id })).await;
    assert_eq!(code(&again), "previous_response_not_found");
    server.stop().await;
}

#[tokio::test]
async fn a_turn_can_warm_the_cache_and_end_with_the_connection() {
    let server = TestServer::scripted(HERMES, TOKENS).await;
    server.say(&"word ".repeat(600));
    let mut client = Client::connect(&server, None).await.expect("a connection");
    let warm = client.turn(json!({ "input": "A question that is long enough.", "generate": false })).await;
    assert_eq!((&response(&warm)["status"], &response(&warm)["output"]), (&json!("completed"), &json!([])));
    client.send(&json!({ "type": "response.create", "model": "deep", "input": "a" }).to_string()).await;
    while client.receive().await["type"] != "response.output_text.delta" {}
    drop(client);
    server.until("the sequence ends with its client", |stats| stats.num_aborted == 1).await;
    server.stop().await;
}

#[tokio::test]
async fn a_connection_needs_a_key_and_a_handshake() {
    let api_keys = vec!["one".to_owned()];
    let server = TestServer::start(TestOptions { api_keys, ..TestOptions::default() }).await;
    assert_eq!(Client::connect(&server, None).await.err(), Some(401));
    assert_eq!(Client::connect(&server, Some("two")).await.err(), Some(401));
    let mut client = Client::connect(&server, Some("one")).await.expect("a connection");
    let turn = client.turn(json!({ "input": "a", "max_output_tokens": 2 })).await;
    assert_eq!(response(&turn)["status"], "incomplete");
    let plain = server.request(http::Method::GET, "/v1/responses", &[("x-api-key", "one")], "").await;
    assert_eq!(plain.status, 400);
    assert!(plain.error()["message"].as_str().is_some_and(|text| text.contains("WebSocket")));
    server.stop().await;
}
