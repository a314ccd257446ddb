//! Messages as chat templates want them: text joined, calls' arguments as objects.

use serde_json::{Map, Value};

use crate::http::error::ApiError;
use crate::http::fields::bounded_from_str;

/// Longest `role`: templates compare it with short words.
const MAX_ROLE_BYTES: usize = 64;

/// Checks a message's shape and brings it into the form that templates know. `path` is where it
/// stands in the request.
///
/// # Errors
/// The 400 that names the field at fault.
pub(super) fn normalise(
    path: &str,
    message: &mut Map<String, Value>,
    keeps_developer: bool,
) -> Result<(), ApiError> {
    let role_path = format!("{path}.role");
    let Some(role) = message.get("role").and_then(Value::as_str) else {
        return Err(ApiError::invalid(role_path.clone(), format!("{role_path} must be a string")));
    };
    if role.len() > MAX_ROLE_BYTES {
        let message = format!("{role_path} has {} bytes; it must have at most {MAX_ROLE_BYTES}", role.len());
        return Err(ApiError::invalid(role_path, message));
    }
    if role == "developer" && !keeps_developer {
        message.insert("role".to_owned(), Value::from("system"));
    }
    let content_path = format!("{path}.content");
    match message.get("content") {
        None | Some(Value::Null | Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            let joined = text_of_parts(parts, &content_path)?;
            message.insert("content".to_owned(), Value::String(joined));
        }
        Some(_) => {
            let message = format!("{content_path} must be a string or an array of text parts");
            return Err(ApiError::invalid(content_path, message));
        }
    }
    let Some(calls) = message.get_mut("tool_calls").filter(|calls| !calls.is_null()) else {
        message.remove("tool_calls");
        return Ok(());
    };
    let calls_path = format!("{path}.tool_calls");
    let Value::Array(calls) = calls else {
        return Err(ApiError::invalid(calls_path.clone(), format!("{calls_path} must be an array")));
    };
    for (i, call) in calls.iter_mut().enumerate() {
        arguments_to_object(&format!("{calls_path}[{i}]"), call)?;
    }
    let has_calls = !calls.is_empty();
    // Templates tell by it that there is nothing beside the calls.
    if has_calls && message.get("content").is_none_or(|content| content == "") {
        message.insert("content".to_owned(), Value::Null);
    }
    Ok(())
}

/// Templates print arguments as JSON themselves; clients send them printed.
fn arguments_to_object(path: &str, call: &mut Value) -> Result<(), ApiError> {
    let wrong = || {
        let message = format!("{path}.function must be an object with a string \"name\" and \"arguments\"");
        ApiError::invalid(format!("{path}.function"), message)
    };
    let function = call.get_mut("function").and_then(Value::as_object_mut).ok_or_else(wrong)?;
    if !function.get("name").is_some_and(Value::is_string) {
        return Err(wrong());
    }
    let parsed = match function.get("arguments") {
        Some(Value::String(text)) if text.trim().is_empty() => Value::Object(Map::new()),
        // What a model wrote need not be JSON; a broken call stands in the history as it was.
        Some(Value::String(text)) => bounded_from_str(text).unwrap_or_else(|_| Value::from(text.as_str())),
        Some(Value::Object(_)) => return Ok(()),
        None | Some(Value::Null) => Value::Object(Map::new()),
        Some(_) => return Err(wrong()),
    };
    function.insert("arguments".to_owned(), parsed);
    Ok(())
}

/// What a model that reads text only is told of an image. An agent that shows it one can go on; a fault would
/// end its conversation, in which the image stays.
const IMAGE_NOTE: &str = "[an image, which this model cannot see]";

/// The text of content parts, joined: templates of text models know no parts.
///
/// # Errors
/// If a part is not text.
pub(in crate::http) fn text_of_parts(parts: &[Value], path: &str) -> Result<String, ApiError> {
    join_parts(parts, path, false)
}

/// The same with a note in the place of every image.
///
/// # Errors
/// If a part is neither.
pub(in crate::http) fn text_of_agents_parts(parts: &[Value], path: &str) -> Result<String, ApiError> {
    join_parts(parts, path, true)
}

fn join_parts(parts: &[Value], path: &str, notes_images: bool) -> Result<String, ApiError> {
    let mut joined = String::new();
    for (i, part) in parts.iter().enumerate() {
        let kind = part.get("type").and_then(Value::as_str).unwrap_or("missing");
        let text = match kind {
            "text" | "input_text" | "output_text" => part.get("text").and_then(Value::as_str),
            "refusal" => part.get("refusal").and_then(Value::as_str),
            "image" | "input_image" if notes_images => Some(IMAGE_NOTE),
            _ => None,
        };
        match text {
            Some(text) => joined.push_str(text),
            None => return Err(invalid_part(&format!("{path}[{i}]"), kind)),
        }
    }
    Ok(joined)
}

/// The 400 for a part that is not text.
pub(in crate::http) fn invalid_part(path: &str, kind: &str) -> ApiError {
    let kind: String = kind.chars().take(64).collect();
    let message = format!("{path} has the type {kind:?}; only parts of type \"text\" are understood");
    ApiError::invalid(path, message)
}
