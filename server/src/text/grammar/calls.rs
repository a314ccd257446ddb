//! Tool calls as a grammar: the model's own way to write them, with arguments that their schemas allow.
//!
//! Every format is the same few parts around name and arguments ([`Parts`]). Where a family has had several
//! spellings, its chat template has told which one is this model's.

use serde_json::{Map, Value, json};

use super::GrammarError;
use super::compile::check_length;
use super::format::{Token, json_rule, literal};
use super::xml_calls::write_parameters;

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
    /// `<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>`.
    QwenXml {
        /// `<tool_call>`.
        open: Token,
        /// `</tool_call>`.
        close: Token,
    },
    /// `<|tool_call|>[{"name": ..., "arguments": ...}, ...]`: Granite, and Mistral until its tokenizer v7.
    List {
        /// `<|tool_call|>`, `[TOOL_CALLS]`.
        open: Token,
    },
    /// `[TOOL_CALLS]NAME[ARGS]{...}`: Mistral since.
    Named {
        /// `[TOOL_CALLS]`.
        open: Token,
        /// `[CALL_ID]`, before nine letters and digits, where there is one.
        call_id: Option<Token>,
        /// `[ARGS]`, where there is one.
        arguments: Option<Token>,
    },
    /// `<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>...<｜tool▁calls▁end｜>`.
    Section {
        /// `<｜tool▁calls▁begin｜>`.
        open: Token,
        /// `<｜tool▁calls▁end｜>`.
        close: Token,
        /// `<｜tool▁call▁begin｜>`.
        call: Token,
        /// `<｜tool▁call▁end｜>`.
        call_end: Token,
        /// `<｜tool▁sep｜>`.
        separator: Token,
        /// As V3 and R1: `function` in the name's place, then the name and the arguments in a fenced block.
        is_fenced: bool,
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

/// The parts of calls, each the right side of a rule; `""` where there is nothing.
struct Parts {
    /// The mark before the first call, if text can be told apart by it.
    mark: Option<Token>,
    /// From there to the first name.
    first: String,
    /// From the end of a call to the next name; `None`: one call is all there can be.
    between: Option<String>,
    /// From name to arguments where the prompt begins the call of a tool; else see [`CallFormat::head`].
    rest_of_head: String,
    /// After arguments.
    tail: String,
    /// After the last call.
    end: String,
}

const NOTHING: &str = "\"\"";

impl CallFormat {
    fn parts(&self) -> Parts {
        let parts = Parts {
            mark: None,
            first: NOTHING.to_owned(),
            between: None,
            rest_of_head: NOTHING.to_owned(),
            tail: NOTHING.to_owned(),
            end: NOTHING.to_owned(),
        };
        match self {
            CallFormat::Hermes { open, close } => Parts {
                mark: Some(open.clone()),
                first: literal("\n{\"name\": \""),
                between: Some(format!("\"\\n\" {} {}", open.rule(), literal("\n{\"name\": \""))),
                rest_of_head: literal(" "),
                tail: format!("\"}}\\n\" {}", close.rule()),
                ..parts
            },
            CallFormat::QwenXml { open, close } => Parts {
                mark: Some(open.clone()),
                first: literal("\n<function="),
                between: Some(format!("\"\\n\" {} {}", open.rule(), literal("\n<function="))),
                tail: format!("{} {}", literal("</function>\n"), close.rule()),
                ..parts
            },
            CallFormat::List { open } => Parts {
                mark: Some(open.clone()),
                // Some of Mistral's write a blank, as SentencePiece's vocabularies have them write text.
                first: format!("\" \"? {}", literal("[{\"name\": \"")),
                between: Some(literal(", {\"name\": \"")),
                rest_of_head: literal(" "),
                tail: literal("}"),
                end: literal("]"),
            },
            CallFormat::Named { open, call_id, arguments } => Parts {
                mark: Some(open.clone()),
                between: Some(open.rule()),
                rest_of_head: match (call_id, arguments) {
                    (Some(_), Some(arguments)) => format!("CALL_ID {}", arguments.rule()),
                    _ => NOTHING.to_owned(),
                },
                ..parts
            },
            CallFormat::Section { open, close, call, call_end, separator, is_fenced } => {
                let kind = || format!("\"function\" {}", separator.rule());
                let begin = if *is_fenced { format!("{} {}", call.rule(), kind()) } else { call.rule() };
                let fence = if *is_fenced { literal("\n```") } else { NOTHING.to_owned() };
                Parts {
                    mark: Some(open.clone()),
                    between: Some(if *is_fenced { format!("\"\\n\" {begin}") } else { begin.clone() }),
                    first: begin,
                    tail: format!("{fence} {}", call_end.rule()),
                    end: close.rule(),
                    ..parts
                }
            }
            CallFormat::Llama => Parts { rest_of_head: literal(" "), tail: literal("}"), ..parts },
            CallFormat::Harmony { .. } => parts,
        }
    }

    /// From a tool's name to its arguments.
    fn head(&self, name: &str) -> String {
        let in_json = |key: &str| {
            let name = Value::from(name).to_string();
            literal(&format!("{}, \"{key}\": ", &name[1..]))
        };
        match self {
            CallFormat::Hermes { .. } | CallFormat::List { .. } => in_json("arguments"),
            CallFormat::Llama => in_json("parameters"),
            CallFormat::QwenXml { .. } => literal(&format!("{name}>\n")),
            CallFormat::Named { call_id, arguments, .. } => {
                let id = call_id.as_ref().map_or_else(String::new, |id| format!("{} CALL_ID", id.rule()));
                let arguments = arguments.as_ref().map_or_else(String::new, Token::rule);
                format!("{} {id} {arguments}", literal(name))
            }
            CallFormat::Section { is_fenced: true, .. } => literal(&format!("{name}\n```json\n")),
            CallFormat::Section { separator, .. } => format!("{} {}", literal(name), separator.rule()),
            CallFormat::Harmony { constrain, message } => {
                let name = literal(&format!("{name} "));
                format!("{name} {} \"json\" {}", constrain.rule(), message.rule())
            }
        }
    }

    /// True if a name stands by itself, with nothing that would quote what is special in it.
    fn has_bare_names(&self) -> bool {
        matches!(self, CallFormat::QwenXml { .. } | CallFormat::Named { .. } | CallFormat::Section { .. })
    }
}

impl Calling {
    pub(super) fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    /// True if calls and text can be told apart by a mark before each call.
    pub fn is_marked(&self) -> bool {
        self.format.parts().mark.is_some()
    }

    /// Writes the rules `calls` (one or more, or what is left of them) and, where calls are marked,
    /// `talk` (text with calls in it).
    ///
    /// # Errors
    /// If a tool's name or its parameters cannot be written in this format, or are too long.
    pub(super) fn write_rules(&self, out: &mut String) -> Result<(), GrammarError> {
        for (i, tool) in self.tools.iter().enumerate() {
            if self.format.has_bare_names() && !is_bare(&tool.name) {
                let message = format!("the tool name {:?} cannot stand in this model's calls", tool.name);
                return Err(GrammarError::Unsupported(message));
            }
            match self.format {
                CallFormat::QwenXml { .. } => write_parameters(i, tool, out)?,
                _ => out.push_str(&format!("arguments_{i}: {}\n", json_rule(&tool.schema()))),
            }
            check_length(out.len())?;
        }
        if matches!(self.format, CallFormat::Named { call_id: Some(_), .. }) {
            out.push_str("CALL_ID: /[a-zA-Z0-9]{9}/\n");
        }
        let Parts { mark, first, between, rest_of_head, tail, end } = &self.format.parts();
        let one =
            |(i, tool): (usize, &ToolShape)| format!("{} arguments_{i} {tail}", self.format.head(&tool.name));
        let any: Vec<String> = self.tools.iter().enumerate().map(one).collect();
        out.push_str(&format!("call: {}\n", any.join(" | ")));
        let more = match (between, self.begun) {
            (Some(between), None | Some(None)) if self.is_parallel => format!("({between} call)*"),
            _ => NOTHING.to_owned(),
        };
        match (self.begun, mark) {
            (Some(Some(tool)), _) => {
                out.push_str(&format!("calls: {rest_of_head} arguments_{tool} {tail} {more} {end}\n"));
            }
            (Some(None), _) | (None, None) => out.push_str(&format!("calls: call {more} {end}\n")),
            (None, Some(mark)) => {
                out.push_str(&format!("rest: {first} call {more} {end}\ncalls: {} rest\n", mark.rule()));
                out.push_str("talk: TALK? | opening rest\n");
                out.push_str(&(mark.text_without("TALK") + &mark.after_text("opening", "TALK")));
            }
        }
        Ok(())
    }
}

/// True if a name is of the characters that OpenAI allows in one, and dots.
fn is_bare(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
}

impl ToolShape {
    /// What its arguments must be, as one object.
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
