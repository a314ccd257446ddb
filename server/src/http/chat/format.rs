//! The form that an answer is asked to have. Only plain text can be promised; anything else is refused,
//! because a client that asks for JSON parses what it gets.

use serde_json::Value;

use crate::http::error::ApiError;

/// Checks a format object, `{"type": "text"}` or none.
///
/// # Errors
/// The 400 that names the type asked for.
pub(in crate::http) fn only_text(param: &str, format: Option<&Value>) -> Result<(), ApiError> {
    match format {
        None | Some(Value::Null) => Ok(()),
        Some(format) if format["type"] == "text" => Ok(()),
        Some(format) => {
            let found: String = format["type"].to_string().chars().take(64).collect();
            let message = format!("{param}.type is {found}; answers can only be promised as \"text\" here");
            Err(ApiError::invalid(param, message))
        }
    }
}
