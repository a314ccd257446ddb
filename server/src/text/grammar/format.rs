//! What an answer as a whole must be, as text in llguidance's dialect of Lark.

use serde_json::{Map, Value, json};

use super::GrammarError;
use super::alternatives::{entries_take_room, inline_alternatives, take};
use super::calls::Calling;
use super::gbnf::gbnf_to_lark;
use super::tags::{Piece, Tags};

/// White space between the parts of JSON: none, a blank, or a line break and an indentation, so that a
/// model cannot go on with white space for ever.
const JSON_SPACE: &str = r" |\n[ \t]{0,40}";

/// What stands between reasoning and answer.
const GAP: &str = r"/[ \t\r\n]{1,8}/";

/// What the client asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Format {
    /// JSON that a schema, an object, allows.
    Json(Map<String, Value>),
    /// A regular expression that the whole answer matches.
    Regex(String),
    /// One of these.
    Choice(Vec<String>),
    /// A grammar in Lark, as llguidance has it.
    Lark(String),
    /// Text with tagged pieces.
    Tags(Tags),
}

impl Format {
    /// Any JSON object.
    pub fn any_object() -> Format {
        Format::Json(Map::from_iter([("type".to_owned(), Value::from("object"))]))
    }

    /// A grammar, in Lark or in llama.cpp's GBNF (`NAME ::= ...`).
    ///
    /// # Errors
    /// If it is GBNF with a fault.
    pub fn grammar(text: &str) -> Result<Format, GrammarError> {
        let is_name = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        let is_gbnf_rule = |line: &str| line.split_once("::=").is_some_and(|(name, _)| is_name(name.trim()));
        let lark = if text.lines().any(is_gbnf_rule) { gbnf_to_lark(text)? } else { text.to_owned() };
        Ok(Format::Lark(lark))
    }

    /// The same, where keys of a schema that nothing is known of do no harm.
    #[must_use]
    pub fn lenient(self) -> Format {
        let Format::Json(mut schema) = self else { return self };
        option(&mut schema, "lenient", Value::Bool(true));
        Format::Json(schema)
    }

    /// The same with marks cut where a tokenizer finds control tokens in them.
    #[must_use]
    pub fn spelled_by(self, cut: &dyn Fn(&str) -> Vec<Piece>) -> Format {
        match self {
            Format::Tags(tags) => Format::Tags(tags.spelled_by(cut)),
            other => other,
        }
    }

    /// True if it has more than about so many bytes.
    pub fn exceeds(&self, num_bytes: usize) -> bool {
        let mut room = num_bytes;
        let fits = match self {
            Format::Json(schema) => entries_take_room(schema, &mut room),
            Format::Regex(text) | Format::Lark(text) => take(text.len(), &mut room),
            Format::Choice(choices) => choices.iter().all(|choice| take(choice.len(), &mut room)),
            Format::Tags(tags) => tags.takes_room(&mut room),
        };
        !fits
    }

    /// What the rule `answer` is.
    fn rule(&self) -> Result<String, GrammarError> {
        Ok(match self {
            Format::Json(schema) => json_rule(schema),
            Format::Regex(regex) => regex_rule(regex)?,
            Format::Choice(choices) => {
                choices.iter().map(|choice| literal(choice)).collect::<Vec<_>>().join(" | ")
            }
            Format::Lark(text) => format!("%lark {{\n{text}\n}}"),
            Format::Tags(tags) => tags.rule()?,
        })
    }
}

/// Sets an option of llguidance's, unless the schema sets it itself.
fn option(schema: &mut Map<String, Value>, name: &str, value: Value) {
    let options = schema.entry("x-guidance").or_insert_with(|| json!({}));
    if let Value::Object(options) = options {
        options.entry(name).or_insert(value);
    }
}

/// A schema as the right side of a rule.
pub(super) fn json_rule(schema: &Map<String, Value>) -> String {
    let mut schema = inline_alternatives(schema);
    option(&mut schema, "whitespace_pattern", Value::from(JSON_SPACE));
    format!("%json {}", Value::Object(schema))
}

/// A text as a literal.
pub(super) fn literal(text: &str) -> String {
    // JSON's spelling, but for one character that Lark wants escaped, too.
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

fn regex_rule(regex: &str) -> Result<String, GrammarError> {
    let num_escapes = |text: &str| text.len() - text.trim_end_matches('\\').len();
    let mut body = regex.strip_prefix('^').unwrap_or(regex);
    // An answer is matched as a whole anyway.
    if let Some(before) = body.strip_suffix('$')
        && num_escapes(before).is_multiple_of(2)
    {
        body = before;
    }
    if !num_escapes(body).is_multiple_of(2) {
        return Err(GrammarError::Unsupported("the regular expression ends inside of an escape".to_owned()));
    }
    Ok(format!("/(?:{})/", llguidance::regex_to_lark(body, "")))
}

/// A control token: by its id, and as it would be spelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// `None`: the vocabulary has no such token, and the model spells it.
    pub id: Option<u32>,
    /// How it is written.
    pub text: String,
}

impl Token {
    /// The token in a rule.
    pub(super) fn rule(&self) -> String {
        self.id.map_or_else(|| literal(&self.text), |id| format!("<[{id}]>"))
    }

    /// The definition of a terminal: text, at least a character of it, in which the token is not spelled.
    pub(super) fn text_without(&self, name: &str) -> String {
        let spelled = llguidance::regex_to_lark(&escaped(&self.text), "");
        format!("{name}: /(?s:.+)/ & ~/(?s:.*{spelled}.*)/\n")
    }

    /// The definition of a rule: the token, after any text. `text` is the terminal of [`Token::text_without`].
    pub(super) fn after_text(&self, name: &str, text: &str) -> String {
        match self.id {
            Some(id) => format!("{name}: {text}? <[{id}]>\n"),
            // Spelled, it could be taken for text until its last byte: so text and token are one.
            None => format!("{name}[suffix={}]: /(?s:.*)/\n", literal(&self.text)),
        }
    }
}

/// A text as a regular expression.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        // Not all punctuation: `\<` is the beginning of a word.
        if "\\.+*?()|[]{}^$#&-~/".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// What a model writes before its answer proper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lead {
    /// Reasoning, between two marks.
    Reasoning {
        /// Before it.
        open: Token,
        /// After it.
        close: Token,
        /// The prompt ends inside of it.
        has_begun: bool,
    },
    /// Channels, `<|channel|>NAME<|message|>TEXT<|end|><|start|>assistant`, of which the last is the answer.
    Channels {
        /// `<|channel|>`.
        channel: Token,
        /// `<|message|>`.
        message: Token,
        /// `<|end|>`.
        end: Token,
        /// `<|start|>`.
        start: Token,
    },
}

impl Lead {
    /// The rule `start` of an answer after this, and what it needs.
    fn rules(&self, answer: &str) -> String {
        match self {
            Lead::Reasoning { open, close, has_begun } => {
                let start = if *has_begun {
                    format!("thought GAP? {answer}")
                } else {
                    format!("{answer} | GAP? {} thought GAP? {answer}", open.rule())
                };
                let thought = close.text_without("THOUGHT") + &close.after_text("thought", "THOUGHT");
                format!("start: {start}\n{thought}GAP: {GAP}\n")
            }
            Lead::Channels { channel, message, end, start } => {
                let thought = end.text_without("THOUGHT") + &end.after_text("thought", "THOUGHT");
                let [channel, message, start] = [channel, message, start].map(Token::rule);
                let before = format!("{channel} \"analysis\" {message} thought {start} \"assistant\"");
                format!("start: ({before})? {channel} \"final\" {message} {answer}\n{thought}")
            }
        }
    }
}

/// A whole answer of this format.
///
/// # Errors
/// If the format cannot be written as a grammar.
pub fn answer_text(format: &Format) -> Result<String, GrammarError> {
    match format {
        // As it stands, so that its faults are found where the client wrote them.
        Format::Lark(text) => Ok(text.clone()),
        format => Ok(format!("start: {}\n", format.rule()?)),
    }
}

/// An answer of a chat: after what the model writes first, what `format` says, or tool calls;
/// any text where there is no format.
///
/// # Errors
/// If the format cannot be written as a grammar.
pub fn grammar_text(
    lead: Option<&Lead>,
    format: Option<&Format>,
    calls: Option<&Calling>,
) -> Result<String, GrammarError> {
    if let (None, Some(format), None) = (lead, format, calls) {
        return answer_text(format);
    }
    let mut rules = String::new();
    if let Some(calls) = calls {
        calls.write_rules(&mut rules)?;
    }
    if let Some(format) = format {
        rules.push_str(&format!("answer: {}\n", format.rule()?));
    }
    let answer = match (format, calls) {
        (Some(_), Some(calls)) if !calls.has_begun() => "(answer | calls)",
        (_, Some(calls)) if calls.has_begun() => "calls",
        (None, Some(_)) => "talk",
        _ => "answer",
    };
    // A call that the prompt begins comes after all that.
    let lead = lead.filter(|_| !calls.is_some_and(Calling::has_begun));
    let start = lead.map_or_else(|| format!("start: {answer}\n"), |lead| lead.rules(answer));
    Ok(start + &rules)
}
