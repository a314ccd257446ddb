//! Responses over WebSocket: a message `response.create` is a turn, its events are a message each. One turn
//! at a time; the next one's prefix is in the cache, and may go on from a response that was not stored.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Extension, State};
use axum::response::Response;
use bytes::Bytes;
use http::HeaderMap;
use serde_json::json;

use super::record::Latest;
use super::turn::{ResponseBody, Turn};
use crate::http::auth;
use crate::http::body::JsonBody;
use crate::http::error::{ApiError, ErrorKind};
use crate::http::io::Activity;
use crate::http::state::AppState;
use crate::http::wire::Wire;

/// Silence between two turns after which the connection is closed: a coffee break of whoever sits at the
/// agent.
const IDLE: Duration = Duration::from_secs(15 * 60);

/// As with server-sent events.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

pub(super) async fn connect(
    State(state): State<Arc<AppState>>,
    activity: Option<Extension<Arc<Activity>>>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = upgrade.map_err(|error| {
        let message = format!("GET on this path opens a WebSocket, and this request does not: {error}");
        ApiError::new(ErrorKind::InvalidRequest, message)
    })?;
    let most_bytes = state.limits.max_body_bytes;
    let upgrade = upgrade.max_message_size(most_bytes).max_frame_size(most_bytes);
    Ok(upgrade.on_upgrade(move |socket| async move {
        // Silence between turns is bounded here, and not as between two requests.
        let _busy = activity.map(|Extension(activity)| activity.begin());
        let mut session = Session { state, headers, socket, latest: Latest::default(), waiting: None };
        // An error says that the client is gone.
        let _ = session.run().await;
    }))
}

/// The client is gone.
struct Gone;

struct Session {
    state: Arc<AppState>,
    headers: HeaderMap,
    socket: WebSocket,
    latest: Latest,
    /// A message that came while a turn ran.
    waiting: Option<Bytes>,
}

impl Session {
    async fn run(&mut self) -> Result<(), Gone> {
        loop {
            let message = match self.waiting.take() {
                Some(message) => message,
                None => match tokio::time::timeout(IDLE, self.receive()).await {
                    Ok(message) => message?,
                    Err(_) => return self.socket.send(Message::Close(None)).await.map_err(|_| Gone),
                },
            };
            // Each turn is a request of its key, which may have been revoked since the last.
            let admitted =
                auth::client(&self.state, &self.headers).and_then(|key| auth::admit(key.as_deref()));
            let body = match admitted {
                Ok(()) => JsonBody::parse(&self.state, message).await.and_then(check_type),
                Err(error) => Err(error),
            };
            let begun = match body {
                Ok(body) => Turn::begin(&self.state, &self.headers, body, Some(&self.latest)).await,
                Err(error) => Err(error),
            };
            match begun {
                Ok(turn) => self.answer(turn).await?,
                Err(error) => self.refuse(&error).await?,
            }
        }
    }

    /// The next message of a client; pings are answered by the library.
    async fn receive(&mut self) -> Result<Bytes, Gone> {
        loop {
            match self.socket.recv().await {
                Some(Ok(Message::Text(text))) => return Ok(text.into()),
                Some(Ok(Message::Binary(bytes))) => return Ok(bytes),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Gone),
            }
        }
    }

    /// Sends the turn's events as they come. Dropping the turn, because the client is gone, ends it.
    async fn answer(&mut self, turn: Turn) -> Result<(), Gone> {
        let Turn { mut generation, mut wire, .. } = turn;
        let mut out = Vec::new();
        wire.begin(&generation, &mut out);
        loop {
            self.send(&mut out).await?;
            let may_read = self.waiting.is_none();
            tokio::select! {
                progress = std::future::poll_fn(|cx| generation.poll_next(cx)) => match progress {
                    Some(Ok(progress)) => wire.progress(&generation, progress, &mut out),
                    Some(Err(error)) => {
                        wire.error(&error, &mut out);
                        return self.send(&mut out).await;
                    }
                    None => {
                        wire.end(&generation, &mut out);
                        return self.send(&mut out).await;
                    }
                },
                message = self.receive(), if may_read => self.waiting = Some(message?),
                () = tokio::time::sleep(KEEP_ALIVE) => {
                    self.socket.send(Message::Ping(Bytes::new())).await.map_err(|_| Gone)?;
                }
            }
        }
    }

    /// Sends the lines in `out`, a message each.
    async fn send(&mut self, out: &mut Vec<u8>) -> Result<(), Gone> {
        let text = std::str::from_utf8(out).expect("JSON is UTF-8: this is a bug");
        for line in text.lines() {
            self.socket.send(Message::text(line)).await.map_err(|_| Gone)?;
        }
        out.clear();
        Ok(())
    }

    async fn refuse(&mut self, error: &ApiError) -> Result<(), Gone> {
        let message = json!({ "type": "error", "status": error.kind.status().as_u16(), "error": {
            "type": error.kind.name(), "code": error.code.unwrap_or(error.kind.name()),
            "message": error.message, "param": error.param,
        } });
        self.socket.send(Message::text(message.to_string())).await.map_err(|_| Gone)
    }
}

fn check_type(body: ResponseBody) -> Result<ResponseBody, ApiError> {
    match body.fields.r#type.as_deref() {
        Some("response.create") => Ok(body),
        found => {
            let found: String = found.unwrap_or("missing").chars().take(64).collect();
            let message = format!("type is {found:?}; a message here must be a \"response.create\"");
            Err(ApiError::invalid("type", message))
        }
    }
}
