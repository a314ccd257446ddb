//! DeepSeek's calls, in sections of control tokens. V3 and R1 write
//! `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n` and the arguments in a fenced block; V3.1 writes
//! `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>` and bare arguments.

use super::events::Sink;
use super::format::Format;
use super::input::Input;
use super::json::JsonSpan;

#[derive(Default)]
pub(super) struct DeepSeek {
    state: State,
}

#[derive(Default)]
enum State {
    #[default]
    Text,
    /// Between calls.
    Section,
    Header(String),
    /// The name on a line of its own, after `function`.
    Line(String),
    /// Before the arguments' `{`.
    Before,
    Arguments(JsonSpan),
    /// After the arguments.
    After,
}

const SECTION: &str = "<｜tool▁calls▁begin｜>";
const SECTION_END: &str = "<｜tool▁calls▁end｜>";
const CALL: &str = "<｜tool▁call▁begin｜>";
const CALL_END: &str = "<｜tool▁call▁end｜>";
const SEPARATOR: &str = "<｜tool▁sep｜>";
/// What V3 and R1 write in the name's place.
const KIND: &str = "function";

/// The control tokens, which tokenizers may hide as special.
pub(super) const MARKERS: &[&str] = &[SECTION, SECTION_END, CALL, CALL_END, SEPARATOR];

impl Format for DeepSeek {
    fn read(&mut self, input: &mut Input, sink: &mut Sink, _is_tool: &dyn Fn(&str) -> bool) {
        loop {
            match &mut self.state {
                State::Text => {
                    let (text, marker) = input.until(&[SECTION, CALL]);
                    sink.text(text);
                    self.state = match marker {
                        None => return,
                        Some(0) => State::Section,
                        Some(_) => State::Header(String::new()),
                    };
                }
                State::Section => {
                    self.state = match input.until(&[CALL, SECTION_END]).1 {
                        None => return,
                        Some(0) => State::Header(String::new()),
                        Some(_) => State::Text,
                    };
                }
                State::Header(header) => {
                    let (text, marker) = input.until(&[SEPARATOR]);
                    header.push_str(text);
                    if marker.is_none() {
                        return;
                    }
                    let name = header.trim();
                    self.state = if name == KIND {
                        State::Line(String::new())
                    } else {
                        sink.call_start(None, name.to_owned());
                        State::Before
                    };
                }
                State::Line(name) => {
                    let (text, marker) = input.until(&["\n"]);
                    name.push_str(text);
                    if marker.is_none() {
                        return;
                    }
                    sink.call_start(None, name.trim().to_owned());
                    self.state = State::Before;
                }
                State::Before => match input.until(&["{", CALL_END]).1 {
                    None => return,
                    Some(0) => {
                        let mut span = JsonSpan::default();
                        span.feed("{");
                        sink.arguments("{");
                        self.state = State::Arguments(span);
                    }
                    Some(_) => {
                        sink.arguments("{}");
                        sink.call_end();
                        self.state = State::Section;
                    }
                },
                State::Arguments(span) => {
                    let (length, is_whole) = span.feed(input.rest());
                    sink.arguments(input.take(length));
                    if !is_whole {
                        return;
                    }
                    sink.call_end();
                    self.state = State::After;
                }
                State::After => {
                    self.state = match input.until(&[CALL_END, SECTION_END]).1 {
                        None => return,
                        Some(0) => State::Section,
                        Some(_) => State::Text,
                    };
                }
            }
        }
    }

    fn finish(&mut self, sink: &mut Sink) {
        if let State::Header(name) | State::Line(name) = &self.state {
            sink.text(name);
        }
    }
}
