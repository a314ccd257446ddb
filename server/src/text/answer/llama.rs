//! Llama 3's and 4's calls: the answer *is* the call, as JSON
//! (`{"name": "f", "parameters": {...}}`, several behind `;`), or in Python's notation
//! (`[f(a=1), g()]`). Without a marker only the name of a tool tells a call from text.

use super::events::Sink;
use super::format::Format;
use super::input::{Begins, Input};
use super::json::{CallJson, Step};
use super::pythonic::CallList;

pub(super) struct Llama {
    state: State,
}

enum State {
    /// Before anything but white space.
    Start,
    Json(Box<CallJson>),
    /// After a call as JSON.
    Next,
    Python(CallList),
    Text,
}

const MARKER: &str = "<|python_tag|>";

impl Llama {
    pub(super) fn new() -> Self {
        Llama { state: State::Start }
    }
}

impl Format for Llama {
    fn read(&mut self, input: &mut Input, sink: &mut Sink, is_tool: &dyn Fn(&str) -> bool) {
        loop {
            match &mut self.state {
                State::Start => {
                    match input.begins_with(MARKER) {
                        Begins::Yes => {
                            input.take(MARKER.len());
                            continue;
                        }
                        Begins::Maybe => return,
                        Begins::No => {}
                    }
                    let rest = input.rest();
                    match rest.chars().next() {
                        None => return,
                        Some('{') => self.state = State::Json(Box::new(CallJson::new())),
                        Some('[') => self.state = State::Python(CallList::new()),
                        Some(first) if first.is_whitespace() => {
                            let space = rest[..first.len_utf8()].to_owned();
                            input.take(space.len());
                            sink.text(&space);
                        }
                        Some(_) => self.state = State::Text,
                    }
                }
                State::Json(call) => match call.read(input, sink, is_tool) {
                    Step::More => return,
                    Step::Done => self.state = State::Next,
                    Step::Bad => {
                        sink.text(call.raw());
                        sink.call_end();
                        self.state = State::Text;
                    }
                },
                State::Next => {
                    if !input.skip_space() {
                        return;
                    }
                    match input.begins_with(MARKER) {
                        Begins::Yes => {
                            input.take(MARKER.len());
                            continue;
                        }
                        Begins::Maybe => return,
                        Begins::No => {}
                    }
                    match input.rest().chars().next() {
                        Some(';' | ',') => {
                            input.take(1);
                        }
                        Some('{') => self.state = State::Json(Box::new(CallJson::new())),
                        _ => self.state = State::Text,
                    }
                }
                State::Python(list) => match list.read(input, sink, is_tool) {
                    Step::More => return,
                    Step::Done => self.state = State::Text,
                    Step::Bad => {
                        sink.text(list.raw());
                        self.state = State::Text;
                    }
                },
                State::Text => {
                    let (text, marker) = input.until(&[MARKER]);
                    sink.text(text);
                    if marker.is_none() {
                        return;
                    }
                    self.state = State::Start;
                }
            }
        }
    }

    fn finish(&mut self, sink: &mut Sink) {
        match &self.state {
            State::Json(call) if !call.is_started() => sink.text(call.raw()),
            State::Python(list) => sink.text(list.raw()),
            _ => {}
        }
    }
}
