//! Calls in Python's notation: `[get_weather(city="Paris", days=3), now()]`. A call is read whole,
//! because its values have to be turned into JSON.

use serde_json::{Map, Number, Value};

use super::events::Sink;
use super::input::Input;
use super::json::Step;

/// Deepest nesting of a value: as deep as JSON may be.
const MAX_DEPTH: usize = 64;

/// Reads a list of calls.
pub(super) struct CallList {
    /// The call being read, and before the first one all that was read.
    raw: String,
    is_open: bool,
    depth: usize,
    quote: Option<char>,
    is_escaped: bool,
}

impl CallList {
    pub(super) fn new() -> Self {
        CallList { raw: String::new(), is_open: false, depth: 0, quote: None, is_escaped: false }
    }

    /// What was read and is no call (yet).
    pub(super) fn raw(&self) -> &str {
        &self.raw
    }

    pub(super) fn read(
        &mut self,
        input: &mut Input,
        sink: &mut Sink,
        is_tool: &dyn Fn(&str) -> bool,
    ) -> Step {
        while let Some(next) = input.rest().chars().next() {
            input.take(next.len_utf8());
            self.raw.push(next);
            if !self.is_open {
                self.is_open = true; // `[`
                continue;
            }
            if let Some(quote) = self.quote {
                match next {
                    _ if self.is_escaped => self.is_escaped = false,
                    '\\' => self.is_escaped = true,
                    _ if next == quote => self.quote = None,
                    _ => {}
                }
                continue;
            }
            match next {
                '\'' | '"' => self.quote = Some(next),
                '(' if self.depth == 0 && !is_tool(call_name(&self.raw)) => return Step::Bad,
                '(' | '[' | '{' => self.depth += 1,
                ')' | ']' | '}' if self.depth == 0 => {
                    let is_end = next == ']' && call_name(&self.raw[..self.raw.len() - 1]).is_empty();
                    return if is_end && !self.raw.starts_with('[') { Step::Done } else { Step::Bad };
                }
                ')' | ']' | '}' => {
                    self.depth -= 1;
                    if self.depth == 0 && next == ')' && !self.emit(sink) {
                        return Step::Bad;
                    }
                }
                _ if self.depth > 0
                    || next.is_alphanumeric()
                    || matches!(next, '_' | '.' | '-' | ',' | ' ' | '\n') => {}
                _ => return Step::Bad,
            }
        }
        Step::More
    }

    /// False if the call cannot be understood.
    fn emit(&mut self, sink: &mut Sink) -> bool {
        let Some((name, arguments)) = self.raw.split_once('(') else { return false };
        let Some(arguments) = read_arguments(&arguments[..arguments.len() - 1]) else { return false };
        sink.call_start(None, call_name(name).to_owned());
        sink.arguments(&Value::Object(arguments).to_string());
        sink.call_end();
        self.raw.clear();
        true
    }
}

/// What stands before `(`, without the list's punctuation.
fn call_name(text: &str) -> &str {
    text.trim_end_matches('(')
        .trim_start_matches(|c: char| c == '[' || c == ',' || c.is_whitespace())
        .trim_end()
}

fn read_arguments(text: &str) -> Option<Map<String, Value>> {
    let mut arguments = Map::new();
    let mut reader = Reader { rest: text };
    while !reader.at_end() {
        let (key, rest) = reader.rest.split_once('=')?;
        reader.rest = rest;
        arguments.insert(key.trim().to_owned(), reader.value(0)?);
        if !reader.eat(',') && !reader.at_end() {
            return None;
        }
    }
    Some(arguments)
}

/// Reads Python literals.
struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    fn at_end(&mut self) -> bool {
        self.rest = self.rest.trim_start();
        self.rest.is_empty()
    }

    fn eat(&mut self, wanted: char) -> bool {
        self.rest = self.rest.trim_start();
        match self.rest.strip_prefix(wanted) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.rest = self.rest.trim_start();
        match self.rest.chars().next()? {
            quote @ ('\'' | '"') => self.string(quote).map(Value::String),
            '[' => self.list('[', ']', depth),
            '(' => self.list('(', ')', depth),
            '{' => self.dict(depth),
            _ => self.word(),
        }
    }

    fn list(&mut self, open: char, close: char, depth: usize) -> Option<Value> {
        self.eat(open);
        let mut items = Vec::new();
        while !self.eat(close) {
            items.push(self.value(depth + 1)?);
            if !self.eat(',') && !self.rest.trim_start().starts_with(close) {
                return None;
            }
        }
        Some(Value::Array(items))
    }

    fn dict(&mut self, depth: usize) -> Option<Value> {
        self.eat('{');
        let mut entries = Map::new();
        while !self.eat('}') {
            let Value::String(key) = self.value(depth + 1)? else { return None };
            if !self.eat(':') {
                return None;
            }
            entries.insert(key, self.value(depth + 1)?);
            if !self.eat(',') && !self.rest.trim_start().starts_with('}') {
                return None;
            }
        }
        Some(Value::Object(entries))
    }

    fn string(&mut self, quote: char) -> Option<String> {
        let mut text = String::new();
        let mut chars = self.rest[1..].char_indices();
        while let Some((at, char)) = chars.next() {
            match char {
                '\\' => text.push(match chars.next()?.1 {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    '0' => '\0',
                    other => other,
                }),
                _ if char == quote => {
                    self.rest = &self.rest[1 + at + 1..];
                    return Some(text);
                }
                _ => text.push(char),
            }
        }
        None
    }

    fn word(&mut self) -> Option<Value> {
        let end = self.rest.find([',', ')', ']', '}', ':']).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        match word.trim() {
            "True" | "true" => Some(Value::Bool(true)),
            "False" | "false" => Some(Value::Bool(false)),
            "None" | "null" => Some(Value::Null),
            number => match number.parse::<i64>() {
                Ok(integer) => Some(Value::from(integer)),
                Err(_) => Number::from_f64(number.parse().ok()?).map(Value::Number),
            },
        }
    }
}
