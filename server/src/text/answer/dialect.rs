//! Which way of writing reasoning and tool calls a model was trained on.
//!
//! The chat template tells: it is asked, once, to render a conversation with a tool call, and what it
//! writes there is what the model writes. A template that shows none leaves the vocabulary, where
//! formats have tokens of their own.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tandem_models::{ChatTemplate, Tokenizer};

use super::deepseek::{self, DeepSeek};
use super::format::Format;
use super::harmony::{self, Harmony};
use super::llama::Llama;
use super::reader::{AnswerReader, Tags};
use super::tagged::Tagged;
use super::tools::ToolSet;
use super::xml::Xml;

/// How a model writes what is not plain text.
#[derive(Clone, Debug)]
pub struct Dialect {
    format: Option<ToolFormat>,
    thinking: Option<Tags>,
    markers: Vec<u32>,
}

/// A family's way to call tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": ..., "arguments": ...}</tool_call>`: Hermes, Qwen, Granite 4.
    Hermes,
    /// `<tool_call><function=...>`: Qwen3-Coder.
    QwenXml,
    /// The answer is a JSON object or a Python list: Llama 3 and 4.
    Llama,
    /// `[TOOL_CALLS]`: Mistral.
    Mistral(MistralCalls),
    /// Sections of control tokens: DeepSeek.
    DeepSeek(DeepSeekCalls),
    /// `<|tool_call|>[...]`: Granite 3.
    Granite,
    /// Channels: gpt-oss.
    Harmony,
}

/// What follows `[TOOL_CALLS]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MistralCalls {
    /// `[{"name": ..., "arguments": ...}, ...]`, until its tokenizer v7.
    List,
    /// `NAME{...}`, with control tokens between.
    Named {
        /// `[CALL_ID]` and an id.
        has_id: bool,
        /// `[ARGS]`.
        has_mark: bool,
    },
}

/// What is between the tokens of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeepSeekCalls {
    /// `function<｜tool▁sep｜>NAME` and a fenced block: V3 and R1.
    Fenced,
    /// `NAME<｜tool▁sep｜>` and bare arguments: V3.1.
    Bare,
}

/// Reasoning's tags: Qwen, DeepSeek and most; Magistral; Seed.
const THINKING: &[Tags] =
    &[("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>")];

/// The name of the tool that the template is asked about.
const PROBE: &str = "tandem_probe";

/// What a format shows in a rendered call. The first that is there decides.
const SIGNS: &[(&str, ToolFormat)] = &[
    ("<|channel|>", ToolFormat::Harmony),
    ("<｜tool▁call▁begin｜>tandem_probe", ToolFormat::DeepSeek(DeepSeekCalls::Bare)),
    ("<｜tool▁call", ToolFormat::DeepSeek(DeepSeekCalls::Fenced)),
    ("[TOOL_CALLS][{", ToolFormat::Mistral(MistralCalls::List)),
    ("[TOOL_CALLS] [{", ToolFormat::Mistral(MistralCalls::List)),
    ("tandem_probe[CALL_ID]", ToolFormat::Mistral(MistralCalls::Named { has_id: true, has_mark: true })),
    ("tandem_probe[ARGS]", ToolFormat::Mistral(MistralCalls::Named { has_id: false, has_mark: true })),
    ("[TOOL_CALLS]tandem_probe", ToolFormat::Mistral(MistralCalls::Named { has_id: false, has_mark: false })),
    ("[TOOL_CALLS]", ToolFormat::Mistral(MistralCalls::List)),
    ("<|tool_call|>", ToolFormat::Granite),
    ("<function=tandem_probe>", ToolFormat::QwenXml),
    ("<tool_call>", ToolFormat::Hermes),
    ("<|python_tag|>", ToolFormat::Llama),
    ("{\"name\": \"tandem_probe\", \"parameters\"", ToolFormat::Llama),
    ("[tandem_probe(", ToolFormat::Llama),
];

/// The token that only a format's models have.
const TOKENS: &[(&str, ToolFormat)] = &[
    ("<|channel|>", ToolFormat::Harmony),
    ("<｜tool▁calls▁begin｜>", ToolFormat::DeepSeek(DeepSeekCalls::Fenced)),
    ("[ARGS]", ToolFormat::Mistral(MistralCalls::Named { has_id: false, has_mark: true })),
    ("[TOOL_CALLS]", ToolFormat::Mistral(MistralCalls::List)),
    ("<|tool_call|>", ToolFormat::Granite),
    ("<tool_call>", ToolFormat::Hermes),
    ("<|python_tag|>", ToolFormat::Llama),
];

impl Dialect {
    /// Finds out about a model.
    pub fn detect(template: Option<&ChatTemplate>, tokenizer: &Tokenizer) -> Dialect {
        let has_token = |token: &str| tokenizer.token_to_id(token).is_some();
        let shown = template
            .and_then(probe)
            .and_then(|text| SIGNS.iter().find(|(sign, _)| text.contains(sign)).map(|(_, format)| *format));
        let format =
            shown.or_else(|| TOKENS.iter().find(|(token, _)| has_token(token)).map(|(_, format)| *format));
        let thinking = THINKING.iter().find(|(open, close)| has_token(open) && has_token(close)).copied();
        let format_markers: &[&str] = match format {
            Some(ToolFormat::Harmony) => harmony::MARKERS,
            Some(ToolFormat::DeepSeek(_)) => deepseek::MARKERS,
            Some(ToolFormat::Mistral(_)) => &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
            Some(ToolFormat::Granite) => &["<|tool_call|>"],
            Some(ToolFormat::Llama) => &["<|python_tag|>"],
            Some(ToolFormat::Hermes | ToolFormat::QwenXml) => &["<tool_call>", "</tool_call>"],
            None => &[],
        };
        let thinking_markers = thinking.into_iter().flat_map(|(open, close)| [open, close]);
        let ids = format_markers.iter().copied().chain(thinking_markers);
        let markers = ids.filter_map(|marker| tokenizer.token_to_id(marker)).collect();
        Dialect { format, thinking, markers }
    }

    /// How its model calls tools, if it was trained to.
    pub fn format(&self) -> Option<ToolFormat> {
        self.format
    }

    /// Control tokens whose text a reader has to see.
    pub fn markers(&self) -> &[u32] {
        &self.markers
    }

    /// A reader of an answer to `prompt`, with calls of `tools`, if calls are wanted.
    pub fn reader(&self, prompt: &str, tools: Option<&Arc<ToolSet>>) -> AnswerReader {
        let format: Option<Box<dyn Format>> = match (self.format, tools) {
            // Its text is written in channels, too.
            (Some(ToolFormat::Harmony), _) => Some(Box::new(Harmony::new())),
            (None, _) | (_, None) => None,
            (Some(ToolFormat::Hermes), _) => Some(Box::new(Tagged::new("<tool_call>", Some("</tool_call>")))),
            (Some(ToolFormat::Granite), _) => Some(Box::new(Tagged::new("<|tool_call|>", None))),
            (Some(ToolFormat::Mistral(_)), _) => Some(Box::new(Tagged::new("[TOOL_CALLS]", None))),
            (Some(ToolFormat::QwenXml), Some(tools)) => Some(Box::new(Xml::new(tools.clone()))),
            (Some(ToolFormat::Llama), _) => Some(Box::new(Llama::new())),
            (Some(ToolFormat::DeepSeek(_)), _) => Some(Box::new(DeepSeek::default())),
        };
        let by_name = matches!(self.format, Some(ToolFormat::Llama)).then(|| tools.cloned()).flatten();
        AnswerReader::new(format, by_name, self.thinking, self.is_thinking(prompt))
    }

    /// True if the prompt ends inside of reasoning that it has begun.
    fn is_thinking(&self, prompt: &str) -> bool {
        self.thinking.is_some_and(|(open, _)| prompt.trim_end().ends_with(open))
    }

    /// What an answer to `prompt` begins with if it must call a tool: this one, or any. `None` if the
    /// format has no beginning that leaves the rest to the model.
    pub fn forced(&self, prompt: &str, tool: Option<&str>) -> Option<String> {
        let name = tool.map(|tool| Value::from(tool).to_string());
        let call = match (self.format?, name, tool) {
            (ToolFormat::Hermes, None, _) => "<tool_call>\n{\"name\": \"".to_owned(),
            (ToolFormat::Hermes, Some(name), _) => format!("<tool_call>\n{{\"name\": {name}, \"arguments\":"),
            (ToolFormat::Granite, None, _) => "<|tool_call|>[{\"name\": \"".to_owned(),
            (ToolFormat::Granite, Some(name), _) => {
                format!("<|tool_call|>[{{\"name\": {name}, \"arguments\":")
            }
            (ToolFormat::QwenXml, _, None) => "<tool_call>\n<function=".to_owned(),
            (ToolFormat::QwenXml, _, Some(tool)) => format!("<tool_call>\n<function={tool}>\n"),
            (ToolFormat::Llama, None, _) => "{\"name\": \"".to_owned(),
            (ToolFormat::Llama, Some(name), _) => format!("{{\"name\": {name}, \"parameters\":"),
            (ToolFormat::Harmony, _, None) => "<|channel|>commentary to=functions.".to_owned(),
            (ToolFormat::Harmony, _, Some(tool)) => {
                format!("<|channel|>commentary to=functions.{tool} <|constrain|>json<|message|>")
            }
            (ToolFormat::Mistral(MistralCalls::List), None, _) => "[TOOL_CALLS][{\"name\": \"".to_owned(),
            (ToolFormat::Mistral(MistralCalls::List), Some(name), _) => {
                format!("[TOOL_CALLS][{{\"name\": {name}, \"arguments\":")
            }
            (ToolFormat::Mistral(MistralCalls::Named { .. }), _, None) => "[TOOL_CALLS]".to_owned(),
            (ToolFormat::Mistral(MistralCalls::Named { has_id, has_mark }), _, Some(tool)) => {
                let mark = match (has_id, has_mark) {
                    (true, _) => "[CALL_ID]",
                    (false, true) => "[ARGS]",
                    (false, false) => "",
                };
                format!("[TOOL_CALLS]{tool}{mark}")
            }
            (ToolFormat::DeepSeek(DeepSeekCalls::Fenced), _, tool) => {
                let rest = tool.map_or_else(String::new, |tool| format!("{tool}\n```json\n"));
                format!("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{rest}")
            }
            (ToolFormat::DeepSeek(DeepSeekCalls::Bare), _, tool) => {
                let rest = tool.map_or_else(String::new, |tool| format!("{tool}<｜tool▁sep｜>"));
                format!("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{rest}")
            }
        };
        Some(self.past_reasoning(prompt) + &call)
    }

    /// The marks around the reasoning that an answer to `prompt` may begin with, and whether it has begun
    /// in the prompt.
    pub fn reasoning(&self, prompt: &str) -> Option<(&'static str, &'static str, bool)> {
        let (open, close) = self.thinking?;
        let is_over = prompt.trim_end().ends_with(close);
        (!is_over).then(|| (open, close, self.is_thinking(prompt)))
    }

    /// What an answer to `prompt` begins with if there is to be no reasoning before it.
    pub fn past_reasoning(&self, prompt: &str) -> String {
        match self.thinking {
            Some((_, close)) if self.is_thinking(prompt) => format!("\n{close}\n\n"),
            _ => String::new(),
        }
    }
}

/// A conversation with a tool call, as the template writes it.
fn probe(template: &ChatTemplate) -> Option<String> {
    let call = json!({ "id": "probe0001", "type": "function",
        "function": { "name": PROBE, "arguments": { "probe": "value" } } });
    let messages = json!([
        { "role": "user", "content": "Hello" },
        { "role": "assistant", "content": "", "tool_calls": [call] },
    ]);
    let tools = json!([{ "type": "function", "function": { "name": PROBE, "description": "A tool",
        "parameters": { "type": "object", "properties": { "probe": { "type": "string" } } } } }]);
    template.render(&messages, Some(&tools), false, &Map::new()).ok()
}
