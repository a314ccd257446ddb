//! gpt-oss's harmony: an answer is messages, each with a header that says its channel and recipient.
//! `<|channel|>analysis<|message|>...<|end|>` is reasoning, `final` is the answer,
//! `commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>` a tool call.
//! The first message's `<|start|>assistant` belongs to the prompt.

use super::events::Sink;
use super::format::Format;
use super::input::Input;

pub(super) struct Harmony {
    state: State,
}

enum State {
    /// In a header; what was read of it, markers included.
    Header(String),
    Body(Kind),
}

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Reasoning,
    Call,
}

const MESSAGE: &str = "<|message|>";
const START: &str = "<|start|>";
const CHANNEL: &str = "<|channel|>";
const CONSTRAIN: &str = "<|constrain|>";
const ENDS: [&str; 5] = ["<|end|>", "<|call|>", "<|return|>", START, CHANNEL];

/// The control tokens, which the tokenizer hides as special.
pub(super) const MARKERS: &[&str] =
    &["<|end|>", "<|call|>", "<|return|>", START, CHANNEL, MESSAGE, CONSTRAIN];

impl Harmony {
    pub(super) fn new() -> Self {
        Harmony { state: State::Header(String::new()) }
    }

    fn begin(&mut self, header: &str, sink: &mut Sink) {
        let words = header.replace(CONSTRAIN, " ").replace(CHANNEL, " ").replace(START, " ");
        let recipient = words.split_whitespace().find_map(|word| word.strip_prefix("to="));
        let kind = match recipient {
            Some(recipient) if recipient != "user" => {
                let name = recipient.strip_prefix("functions.").unwrap_or(recipient);
                sink.call_start(None, name.to_owned());
                Kind::Call
            }
            _ if words.split_whitespace().any(|word| word == "analysis") => {
                sink.turn();
                Kind::Reasoning
            }
            _ => {
                sink.turn();
                Kind::Text
            }
        };
        self.state = State::Body(kind);
    }
}

impl Format for Harmony {
    fn read(&mut self, input: &mut Input, sink: &mut Sink, _is_tool: &dyn Fn(&str) -> bool) {
        loop {
            match &mut self.state {
                State::Header(header) => {
                    let (text, marker) = input.until(&[MESSAGE]);
                    header.push_str(text);
                    if marker.is_none() {
                        return;
                    }
                    let header = std::mem::take(header);
                    self.begin(&header, sink);
                }
                State::Body(kind) => {
                    let kind = *kind;
                    let (text, end) = input.until_certainly(&ENDS);
                    match kind {
                        Kind::Text => sink.text(text),
                        Kind::Reasoning => sink.reasoning(text),
                        Kind::Call => sink.arguments(text),
                    }
                    let Some(end) = end else { return };
                    if matches!(kind, Kind::Call) {
                        sink.call_end();
                    }
                    self.state = State::Header(ENDS[end].to_owned());
                }
            }
        }
    }

    fn finish(&mut self, sink: &mut Sink) {
        // A model that does not know the form: what it wrote is its answer.
        if let State::Header(header) = &self.state
            && !MARKERS.iter().any(|marker| header.contains(marker))
        {
            sink.text(header);
        }
    }
}
