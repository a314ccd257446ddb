//! The form that an answer is asked to have, under all the names that clients have for it: OpenAI's and
//! Mistral's `response_format`, Responses' `text.format`, vLLM's `structured_outputs` and `guided_*`,
//! llama.cpp's `grammar` and `json_schema`.

use serde_json::{Map, Value};

use super::json::one_of;
use super::{Bounded, bounded_from_str, wrong_type};
use crate::http::error::ApiError;
use crate::text::grammar::{Format, GrammarError, Piece, Tag, Tags};

/// Longest schema or grammar, as its client wrote it.
const MAX_FORMAT_BYTES: usize = 200 << 10;

/// Most strings to choose from.
const MAX_CHOICES: usize = 4096;

/// Most triggers of tagged pieces: the text before one is checked for all of them.
const MAX_TRIGGERS: usize = 64;

/// Most tags of tagged pieces.
const MAX_TAGS: usize = 1000;

/// A form, and the field that asks for it.
#[derive(Clone, Debug)]
pub(in crate::http) struct AskedFormat {
    pub(in crate::http) param: String,
    pub(in crate::http) format: Format,
}

/// The fields as they stand in the body.
pub(super) struct FormatFields<'a> {
    pub(super) response_format: Option<&'a Bounded>,
    pub(super) structured_outputs: Option<&'a Bounded>,
    pub(super) guided_json: Option<&'a Bounded>,
    pub(super) guided_regex: Option<&'a Bounded>,
    pub(super) guided_choice: Option<&'a Bounded>,
    pub(super) guided_grammar: Option<&'a Bounded>,
    pub(super) grammar: Option<&'a Bounded>,
    pub(super) json_schema: Option<&'a Bounded>,
}

impl FormatFields<'_> {
    /// The one form that is asked for.
    ///
    /// # Errors
    /// The 400 that names the field at fault, or the two that ask for something.
    pub(super) fn resolve(&self) -> Result<Option<AskedFormat>, ApiError> {
        let value = |field: Option<&Bounded>| field.map(|Bounded(value)| value.clone()).filter(is_given);
        let guided = [
            ("guided_json", "json", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "grammar", self.guided_grammar),
            ("grammar", "grammar", self.grammar),
            ("json_schema", "json", self.json_schema),
        ];
        let mut asked: Vec<AskedFormat> = Vec::new();
        if let Some(format) = value(self.response_format) {
            asked.extend(response_format("response_format", format)?);
        }
        for (param, kind, field) in guided {
            // llama.cpp's clients send an empty grammar for none.
            let given = value(field).filter(|value| !(param == "grammar" && *value == ""));
            asked.extend(given.map(|value| constraint(param, kind, value)).transpose()?);
        }
        if let Some(Value::Object(constraints)) = value(self.structured_outputs) {
            for (kind, constraint_value) in constraints.into_iter().filter(|(_, value)| is_given(value)) {
                let param = format!("structured_outputs.{kind}");
                asked.extend(structured_output(&param, &kind, constraint_value)?);
            }
        } else if let Some(other) = value(self.structured_outputs) {
            return Err(wrong_type("structured_outputs", "an object", &other));
        }
        if let [first, second, ..] = asked.as_slice() {
            let message =
                format!("{} and {} both say what the answer must be; give one", first.param, second.param);
            return Err(ApiError::invalid(second.param.clone(), message));
        }
        Ok(asked.pop())
    }
}

fn is_given(value: &Value) -> bool {
    !value.is_null()
}

/// `{"type": "text" | "json_object" | "json_schema", ...}`: OpenAI's, with the schema under `json_schema`,
/// or Responses', with the schema beside `type`; llama.cpp's has a `schema` with `json_object`, too.
///
/// # Errors
/// The 400 that names what is wrong.
pub(in crate::http) fn response_format(param: &str, format: Value) -> Result<Option<AskedFormat>, ApiError> {
    let Value::Object(mut format) = format else { return Err(wrong_type(param, "an object", &format)) };
    let kind = match format.get("type") {
        Some(Value::String(kind)) => kind.clone(),
        other => {
            return Err(wrong_type(&format!("{param}.type"), "a string", other.unwrap_or(&Value::Null)));
        }
    };
    const KINDS: [(&str, u8); 4] =
        [("text", 0), ("json_object", 1), ("json_schema", 2), ("structural_tag", 3)];
    let asked = |param: String, format: Format| Ok(Some(AskedFormat { param, format }));
    match one_of(&format!("{param}.type"), &kind, &KINDS)? {
        0 => Ok(None),
        1 => match format.remove("schema").filter(is_given) {
            Some(schema) => asked(format!("{param}.schema"), json(&format!("{param}.schema"), schema)?),
            None => asked(param.to_owned(), Format::any_object()),
        },
        3 => asked(param.to_owned(), tags(param, Value::Object(format))?),
        _ => {
            let (path, mut holder) = match format.remove("json_schema") {
                Some(Value::Object(holder)) => (format!("{param}.json_schema"), holder),
                Some(other) => return Err(wrong_type(&format!("{param}.json_schema"), "an object", &other)),
                None => (param.to_owned(), format),
            };
            let path_of_schema = format!("{path}.schema");
            // Mistral's clients call it so.
            let schema = holder.remove("schema").or_else(|| holder.remove("schema_definition"));
            let format = json(&path_of_schema, schema.unwrap_or(Value::Null))?;
            // A client that says that the schema need not be kept is not refused for its rarer keys.
            let is_loose = holder.get("strict") == Some(&Value::Bool(false));
            asked(path_of_schema, if is_loose { format.lenient() } else { format })
        }
    }
}

/// One of vLLM's. Options that shape no answer have none.
fn structured_output(param: &str, kind: &str, value: Value) -> Result<Option<AskedFormat>, ApiError> {
    match kind {
        "json_object" => {
            let format = Format::any_object();
            Ok((value == true).then(|| AskedFormat { param: param.to_owned(), format }))
        }
        "json" | "regex" | "choice" | "grammar" | "structural_tag" => {
            constraint(param, kind, value).map(Some)
        }
        _ => Ok(None),
    }
}

fn constraint(param: &str, kind: &str, value: Value) -> Result<AskedFormat, ApiError> {
    let format = match kind {
        "json" => json(param, value)?,
        "regex" => Format::Regex(text(param, value)?),
        "choice" => choices(param, value)?,
        "structural_tag" => tags(param, value)?,
        _ => Format::grammar(&text(param, value)?).map_err(|error| fault(param, &error))?,
    };
    Ok(AskedFormat { param: param.to_owned(), format })
}

fn text(param: &str, value: Value) -> Result<String, ApiError> {
    match value {
        Value::String(text) => check_size(param, text.len()).map(|()| text),
        other => Err(wrong_type(param, "a string", &other)),
    }
}

/// A schema, also one written out as a string.
fn json(param: &str, value: Value) -> Result<Format, ApiError> {
    let schema = match value {
        Value::String(text) => {
            check_size(param, text.len())?;
            bounded_from_str(&text)
                .map_err(|error| ApiError::invalid(param, format!("{param} is not JSON: {error}")))?
        }
        schema => schema,
    };
    match schema {
        Value::Object(schema) => {
            check_size(param, Value::Object(schema.clone()).to_string().len())?;
            Ok(Format::Json(schema))
        }
        // Anything at all.
        Value::Bool(true) => Ok(Format::Json(Map::new())),
        other => Err(wrong_type(param, "a JSON schema, an object", &other)),
    }
}

/// `{"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}`, also written out as a string; or
/// the same as `{"format": {"type": "triggered_tags", "tags": [{"begin", "content": {"type": "json_schema",
/// "json_schema"}, "end"}, ...], "triggers": [...]}}`.
fn tags(param: &str, value: Value) -> Result<Format, ApiError> {
    let value = match value {
        Value::String(text) => {
            check_size(param, text.len())?;
            bounded_from_str(&text)
                .map_err(|error| ApiError::invalid(param, format!("{param} is not JSON: {error}")))?
        }
        value => value,
    };
    check_size(param, value.to_string().len())?;
    let wrong =
        |path: &str, wanted: &str, found: &Value| Err(wrong_type(&format!("{param}.{path}"), wanted, found));
    let (holder, list, path) = match &value["format"] {
        Value::Null => (&value, "structures", "structures"),
        format if format["type"] == "triggered_tags" => (format, "tags", "format.tags"),
        other => return wrong("format.type", "\"triggered_tags\"", &other["type"]),
    };
    for switch in ["at_least_one", "stop_after_first"] {
        if holder[switch] == true {
            return wrong(&format!("format.{switch}"), "false", &holder[switch]);
        }
    }
    let at_most = |path: &str, list: &Value, most: usize, things: &str| {
        let path = format!("{param}.{path}");
        let count = list.as_array().map_or(0, Vec::len);
        let message = format!("{path} holds {count} {things}; at most {most} are taken");
        if count <= most { Ok(()) } else { Err(ApiError::invalid(path, message)) }
    };
    at_most("triggers", &holder["triggers"], MAX_TRIGGERS, "triggers")?;
    at_most(path, &holder[list], MAX_TAGS, "tags")?;
    let piece = |text: &str| vec![Piece::Text(text.to_owned())];
    let triggers: Option<Vec<&str>> =
        holder["triggers"].as_array().and_then(|all| all.iter().map(Value::as_str).collect());
    let Some(triggers) = triggers.filter(|all| !all.is_empty() && !all.contains(&"")) else {
        return wrong("triggers", "an array of strings that are not empty", &holder["triggers"]);
    };
    let Some(items) = holder[list].as_array() else {
        return wrong(path, "an array of objects", &holder[list]);
    };
    let is_nested = list == "tags";
    let mut tags = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let at = |key: &str| format!("{path}[{i}].{key}");
        let schema = if is_nested { &item["content"]["json_schema"] } else { &item["schema"] };
        let (Some(begin), Some(end)) = (item["begin"].as_str(), item["end"].as_str()) else {
            return wrong(&at("begin"), "a string, and so must be its end", &item["begin"]);
        };
        let kind = &item["content"]["type"];
        if is_nested && kind != "json_schema" {
            return wrong(&at("content.type"), "\"json_schema\"", kind);
        }
        let Some(schema) = schema.as_object() else {
            return wrong(
                &at(if is_nested { "content.json_schema" } else { "schema" }),
                "a JSON schema, an object",
                schema,
            );
        };
        if !triggers.iter().any(|trigger| begin.starts_with(trigger)) {
            return wrong(&at("begin"), "a string that begins with one of the triggers", &item["begin"]);
        }
        tags.push(Tag { begin: piece(begin), schema: schema.clone(), end: piece(end) });
    }
    let triggers = triggers.into_iter().map(piece).collect();
    Ok(Format::Tags(Tags { triggers, tags }))
}

fn choices(param: &str, value: Value) -> Result<Format, ApiError> {
    let Value::Array(items) = value else { return Err(wrong_type(param, "an array of strings", &value)) };
    if items.is_empty() || items.len() > MAX_CHOICES {
        let message = format!("{param} holds {} strings; it must hold 1 to {MAX_CHOICES}", items.len());
        return Err(ApiError::invalid(param, message));
    }
    let choices = items.into_iter().enumerate().map(|(i, item)| text(&format!("{param}[{i}]"), item));
    let choices = choices.collect::<Result<Vec<String>, ApiError>>()?;
    check_size(param, choices.iter().map(String::len).sum())?;
    Ok(Format::Choice(choices))
}

fn check_size(param: &str, num_bytes: usize) -> Result<(), ApiError> {
    if num_bytes <= MAX_FORMAT_BYTES {
        return Ok(());
    }
    let message = format!("{param} has {num_bytes} bytes; at most {MAX_FORMAT_BYTES} are taken");
    Err(ApiError::invalid(param, message))
}

/// The 400 for a grammar that cannot be had.
pub(in crate::http) fn fault(param: &str, error: &GrammarError) -> ApiError {
    ApiError::invalid(param, format!("{param} cannot be kept: {error}"))
}
