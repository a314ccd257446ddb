//! Calls as JSON objects behind a marker: Hermes and Qwen (`<tool_call>{...}</tool_call>`), Granite
//! (`<|tool_call|>[{...}, ...]`), Mistral (`[TOOL_CALLS][{...}, ...]`, and since its tokenizer v11
//! `[TOOL_CALLS]name[ARGS]{...}`).

use super::events::Sink;
use super::format::Format;
use super::input::{Begins, Input};
use super::json::{CallJson, JsonSpan, Step};

pub(super) struct Tagged {
    open: &'static str,
    close: Option<&'static str>,
    state: State,
    in_list: bool,
    /// The present section has had a call.
    has_call: bool,
}

enum State {
    Text,
    /// Behind the marker, before a call.
    Section,
    Call(Box<CallJson>),
    /// The name of a call whose arguments follow it.
    Name(String),
    Arguments(JsonSpan),
}

const MISTRAL_ARGUMENTS: &str = "[ARGS]";
const MISTRAL_CALL_ID: &str = "[CALL_ID]";

impl Tagged {
    pub(super) fn new(open: &'static str, close: Option<&'static str>) -> Self {
        Tagged { open, close, state: State::Text, in_list: false, has_call: false }
    }

    /// What looked like calls is text.
    fn give_up(&mut self, raw: &str, sink: &mut Sink) {
        if !self.has_call {
            sink.text(self.open);
            sink.text(if self.in_list { "[" } else { "" });
            sink.text(raw);
        }
        sink.call_end();
        self.state = State::Text;
    }

    /// False if more text is needed.
    fn section(&mut self, input: &mut Input, sink: &mut Sink) -> bool {
        if !input.skip_space() {
            return false;
        }
        if let Some(close) = self.close {
            match input.begins_with(close) {
                Begins::Yes => {
                    input.take(close.len());
                    self.state = State::Text;
                    return true;
                }
                Begins::Maybe => return false,
                Begins::No => {}
            }
        }
        match input.rest().chars().next() {
            Some('{') => self.state = State::Call(Box::new(CallJson::new())),
            Some('[') if !self.in_list && !self.has_call => {
                input.take(1);
                self.in_list = true;
            }
            Some(',') if self.has_call => {
                input.take(1);
            }
            Some(']') if self.in_list => {
                input.take(1);
                self.in_list = false;
                if self.close.is_none() {
                    self.state = State::Text;
                }
            }
            Some(first) if self.close.is_none() && !self.in_list && !self.has_call && is_name(first) => {
                self.state = State::Name(String::new());
            }
            _ => self.give_up("", sink),
        }
        true
    }

    /// The name up to its arguments. False if more text is needed.
    fn name(&mut self, input: &mut Input, sink: &mut Sink) -> bool {
        let State::Name(name) = &mut self.state else { return true };
        let (text, marker) = input.until(&["{", MISTRAL_ARGUMENTS, "\n"]);
        name.push_str(text);
        let header = std::mem::take(name);
        match marker {
            Some(2) => self.give_up(&header, sink),
            Some(marker) => {
                let (name, id) = match header.split_once(MISTRAL_CALL_ID) {
                    Some((name, id)) => (name, Some(id.trim().to_owned())),
                    None => (header.as_str(), None),
                };
                self.has_call = true;
                sink.call_start(id, name.trim().to_owned());
                let mut span = JsonSpan::default();
                if marker == 0 {
                    span.feed("{");
                    sink.arguments("{");
                }
                self.state = State::Arguments(span);
            }
            None => {
                *name = header;
                return false;
            }
        }
        true
    }
}

fn is_name(char: char) -> bool {
    char.is_alphanumeric() || char == '_'
}

impl Format for Tagged {
    fn read(&mut self, input: &mut Input, sink: &mut Sink, is_tool: &dyn Fn(&str) -> bool) {
        loop {
            match &mut self.state {
                State::Text => {
                    let (text, marker) = input.until(&[self.open]);
                    sink.text(text);
                    if marker.is_none() {
                        return;
                    }
                    self.state = State::Section;
                    self.in_list = false;
                    self.has_call = false;
                }
                State::Section => {
                    if !self.section(input, sink) {
                        return;
                    }
                }
                State::Call(call) => match call.read(input, sink, is_tool) {
                    Step::More => return,
                    Step::Done => {
                        self.has_call = true;
                        self.state = State::Section;
                    }
                    Step::Bad => {
                        let (raw, is_started) = (call.raw().to_owned(), call.is_started());
                        self.has_call |= is_started;
                        self.give_up(&raw, sink);
                    }
                },
                State::Name(_) => {
                    if !self.name(input, sink) {
                        return;
                    }
                }
                State::Arguments(span) => {
                    let (length, is_whole) = span.feed(input.rest());
                    let json = input.take(length);
                    sink.arguments(json);
                    if !is_whole {
                        return;
                    }
                    sink.call_end();
                    self.state = State::Text;
                }
            }
        }
    }

    fn finish(&mut self, sink: &mut Sink) {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Call(call) if !call.is_started() => self.give_up(call.raw(), sink),
            State::Section => self.give_up("", sink),
            State::Name(name) => self.give_up(&name, sink),
            _ => {}
        }
    }
}
