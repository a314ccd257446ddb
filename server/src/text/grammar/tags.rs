//! Text in which tagged pieces have a form: after a trigger comes a tag's beginning, JSON of its schema and its
//! end, as often as the model likes. vLLM's and SGLang's `structural_tag`.
//!
//! What is spelled is found as text; marks that are tokens of their own are named by their ids, because text
//! never holds such a token.

use serde_json::{Map, Value};

use super::GrammarError;
use super::format::{escaped, json_rule, literal};

/// A part of a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Spelled.
    Text(String),
    /// A control token.
    Token(u32),
}

/// A piece of text that has a form.
#[derive(Clone, Debug, PartialEq)]
pub struct Tag {
    /// Before the JSON; begins with a trigger.
    pub begin: Vec<Piece>,
    /// What the JSON is.
    pub schema: Map<String, Value>,
    /// After it.
    pub end: Vec<Piece>,
}

/// What may be tagged in an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Tags {
    /// After each of them nothing but a tag that begins so may follow.
    pub triggers: Vec<Vec<Piece>>,
    /// The tags.
    pub tags: Vec<Tag>,
}

impl Tags {
    /// The same with texts cut where a tokenizer finds control tokens in them.
    #[must_use]
    pub fn spelled_by(self, cut: &dyn Fn(&str) -> Vec<Piece>) -> Self {
        let all = |pieces: Vec<Piece>| -> Vec<Piece> {
            let of = |piece| match piece {
                Piece::Text(text) => cut(&text),
                token => vec![token],
            };
            pieces.into_iter().flat_map(of).collect()
        };
        let tag = |tag: Tag| Tag { begin: all(tag.begin), schema: tag.schema, end: all(tag.end) };
        Tags {
            triggers: self.triggers.into_iter().map(all).collect(),
            tags: self.tags.into_iter().map(tag).collect(),
        }
    }

    /// The right side of a rule.
    ///
    /// # Errors
    /// If a tag begins with no trigger, or nothing is a trigger.
    pub(super) fn rule(&self) -> Result<String, GrammarError> {
        let triggers: Vec<&Piece> = self.triggers.iter().filter_map(|trigger| trigger.first()).collect();
        let texts: Vec<String> =
            triggers.iter().filter_map(|trigger| spelled(trigger)).map(pattern).collect();
        let mut tags_of: Vec<Vec<String>> = vec![Vec::new(); triggers.len()];
        let mut rules = String::new();
        for (index, tag) in self.tags.iter().enumerate() {
            let found =
                triggers.iter().enumerate().find_map(|(i, trigger)| Some((i, after(trigger, &tag.begin)?)));
            let Some((trigger, rest)) = found else {
                let message = format!("the tag {index} begins with no trigger");
                return Err(GrammarError::Unsupported(message));
            };
            rules.push_str(&format!("json_{index}: {}\n", json_rule(&tag.schema)));
            tags_of[trigger].push(format!("{} json_{index} {}", sequence(&rest), sequence(&tag.end)));
        }
        let never = |end: &str| -> String {
            texts.iter().map(|text| format!(" & ~/(?s:.*){text}(?s:{end})/")).collect()
        };
        let mut tagged = Vec::new();
        for (index, (trigger, tags)) in triggers.iter().zip(&tags_of).enumerate() {
            // A trigger that nothing begins with only forbids itself.
            if tags.is_empty() {
                continue;
            }
            let open = match trigger {
                Piece::Token(id) => format!("TALK? <[{id}]>"),
                // The first trigger in a text ends it, so that no such text is the beginning of another.
                Piece::Text(text) => {
                    let text = pattern(text);
                    rules.push_str(&format!("OPEN_{index}: /(?s:.*){text}/{}\n", never(".+")));
                    format!("OPEN_{index}")
                }
            };
            tagged.push(format!("{open} ({})", tags.join(" | ")));
        }
        if tagged.is_empty() {
            return Err(GrammarError::Unsupported("there is no tag".to_owned()));
        }
        let start = format!("start: ({})* TALK?\nTALK: /(?s:.+)/{}\n", tagged.join(" | "), never(".*"));
        Ok(format!("%lark {{\n{start}{rules}}}"))
    }
}

/// A text as a part of a regular expression in Lark.
fn pattern(text: &str) -> String {
    llguidance::regex_to_lark(&escaped(text), "")
}

fn spelled(piece: &Piece) -> Option<&str> {
    match piece {
        Piece::Text(text) => Some(text),
        Piece::Token(_) => None,
    }
}

/// What of a tag's beginning follows the first piece of a trigger; `None` if it does not begin so.
fn after(trigger: &Piece, begin: &[Piece]) -> Option<Vec<Piece>> {
    let (first, rest) = begin.split_first()?;
    let mut left = Vec::new();
    match (trigger, first) {
        (Piece::Token(wanted), Piece::Token(found)) if wanted == found => {}
        (Piece::Text(wanted), Piece::Text(found)) => {
            left.push(Piece::Text(found.strip_prefix(wanted.as_str())?.to_owned()));
        }
        _ => return None,
    }
    left.extend_from_slice(rest);
    Some(left)
}

fn sequence(pieces: &[Piece]) -> String {
    let part = |piece: &Piece| match piece {
        Piece::Text(text) => literal(text),
        Piece::Token(id) => format!("<[{id}]>"),
    };
    if pieces.is_empty() { literal("") } else { pieces.iter().map(part).collect::<Vec<_>>().join(" ") }
}
