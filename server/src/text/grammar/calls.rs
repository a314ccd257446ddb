//! Tool calls as a grammar: the model's own way to write them, with arguments that their schemas allow.
//!
//! Formats are here whose calls have one spelling that their models were trained on. The others' (Mistral's
//! and DeepSeek's two each, XML's bare text) are not promised to anybody.

use serde_json::{Map, Value, json};

use super::format::{Token, json_rule, literal};

/// How calls are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallFormat {
    /// `<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>`.
    Hermes {
        /// `<tool_call>`.
        open: Token,
        /// `</tool_call>`.
        close: Token,
    },
    /// `<|tool_call|>[{"name": ..., "arguments": ...}, ...]`.
    Granite {
        /// `<|tool_call|>`.
        open: Token,
    },
    /// `{"name": ..., "parameters": ...}`, and nothing else.
    Llama,
    /// `NAME <|constrain|>json<|message|>...`, after what stands before it in the prompt.
    Harmony {
        /// `<|constrain|>`.
        constrain: Token,
        /// `<|message|>`.
        message: Token,
    },
}

/// A tool that can be called.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolShape {
    /// Its name.
    pub name: String,
    /// The schema of its arguments.
    pub parameters: Map<String, Value>,
    /// Its arguments must be what the schema says.
    pub is_exact: bool,
}

/// The calls of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Calling {
    /// How they are written.
    pub format: CallFormat,
    /// What can be called.
    pub tools: Vec<ToolShape>,
    /// The prompt ends with the beginning of a call: of any tool, its name comes next; or of the tool
    /// at this place, its arguments come next.
    pub begun: Option<Option<usize>>,
    /// There may be several.
    pub is_parallel: bool,
}

impl Calling {
    pub(super) fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    /// True if calls and text can be told apart by a mark before each call.
    pub fn is_marked(&self) -> bool {
        matches!(self.format, CallFormat::Hermes { .. } | CallFormat::Granite { .. })
    }

    /// Writes the rules `calls` (one or more, or what is left of them) and, where calls are marked,
    /// `talk` (text with calls in it).
    pub(super) fn write_rules(&self, out: &mut String) {
        for (i, tool) in self.tools.iter().enumerate() {
            out.push_str(&format!("arguments_{i}: {}\n", json_rule(&tool.schema())));
        }
        match &self.format {
            CallFormat::Hermes { open, close } => self.write_hermes(open, close, out),
            CallFormat::Granite { open } => self.write_granite(open, out),
            CallFormat::Llama => self.write_llama(out),
            CallFormat::Harmony { constrain, message } => self.write_harmony(constrain, message, out),
        }
    }

    /// Alternatives, one a tool: `before` its name, the rest of the object after it.
    fn objects(&self, before: &str, key: &str) -> String {
        let object = |(i, tool): (usize, &ToolShape)| {
            let name = Value::from(tool.name.as_str()).to_string();
            let head = literal(&format!("{before}{}, \"{key}\": ", &name[1..]));
            format!("{head} arguments_{i} \"}}\"")
        };
        self.tools.iter().enumerate().map(object).collect::<Vec<_>>().join(" | ")
    }

    /// What is left of the first call's object.
    fn rest_of_first(&self, key: &str) -> String {
        match self.begun {
            Some(Some(tool)) => format!("\" \" arguments_{tool} \"}}\""),
            _ => format!("({})", self.objects("", key)),
        }
    }

    fn takes_more(&self) -> bool {
        self.is_parallel && !matches!(self.begun, Some(Some(_)))
    }

    fn write_hermes(&self, open: &Token, close: &Token, out: &mut String) {
        let whole = self.objects("{\"name\": \"", "arguments");
        let close = close.rule();
        out.push_str(&format!("body: \"\\n\" ({whole}) \"\\n\" {close}\ncall: {} body\n", open.rule()));
        let more = if self.takes_more() { "(\"\\n\" call)*" } else { "" };
        match self.begun {
            Some(_) => {
                let rest = self.rest_of_first("arguments");
                out.push_str(&format!("calls: {rest} \"\\n\" {close} {more}\n"));
            }
            None => {
                out.push_str(&format!("calls: call {more}\ntalk: TALK? | opening body {more}\n"));
                out.push_str(&(open.text_without("TALK") + &open.after_text("opening", "TALK")));
            }
        }
    }

    fn write_granite(&self, open: &Token, out: &mut String) {
        let whole = self.objects("{\"name\": \"", "arguments");
        out.push_str(&format!("call: {whole}\n"));
        let more = if self.takes_more() { "(\", \" call)*" } else { "" };
        match self.begun {
            Some(_) => {
                let rest = self.rest_of_first("arguments");
                out.push_str(&format!("calls: {rest} {more} \"]\"\n"));
            }
            None => {
                let list = format!("\"[\" call {more} \"]\"");
                out.push_str(&format!("calls: {} {list}\ntalk: TALK? | opening {list}\n", open.rule()));
                out.push_str(&(open.text_without("TALK") + &open.after_text("opening", "TALK")));
            }
        }
    }

    fn write_llama(&self, out: &mut String) {
        out.push_str(&format!("calls: {}\n", self.rest_of_first("parameters")));
    }

    fn write_harmony(&self, constrain: &Token, message: &Token, out: &mut String) {
        let rule = match self.begun {
            Some(Some(tool)) => format!("arguments_{tool}"),
            _ => {
                let (constrain, message) = (constrain.rule(), message.rule());
                let call = |(i, tool): (usize, &ToolShape)| {
                    let name = literal(&format!("{} ", tool.name));
                    format!("{name} {constrain} \"json\" {message} arguments_{i}")
                };
                self.tools.iter().enumerate().map(call).collect::<Vec<_>>().join(" | ")
            }
        };
        out.push_str(&format!("calls: {rule}\n"));
    }
}

impl ToolShape {
    fn schema(&self) -> Map<String, Value> {
        let mut schema = if self.is_exact { self.parameters.clone() } else { Map::new() };
        schema.entry("type").or_insert_with(|| Value::from("object"));
        // A tool without parameters is not to be given any.
        let is_empty = |key: &str| schema.get(key).is_none_or(|value| *value == json!({}));
        let has_none = self.parameters.get("properties") == Some(&json!({}));
        if self.is_exact && has_none && is_empty("patternProperties") {
            schema.entry("additionalProperties").or_insert(Value::Bool(false));
        }
        schema
    }
}
