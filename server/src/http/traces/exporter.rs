//! The task that hands spans to a collector, over plain HTTP: collectors stand beside what they collect from.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{Request, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Span, otlp};

/// Spans that wait to be sent; more are dropped.
const MAX_WAITING: usize = 2048;

/// Spans of one request to the collector.
const MAX_BATCH: usize = 512;

/// How long the first span of a batch waits for others.
const BATCH_INTERVAL: Duration = Duration::from_secs(1);

/// How long a collector may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Most of its answer that is read.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Where spans are sent, such as `http://localhost:4318/v1/traces`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollectorUrl {
    /// `HOST:PORT`
    authority: String,
    path: String,
}

/// Why a text is no [`CollectorUrl`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectorUrlError {
    /// It is something else.
    #[error("{0:?} is no collector's address; it must be like http://localhost:4318/v1/traces")]
    Form(String),
    /// It has a port that there is not.
    #[error("a collector's port is {0:?}; it must be from 1 to 65535, as in http://localhost:4318/v1/traces")]
    Port(String),
    /// It has a user, and perhaps a password, which are not sent and therefore not shown either.
    #[error(
        "a collector's address has a user before its host; it must be without, as in \
         http://localhost:4318/v1/traces, at a collector that asks for none"
    )]
    User,
}

impl FromStr for CollectorUrl {
    type Err = CollectorUrlError;

    fn from_str(text: &str) -> Result<Self, CollectorUrlError> {
        let fault = || CollectorUrlError::Form(text.to_owned());
        let given = text.split_once("://").map_or(text, |(_, rest)| rest);
        // Before all else: other errors show the text.
        if given.split(['/', '?', '#']).next().is_some_and(|authority| authority.contains('@')) {
            return Err(CollectorUrlError::User);
        }
        let uri: Uri = text.parse().map_err(|_| fault())?;
        let host = uri.host().filter(|host| !host.is_empty() && uri.scheme_str() == Some("http"));
        let host = host.ok_or_else(fault)?;
        // A port that is no number of 16 bits is none to `Uri`.
        let port = uri.authority().and_then(|authority| authority.as_str().strip_prefix(host)).unwrap_or("");
        let port = match port.strip_prefix(':') {
            None => 80,
            Some(port) => match port.parse::<u16>() {
                Ok(number) if number > 0 => number,
                _ => return Err(CollectorUrlError::Port(port.to_owned())),
            },
        };
        let authority = format!("{host}:{port}");
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        // Who names the host alone means the usual place.
        let path = if path == "/" { "/v1/traces".to_owned() } else { path };
        Ok(CollectorUrl { authority, path })
    }
}

impl fmt::Display for CollectorUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.authority, self.path)
    }
}

/// Takes spans. Cheap to clone.
#[derive(Clone)]
pub struct Tracer {
    spans: mpsc::Sender<Span>,
    num_dropped: Arc<AtomicU64>,
}

/// The exporter at work.
pub struct Exporting(JoinHandle<()>);

impl Exporting {
    /// Waits until what was taken is sent, once every [`Tracer`] is dropped; not for long.
    pub async fn finish(self) {
        if tokio::time::timeout(PATIENCE, self.0).await.is_err() {
            tracing::warn!("the last spans could not be sent in time");
        }
    }
}

impl Tracer {
    /// Starts a task that sends spans under this service's name to `url`.
    ///
    /// # Panics
    /// Outside of an async runtime.
    pub fn start(url: CollectorUrl, service: String) -> (Tracer, Exporting) {
        let (spans, waiting) = mpsc::channel(MAX_WAITING);
        let num_dropped = Arc::new(AtomicU64::new(0));
        let task = tokio::spawn(export(url, service, waiting, num_dropped.clone()));
        (Tracer { spans, num_dropped }, Exporting(task))
    }

    pub(super) fn send(&self, span: Span) {
        if self.spans.try_send(span).is_err() {
            self.num_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn export(
    url: CollectorUrl,
    service: String,
    mut waiting: mpsc::Receiver<Span>,
    num_dropped: Arc<AtomicU64>,
) {
    let mut batch = Vec::with_capacity(MAX_BATCH);
    let mut fails = false;
    while waiting.recv_many(&mut batch, MAX_BATCH).await > 0 {
        let deadline = tokio::time::Instant::now() + BATCH_INTERVAL;
        while batch.len() < MAX_BATCH {
            let room = MAX_BATCH - batch.len();
            match tokio::time::timeout_at(deadline, waiting.recv_many(&mut batch, room)).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        let sent = tokio::time::timeout(PATIENCE, post(&url, otlp::request(&service, &batch))).await;
        let sent = sent.unwrap_or_else(|_| Err(format!("no answer in {} s", PATIENCE.as_secs())));
        // Said when it begins and when it ends, not for every batch.
        match &sent {
            Err(reason) if !fails => {
                tracing::warn!("spans cannot be sent to {url} and are dropped: {reason}")
            }
            Ok(()) if fails => tracing::info!("spans can be sent to {url} again"),
            _ => {}
        }
        fails = sent.is_err();
        let dropped = num_dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            tracing::warn!("{dropped} spans were dropped: they came faster than {url} takes them");
        }
        batch.clear();
    }
}

/// On a connection of its own: a batch a second at most is not worth keeping one open.
async fn post(url: &CollectorUrl, body: Vec<u8>) -> Result<(), String> {
    let text = |error: &dyn fmt::Display| error.to_string();
    let stream = TcpStream::connect(&url.authority).await.map_err(|error| text(&error))?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| text(&error))?;
    let connection = tokio::spawn(connection);
    let request = Request::post(&url.path)
        .header(HOST, &url.authority)
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| text(&error))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|error| text(&error))?;
        let status = response.status();
        // Read to its end, so that the collector is not cut off.
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
        body.map_err(|error| text(&error))?;
        if status.is_success() { Ok(()) } else { Err(format!("status {status}")) }
    };
    let answer = answer.await;
    connection.abort();
    answer
}

#[cfg(test)]
mod tests {
    use super::{CollectorUrl, CollectorUrlError};

    #[test]
    fn a_collectors_address_is_plain_http() {
        let shown = |text: &str| text.parse::<CollectorUrl>().map(|url| url.to_string());
        assert_eq!(shown("http://c:4318/v1/traces").as_deref(), Ok("http://c:4318/v1/traces"));
        assert_eq!(shown("http://127.0.0.1:4318").as_deref(), Ok("http://127.0.0.1:4318/v1/traces"));
        assert_eq!(shown("http://[::1]/x").as_deref(), Ok("http://[::1]:80/x"));
        for wrong in ["", "c:4318", "https://c:4318/v1/traces", "grpc://c:4317", "http://"] {
            assert!(shown(wrong).is_err(), "{wrong}");
        }
        for port in ["99999", "65536", "0", ""] {
            let found = shown(&format!("http://c:{port}/v1/traces"));
            assert_eq!(found, Err(CollectorUrlError::Port(port.to_owned())), "{port}");
        }
        assert_eq!(shown("http://[::1]:4318").as_deref(), Ok("http://[::1]:4318/v1/traces"));
        assert_eq!(shown("http://c/x@y").as_deref(), Ok("http://c:80/x@y"));
        for secret in ["http://user:pass@c:4318", "http://user@c", "user:pass@c", "https://a:b@c"] {
            assert_eq!(shown(secret), Err(CollectorUrlError::User), "{secret}");
        }
    }
}
