//! Tools and the choice among them, in OpenAI's form, which is also the templates'.

use serde_json::{Map, Value};

use super::conversation::{ToolChoice, function_tool};
use crate::http::error::ApiError;
use crate::http::fields::{Bounded, objects, one_of, wrong_type};

/// Longest name of a tool. OpenAI takes 64 bytes; MCP clients join names to longer ones.
pub(in crate::http) const MAX_TOOL_NAME_BYTES: usize = 256;

/// `tools` and `tool_choice`.
pub(in crate::http) struct ToolFields {
    pub(in crate::http) tools: Option<Bounded>,
    pub(in crate::http) tool_choice: Option<Bounded>,
}

impl ToolFields {
    /// The functions among the tools, in the form that templates know. Tools of other kinds are passed
    /// over: they run at OpenAI's own place, and clients send them along.
    pub(in crate::http) fn resolve(self) -> Result<(Vec<Value>, ToolChoice), ApiError> {
        let mut tools = Vec::new();
        for (i, tool) in objects("tools", self.tools)?.into_iter().enumerate() {
            if tool.get("type").is_some_and(|kind| kind != "function") {
                continue;
            }
            let path = format!("tools[{i}].function");
            // Responses have the function's fields beside `type`.
            let function = match tool.get("function") {
                None if tool.contains_key("name") => &tool,
                Some(Value::Object(function)) => function,
                other => return Err(wrong_type(&path, "an object", other.unwrap_or(&Value::Null))),
            };
            let name = function.get("name").and_then(Value::as_str).unwrap_or("");
            if name.is_empty() || name.len() > MAX_TOOL_NAME_BYTES {
                let path = format!("{path}.name");
                let message = format!("{path} must be a string of 1 to {MAX_TOOL_NAME_BYTES} bytes");
                return Err(ApiError::invalid(path, message));
            }
            if let Some(parameters) = function.get("parameters")
                && !(parameters.is_object() || parameters.is_null())
            {
                return Err(wrong_type(&format!("{path}.parameters"), "an object", parameters));
            }
            let mut tool = function_tool(name, function.get("description"), function.get("parameters"));
            if function.get("strict") == Some(&Value::Bool(true)) {
                tool["function"]["strict"] = Value::Bool(true);
            }
            tools.push(tool);
        }
        let tool_choice = match self.tool_choice.map(|Bounded(value)| value) {
            None | Some(Value::Null) => ToolChoice::Auto,
            Some(Value::String(word)) => {
                const KNOWN: [(&str, u8); 3] = [("none", 0), ("auto", 1), ("required", 2)];
                match one_of("tool_choice", &word, &KNOWN)? {
                    0 => ToolChoice::None,
                    1 => ToolChoice::Auto,
                    _ => ToolChoice::Required,
                }
            }
            Some(choice) => {
                let name = choice["function"]["name"].as_str().or_else(|| choice["name"].as_str());
                match name.filter(|_| choice["type"] == "function") {
                    Some(name) => ToolChoice::Named(name.to_owned()),
                    None => {
                        let message = "tool_choice must be \"none\", \"auto\", \"required\" or \
                            {\"type\": \"function\", \"function\": {\"name\": ...}}";
                        return Err(ApiError::invalid("tool_choice", message));
                    }
                }
            }
        };
        Ok((tools, tool_choice))
    }
}

/// What `reasoning_effort` is to templates: gpt-oss's has the word, Qwen's and DeepSeek's a switch.
///
/// # Errors
/// If it is no such word.
pub(in crate::http) fn reasoning_variables(
    effort: &str,
    variables: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    const EFFORTS: [(&str, bool); 6] = [
        ("none", false),
        ("minimal", true),
        ("low", true),
        ("medium", true),
        ("high", true),
        ("xhigh", true),
    ];
    let thinks = one_of("reasoning_effort", effort, &EFFORTS)?;
    if thinks {
        variables.insert("reasoning_effort".to_owned(), Value::from(effort));
    } else {
        variables.insert("enable_thinking".to_owned(), Value::Bool(false));
        variables.insert("thinking".to_owned(), Value::Bool(false));
    }
    Ok(())
}
