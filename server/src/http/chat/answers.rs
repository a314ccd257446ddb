//! Reads the answers of a chat and hands what they mean to the protocol.

use std::sync::Arc;

use tandem_models::Tokenizer;

use super::conversation::ReadingPlan;
use crate::http::error::ApiError;
use crate::http::generation::{CompletedChoice, EndReason, Generation, Progress, ScoredToken};
use crate::http::wire::{EVENT_STREAM, Wire};
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
    /// Tokens of `message.reasoning`.
    pub(in crate::http) num_reasoning_tokens: u64,
}

/// What a protocol makes of a chat's answers.
pub(in crate::http) trait ChatWire: Send + Unpin + 'static {
    /// What a stream of it is.
    fn content_type(&self) -> &'static str {
        EVENT_STREAM
    }
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
    fn end(&mut self, generation: &Generation, num_reasoning_tokens: u64, out: &mut Vec<u8>);
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
    readings: Vec<Reading>,
    events: Vec<AnswerEvent>,
}

impl<W: ChatWire> ChatStream<W> {
    /// `one_call`: a client that takes one tool call at a time gets the first.
    pub(in crate::http) fn new(wire: W, plan: ReadingPlan, one_call: bool, num_answers: usize) -> Self {
        let readings = (0..num_answers).map(|_| Reading::new(&plan, one_call)).collect();
        ChatStream { wire, readings, events: Vec::new() }
    }
}

/// The state of one answer.
pub(in crate::http) struct Reading {
    reader: AnswerReader,
    /// Events of what the prompt held already, until the first step.
    begun: Vec<AnswerEvent>,
    num_calls: usize,
    one_call: bool,
    /// Counts what reasoning was.
    tokenizer: Option<Arc<Tokenizer>>,
    reasoning: String,
    num_reasoning_tokens: u64,
}

impl Reading {
    /// `one_call` as in [`ChatStream::new`].
    pub(in crate::http) fn new(plan: &ReadingPlan, one_call: bool) -> Self {
        let mut begun = Vec::new();
        Reading {
            reader: plan.reader(&mut begun),
            begun,
            num_calls: 0,
            one_call,
            tokenizer: plan.tokenizer(),
            reasoning: String::new(),
            num_reasoning_tokens: 0,
        }
    }

    /// Reads on and appends what it means.
    fn read(&mut self, text: &str, end: Option<EndReason>, events: &mut Vec<AnswerEvent>) -> Option<Finish> {
        events.append(&mut self.begun);
        self.reader.push(text, events);
        if end.is_some() {
            self.reader.finish(events);
        }
        let (num_calls, one_call, reasoning) = (&mut self.num_calls, self.one_call, &mut self.reasoning);
        events.retain(|event| {
            match event {
                AnswerEvent::CallStart { .. } => *num_calls += 1,
                AnswerEvent::Reasoning(text) => reasoning.push_str(text),
                _ => {}
            }
            !one_call || *num_calls <= 1
        });
        let has_calls = *num_calls > 0;
        if end.is_some() {
            self.num_reasoning_tokens = self.count_reasoning();
        }
        end.map(|end| match end {
            EndReason::Length => Finish::Length,
            _ if has_calls => Finish::ToolCalls,
            EndReason::StopString => Finish::StopString,
            EndReason::Stop => Finish::Stop,
        })
    }

    /// The text is counted and not the steps it came in: they depend on what was drafted.
    fn count_reasoning(&self) -> u64 {
        match &self.tokenizer {
            Some(tokenizer) if !self.reasoning.is_empty() => {
                tokenizer.encode_text(&self.reasoning, false).map_or(0, |tokens| tokens.len() as u64)
            }
            _ => 0,
        }
    }

    /// Reads all of an answer.
    pub(in crate::http) fn whole(&mut self, answer: CompletedChoice) -> ChatAnswer {
        let mut events = Vec::new();
        let finish = self.read(&answer.answer.text, Some(answer.end), &mut events);
        let mut message = AnswerMessage::default();
        events.into_iter().for_each(|event| message.absorb(event));
        ChatAnswer {
            message,
            finish: finish.expect("an answer that has ended says why: this is a bug"),
            tokens: answer.answer.tokens,
            num_reasoning_tokens: self.num_reasoning_tokens,
        }
    }
}

impl<W: ChatWire> Wire for ChatStream<W> {
    fn content_type(&self) -> &'static str {
        self.wire.content_type()
    }

    fn begin(&mut self, generation: &Generation, out: &mut Vec<u8>) {
        self.wire.begin(generation, out);
    }

    fn progress(&mut self, generation: &Generation, progress: Progress, out: &mut Vec<u8>) {
        let Progress { index, end } = progress;
        let delta = generation.delta(index);
        let finish = self.readings[index].read(&delta.text, end, &mut self.events);
        self.wire.events(generation, index, &mut self.events, &delta.tokens, out);
        self.events.clear();
        if let Some(finish) = finish {
            self.wire.finish(generation, index, finish, out);
        }
    }

    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>) {
        let num_reasoning_tokens = self.readings.iter().map(|reading| reading.num_reasoning_tokens).sum();
        self.wire.end(generation, num_reasoning_tokens, out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        self.wire.error(error, out);
    }

    fn keep_alive(&mut self, out: &mut Vec<u8>) {
        self.wire.keep_alive(out);
    }

    fn whole(&mut self, generation: &Generation, answers: Vec<CompletedChoice>, out: &mut Vec<u8>) {
        let answers = self.readings.iter_mut().zip(answers);
        let answers: Vec<ChatAnswer> = answers.map(|(reading, answer)| reading.whole(answer)).collect();
        self.wire.whole(generation, answers, out);
    }
}
