//! A small HTTP client for one stream at a time: one kept-alive connection, server-sent events, the
//! clock read when each event arrives.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpStream;

/// A connection to a server.
pub(super) struct Client {
    address: SocketAddr,
    sender: SendRequest<Full<Bytes>>,
}

/// What one streamed completion brought.
#[derive(Clone, Debug, Default)]
pub(super) struct Completion {
    pub(super) text: String,
    pub(super) finish_reason: String,
    pub(super) num_output_tokens: u64,
    pub(super) num_accepted_tokens: u64,
    pub(super) num_rejected_tokens: u64,
    /// From sending the request to the first text.
    pub(super) first_text: Duration,
    /// From sending the request to the end of the stream.
    pub(super) total: Duration,
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: String,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: u64,
    completion_tokens_details: Details,
}

#[derive(Deserialize)]
struct Details {
    accepted_prediction_tokens: u64,
    rejected_prediction_tokens: u64,
}

impl Client {
    pub(super) async fn connect(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // Ends with the sender; a broken connection shows as an error of the next request.
        tokio::spawn(connection);
        Ok(Client { address, sender })
    }

    /// Streams one `/v1/completions` request to its end.
    ///
    /// # Errors
    /// A status other than 200, a stream that breaks off, an error inside it.
    pub(super) async fn complete(&mut self, body: &Value) -> anyhow::Result<Completion> {
        let request = Request::builder()
            .method(Method::POST)
            .uri("/v1/completions")
            .header(http::header::HOST, self.address.to_string())
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(serde_json::to_vec(body)?)))?;
        // The end of the last response may not have been digested yet.
        self.sender.ready().await.context("the server closed the connection")?;
        let sent = Instant::now();
        let response = self.sender.send_request(request).await?;
        let status = response.status();
        if !status.is_success() {
            let body = response.into_body().collect().await?.to_bytes();
            bail!("status {status}: {}", String::from_utf8_lossy(&body));
        }
        let mut completion = Completion::default();
        read_stream(response.into_body(), sent, &mut completion).await?;
        completion.total = sent.elapsed();
        Ok(completion)
    }
}

async fn read_stream(mut body: Incoming, sent: Instant, completion: &mut Completion) -> anyhow::Result<()> {
    let mut events = EventLines::default();
    let mut done = false;
    while let Some(frame) = body.frame().await {
        let frame = frame.context("the stream broke off")?;
        let Some(data) = frame.data_ref() else { continue };
        events.push(data);
        while let Some(payload) = events.next_payload() {
            if payload == b"[DONE]" {
                done = true;
                continue;
            }
            let chunk: Chunk = serde_json::from_slice(&payload).with_context(|| {
                format!("an event is no completion: {}", String::from_utf8_lossy(&payload))
            })?;
            absorb(chunk, sent, completion)?;
        }
    }
    if done { Ok(()) } else { bail!("the stream ended before its end mark") }
}

fn absorb(chunk: Chunk, sent: Instant, completion: &mut Completion) -> anyhow::Result<()> {
    if let Some(error) = chunk.error {
        bail!("the server reports: {error}");
    }
    for choice in chunk.choices {
        if completion.text.is_empty() && !choice.text.is_empty() {
            completion.first_text = sent.elapsed();
        }
        completion.text.push_str(&choice.text);
        completion.finish_reason = choice.finish_reason.unwrap_or_default();
    }
    if let Some(usage) = chunk.usage {
        completion.num_output_tokens = usage.completion_tokens;
        completion.num_accepted_tokens = usage.completion_tokens_details.accepted_prediction_tokens;
        completion.num_rejected_tokens = usage.completion_tokens_details.rejected_prediction_tokens;
    }
    Ok(())
}

/// Cuts a byte stream into the payloads of its `data:` lines.
#[derive(Default)]
struct EventLines {
    pending: Vec<u8>,
}

impl EventLines {
    fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    fn next_payload(&mut self) -> Option<Vec<u8>> {
        while let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            if let Some(payload) = line.trim_ascii().strip_prefix(b"data:") {
                return Some(payload.trim_ascii().to_vec());
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_found_however_the_bytes_are_cut() {
        let stream = b": comment\n\ndata: {\"a\":1}\r\n\r\ndata: [DONE]\n\n";
        for size in 1..stream.len() {
            let mut events = EventLines::default();
            let mut payloads = Vec::new();
            for piece in stream.chunks(size) {
                events.push(piece);
                payloads.extend(std::iter::from_fn(|| events.next_payload()));
            }
            assert_eq!(payloads, [b"{\"a\":1}".to_vec(), b"[DONE]".to_vec()], "pieces of {size}");
        }
    }

    #[test]
    fn an_error_inside_the_stream_is_an_error() {
        let chunk: Chunk = serde_json::from_str(r#"{"error": {"message": "no"}}"#).expect("a chunk");
        assert!(absorb(chunk, Instant::now(), &mut Completion::default()).is_err());
    }
}
