//! Anthropic's fields, and their messages in the templates' form: content blocks become text, tool
//! calls, reasoning and tool results.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::http::chat::{
    Conversation, MAX_TOOL_NAME_BYTES, ToolChoice, function_tool, invalid_part, text_of_agents_parts,
};
use crate::http::error::ApiError;
use crate::http::fields::{Bounded, Strings, objects, one_of, wrong_type};

/// The fields that only messages have.
#[derive(Deserialize, ToSchema)]
pub(super) struct MessagesFields {
    messages: Option<Bounded>,
    system: Option<Bounded>,
    pub(super) stop_sequences: Option<Strings>,
    tools: Option<Bounded>,
    tool_choice: Option<Choice>,
    thinking: Option<Thinking>,
    output_config: Option<OutputConfig>,
}

#[derive(Deserialize, ToSchema)]
struct OutputConfig {
    effort: Option<String>,
}

#[derive(Deserialize, ToSchema)]
struct Choice {
    r#type: String,
    name: Option<String>,
    disable_parallel_tool_use: Option<bool>,
}

#[derive(Deserialize, ToSchema)]
struct Thinking {
    r#type: String,
}

impl MessagesFields {
    /// The client takes one tool call at a time.
    pub(super) fn one_call(&self) -> bool {
        self.tool_choice.as_ref().is_some_and(|choice| choice.disable_parallel_tool_use == Some(true))
    }

    /// The client wants to see reasoning; without `thinking` it expects none.
    pub(super) fn shows_thinking(&self) -> Result<bool, ApiError> {
        match self.thinking.as_ref().map(|thinking| thinking.r#type.as_str()) {
            None | Some("disabled") => Ok(false),
            Some("enabled" | "adaptive") => Ok(true),
            Some(_) => {
                let message = "thinking.type must be \"enabled\", \"adaptive\" or \"disabled\"";
                Err(ApiError::invalid("thinking.type", message))
            }
        }
    }

    /// What the request is about.
    pub(super) fn conversation(self, size_bytes: usize) -> Result<Conversation, ApiError> {
        let thinks = self.shows_thinking()?;
        let mut messages = Vec::new();
        match self.system.map(|Bounded(system)| system) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(Value::String(text)) => messages.push(message("system", text)),
            Some(Value::Array(blocks)) if blocks.is_empty() => {}
            Some(Value::Array(blocks)) => messages.push(message("system", system_text(&blocks)?)),
            Some(other) => return Err(wrong_type("system", "a string or an array of text blocks", &other)),
        }
        for (i, message) in objects("messages", self.messages)?.into_iter().enumerate() {
            translate(&format!("messages[{i}]"), message, &mut messages)?;
        }
        let prefill = match messages.last() {
            Some(last) if last["role"] == "assistant" && !last.contains_key("tool_calls") => {
                let last = messages.pop().expect("there is a last one: this is a bug");
                last["content"].as_str().unwrap_or("").to_owned()
            }
            _ => String::new(),
        };
        let mut variables = Map::new();
        for switch in ["enable_thinking", "thinking"] {
            variables.insert(switch.to_owned(), Value::Bool(thinks));
        }
        if let Some(effort) = self.output_config.and_then(|config| config.effort).filter(|_| thinks) {
            variables.insert("reasoning_effort".to_owned(), Value::from(known_effort(&effort)?));
        }
        Ok(Conversation {
            messages,
            path: "messages",
            tools: tools(self.tools)?,
            tool_choice: choice(self.tool_choice)?,
            prefill,
            variables,
            size_bytes,
        })
    }
}

/// Their words for effort in the templates'.
fn known_effort(effort: &str) -> Result<&'static str, ApiError> {
    const EFFORTS: [(&str, &str); 5] =
        [("low", "low"), ("medium", "medium"), ("high", "high"), ("xhigh", "high"), ("max", "high")];
    one_of("output_config.effort", effort, &EFFORTS)
}

fn message(role: &str, content: String) -> Map<String, Value> {
    let mut message = Map::new();
    message.insert("role".to_owned(), Value::from(role));
    message.insert("content".to_owned(), Value::String(content));
    message
}

fn system_text(blocks: &[Value]) -> Result<String, ApiError> {
    let texts: Result<Vec<String>, ApiError> = blocks
        .iter()
        .enumerate()
        .map(|(i, block)| text_of_agents_parts(std::slice::from_ref(block), &format!("system[{i}]")))
        .collect();
    Ok(texts?.join("\n"))
}

/// One message of theirs, as one or several of the template's.
fn translate(
    path: &str,
    message: Map<String, Value>,
    out: &mut Vec<Map<String, Value>>,
) -> Result<(), ApiError> {
    let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
    if !["user", "assistant", "system"].contains(&role) {
        let text = format!("{path}.role must be \"user\", \"assistant\" or \"system\"");
        return Err(ApiError::invalid(format!("{path}.role"), text));
    }
    let content = match message.get("content") {
        Some(Value::String(text)) => {
            out.push(self::message(role, text.clone()));
            return Ok(());
        }
        Some(Value::Array(blocks)) => blocks,
        other => {
            let wanted = "a string or an array of content blocks";
            return Err(wrong_type(&format!("{path}.content"), wanted, other.unwrap_or(&Value::Null)));
        }
    };
    let (mut text, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    for (i, block) in content.iter().enumerate() {
        let path = format!("{path}.content[{i}]");
        let field = |name: &str| {
            let wrong = || wrong_type(&format!("{path}.{name}"), "a string", &block[name]);
            block[name].as_str().ok_or_else(wrong)
        };
        match block["type"].as_str().unwrap_or("missing") {
            "text" => text.push_str(field("text")?),
            "thinking" => reasoning.push_str(field("thinking")?),
            "redacted_thinking" => {}
            "image" => text.push_str(&text_of_agents_parts(std::slice::from_ref(block), &path)?),
            "tool_use" => calls.push(json!({ "id": field("id")?, "type": "function",
                "function": { "name": field("name")?, "arguments": input(block) } })),
            "tool_result" => {
                let mut result = self::message("tool", result_text(block, &path)?);
                result.insert("tool_call_id".to_owned(), Value::from(field("tool_use_id")?));
                out.push(result);
            }
            kind => return Err(invalid_part(&path, kind)),
        }
    }
    let has_other = !calls.is_empty() || !reasoning.is_empty();
    if text.is_empty() && !has_other && !content.is_empty() {
        // Nothing but results, which are there already.
        return Ok(());
    }
    let mut whole = self::message(role, text);
    if !reasoning.is_empty() {
        whole.insert("reasoning_content".to_owned(), Value::String(reasoning));
    }
    if !calls.is_empty() {
        whole.insert("tool_calls".to_owned(), Value::Array(calls));
    }
    out.push(whole);
    Ok(())
}

fn input(block: &Value) -> Value {
    if block["input"].is_object() { block["input"].clone() } else { json!({}) }
}

fn result_text(block: &Value, path: &str) -> Result<String, ApiError> {
    match &block["content"] {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => text_of_agents_parts(parts, &format!("{path}.content")),
        other => Err(wrong_type(&format!("{path}.content"), "a string or an array of text blocks", other)),
    }
}

/// Tools with a schema; those that Anthropic runs itself have none and are passed over.
fn tools(field: Option<Bounded>) -> Result<Vec<Value>, ApiError> {
    let mut tools = Vec::new();
    for (i, tool) in objects("tools", field)?.into_iter().enumerate() {
        if tool.get("type").is_some_and(|kind| kind != "custom" && !kind.is_null()) {
            continue;
        }
        let name = tool.get("name").and_then(Value::as_str).unwrap_or("");
        if name.is_empty() || name.len() > MAX_TOOL_NAME_BYTES {
            let path = format!("tools[{i}].name");
            let message = format!("{path} must be a string of 1 to {MAX_TOOL_NAME_BYTES} bytes");
            return Err(ApiError::invalid(path, message));
        }
        let schema = tool.get("input_schema");
        if let Some(schema) = schema.filter(|schema| !schema.is_object()) {
            return Err(wrong_type(&format!("tools[{i}].input_schema"), "an object", schema));
        }
        tools.push(function_tool(name, tool.get("description"), schema));
    }
    Ok(tools)
}

fn choice(choice: Option<Choice>) -> Result<ToolChoice, ApiError> {
    let Some(choice) = choice else { return Ok(ToolChoice::Auto) };
    match (choice.r#type.as_str(), choice.name) {
        ("auto", _) => Ok(ToolChoice::Auto),
        ("none", _) => Ok(ToolChoice::None),
        ("any", _) => Ok(ToolChoice::Required),
        ("tool", Some(name)) => Ok(ToolChoice::Named(name)),
        _ => {
            let message =
                "tool_choice must be {\"type\": \"auto\"}, \"any\", \"none\", or \"tool\" with a \"name\"";
            Err(ApiError::invalid("tool_choice", message))
        }
    }
}
