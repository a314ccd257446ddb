//! The parameters of a Qwen3-Coder call, `<parameter=KEY>\nVALUE\n</parameter>\n` each, as a grammar: a value of
//! type `string` is bare text, any other JSON.
//!
//! Bare text cannot hold the marks that end it, so what a schema promises of a string is kept by regular
//! expressions: each is one lexeme up to and with its end mark, and none is the beginning of another.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::GrammarError;
use super::alternatives::unescape;
use super::calls::ToolShape;
use super::compile::check_length;
use super::format::{json_rule, literal};

const END: &str = "\n</parameter>";
/// What a reader takes for the end of a value.
const MARKS: [&str; 2] = ["</parameter>", "</function>"];
/// Text up to its end mark and with it.
const TEXT: &str = r"~/(?s:.*)<\/parameter>(?s:.+)/ & ~/(?s:.*)<\/function>(?s:.*)/";

/// Keys of a tool's parameters that say nothing more of them than is kept here. `additionalProperties` is about
/// parameters that are never written.
const KNOWN_OF_OBJECTS: &[&str] =
    &["type", "properties", "required", "additionalProperties", "$defs", "definitions"];
/// Keys of a string that are kept.
const KNOWN_OF_STRINGS: &[&str] = &["type", "enum", "const", "minLength", "maxLength", "pattern"];
/// Keys that narrow nothing.
const NOTES: &[&str] = &[
    "$schema",
    "$id",
    "$comment",
    "title",
    "description",
    "default",
    "example",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
];

/// Writes the rule `arguments_TOOL`.
///
/// # Errors
/// If the tool's schema asks for something that cannot be kept in this format, or becomes too long in it.
pub(super) fn write_parameters(index: usize, tool: &ToolShape, out: &mut String) -> Result<(), GrammarError> {
    if !tool.is_exact {
        let value = format!("/(?s:.*)\\n<\\/parameter>/ & {TEXT}");
        out.push_str(&format!("KEY_{index}: /[^<>\\n]+/\nANY_{index}: {value}\n"));
        let parameter = format!("\"<parameter=\" KEY_{index} \">\\n\" ANY_{index} \"\\n\"");
        out.push_str(&format!("arguments_{index}: ({parameter})*\n"));
        return Ok(());
    }
    let schema = &tool.parameters;
    if let Some(key) = unknown(schema, KNOWN_OF_OBJECTS) {
        return Err(unsupported(tool, "the parameters", &format!("`{key}`")));
    }
    let none = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&none);
    let required: HashSet<&str> = match schema.get("required") {
        Some(Value::Array(keys)) => keys.iter().filter_map(Value::as_str).collect(),
        _ => HashSet::new(),
    };
    if let Some(key) = required.iter().find(|key| !properties.contains_key(**key)) {
        return Err(unsupported(tool, "the parameters", &format!("a required {key:?} of no schema")));
    }
    let mut sequence = String::new();
    for (i, (key, of)) in properties.iter().enumerate() {
        let name = || format!("the parameter {key:?}");
        if key.trim() != key || key.is_empty() || key.contains(['<', '>', '\n']) {
            return Err(unsupported(tool, &name(), "such a name"));
        }
        let (rule, value) = match Bare::of(of).map_err(|what| unsupported(tool, &name(), &what))? {
            // The name of a terminal, which a regular expression is, is in capitals.
            Some(Bare::Text(text)) => (format!("TEXT_{index}_{i}"), text),
            Some(Bare::Choice(choices)) => (format!("choice_{index}_{i}"), choices),
            None => {
                let of = json_value(schema, of).map_err(|what| unsupported(tool, &name(), &what))?;
                out.push_str(&format!("json_{index}_{i}: {}\n", json_rule(&of)));
                (format!("value_{index}_{i}"), format!("json_{index}_{i} {}", literal(END)))
            }
        };
        out.push_str(&format!("{rule}: {value}\n"));
        let is_required = required.contains(&key.as_str());
        let begin = literal(&format!("<parameter={key}>\n"));
        sequence.push_str(&format!("({begin} {rule} \"\\n\"){} ", if is_required { "" } else { "?" }));
        // Definitions are written with each parameter that refers to them.
        check_length(out.len() + sequence.len())?;
    }
    let rule = if sequence.is_empty() { "\"\"" } else { sequence.trim_end() };
    out.push_str(&format!("arguments_{index}: {rule}\n"));
    Ok(())
}

/// Bare text with its end mark, as a rule's right side.
enum Bare {
    /// Regular expressions.
    Text(String),
    /// Literals.
    Choice(String),
}

impl Bare {
    /// `None` if the value is no bare text.
    fn of(schema: &Value) -> Result<Option<Bare>, String> {
        match schema.as_object().filter(|of| of.get("type").is_some_and(|kind| kind == "string")) {
            Some(of) => bare_string(of).map(Some),
            None => Ok(None),
        }
    }
}

fn bare_string(of: &Map<String, Value>) -> Result<Bare, String> {
    if let Some(key) = unknown(of, KNOWN_OF_STRINGS) {
        return Err(format!("`{key}` of a string"));
    }
    let length = |key: &str| -> Result<Option<u64>, String> {
        match of.get(key) {
            None => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or_else(|| format!("`{key}` that is no count")),
        }
    };
    let (least, most) = (length("minLength")?.unwrap_or(0), length("maxLength")?);
    let pattern = match of.get("pattern") {
        None => None,
        Some(pattern) => Some(pattern.as_str().ok_or("`pattern` that is no string")?),
    };
    let choices = match (of.get("enum"), of.get("const")) {
        (None, None) => None,
        (Some(Value::Array(choices)), None) => Some(choices.as_slice()),
        (None, Some(choice)) => Some(std::slice::from_ref(choice)),
        _ => return Err("`enum` beside `const`, or that is no list".to_owned()),
    };
    let Some(choices) = choices else {
        let bound = most.map_or_else(String::new, |most| most.to_string());
        let long = format!("/(?s:.{{{least},{bound}}})\\n<\\/parameter>/ & {TEXT}");
        return Ok(Bare::Text(match pattern {
            None => long,
            Some(pattern) => format!("{long} & {}", searched(pattern)?),
        }));
    };
    if pattern.is_some() {
        return Err("`pattern` beside `enum` or `const`".to_owned());
    }
    let fits = |choice: &&str| {
        let length = choice.chars().count() as u64;
        length >= least && most.is_none_or(|most| length <= most)
    };
    let choices: Vec<&str> = choices.iter().filter_map(Value::as_str).filter(fits).collect();
    if choices.is_empty() {
        return Err("`enum` without a string that fits".to_owned());
    }
    if let Some(choice) = choices.iter().find(|choice| MARKS.iter().any(|mark| choice.contains(mark))) {
        return Err(format!("the value {choice:?}"));
    }
    let choices: Vec<String> = choices.iter().map(|choice| literal(&format!("{choice}{END}"))).collect();
    Ok(Bare::Choice(choices.join(" | ")))
}

/// A pattern that is found somewhere in the text, and the end mark.
fn searched(pattern: &str) -> Result<String, String> {
    let num_escapes = |text: &str| text.len() - text.trim_end_matches('\\').len();
    let (before, body) = match pattern.strip_prefix('^') {
        Some(body) => ("", body),
        None => ("(?s:.*)", pattern),
    };
    let (body, after) = match body.strip_suffix('$') {
        Some(body) if num_escapes(body).is_multiple_of(2) => (body, ""),
        _ => (body, "(?s:.*)"),
    };
    if !num_escapes(body).is_multiple_of(2) {
        return Err("`pattern` that ends inside of an escape".to_owned());
    }
    let body = llguidance::regex_to_lark(body, "");
    Ok(format!("/{before}(?:{body}){after}\\n<\\/parameter>/"))
}

/// Where definitions stand.
const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];

/// The schema of one value, with those definitions beside the parameters that it leads to.
fn json_value(parameters: &Map<String, Value>, of: &Value) -> Result<Map<String, Value>, String> {
    let mut schema = match of {
        Value::Object(schema) => schema.clone(),
        Value::Bool(true) => Map::new(),
        _ => return Err("a schema that is no object".to_owned()),
    };
    let elsewhere = || "`$ref` to something but `$defs`".to_owned();
    let mut reached: [Map<String, Value>; 2] = Default::default();
    let mut has_all = [false; 2];
    let mut references = Vec::new();
    find_references(of, &mut references);
    while let Some(to) = references.pop() {
        let (place, name) = definition(to).ok_or_else(elsewhere)?;
        let Some(definitions) = parameters.get(DEFINITIONS[place]).and_then(Value::as_object) else {
            continue;
        };
        let names = match definitions.get_key_value(&name) {
            Some(found) => vec![found],
            None if std::mem::replace(&mut has_all[place], true) => continue,
            // What is spelled in yet another way is somewhere among all.
            None => definitions.iter().collect(),
        };
        for (name, found) in names {
            if !reached[place].contains_key(name) {
                reached[place].insert(name.clone(), found.clone());
                find_references(found, &mut references);
            }
        }
    }
    for (key, definitions) in DEFINITIONS.into_iter().zip(reached).filter(|(_, all)| !all.is_empty()) {
        match schema.get_mut(key) {
            Some(Value::Object(own)) => own.extend(definitions),
            _ => {
                schema.insert(key.to_owned(), Value::Object(definitions));
            }
        }
    }
    Ok(schema)
}

/// Which of [`DEFINITIONS`] a reference leads to, and the key there; `None`: it leads to what is not written
/// along with a value's own schema.
fn definition(to: &str) -> Option<(usize, String)> {
    let (place, path) = to.strip_prefix("#/")?.split_once('/')?;
    let place = DEFINITIONS.iter().position(|known| *known == place)?;
    Some((place, unescape(path.split('/').next().unwrap_or_default())))
}

/// All references in a schema.
fn find_references<'a>(schema: &'a Value, out: &mut Vec<&'a str>) {
    match schema {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| match value {
            Value::String(to) if key == "$ref" => out.push(to),
            value => find_references(value, out),
        }),
        Value::Array(items) => items.iter().for_each(|item| find_references(item, out)),
        _ => {}
    }
}

/// A key that narrows what is valid in a way that is not kept here.
fn unknown<'a>(schema: &'a Map<String, Value>, known: &[&str]) -> Option<&'a str> {
    schema.keys().map(String::as_str).find(|key| !known.contains(key) && !NOTES.contains(key))
}

fn unsupported(tool: &ToolShape, place: &str, what: &str) -> GrammarError {
    GrammarError::Unsupported(format!(
        "{place} of the tool {:?}: this model writes strings as bare text, and {what} cannot be kept in it",
        tool.name
    ))
}
