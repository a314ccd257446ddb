//! A small HTTP client for streamed completions of any OpenAI-compatible server: one kept-alive
//! connection, server-sent events, the clock read when each event arrives.

use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, RETRY_AFTER};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;

/// Where a server listens, and the key it wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    host: String,
    port: u16,
    /// What stands before `/v1`: empty, or a path without a slash at its end.
    prefix: String,
    api_key: Option<String>,
}

impl Endpoint {
    /// From a URL such as `http://127.0.0.1:8080`, with or without `/v1`.
    ///
    /// # Errors
    /// Says what is wrong with the URL.
    pub(super) fn parse(url: &str, api_key: Option<String>) -> anyhow::Result<Self> {
        let uri: Uri = url.parse().with_context(|| format!("{url:?} is no URL"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => bail!("{url}: only plain http is spoken here; measure behind the TLS proxy"),
            _ => bail!("{url:?} is no URL such as http://127.0.0.1:8080"),
        }
        let host = uri.host().with_context(|| format!("{url:?} names no host"))?;
        let path = uri.path().trim_end_matches('/');
        Ok(Endpoint {
            // A resolver takes an IPv6 address without the URL's brackets.
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port: uri.port_u16().unwrap_or(80),
            prefix: path.strip_suffix("/v1").unwrap_or(path).to_owned(),
            api_key,
        })
    }

    /// A server of this process.
    pub(super) fn local(address: SocketAddr) -> Self {
        let (host, port) = (address.ip().to_string(), address.port());
        Endpoint { host, port, prefix: String::new(), api_key: None }
    }

    /// The same with a key.
    pub(super) fn with_key(self, key: &str) -> Self {
        Endpoint { api_key: Some(key.to_owned()), ..self }
    }
}

/// Why a request has no whole answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// No connection.
    #[error("cannot connect: {0}{hint}", hint = limit_hint(.0))]
    Connect(std::io::Error),
    /// The server refuses.
    #[error("status {status}: {body}")]
    Status { status: StatusCode, retry_after: Option<Duration>, body: String },
    /// The answer broke off, is malformed or carries an error.
    #[error("{0}")]
    Broken(String),
}

/// True if this process may not open another socket.
pub(super) fn is_out_of_files(error: &std::io::Error) -> bool {
    const EMFILE: i32 = 24;
    const ENFILE: i32 = 23;
    matches!(error.raw_os_error(), Some(EMFILE | ENFILE))
}

fn limit_hint(error: &std::io::Error) -> &'static str {
    if is_out_of_files(error) {
        " (raise the limit of open files, for client and server: `ulimit -n 65536`)"
    } else {
        ""
    }
}

/// What one streamed completion brought.
#[derive(Clone, Debug, Default)]
pub(super) struct Completion {
    pub(super) text: String,
    pub(super) finish_reason: String,
    pub(super) num_output_tokens: u64,
    pub(super) num_accepted_tokens: u64,
    pub(super) num_rejected_tokens: u64,
    /// Waiting and prefill, as the server says.
    pub(super) engine_ttft: Duration,
    /// When each piece of text came, from sending the request.
    pub(super) arrivals: Vec<Duration>,
    /// From sending the request to the end of the stream.
    pub(super) total: Duration,
}

impl Completion {
    /// From sending the request to the first text; to the end where there was none.
    pub(super) fn ttft(&self) -> Duration {
        self.arrivals.first().copied().unwrap_or(self.total)
    }
}

/// Fields that other servers leave out are optional.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    timings: Option<Timings>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: String,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: u64,
}

/// llama.cpp's account; Tandem's last event carries it too.
#[derive(Deserialize)]
struct Timings {
    #[serde(default)]
    draft_n: u64,
    #[serde(default)]
    draft_n_accepted: u64,
    #[serde(default)]
    predicted_n: u64,
    #[serde(default)]
    queue_ms: f64,
    #[serde(default)]
    prompt_ms: f64,
}

/// At most one connection to a server, opened when needed.
pub(super) struct Client {
    endpoint: Endpoint,
    connection: Option<Connection>,
}

struct Connection {
    sender: SendRequest<Full<Bytes>>,
    task: AbortHandle,
}

impl Drop for Connection {
    /// Closes the socket at once, in the middle of an answer too.
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Client {
    pub(super) fn new(endpoint: Endpoint) -> Self {
        Client { endpoint, connection: None }
    }

    /// Closes the connection, whatever is under way; the next request opens another.
    pub(super) fn close(&mut self) {
        self.connection = None;
    }

    /// A connection that is ready for a request.
    async fn sender(&mut self) -> Result<&mut SendRequest<Full<Bytes>>, Failure> {
        // The end of the last response may not have been digested yet, or the server has hung up.
        let is_ready = match &mut self.connection {
            Some(connection) => connection.sender.ready().await.is_ok(),
            None => false,
        };
        if !is_ready {
            self.connection = None;
            let address = (self.endpoint.host.as_str(), self.endpoint.port);
            let stream = TcpStream::connect(address).await.map_err(Failure::Connect)?;
            stream.set_nodelay(true).map_err(Failure::Connect)?;
            let (sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
            // Broken connections show as errors of their requests.
            let task = tokio::spawn(connection).abort_handle();
            self.connection = Some(Connection { sender, task });
        }
        Ok(&mut self.connection.as_mut().expect("there is one now").sender)
    }

    async fn send(&mut self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, Failure> {
        let endpoint = &self.endpoint;
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", endpoint.prefix))
            .header(HOST, format!("{}:{}", endpoint.host, endpoint.port))
            .header(CONTENT_TYPE, "application/json");
        if let Some(key) = &endpoint.api_key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request.body(Full::new(body)).map_err(|error| Failure::Broken(error.to_string()))?;
        let response = self.sender().await?.send_request(request).await.map_err(broken)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let seconds = |value: &http::HeaderValue| value.to_str().ok()?.parse().ok().map(Duration::from_secs);
        let retry_after = response.headers().get(RETRY_AFTER).and_then(seconds);
        let body = response.into_body().collect().await.map_err(broken)?.to_bytes();
        Err(Failure::Status { status, retry_after, body: String::from_utf8_lossy(&body).into_owned() })
    }

    /// The body at `path`.
    ///
    /// # Errors
    /// A status other than 2xx, no connection, a body that breaks off.
    pub(super) async fn get(&mut self, path: &str) -> Result<Bytes, Failure> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        Ok(response.into_body().collect().await.map_err(broken)?.to_bytes())
    }

    /// Streams one `/v1/completions` request to its end.
    ///
    /// # Errors
    /// A status other than 200, a stream that breaks off, an error inside it.
    pub(super) async fn complete(&mut self, body: &Value) -> Result<Completion, Failure> {
        self.complete_while(body, |_| ControlFlow::Continue(())).await
    }

    /// The same, until `watch` has seen enough of it: then the connection is closed in the middle of
    /// the stream. `watch` is asked after every event.
    ///
    /// # Errors
    /// As [`Client::complete`].
    pub(super) async fn complete_while(
        &mut self,
        body: &Value,
        mut watch: impl FnMut(&Completion) -> ControlFlow<()>,
    ) -> Result<Completion, Failure> {
        let body = Bytes::from(serde_json::to_vec(body).expect("a value is JSON: this is a bug"));
        let sent = Instant::now();
        let mut response = self.send(Method::POST, "/v1/completions", body).await?.into_body();
        let mut completion = Completion::default();
        let mut events = EventLines::default();
        let mut is_done = false;
        while let Some(frame) = response.frame().await {
            let frame = frame.map_err(|error| Failure::Broken(format!("the stream broke off: {error}")))?;
            let Some(data) = frame.data_ref() else { continue };
            events.push(data);
            while let Some(payload) = events.next_payload() {
                if payload == b"[DONE]" {
                    is_done = true;
                    continue;
                }
                absorb(&payload, sent, &mut completion)?;
                if watch(&completion).is_break() {
                    self.close();
                    completion.total = sent.elapsed();
                    return Ok(completion);
                }
            }
        }
        completion.total = sent.elapsed();
        if is_done {
            Ok(completion)
        } else {
            Err(Failure::Broken("the stream ended before its end mark".to_owned()))
        }
    }
}

fn broken(error: hyper::Error) -> Failure {
    Failure::Broken(format!("the connection broke off: {error}"))
}

fn absorb(payload: &[u8], sent: Instant, completion: &mut Completion) -> Result<(), Failure> {
    let chunk: Chunk = serde_json::from_slice(payload).map_err(|error| {
        Failure::Broken(format!("an event is no completion: {error}: {}", String::from_utf8_lossy(payload)))
    })?;
    if let Some(error) = chunk.error {
        return Err(Failure::Broken(format!("the server reports: {error}")));
    }
    for choice in chunk.choices {
        if !choice.text.is_empty() {
            completion.arrivals.push(sent.elapsed());
            // Replaced by the server's own count, if it sends one.
            completion.num_output_tokens += 1;
        }
        completion.text.push_str(&choice.text);
        completion.finish_reason = choice.finish_reason.unwrap_or_default();
    }
    if let Some(usage) = chunk.usage {
        completion.num_output_tokens = usage.completion_tokens;
    }
    if let Some(timings) = chunk.timings {
        completion.num_accepted_tokens = timings.draft_n_accepted;
        completion.engine_ttft =
            Duration::from_secs_f64((timings.queue_ms + timings.prompt_ms).max(0.0) / 1e3);
        completion.num_output_tokens = completion.num_output_tokens.max(timings.predicted_n);
        completion.num_rejected_tokens = timings.draft_n.saturating_sub(timings.draft_n_accepted);
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
        let event = br#"{"error": {"message": "no"}}"#;
        assert!(absorb(event, Instant::now(), &mut Completion::default()).is_err());
    }

    #[test]
    fn events_of_servers_that_say_less_are_understood() {
        let mut completion = Completion::default();
        for event in [
            r#"{"choices": [{"text": "a", "finish_reason": null}]}"#,
            r#"{"choices": [{"text": "b", "finish_reason": "stop"}], "usage": null}"#,
        ] {
            absorb(event.as_bytes(), Instant::now(), &mut completion).expect("a completion");
        }
        assert_eq!((completion.text.as_str(), completion.num_output_tokens), ("ab", 2));
        let usage = br#"{"choices": [], "usage": {"completion_tokens": 3}, "timings": {"draft_n": 5, "draft_n_accepted": 2}}"#;
        absorb(usage, Instant::now(), &mut completion).expect("a completion");
        assert_eq!((completion.num_output_tokens, completion.arrivals.len()), (3, 2));
        assert_eq!((completion.num_accepted_tokens, completion.num_rejected_tokens), (2, 3));
    }

    #[test]
    fn urls_are_taken_with_and_without_the_version_and_a_prefix() {
        let parse = |url| Endpoint::parse(url, None).map(|e| (e.host, e.port, e.prefix));
        let endpoint = |host: &str, port, prefix: &str| (host.to_owned(), port, prefix.to_owned());
        assert_eq!(parse("http://127.0.0.1:8080").expect("valid"), endpoint("127.0.0.1", 8080, ""));
        assert_eq!(parse("http://host/v1/").expect("valid"), endpoint("host", 80, ""));
        assert_eq!(parse("http://[::1]:9/llm/v1").expect("valid"), endpoint("::1", 9, "/llm"));
        for wrong in ["https://host", "host:80", "/v1", ""] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
