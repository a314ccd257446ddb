//! Text in which tagged pieces have a form: after a trigger comes a tag's beginning, JSON of its schema and its
//! end, as often as the model likes. vLLM's and SGLang's `structural_tag`.
//!
//! What is spelled is found as text; marks that are tokens of their own are named by their ids, because text
//! never holds such a token.

use serde_json::{Map, Value};

use super::GrammarError;
use super::alternatives::{entries_take_room, take};
use super::compile::check_length;
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

    /// Takes about its bytes from `room`; false if there are not so many.
    pub(super) fn takes_room(&self, room: &mut usize) -> bool {
        let marks_take = |pieces: &[Piece], room: &mut usize| {
            pieces.iter().all(|piece| take(spelled(piece).map_or(1, str::len), room))
        };
        self.triggers.iter().all(|trigger| marks_take(trigger, room))
            && self.tags.iter().all(|tag| {
                marks_take(&tag.begin, room)
                    && marks_take(&tag.end, room)
                    && entries_take_room(&tag.schema, room)
            })
    }

    /// The right side of a rule.
    ///
    /// # Errors
    /// If a trigger cannot be told from text, a tag begins with no trigger or can never be begun, nothing is
    /// tagged, or all that is too long.
    pub(super) fn rule(&self) -> Result<String, GrammarError> {
        let triggers = self.first_pieces()?;
        let texts: Vec<&str> = triggers.iter().filter_map(|trigger| spelled(trigger)).collect();
        let mut tags_of: Vec<Vec<String>> = vec![Vec::new(); triggers.len()];
        let mut rules = String::new();
        for (index, tag) in self.tags.iter().enumerate() {
            let fits = |(i, trigger): (usize, &&Piece)| Some((i, after(trigger, &tag.begin)?));
            // The shortest, where one is the beginning of another: what comes after that is a tag already.
            let found = triggers.iter().enumerate().filter_map(fits);
            let found = found.min_by_key(|&(i, _)| spelled(triggers[i]).map_or(0, str::len));
            let Some((trigger, rest)) = found else {
                let message = format!("the tag {index} begins with no trigger");
                return Err(GrammarError::Unsupported(message));
            };
            rules.push_str(&format!("json_{index}: {}\n", json_rule(&tag.schema)));
            check_length(rules.len())?;
            tags_of[trigger].push(format!("{} json_{index} {}", sequence(&rest), sequence(&tag.end)));
        }
        let never = |end: &str| -> Result<String, GrammarError> {
            let all = texts.iter().map(|text| format!(" & ~/(?s:.*){}(?s:{end})/", pattern(text)));
            let all: String = all.collect();
            check_length(all.len()).map(|()| all)
        };
        let never_before = never(".+")?;
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
                    if let Some(other) = texts.iter().find(|other| ends_early(text, other)) {
                        let message = format!(
                            "no tag can begin with the trigger {}, because the trigger {} comes before its end",
                            shown(text),
                            shown(other)
                        );
                        return Err(GrammarError::Unsupported(message));
                    }
                    rules.push_str(&format!("OPEN_{index}: /(?s:.*){}/{never_before}\n", pattern(text)));
                    check_length(rules.len())?;
                    format!("OPEN_{index}")
                }
            };
            tagged.push(format!("{open} ({})", tags.join(" | ")));
        }
        if tagged.is_empty() {
            return Err(GrammarError::Unsupported("there is no tag".to_owned()));
        }
        let start = format!("start: ({})* TALK?\nTALK: /(?s:.+)/{}\n", tagged.join(" | "), never(".*")?);
        Ok(format!("%lark {{\n{start}{rules}}}"))
    }

    /// What each trigger is known by.
    fn first_pieces(&self) -> Result<Vec<&Piece>, GrammarError> {
        let is_token = |piece: &Piece| matches!(piece, Piece::Token(_));
        let mut pieces = Vec::with_capacity(self.triggers.len());
        for trigger in &self.triggers {
            let Some((first, rest)) = trigger.split_first() else { continue };
            // Its text alone would be forbidden everywhere else, and may be as common as a line break.
            if let Some(text) = spelled(first).filter(|_| rest.iter().any(is_token)) {
                let message = format!(
                    "a trigger holds a control token of this model after {}; let it begin with the control token",
                    shown(text)
                );
                return Err(GrammarError::Unsupported(message));
            }
            pieces.push(first);
        }
        Ok(pieces)
    }
}

/// The beginning of a text, for a message.
fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(40).collect::<String>())
}

/// True if in a text another one ends before the text's own end.
fn ends_early(text: &str, other: &str) -> bool {
    text.find(other).is_some_and(|at| at + other.len() < text.len())
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
