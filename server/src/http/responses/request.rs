//! The fields of a response, and its items: as they were said, and in the templates' form.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::http::chat::text_of_agents_parts;
use crate::http::error::ApiError;
use crate::http::fields::{Bounded, integer, objects, wrong_type};
use crate::http::wire::random_id;

/// The fields that only responses have.
#[derive(Deserialize, ToSchema)]
pub(super) struct ResponseFields {
    /// Over WebSocket: `response.create`.
    pub(super) r#type: Option<String>,
    /// False: the prompt is computed, so that the next turn finds it cached, and nothing is said.
    pub(super) generate: Option<bool>,
    pub(super) input: Option<Bounded>,
    pub(super) instructions: Option<String>,
    pub(super) tools: Option<Bounded>,
    pub(super) tool_choice: Option<Bounded>,
    pub(super) parallel_tool_calls: Option<bool>,
    #[serde(default, deserialize_with = "integer")]
    pub(super) max_output_tokens: Option<i128>,
    pub(super) reasoning: Option<Reasoning>,
    pub(super) store: Option<bool>,
    pub(super) previous_response_id: Option<String>,
    pub(super) background: Option<bool>,
    pub(super) text: Option<Bounded>,
    pub(super) metadata: Option<Bounded>,
    pub(super) prompt_cache_key: Option<String>,
    pub(super) safety_identifier: Option<String>,
    pub(super) user: Option<String>,
}

#[derive(Deserialize, ToSchema)]
pub(super) struct Reasoning {
    pub(super) effort: Option<String>,
}

/// What the client says in a turn.
pub(super) struct Input {
    /// Its items, each with an id.
    pub(super) items: Vec<Value>,
    /// The same as messages of a template.
    pub(super) messages: Vec<Map<String, Value>>,
}

impl Input {
    /// Reads `input`: a string, or items.
    ///
    /// # Errors
    /// The 400 that names the item at fault.
    pub(super) fn read(input: Option<Bounded>) -> Result<Input, ApiError> {
        let items = match input {
            Some(Bounded(Value::String(text))) => vec![message("user", Value::String(text))],
            Some(Bounded(other)) if !other.is_array() && !other.is_null() => {
                return Err(wrong_type("input", "a string or an array of items", &other));
            }
            items => objects("input", items)?,
        };
        let mut messages = Vec::new();
        for (i, item) in items.iter().enumerate() {
            translate(&format!("input[{i}]"), item, &mut messages)?;
        }
        Ok(Input { items: items.into_iter().map(listed).collect(), messages })
    }
}

/// An item as a list of them shows it.
fn listed(mut item: Map<String, Value>) -> Value {
    let is_message = item.get("type").is_none_or(|kind| kind == "message");
    if is_message {
        item.insert("type".to_owned(), Value::from("message"));
        if let Some(Value::String(text)) = item.get("content") {
            let kind = if item["role"] == "assistant" { "output_text" } else { "input_text" };
            let part = json!([{ "type": kind, "text": text }]);
            item.insert("content".to_owned(), part);
        }
    }
    item.entry("id").or_insert_with(|| Value::from(random_id(if is_message { "msg_" } else { "item_" })));
    Value::Object(item)
}

pub(super) fn message(role: &str, content: Value) -> Map<String, Value> {
    let mut message = Map::new();
    message.insert("role".to_owned(), Value::from(role));
    message.insert("content".to_owned(), content);
    message
}

/// Appends an item. Reasoning, text and calls of one turn are one message; items of kinds that are not
/// known are passed over.
fn translate(
    path: &str,
    item: &Map<String, Value>,
    out: &mut Vec<Map<String, Value>>,
) -> Result<(), ApiError> {
    let field = |name: &str| {
        let value = item.get(name).unwrap_or(&Value::Null);
        value.as_str().ok_or_else(|| wrong_type(&format!("{path}.{name}"), "a string", value))
    };
    let text = |name: &str| match item.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => text_of_agents_parts(parts, &format!("{path}.{name}")),
        other => {
            let wanted = "a string or an array of text parts";
            Err(wrong_type(&format!("{path}.{name}"), wanted, other.unwrap_or(&Value::Null)))
        }
    };
    match item.get("type").and_then(Value::as_str) {
        None | Some("message") => match field("role")? {
            "assistant" => {
                let content = text("content")?;
                let turn = open_turn(out, |turn| !turn.contains_key("tool_calls") && turn["content"] == "");
                turn.insert("content".to_owned(), Value::String(content));
            }
            role => out.push(message(role, Value::String(text("content")?))),
        },
        Some("function_call") => {
            let call = json!({ "id": field("call_id")?, "type": "function",
                "function": { "name": field("name")?, "arguments": field("arguments")? } });
            let turn = open_turn(out, |_| true);
            match turn.get_mut("tool_calls").and_then(Value::as_array_mut) {
                Some(calls) => calls.push(call),
                None => {
                    turn.insert("tool_calls".to_owned(), Value::Array(vec![call]));
                }
            }
        }
        Some("function_call_output") => {
            let mut result = message("tool", Value::String(text("output")?));
            result.insert("tool_call_id".to_owned(), Value::from(field("call_id")?));
            out.push(result);
        }
        Some("reasoning") => {
            let reasoning = reasoning_text(item);
            let turn = open_turn(out, |turn| !turn.contains_key("tool_calls") && turn["content"] == "");
            turn.insert("reasoning_content".to_owned(), Value::String(reasoning));
        }
        // A summary stands for what was said before.
        Some("compaction") => {
            let summary = format!("What was said before, in short:\n{}", field("encrypted_content")?);
            out.push(message("user", Value::String(summary)));
        }
        Some(_) => {}
    }
    Ok(())
}

/// The assistant's message that is being put together if it may take more, else a new one.
fn open_turn(
    out: &mut Vec<Map<String, Value>>,
    takes_more: impl Fn(&Map<String, Value>) -> bool,
) -> &mut Map<String, Value> {
    let goes_on = out.last().is_some_and(|last| last["role"] == "assistant" && takes_more(last));
    if !goes_on {
        out.push(message("assistant", Value::from("")));
    }
    out.last_mut().expect("one was pushed: this is a bug")
}

fn reasoning_text(item: &Map<String, Value>) -> String {
    let texts = |name: &str| -> String {
        let parts = item.get(name).and_then(Value::as_array).into_iter().flatten();
        parts.filter_map(|part| part["text"].as_str()).collect()
    };
    let text = texts("content");
    if text.is_empty() { texts("summary") } else { text }
}
