//! What a peer can do with a socket: stall, vanish, stop reading, come in crowds. Timeouts are short
//! here and what is asserted is that the server closes, not when.

mod support;

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use support::{TestOptions, TestServer};
use tandem::http::{Limits, ServeOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const SHORT: Duration = Duration::from_millis(150);
const LONG: Duration = Duration::from_secs(600);

/// Timeouts that never end a test by themselves.
fn patient() -> ServeOptions {
    ServeOptions { header_timeout: LONG, idle_timeout: LONG, write_timeout: LONG, ..ServeOptions::default() }
}

fn options(serve: ServeOptions) -> TestOptions {
    TestOptions { serve, max_model_len: 8192, ..TestOptions::default() }
}

/// Everything the server sends until it closes. Hangs if it does not.
async fn read_to_close(stream: &mut TcpStream) -> Vec<u8> {
    let mut received = Vec::new();
    // A reset is a way of closing, too.
    let _ = stream.read_to_end(&mut received).await;
    received
}

/// A request whose answer takes the whole context.
fn endless(stream: bool) -> Value {
    json!({ "model": "deep", "prompt": "a", "max_tokens": 8000, "ignore_eos": true, "stream": stream })
}

fn raw_post(body: &Value) -> String {
    let body = body.to_string();
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn a_half_sent_head_is_closed_even_if_it_trickles() {
    let serve = ServeOptions { header_timeout: SHORT, ..patient() };
    let server = TestServer::start(options(serve)).await;
    let mut silent = server.connect().await;
    let mut stalled = server.connect().await;
    stalled.write_all(b"GET /health HTTP/1.1\r\nhost: te").await.expect("written");
    let mut trickling = server.connect().await;
    trickling.write_all(b"GET /health HTTP/1.1\r\n").await.expect("written");
    let (mut trickling_read, mut trickling_write) = trickling.into_split();
    let trickle = tokio::spawn(async move {
        while trickling_write.write_all(b"x-slow: 1\r\n").await.is_ok() {
            tokio::time::sleep(SHORT / 10).await;
        }
    });
    read_to_close(&mut silent).await;
    read_to_close(&mut stalled).await;
    let mut rest = Vec::new();
    let _ = trickling_read.read_to_end(&mut rest).await;
    trickle.await.expect("the writer saw the close");
    server.stop().await;
}

#[tokio::test]
async fn an_idle_connection_is_closed_after_its_answer() {
    let serve = ServeOptions { idle_timeout: SHORT, ..patient() };
    let server = TestServer::start(options(serve)).await;
    let mut stream = server.connect().await;
    for _ in 0..2 {
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: test\r\n\r\n").await.expect("written");
        let mut head = [0; 15];
        stream.read_exact(&mut head).await.expect("the connection is kept between requests");
        assert_eq!(&head, b"HTTP/1.1 200 OK");
        // The rest of the answer comes with the next read, or before the close.
        let mut rest = [0; 4096];
        let size = stream.read(&mut rest).await.expect("the rest of the answer");
        assert!(rest[..size].ends_with(b"}"), "{:?}", String::from_utf8_lossy(&rest[..size]));
    }
    assert!(read_to_close(&mut stream).await.is_empty());
    server.stop().await;
}

#[tokio::test]
async fn a_long_answer_outlives_the_idle_and_header_timeouts() {
    let tiny = Duration::from_millis(20);
    let serve = ServeOptions { header_timeout: SHORT, idle_timeout: tiny, ..patient() };
    let server = TestServer::start(options(serve)).await;
    let answer = server.post("/v1/completions", &endless(false)).await;
    assert_eq!(answer.json()["usage"]["completion_tokens"], 8000);
    server.stop().await;
}

#[tokio::test]
async fn a_half_sent_body_is_answered_and_closed() {
    let limits = Limits { body_timeout: SHORT, ..Limits::default() };
    let server = TestServer::start(TestOptions { limits, ..options(patient()) }).await;
    let mut stream = server.connect().await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-length: 100\r\n\r\n{\"prompt\"";
    stream.write_all(head.as_bytes()).await.expect("written");
    let answer = String::from_utf8(read_to_close(&mut stream).await).expect("text");
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("\"error\""), "{answer}");
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_stops_reading_is_dropped_and_its_sequences_freed() {
    let serve = ServeOptions { write_timeout: SHORT, ..patient() };
    let server = TestServer::start(options(serve)).await;
    // Echoed prompts with log-probabilities fill the socket's buffers quickly.
    let mut body = endless(true);
    body["logprobs"] = json!(20);
    body["n"] = json!(4);
    let mut stream = server.connect().await;
    stream.write_all(raw_post(&body).as_bytes()).await.expect("written");
    server.until("the sequences run", |stats| stats.num_running > 0).await;
    server.until("the sequences are freed", |stats| stats.num_aborted == 4 && stats.num_running == 0).await;
    let stats = server.engine.stats();
    assert_eq!(stats.num_free_blocks + stats.num_cached_blocks, stats.num_total_blocks);
    drop(stream);
    server.stop().await;
}

#[tokio::test]
async fn a_closed_connection_frees_its_sequences() {
    for stream in [true, false] {
        let server = TestServer::start(options(patient())).await;
        let mut connection = server.connect().await;
        connection.write_all(raw_post(&endless(stream)).as_bytes()).await.expect("written");
        server.until("the sequence runs", |stats| stats.num_running == 1).await;
        drop(connection);
        server.until("the sequence is freed", |stats| stats.num_running == 0).await;
        let stats = server.engine.stats();
        assert_eq!((stats.num_aborted, stats.num_finished), (1, 0), "streamed: {stream}");
        assert_eq!(stats.num_free_blocks + stats.num_cached_blocks, stats.num_total_blocks);
        server.stop().await;
    }
}

#[tokio::test]
async fn connections_above_the_limit_wait_for_their_turn() {
    let serve = ServeOptions { max_connections: 1, ..patient() };
    let server = TestServer::start(options(serve)).await;
    let first = server.connect().await;
    let mut second = server.connect().await;
    second
        .write_all(b"GET /health HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
        .await
        .expect("the backlog takes it");
    let mut byte = [0; 1];
    let early = tokio::time::timeout(SHORT, second.read(&mut byte)).await;
    assert!(early.is_err(), "answered beside the first connection");
    drop(first);
    let answer = read_to_close(&mut second).await;
    assert!(answer.starts_with(b"HTTP/1.1 200 OK"));
    server.stop().await;
}

#[tokio::test]
async fn a_shutdown_finishes_running_answers_and_takes_no_new_ones() {
    let mut server = TestServer::start(options(patient())).await;
    let body = Bytes::from(endless(true).to_string());
    let request = Request::post("/v1/completions")
        .header("host", "test")
        .header("content-type", "application/json")
        .body(Full::new(body))
        .expect("a request");
    let response = server.send(request).await;
    // A connection that is open and idle when the server is told to stop.
    let mut idle = server.connect().await;
    idle.write_all(b"GET /health HTTP/1.1\r\nhost: test\r\n\r\n").await.expect("written");
    let mut first = [0; 1];
    idle.read_exact(&mut first).await.expect("an answer");
    server.until("the sequence runs", |stats| stats.num_running == 1).await;
    server.begin_shutdown();
    read_to_close(&mut idle).await;
    let address = server.address;
    let whole = response.into_body().collect().await.expect("the answer is finished").to_bytes();
    let text = String::from_utf8(whole.to_vec()).expect("text");
    assert!(text.ends_with("data: [DONE]\n\n"), "{}", &text[text.len().saturating_sub(300)..]);
    assert!(text.contains("\"finish_reason\":\"length\""));
    server.stop().await;
    assert!(TcpStream::connect(address).await.is_err(), "the listener is closed");
}

#[tokio::test]
async fn a_shutdown_cuts_answers_after_the_grace_period() {
    let serve = ServeOptions { grace_period: SHORT, ..patient() };
    let server = TestServer::start(options(serve)).await;
    let mut connection = server.connect().await;
    let mut body = endless(true);
    body["n"] = json!(8);
    connection.write_all(raw_post(&body).as_bytes()).await.expect("written");
    server.until("the sequences run", |stats| stats.num_running > 0).await;
    // Ends although the answer has not, and although nobody reads it.
    server.stop().await;
}
