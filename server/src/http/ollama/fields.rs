//! Ollama's fields. Those that shape an answer stand in `options`, most of them under common names.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::http::error::ApiError;
use crate::http::fields::{
    AskedFormat, Bounded, CommonFields, in_range, integer, response_format, wrong_type,
};

/// What both endpoints have; `options` is read twice, for its common fields and for its own.
#[derive(Deserialize, ToSchema)]
pub(super) struct OllamaCommon {
    model: Option<String>,
    stream: Option<bool>,
    options: Option<CommonFields>,
}

/// Beside the common ones. `num_ctx` and the like say how to load a model, which is loaded here.
#[derive(Default, Deserialize, ToSchema)]
pub(super) struct Options {
    #[serde(default, deserialize_with = "integer")]
    num_predict: Option<i128>,
    repeat_penalty: Option<f64>,
}

/// Largest count that is not refused.
const MOST: i128 = i32::MAX as i128;

/// Ollama's names end with a tag; there are no versions to tell apart here.
pub(super) fn plain_name(name: &str) -> &str {
    name.strip_suffix(":latest").unwrap_or(name)
}

impl OllamaCommon {
    /// The common fields, and the client's bound on the answer. `None`: what the context leaves.
    ///
    /// # Errors
    /// If a count is out of range.
    pub(super) fn resolve(self, options: Option<Options>) -> Result<(CommonFields, Option<i128>), ApiError> {
        let Some(model) = self.model else {
            return Err(ApiError::invalid("model", "model is missing; it must name a model"));
        };
        let options = options.unwrap_or_default();
        let mut common = self.options.unwrap_or_default();
        common.model = Some(plain_name(&model).to_owned());
        common.n = None;
        common.stream = Some(self.stream.unwrap_or(true));
        common.repetition_penalty = common.repetition_penalty.or(options.repeat_penalty);
        // -1: no limit; -2: what the context leaves, which is the same here.
        let asked = in_range("options.num_predict", options.num_predict.unwrap_or(-1), -2, MOST)?;
        Ok((common, (asked >= 0).then_some(asked)))
    }
}

/// `think`: a switch, or how much.
///
/// # Errors
/// If it is neither.
pub(super) fn think(field: Option<Bounded>, variables: &mut Map<String, Value>) -> Result<(), ApiError> {
    let thinks = match field.map(|Bounded(value)| value) {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Bool(thinks)) => thinks,
        Some(Value::String(effort)) => {
            return crate::http::chat::reasoning_variables(&effort, variables);
        }
        Some(other) => {
            return Err(wrong_type("think", "a boolean or \"low\", \"medium\" or \"high\"", &other));
        }
    };
    for switch in ["enable_thinking", "thinking"] {
        variables.insert(switch.to_owned(), Value::Bool(thinks));
    }
    Ok(())
}

/// `format`: `"json"`, or a JSON schema.
///
/// # Errors
/// If it is neither.
pub(super) fn format(field: Option<Bounded>) -> Result<Option<AskedFormat>, ApiError> {
    let asked = match field.map(|Bounded(value)| value) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(word)) if word.is_empty() => return Ok(None),
        Some(Value::String(word)) if word == "json" => json!({ "type": "json_object" }),
        Some(schema @ Value::Object(_)) => json!({ "type": "json_schema", "schema": schema }),
        Some(other) => return Err(wrong_type("format", "\"json\" or a JSON schema", &other)),
    };
    response_format("format", asked)
}
