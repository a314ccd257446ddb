//! Reads an answer as it arrives: reasoning first, then text and tool calls.

use std::sync::Arc;

use super::events::{AnswerEvent, Sink};
use super::format::Format;
use super::input::{Begins, Input};
use super::tools::ToolSet;

/// What stands before and after reasoning.
pub(super) type Tags = (&'static str, &'static str);

/// Turns the text of one answer into events. The events, neighbours joined, do not depend on how the
/// text was cut into pieces.
pub struct AnswerReader {
    input: Input,
    sink: Sink,
    phase: Phase,
    thinking: Option<Tags>,
    format: Option<Box<dyn Format>>,
    /// The names that can be called, where only the name tells a call from text.
    by_name: Option<Arc<ToolSet>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Before anything but white space: reasoning may follow.
    Start,
    Reasoning,
    Answer,
}

impl AnswerReader {
    pub(super) fn new(
        format: Option<Box<dyn Format>>,
        by_name: Option<Arc<ToolSet>>,
        thinking: Option<Tags>,
        is_thinking: bool,
    ) -> Self {
        let mut sink = Sink::default();
        let phase = match (thinking, is_thinking) {
            (None, _) => Phase::Answer,
            (Some(_), false) => Phase::Start,
            (Some(_), true) => {
                sink.turn();
                Phase::Reasoning
            }
        };
        AnswerReader { input: Input::default(), sink, phase, thinking, format, by_name }
    }

    /// A reader for which everything is text.
    pub fn plain() -> Self {
        AnswerReader::new(None, None, None, false)
    }

    /// Takes more text; appends what is certain by now.
    pub fn push(&mut self, text: &str, events: &mut Vec<AnswerEvent>) {
        if self.format.is_none() && self.thinking.is_none() {
            if !text.is_empty() {
                events.push(AnswerEvent::Text(text.to_owned()));
            }
            return;
        }
        self.input.push(text);
        self.read();
        events.extend(self.sink.drain());
    }

    /// The answer is over: appends the rest.
    pub fn finish(&mut self, events: &mut Vec<AnswerEvent>) {
        self.input.is_last = true;
        self.read();
        if let Some(format) = &mut self.format {
            format.finish(&mut self.sink);
        }
        self.sink.finish();
        events.extend(self.sink.drain());
    }

    fn read(&mut self) {
        while let (Some((open, close)), true) = (self.thinking, self.phase != Phase::Answer) {
            if self.phase == Phase::Start {
                let rest = self.input.rest();
                let space = rest.len() - rest.trim_start().len();
                if space == rest.len() && !self.input.is_last {
                    return;
                }
                let text = rest[space..].to_owned();
                match begins(&text, open, self.input.is_last) {
                    Begins::Yes => {
                        self.input.take(space + open.len());
                        self.sink.turn();
                        self.phase = Phase::Reasoning;
                    }
                    Begins::No => self.phase = Phase::Answer,
                    Begins::Maybe => return,
                }
                continue;
            }
            let (text, end) = self.input.until(&[close]);
            self.sink.reasoning(text);
            if end.is_none() {
                return;
            }
            self.sink.turn();
            self.phase = Phase::Answer;
        }
        match &mut self.format {
            Some(format) => {
                let by_name = self.by_name.as_deref();
                let is_tool = |name: &str| by_name.is_none_or(|tools| tools.contains(name));
                format.read(&mut self.input, &mut self.sink, &is_tool);
            }
            None => {
                let text = self.input.take(self.input.rest().len()).to_owned();
                self.sink.text(&text);
            }
        }
    }
}

fn begins(text: &str, marker: &str, is_last: bool) -> Begins {
    if text.starts_with(marker) {
        Begins::Yes
    } else if !is_last && marker.starts_with(text) {
        Begins::Maybe
    } else {
        Begins::No
    }
}
