//! Reads the answers of a chat and hands what they mean to the protocol.

use super::conversation::ReadingPlan;
use crate::http::error::ApiError;
use crate::http::generation::{CompletedChoice, EndReason, Generation, Progress, ScoredToken};
use crate::http::wire::Wire;
use crate::text::answer::{AnswerEvent, AnswerMessage, AnswerReader};

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::http) enum Finish {
    /// The model had said it all.
    Stop,
    /// A stop string came up; [`Generation::stop_string`] says which.
    StopString,
    /// There was no room for more.
    Length,
    /// The client is to run tools.
    ToolCalls,
}

/// A whole answer.
pub(in crate::http) struct ChatAnswer {
    pub(in crate::http) message: AnswerMessage,
    pub(in crate::http) finish: Finish,
    /// Scored tokens, if asked for.
    pub(in crate::http) tokens: Vec<ScoredToken>,
}

/// What a protocol makes of a chat's answers.
pub(in crate::http) trait ChatWire: Send + Unpin + 'static {
    /// Appends what stands before all answers of a stream.
    fn begin(&mut self, _generation: &Generation, _out: &mut Vec<u8>) {}
    /// Appends one step of one answer. `tokens` are scored tokens that came with it, if asked for.
    fn events(
        &mut self,
        generation: &Generation,
        index: usize,
        events: &mut Vec<AnswerEvent>,
        tokens: &[ScoredToken],
        out: &mut Vec<u8>,
    );
    /// Appends the end of one answer.
    fn finish(&mut self, generation: &Generation, index: usize, finish: Finish, out: &mut Vec<u8>);
    /// Appends what follows the last answer's end.
    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>);
    /// Appends the event for a failure after the response began.
    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>);
    /// Appends what shows that the server is still at work.
    fn keep_alive(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(b": still at work\n\n");
    }
    /// Appends the JSON of whole answers.
    fn whole(&mut self, generation: &Generation, answers: Vec<ChatAnswer>, out: &mut Vec<u8>);
}

/// A [`Wire`] that reads answers for a [`ChatWire`].
pub(in crate::http) struct ChatStream<W> {
    wire: W,
    one_call: bool,
    readings: Vec<Reading>,
    events: Vec<AnswerEvent>,
}

/// The state of one answer.
struct Reading {
    reader: AnswerReader,
    /// Events of what the prompt held already, until the first step.
    begun: Vec<AnswerEvent>,
    num_calls: usize,
}

impl<W: ChatWire> ChatStream<W> {
    /// `one_call`: a client that takes one tool call at a time gets the first.
    pub(in crate::http) fn new(wire: W, plan: ReadingPlan, one_call: bool, num_answers: usize) -> Self {
        let reading = |_| {
            let mut begun = Vec::new();
            Reading { reader: plan.reader(&mut begun), begun, num_calls: 0 }
        };
        let readings = (0..num_answers).map(reading).collect();
        ChatStream { wire, one_call, readings, events: Vec::new() }
    }

    /// Reads on; the new events are in `self.events`.
    fn read(&mut self, index: usize, text: &str, end: Option<EndReason>) -> Option<Finish> {
        let reading = &mut self.readings[index];
        self.events.append(&mut reading.begun);
        reading.reader.push(text, &mut self.events);
        if end.is_some() {
            reading.reader.finish(&mut self.events);
        }
        let (num_calls, one_call) = (&mut reading.num_calls, self.one_call);
        self.events.retain(|event| {
            *num_calls += usize::from(matches!(event, AnswerEvent::CallStart { .. }));
            !one_call || *num_calls <= 1
        });
        let has_calls = *num_calls > 0;
        end.map(|end| match end {
            EndReason::Length => Finish::Length,
            _ if has_calls => Finish::ToolCalls,
            EndReason::StopString => Finish::StopString,
            EndReason::Stop | EndReason::GapFilled => Finish::Stop,
        })
    }
}

impl<W: ChatWire> Wire for ChatStream<W> {
    fn begin(&mut self, generation: &Generation, out: &mut Vec<u8>) {
        self.wire.begin(generation, out);
    }

    fn progress(&mut self, generation: &Generation, progress: Progress, out: &mut Vec<u8>) {
        let Progress { index, end } = progress;
        let delta = generation.delta(index);
        let finish = self.read(index, &delta.text, end);
        self.wire.events(generation, index, &mut self.events, &delta.tokens, out);
        self.events.clear();
        if let Some(finish) = finish {
            self.wire.finish(generation, index, finish, out);
        }
    }

    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>) {
        self.wire.end(generation, out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        self.wire.error(error, out);
    }

    fn keep_alive(&mut self, out: &mut Vec<u8>) {
        self.wire.keep_alive(out);
    }

    fn whole(&mut self, generation: &Generation, answers: Vec<CompletedChoice>, out: &mut Vec<u8>) {
        let answers = answers.into_iter().enumerate().map(|(index, answer)| {
            let finish = self.read(index, &answer.answer.text, Some(answer.end));
            let mut message = AnswerMessage::default();
            self.events.drain(..).for_each(|event| message.absorb(event));
            let finish = finish.expect("an answer that has ended says why: this is a bug");
            ChatAnswer { message, finish, tokens: answer.answer.tokens }
        });
        let answers: Vec<ChatAnswer> = answers.collect();
        self.wire.whole(generation, answers, out);
    }
}
