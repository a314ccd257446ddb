//! `oneOf` whose alternatives are references.
//!
//! A grammar can keep a `oneOf` only if its alternatives exclude each other, and llguidance sees that of
//! schemas and not of references to them. So references are replaced there by what they refer to, a few
//! levels deep and up to a bound, which leaves recursion as it is.

use serde_json::{Map, Value};

use super::compile::MAX_TEXT_BYTES;

/// A `oneOf` inside what an alternative of another one refers to, and so on.
const MAX_DEPTH: usize = 4;

/// Keys whose values are no schemas, whatever they look like.
const DATA: [&str; 5] = ["const", "enum", "default", "example", "examples"];

/// About how many bytes are copied at most: more is no grammar anyway.
const MAX_COPIED_BYTES: usize = MAX_TEXT_BYTES;

/// The schema with the references in its `oneOf`s replaced.
pub(super) fn inline_alternatives(schema: &Map<String, Value>) -> Map<String, Value> {
    let mut inliner = Inliner { root: schema, room: MAX_COPIED_BYTES };
    schema.iter().map(|(key, value)| (key.clone(), inliner.copy(key == "oneOf", value, 0))).collect()
}

struct Inliner<'a> {
    root: &'a Map<String, Value>,
    room: usize,
}

impl Inliner<'_> {
    /// A copy of a value; of the alternatives of a `oneOf` if `is_choice`.
    fn copy(&mut self, is_choice: bool, value: &Value, depth: usize) -> Value {
        match value {
            Value::Array(items) => {
                let copy = |item: &Value| {
                    let inlined = if is_choice { self.alternative(item, depth) } else { None };
                    inlined.unwrap_or_else(|| self.copy(false, item, depth))
                };
                items.iter().map(copy).collect()
            }
            Value::Object(entries) => {
                let copy = |(key, value): (&String, &Value)| {
                    let is_data = DATA.contains(&key.as_str());
                    let copied =
                        if is_data { value.clone() } else { self.copy(key == "oneOf", value, depth) };
                    (key.clone(), copied)
                };
                Value::Object(entries.iter().map(copy).collect())
            }
            other => other.clone(),
        }
    }

    /// What an alternative refers to, if it is nothing but a reference that can be replaced.
    fn alternative(&mut self, item: &Value, depth: usize) -> Option<Value> {
        let entries = item.as_object().filter(|entries| entries.len() == 1)?;
        let pointer = entries.get("$ref")?.as_str()?.strip_prefix('#')?;
        let target = match pointer.strip_prefix('/') {
            Some(path) => {
                let (first, rest) = path.split_once('/').map_or((path, ""), |(first, rest)| (first, rest));
                let value = self.root.get(&unescape(first))?;
                if rest.is_empty() { value } else { value.pointer(&format!("/{rest}"))? }
            }
            None => return None,
        };
        if depth == MAX_DEPTH || !takes_room(target, &mut self.room) {
            // Nothing more, so that what does not fit is not counted again and again.
            self.room = if depth == MAX_DEPTH { self.room } else { 0 };
            return None;
        }
        // A reference to a reference.
        match self.alternative(target, depth + 1) {
            Some(further) => Some(further),
            None => Some(self.copy(false, target, depth + 1)),
        }
    }
}

/// A part of a JSON pointer as a key.
pub(super) fn unescape(part: &str) -> String {
    part.replace("~1", "/").replace("~0", "~")
}

/// Takes about a value's bytes from `room`; false if there are not so many.
pub(super) fn takes_room(value: &Value, room: &mut usize) -> bool {
    match value {
        Value::Array(items) => take(1, room) && items.iter().all(|item| takes_room(item, room)),
        Value::Object(entries) => take(1, room) && entries_take_room(entries, room),
        Value::String(text) => take(1 + text.len(), room),
        _ => take(1, room),
    }
}

/// The same of a schema's entries.
pub(super) fn entries_take_room(entries: &Map<String, Value>, room: &mut usize) -> bool {
    entries.iter().all(|(key, value)| take(key.len(), room) && takes_room(value, room))
}

/// Takes so many bytes from `room`.
pub(super) fn take(num_bytes: usize, room: &mut usize) -> bool {
    let left = room.checked_sub(num_bytes);
    *room = left.unwrap_or(0);
    left.is_some()
}
