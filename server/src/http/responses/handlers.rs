//! `POST /v1/responses`, and `GET` and `DELETE /v1/responses/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use serde_json::{Map, Value, json};
use tandem_engine::CacheSalt;

use super::request::{ResponseFields, message, messages};
use super::store::Stored;
use super::wire::ResponsesWire;
use crate::http::body::JsonBody;
use crate::http::chat::{ChatStream, Conversation, ToolChoice, ToolFields, reasoning_variables};
use crate::http::error::{ApiError, ErrorKind};
use crate::http::fields::{Bounded, CommonFields, bounded_from_str, in_range, response_format};
use crate::http::generation::Prompt;
use crate::http::intake::{Intake, answer_tokens};
use crate::http::lanes::{AUTO, Work};
use crate::http::state::{AppState, unix_seconds};
use crate::http::wire::{random_id, respond};
use crate::text::answer::AnswerMessage;

/// Most turns that a conversation goes back.
const MAX_TURNS: usize = 1024;

pub(super) async fn create(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { common, fields, size_bytes }: JsonBody<CommonFields, ResponseFields>,
) -> Result<Response, ApiError> {
    if fields.background == Some(true) {
        let message = "background is true; responses are not made in the background here";
        return Err(ApiError::invalid("background", message));
    }
    let asked =
        fields.max_output_tokens.map(|value| in_range("max_output_tokens", value, 1, i64::MAX.into()));
    let asked = asked.transpose()?;
    let tenant = state.cache_salt(&headers, None);
    let mut response = echoed(&fields, common.model.as_deref());
    let mut intake = Intake::new(&state, &headers, common, Work::Chat, false)?;
    intake.common.num_choices = 1;
    if let Some(format) =
        fields.text.as_ref().and_then(|Bounded(text)| text.get("format")).filter(|format| !format.is_null())
    {
        response.insert("text".to_owned(), json!({ "format": format }));
        intake.common.format = response_format("text.format", format.clone())?;
    }
    response.insert("temperature".to_owned(), json!(intake.common.params.temperature));
    response.insert("top_p".to_owned(), json!(intake.common.params.top_p));

    let one_call = fields.parallel_tool_calls == Some(false);
    let own = messages(fields.input)?;
    let (history, history_bytes) = history(&state, tenant, fields.previous_response_id.as_deref())?;
    let recorder = (fields.store != Some(false)).then(|| Recorder {
        state: state.clone(),
        tenant,
        messages: own.clone(),
        previous: fields.previous_response_id,
    });
    let mut all = Vec::new();
    all.extend(fields.instructions.map(|text| message("system", Value::String(text))));
    all.extend(history);
    all.extend(own);
    let tools = ToolFields { tools: fields.tools, tool_choice: fields.tool_choice };
    let (tools, tool_choice) = tools.resolve()?;
    let mut variables = Map::new();
    if let Some(effort) = fields.reasoning.and_then(|reasoning| reasoning.effort) {
        reasoning_variables(&effort, &mut variables)?;
    }
    response.insert("tool_choice".to_owned(), shown_choice(&tool_choice));
    let conversation = Conversation {
        messages: all,
        path: "input",
        tools,
        tool_choice,
        prefill: String::new(),
        variables,
        size_bytes: size_bytes + history_bytes,
    };
    let rendered = conversation.render(&mut intake).await?;
    let max_model_len = intake.max_model_len();
    let max_tokens =
        answer_tokens("max_output_tokens", asked, None, rendered.tokens.len(), max_model_len, false)?;
    let prompt = Prompt { tokens: rendered.tokens, text: None, max_tokens };
    let (generation, reply) = intake.start(vec![prompt]).await?;
    let wire = ResponsesWire::new(response, recorder);
    respond(generation, ChatStream::new(wire, rendered.plan, one_call, 1), &reply).await
}

/// A new response as far as the request says it. Fields that have no meaning here have their defaults.
fn echoed(fields: &ResponseFields, model: Option<&str>) -> Map<String, Value> {
    let shown = |field: &Option<Bounded>, default: Value| {
        field.as_ref().map(|Bounded(value)| value.clone()).filter(|value| !value.is_null()).unwrap_or(default)
    };
    let effort = fields.reasoning.as_ref().and_then(|reasoning| reasoning.effort.clone());
    let response = json!({
        "id": random_id("resp_"), "object": "response", "created_at": unix_seconds(), "completed_at": null,
        "status": "in_progress", "background": false, "error": null, "incomplete_details": null,
        "instructions": fields.instructions, "max_output_tokens": fields.max_output_tokens.map(|n| n as i64),
        "max_tool_calls": null, "model": model.unwrap_or(AUTO), "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls.unwrap_or(true),
        "previous_response_id": fields.previous_response_id, "prompt_cache_key": null,
        "reasoning": { "effort": effort, "summary": null }, "safety_identifier": null,
        "service_tier": "default", "store": fields.store.unwrap_or(true), "temperature": 1.0,
        "text": { "format": { "type": "text" } }, "tool_choice": "auto",
        "tools": shown(&fields.tools, json!([])), "top_logprobs": 0, "top_p": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "truncation": "disabled", "usage": null,
        "user": null, "metadata": shown(&fields.metadata, json!({})),
    });
    match response {
        Value::Object(response) => response,
        _ => unreachable!("it is an object: this is a bug"),
    }
}

fn shown_choice(choice: &ToolChoice) -> Value {
    match choice {
        ToolChoice::None => Value::from("none"),
        ToolChoice::Auto => Value::from("auto"),
        ToolChoice::Required => Value::from("required"),
        ToolChoice::Named(name) => json!({ "type": "function", "name": name }),
    }
}

fn not_found(id: &str) -> ApiError {
    let id: String = id.chars().take(64).collect();
    let message = format!("there is no response {id:?}; it was never stored, or it had to make room");
    ApiError::new(ErrorKind::NotFound, message).with_code("response_not_found")
}

/// The messages of the turns up to this one, oldest first, and their size.
fn history(
    state: &AppState,
    tenant: CacheSalt,
    last: Option<&str>,
) -> Result<(Vec<Map<String, Value>>, usize), ApiError> {
    let mut turns = Vec::new();
    let mut next = last.map(str::to_owned);
    while let Some(id) = next {
        let turn = state.responses.get(tenant, &id);
        let Some(turn) = turn.filter(|_| turns.len() < MAX_TURNS) else {
            return Err(ApiError { param: Some("previous_response_id".to_owned()), ..not_found(&id) });
        };
        next = turn.previous.clone();
        turns.push(turn);
    }
    let size_bytes = turns.iter().map(|turn| turn.messages.len()).sum();
    let mut messages = Vec::new();
    for turn in turns.iter().rev() {
        let stored = bounded_from_str(&turn.messages).map_err(|error| {
            ApiError::invalid("previous_response_id", format!("the turns before it are too large: {error}"))
        })?;
        messages.extend(object_items(stored));
    }
    Ok((messages, size_bytes))
}

fn object_items(value: Value) -> impl Iterator<Item = Map<String, Value>> {
    let items = match value {
        Value::Array(items) => items,
        _ => vec![],
    };
    items.into_iter().filter_map(|item| match item {
        Value::Object(object) => Some(object),
        _ => None,
    })
}

/// Stores a response when it is whole.
pub(super) struct Recorder {
    state: Arc<AppState>,
    tenant: CacheSalt,
    /// What the client said in this turn.
    messages: Vec<Map<String, Value>>,
    previous: Option<String>,
}

impl Recorder {
    pub(super) fn record(mut self, response: &Value, answer: AnswerMessage) {
        let mut said = message("assistant", Value::String(answer.text));
        if !answer.reasoning.is_empty() {
            said.insert("reasoning_content".to_owned(), Value::String(answer.reasoning));
        }
        // The calls' ids are those that the client was told.
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
        self.messages.push(said);
        let messages = Value::Array(self.messages.into_iter().map(Value::Object).collect()).to_string();
        let turn = Stored { response: response.to_string(), messages, previous: self.previous };
        if let Some(id) = response["id"].as_str() {
            self.state.responses.insert(self.tenant, id.to_owned(), turn);
        }
    }
}

pub(super) async fn retrieve(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let turn = state.responses.get(state.cache_salt(&headers, None), &id).ok_or_else(|| not_found(&id))?;
    Ok(([(CONTENT_TYPE, "application/json")], turn.response.clone()).into_response())
}

pub(super) async fn delete(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    match state.responses.remove(state.cache_salt(&headers, None), &id) {
        true => Ok(Json(json!({ "id": id, "object": "response", "deleted": true }))),
        false => Err(not_found(&id)),
    }
}
