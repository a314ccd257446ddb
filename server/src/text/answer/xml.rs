//! Qwen3-Coder's calls:
//! `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>`.
//!
//! Values are bare; the tool's schema says which are strings. Those stream, the others are read whole.

use std::sync::Arc;

use serde::de::IgnoredAny;
use serde_json::Value;

use super::events::Sink;
use super::format::Format;
use super::input::Input;
use super::tools::ToolSet;

pub(super) struct Xml {
    tools: Arc<ToolSet>,
    state: State,
    name: String,
    num_parameters: usize,
}

enum State {
    Text,
    /// After `<tool_call>`, before `<function=`.
    Call,
    Name(String),
    /// Between parameters.
    Function,
    Key(String),
    /// In a value; `None`: a string, which streams. Before its first character, `true`.
    Value(Option<String>, bool),
    /// After `</function>`.
    Close,
}

const CALL: &str = "<tool_call>";
const CALL_END: &str = "</tool_call>";
const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
/// With the line break that belongs to the layout, and what ends a value whose end is missing.
const VALUE_ENDS: [&str; 4] = ["\n</parameter>", "</parameter>", "\n</function>", "</function>"];

impl Xml {
    pub(super) fn new(tools: Arc<ToolSet>) -> Self {
        Xml { tools, state: State::Text, name: String::new(), num_parameters: 0 }
    }

    fn begin_value(&mut self, key: &str, sink: &mut Sink) {
        sink.arguments(if self.num_parameters == 0 { "{" } else { ", " });
        self.num_parameters += 1;
        sink.arguments(&Value::from(key).to_string());
        sink.arguments(": ");
        let is_string = self.tools.is_string(&self.name, key);
        if is_string {
            sink.arguments("\"");
        }
        self.state = State::Value((!is_string).then(String::new), true);
    }

    fn end_function(&mut self, sink: &mut Sink) {
        sink.arguments(if self.num_parameters == 0 { "{}" } else { "}" });
        sink.call_end();
        self.state = State::Close;
    }

    /// False if more text is needed.
    fn value(&mut self, input: &mut Input, sink: &mut Sink) -> bool {
        let State::Value(held, is_fresh) = &mut self.state else { return true };
        if *is_fresh {
            let Some(first) = input.rest().chars().next() else { return false };
            if first == '\n' && !VALUE_ENDS.iter().any(|end| input.rest().starts_with(end)) {
                // The layout's line break; or the beginning of an end, of an empty value.
                if VALUE_ENDS.iter().any(|end| end.starts_with(input.rest())) {
                    return false;
                }
                input.take(1);
            }
            *is_fresh = false;
        }
        let (text, end) = input.until_certainly(&VALUE_ENDS);
        match held {
            Some(held) => held.push_str(text),
            None => sink.arguments(&escaped(text)),
        }
        let Some(end) = end else { return false };
        // Where a grammar keeps values whole, what looks like the end of one may stand inside of a string in it.
        if let Some(held) = held
            && self.tools.is_strict(&self.name)
            && is_unfinished(held)
        {
            held.push_str(VALUE_ENDS[end]);
            return true;
        }
        match held.take() {
            Some(held) => sink.arguments(&bare_value(&held).to_string()),
            None => sink.arguments("\""),
        }
        self.state = State::Function;
        if end >= 2 {
            self.end_function(sink);
        }
        true
    }
}

/// True if this may be the beginning of JSON that goes on. Of a forced call's values not all need be JSON: those
/// that are none end where they seem to.
fn is_unfinished(text: &str) -> bool {
    let can_hold_strings = text.trim_start().starts_with(['"', '[', '{']);
    can_hold_strings && serde_json::from_str::<IgnoredAny>(text).is_err_and(|error| error.is_eof())
}

/// As inside a JSON string.
fn escaped(text: &str) -> String {
    let json = Value::from(text).to_string();
    json[1..json.len() - 1].to_owned()
}

/// JSON where it is JSON, Python's words for it, or else a string.
fn bare_value(text: &str) -> Value {
    match text.trim() {
        "True" => Value::Bool(true),
        "False" => Value::Bool(false),
        "None" => Value::Null,
        trimmed => serde_json::from_str(trimmed).unwrap_or_else(|_| Value::from(text)),
    }
}

impl Format for Xml {
    fn read(&mut self, input: &mut Input, sink: &mut Sink, _is_tool: &dyn Fn(&str) -> bool) {
        loop {
            match &mut self.state {
                State::Text => {
                    let (text, marker) = input.until(&[CALL, FUNCTION]);
                    sink.text(text);
                    match marker {
                        None => return,
                        Some(0) => self.state = State::Call,
                        Some(_) => self.state = State::Name(String::new()),
                    }
                }
                State::Call => {
                    let (text, marker) = input.until(&[FUNCTION, CALL_END]);
                    // Nothing but layout belongs here.
                    sink.text(text);
                    match marker {
                        None => return,
                        Some(0) => self.state = State::Name(String::new()),
                        Some(_) => self.state = State::Text,
                    }
                }
                State::Name(name) => {
                    let (text, marker) = input.until(&[">"]);
                    name.push_str(text);
                    if marker.is_none() {
                        return;
                    }
                    self.name = name.trim().to_owned();
                    self.num_parameters = 0;
                    sink.call_start(None, self.name.clone());
                    self.state = State::Function;
                }
                State::Function => {
                    let (_, marker) = input.until(&[PARAMETER, FUNCTION_END, CALL_END]);
                    match marker {
                        None => return,
                        Some(0) => self.state = State::Key(String::new()),
                        Some(1) => self.end_function(sink),
                        Some(_) => {
                            self.end_function(sink);
                            self.state = State::Text;
                        }
                    }
                }
                State::Key(key) => {
                    let (text, marker) = input.until(&[">"]);
                    key.push_str(text);
                    if marker.is_none() {
                        return;
                    }
                    let key = key.trim().to_owned();
                    self.begin_value(&key, sink);
                }
                State::Value(..) => {
                    if !self.value(input, sink) {
                        return;
                    }
                }
                State::Close => {
                    let (text, marker) = input.until(&[CALL_END, FUNCTION]);
                    sink.text(text);
                    match marker {
                        None => return,
                        Some(0) => self.state = State::Text,
                        Some(_) => self.state = State::Name(String::new()),
                    }
                }
            }
        }
    }

    fn finish(&mut self, sink: &mut Sink) {
        if let State::Name(name) = &self.state {
            sink.text(FUNCTION);
            sink.text(name);
        }
    }
}
