//! One turn: from a request's fields to a generation and the wire that writes it, over HTTP as over
//! WebSocket.

use std::sync::Arc;

use http::HeaderMap;
use serde_json::{Map, Value, json};

use super::record::{History, Latest, Recorder};
use super::request::{Input, ResponseFields, message};
use super::wire::{Framing, ResponsesWire};
use crate::http::body::JsonBody;
use crate::http::chat::{ChatStream, Conversation, ToolChoice, ToolFields, only_text, reasoning_variables};
use crate::http::error::ApiError;
use crate::http::fields::{Bounded, CommonFields};
use crate::http::generation::{Generation, Prompt};
use crate::http::intake::{Intake, Reply, answer_tokens, asked_tokens};
use crate::http::lanes::{AUTO, Work};
use crate::http::state::{AppState, unix_seconds};
use crate::http::wire::random_id;

/// The body of a response.
pub(super) type ResponseBody = JsonBody<CommonFields, ResponseFields>;

/// A turn that has begun.
pub(super) struct Turn {
    pub(super) generation: Generation,
    pub(super) wire: ChatStream<ResponsesWire>,
    pub(super) reply: Reply,
}

impl Turn {
    /// Checks the request and starts its sequence. `latest`: the connection's, over WebSocket.
    ///
    /// # Errors
    /// What is wrong with the request, and what the engine refuses.
    pub(super) async fn begin(
        state: &Arc<AppState>,
        headers: &HeaderMap,
        body: ResponseBody,
        latest: Option<&Latest>,
    ) -> Result<Turn, ApiError> {
        let JsonBody { common, mut fields, size_bytes } = body;
        let tenant = state.cache_salt(headers, None);
        let previous = fields.previous_response_id.clone();
        // Before anything else can fail: a turn that fails leaves nothing to go on from.
        let history = History::before(state, tenant, latest, previous.as_deref())?;
        check_form(&fields)?;
        let asked = asked_tokens("max_output_tokens", fields.max_output_tokens, 1)?;
        // A turn that only warms the cache computes the prompt and says nothing.
        let asked = if fields.generate == Some(false) { Some(0) } else { asked };
        let mut response = echoed(&fields, common.model.as_deref());
        let mut intake = Intake::new(state, headers, common, Work::Chat, false)?;
        intake.common.num_choices = 1;
        let params = &intake.common.params;
        for (name, value) in [
            ("temperature", params.temperature),
            ("top_p", params.top_p),
            ("presence_penalty", params.presence_penalty),
            ("frequency_penalty", params.frequency_penalty),
        ] {
            response.insert(name.to_owned(), json!(value));
        }
        let one_call = fields.parallel_tool_calls == Some(false);
        let Input { items, messages } = Input::read(fields.input.take())?;
        check_results(&history.messages, &messages)?;
        let store = fields.store != Some(false);
        let recorder = (store || latest.is_some()).then(|| Recorder {
            state: state.clone(),
            tenant,
            store,
            latest: latest.cloned(),
            input: if store { items } else { vec![] },
            messages: messages.clone(),
            history: latest.map(|_| history.messages.clone()).unwrap_or_default(),
            previous,
        });
        let size_bytes = size_bytes + history.size_bytes;
        let conversation = conversation(fields, [history.messages, messages].concat(), size_bytes)?;
        response.insert("tool_choice".to_owned(), shown_choice(&conversation.tool_choice));
        let rendered = conversation.render(&mut intake).await?;
        let max_model_len = intake.max_model_len();
        let max_tokens = answer_tokens(asked, None, rendered.tokens.len(), max_model_len)?;
        let prompt = Prompt { tokens: rendered.tokens, text: None, max_tokens };
        let (generation, reply) = intake.start(vec![prompt]).await?;
        let framing = if latest.is_some() { Framing::Lines } else { Framing::Events };
        let wire = ResponsesWire::new(response, recorder, framing, asked == Some(0));
        Ok(Turn { generation, wire: ChatStream::new(wire, rendered.plan, one_call, 1), reply })
    }
}

/// Refuses what cannot be done here.
fn check_form(fields: &ResponseFields) -> Result<(), ApiError> {
    if fields.background == Some(true) {
        let message = "background is true; responses are not made in the background here";
        return Err(ApiError::invalid("background", message));
    }
    only_text("text.format", fields.text.as_ref().and_then(|Bounded(text)| text.get("format")))
}

/// Every result belongs to a call that stands before it.
fn check_results(history: &[Map<String, Value>], messages: &[Map<String, Value>]) -> Result<(), ApiError> {
    let mut calls = Vec::new();
    for message in history.iter().chain(messages) {
        let made = message.get("tool_calls").and_then(Value::as_array).into_iter().flatten();
        calls.extend(made.map(|call| &call["id"]));
        let Some(id) = message.get("tool_call_id") else { continue };
        if !calls.contains(&id) {
            let id: String = id.as_str().unwrap_or("").chars().take(64).collect();
            let message =
                format!("input holds a result for the call {id:?}, and no such call stands before it");
            return Err(ApiError::invalid("input", message));
        }
    }
    Ok(())
}

fn conversation(
    fields: ResponseFields,
    turns: Vec<Map<String, Value>>,
    size_bytes: usize,
) -> Result<Conversation, ApiError> {
    let mut messages = Vec::new();
    messages.extend(fields.instructions.map(|text| message("system", Value::String(text))));
    messages.extend(turns);
    let tools = ToolFields { tools: fields.tools, tool_choice: fields.tool_choice };
    let (tools, tool_choice) = tools.resolve()?;
    let mut variables = Map::new();
    if let Some(effort) = fields.reasoning.and_then(|reasoning| reasoning.effort) {
        reasoning_variables(&effort, &mut variables)?;
    }
    let prefill = String::new();
    Ok(Conversation { messages, path: "input", tools, tool_choice, prefill, variables, size_bytes })
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
        "previous_response_id": fields.previous_response_id, "prompt_cache_key": fields.prompt_cache_key,
        "reasoning": { "effort": effort, "summary": null }, "safety_identifier": fields.safety_identifier,
        "service_tier": "default", "store": fields.store.unwrap_or(true),
        "text": { "format": { "type": "text" } }, "tool_choice": "auto",
        "tools": shown_tools(fields.tools.as_ref()), "top_logprobs": 0, "truncation": "disabled",
        "usage": null, "user": fields.user, "metadata": shown(&fields.metadata, json!({})),
    });
    match response {
        Value::Object(response) => response,
        _ => unreachable!("it is an object: this is a bug"),
    }
}

/// The tools as they were given, with the fields that a function always has.
fn shown_tools(tools: Option<&Bounded>) -> Value {
    let Some(Bounded(Value::Array(tools))) = tools else { return json!([]) };
    let mut tools = tools.clone();
    for tool in tools.iter_mut().filter_map(Value::as_object_mut) {
        if tool.get("type").is_some_and(|kind| kind == "function") {
            for field in ["description", "parameters", "strict"] {
                tool.entry(field).or_insert(Value::Null);
            }
        }
    }
    Value::Array(tools)
}

fn shown_choice(choice: &ToolChoice) -> Value {
    match choice {
        ToolChoice::None => Value::from("none"),
        ToolChoice::Auto => Value::from("auto"),
        ToolChoice::Required => Value::from("required"),
        ToolChoice::Named(name) => json!({ "type": "function", "name": name }),
    }
}
