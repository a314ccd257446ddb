//! What a response leaves behind for the turns after it, and how a turn finds what stands before it.

use std::sync::{Arc, Mutex};

use serde_json::{Map, Value, json};
use tandem_engine::CacheSalt;

use super::request::message;
use super::store::Stored;
use crate::http::error::{ApiError, ErrorKind};
use crate::http::fields::bounded_from_str;
use crate::http::state::AppState;
use crate::text::answer::AnswerMessage;

/// Most turns that a conversation goes back.
const MAX_TURNS: usize = 1024;

/// The latest response of a WebSocket's connection: the next turn goes on from it even if it was not to be
/// stored. A turn that goes on takes it, and puts its own response there only if it succeeds.
#[derive(Clone, Default)]
pub(super) struct Latest(Arc<Mutex<Option<Kept>>>);

struct Kept {
    id: String,
    turn: Arc<Stored>,
}

impl Latest {
    /// Takes the response if it is this one; what was there is gone either way, as a turn goes on from it.
    fn take(&self, id: &str) -> Option<Arc<Stored>> {
        let mut latest = self.0.lock().expect("no holder of this lock panics: this is a bug");
        latest.take().filter(|kept| kept.id == id).map(|kept| kept.turn)
    }

    fn put(&self, id: String, turn: Arc<Stored>) {
        *self.0.lock().expect("no holder of this lock panics: this is a bug") = Some(Kept { id, turn });
    }
}

/// The 404 for a response that nobody keeps.
pub(super) fn not_found(id: &str) -> ApiError {
    let id: String = id.chars().take(64).collect();
    let message = format!("there is no response {id:?}; it was never stored, or it had to make room");
    ApiError::new(ErrorKind::NotFound, message).with_code("response_not_found")
}

/// Messages before a turn, and their size as JSON.
#[derive(Default)]
pub(super) struct History {
    pub(super) messages: Vec<Map<String, Value>>,
    pub(super) size_bytes: usize,
}

impl History {
    /// The messages of the turns up to `last`, oldest first.
    ///
    /// # Errors
    /// 400 if one of them is not kept, or if they are too many.
    pub(super) fn before(
        state: &AppState,
        tenant: CacheSalt,
        latest: Option<&Latest>,
        last: Option<&str>,
    ) -> Result<History, ApiError> {
        let Some(last) = last else { return Ok(History::default()) };
        let gone = |id: &str| ApiError {
            kind: ErrorKind::InvalidRequest,
            param: Some("previous_response_id".to_owned()),
            code: Some("previous_response_not_found"),
            ..not_found(id)
        };
        let first = latest.and_then(|latest| latest.take(last)).or_else(|| state.responses.get(tenant, last));
        let mut turns = vec![first.ok_or_else(|| gone(last))?];
        while let Some(id) = turns.last().and_then(|turn| turn.previous.clone()) {
            let turn = state.responses.get(tenant, &id).filter(|_| turns.len() < MAX_TURNS);
            turns.push(turn.ok_or_else(|| gone(&id))?);
        }
        let size_bytes = turns.iter().map(|turn| turn.messages.len()).sum();
        let mut messages = Vec::new();
        for turn in turns.iter().rev() {
            let stored = bounded_from_str(&turn.messages).map_err(|error| {
                let message = format!("the turns before it are too large: {error}");
                ApiError::invalid("previous_response_id", message)
            })?;
            if let Value::Array(items) = stored {
                messages.extend(items.into_iter().filter_map(|item| match item {
                    Value::Object(object) => Some(object),
                    _ => None,
                }));
            }
        }
        Ok(History { messages, size_bytes })
    }
}

/// Keeps a response when it is whole.
pub(super) struct Recorder {
    pub(super) state: Arc<AppState>,
    pub(super) tenant: CacheSalt,
    /// The client wants it stored; otherwise only `latest` has it.
    pub(super) store: bool,
    pub(super) latest: Option<Latest>,
    /// What the client said in this turn, as it said it.
    pub(super) input: Vec<Value>,
    /// The same in the templates' form.
    pub(super) messages: Vec<Map<String, Value>>,
    /// What stood before, if `latest` wants it.
    pub(super) history: Vec<Map<String, Value>>,
    pub(super) previous: Option<String>,
}

impl Recorder {
    pub(super) fn record(mut self, response: &Value, answer: AnswerMessage) {
        let Some(id) = response["id"].as_str() else { return };
        self.messages.push(said(response, answer));
        let in_text = |messages: Vec<Map<String, Value>>| {
            Value::Array(messages.into_iter().map(Value::Object).collect()).to_string()
        };
        if let Some(latest) = self.latest {
            let messages = [self.history, self.messages.clone()].concat();
            let turn = Stored { messages: in_text(messages), ..Stored::default() };
            latest.put(id.to_owned(), Arc::new(turn));
        }
        if self.store {
            let turn = Stored {
                response: response.to_string(),
                input: Value::Array(self.input).to_string(),
                messages: in_text(self.messages),
                previous: self.previous,
            };
            self.state.responses.insert(self.tenant, id.to_owned(), turn);
        }
    }
}

/// The answer as a message. The calls' ids are those that the client was told.
fn said(response: &Value, answer: AnswerMessage) -> Map<String, Value> {
    let mut said = message("assistant", Value::String(answer.text));
    if !answer.reasoning.is_empty() {
        said.insert("reasoning_content".to_owned(), Value::String(answer.reasoning));
    }
    let calls = response["output"].as_array().into_iter().flatten();
    let calls: Vec<Value> = calls
        .filter(|item| item["type"] == "function_call")
        .map(|item| {
            json!({ "id": item["call_id"], "type": "function",
                "function": { "name": item["name"], "arguments": item["arguments"] } })
        })
        .collect();
    if !calls.is_empty() {
        said.insert("tool_calls".to_owned(), Value::Array(calls));
    }
    said
}
