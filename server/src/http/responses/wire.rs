//! A response's object, and the events that build it up.

use serde_json::{Map, Value, json};

use super::record::Recorder;
use crate::http::chat::{ChatAnswer, ChatWire, Finish};
use crate::http::error::ApiError;
use crate::http::generation::{Account, Generation, ScoredToken};
use crate::http::state::unix_seconds;
use crate::http::wire::{json, named_event, random_id};
use crate::text::answer::{AnswerEvent, AnswerMessage};

pub(super) struct ResponsesWire {
    /// The response as it was asked for; `output`, `status` and `usage` are filled in.
    response: Map<String, Value>,
    items: Vec<Value>,
    open: Option<OpenItem>,
    sequence_number: u64,
    finish: Finish,
    message: AnswerMessage,
    recorder: Option<Recorder>,
    framing: Framing,
    /// Nothing was to be said, so that nothing was cut off.
    only_warms: bool,
}

/// How events follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// As server-sent events.
    Events,
    /// As lines of JSON.
    Lines,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Reasoning,
    Call,
}

/// The item that is being written.
struct OpenItem {
    kind: Kind,
    item: Value,
    text: String,
}

impl ResponsesWire {
    pub(super) fn new(
        response: Map<String, Value>,
        recorder: Option<Recorder>,
        framing: Framing,
        only_warms: bool,
    ) -> Self {
        ResponsesWire {
            response,
            items: Vec::new(),
            open: None,
            sequence_number: 0,
            finish: Finish::Stop,
            message: AnswerMessage::default(),
            recorder,
            framing,
            only_warms,
        }
    }

    fn send(&mut self, name: &str, mut data: Value, out: &mut Vec<u8>) {
        data["type"] = Value::from(name);
        data["sequence_number"] = Value::from(self.sequence_number);
        self.sequence_number += 1;
        match self.framing {
            Framing::Events => named_event(out, name, &data),
            Framing::Lines => {
                json(out, &data);
                out.push(b'\n');
            }
        }
    }

    /// An event about the open item.
    fn send_part(&mut self, name: &str, mut data: Value, out: &mut Vec<u8>) {
        let id = self.open.as_ref().map(|open| open.item["id"].clone()).unwrap_or_default();
        data["item_id"] = id;
        data["output_index"] = Value::from(self.items.len());
        self.send(name, data, out);
    }

    fn begin_item(&mut self, kind: Kind, item: Value, out: &mut Vec<u8>) {
        if kind != Kind::Call && self.open.as_ref().is_some_and(|open| open.kind == kind) {
            return;
        }
        self.end_item("completed", out);
        let mut shown = item.clone();
        if kind != Kind::Call {
            shown["content"] = json!([]);
        }
        let added = json!({ "output_index": self.items.len(), "item": shown });
        self.send("response.output_item.added", added, out);
        self.open = Some(OpenItem { kind, item, text: String::new() });
        if kind != Kind::Call {
            let part = json!({ "content_index": 0, "part": part(kind, "") });
            self.send_part("response.content_part.added", part, out);
        }
    }

    fn delta(&mut self, text: &str, out: &mut Vec<u8>) {
        let Some(open) = &mut self.open else { return };
        open.text.push_str(text);
        let (name, data) = match open.kind {
            Kind::Text => {
                ("response.output_text.delta", json!({ "content_index": 0, "delta": text, "logprobs": [] }))
            }
            Kind::Reasoning => {
                ("response.reasoning_text.delta", json!({ "content_index": 0, "delta": text }))
            }
            Kind::Call => ("response.function_call_arguments.delta", json!({ "delta": text })),
        };
        self.send_part(name, data, out);
    }

    fn end_item(&mut self, status: &str, out: &mut Vec<u8>) {
        let Some(OpenItem { kind, mut item, text }) = self.open.take() else { return };
        item["status"] = Value::from(status);
        let (name, data) = match kind {
            Kind::Text => {
                ("response.output_text.done", json!({ "content_index": 0, "text": text, "logprobs": [] }))
            }
            Kind::Reasoning => ("response.reasoning_text.done", json!({ "content_index": 0, "text": text })),
            Kind::Call => {
                ("response.function_call_arguments.done", json!({ "name": item["name"], "arguments": text }))
            }
        };
        let part = part(kind, &text);
        match kind {
            Kind::Call => item["arguments"] = Value::String(text),
            _ => item["content"] = json!([part]),
        }
        self.open = Some(OpenItem { kind, item: item.clone(), text: String::new() });
        self.send_part(name, data, out);
        if kind != Kind::Call {
            self.send_part("response.content_part.done", json!({ "content_index": 0, "part": part }), out);
        }
        self.open = None;
        let done = json!({ "output_index": self.items.len(), "item": item });
        self.send("response.output_item.done", done, out);
        self.items.push(item);
    }

    fn write(&mut self, event: AnswerEvent, out: &mut Vec<u8>) {
        match &event {
            AnswerEvent::Text(text) => {
                self.begin_item(Kind::Text, message_item(), out);
                self.delta(text, out);
            }
            AnswerEvent::Reasoning(text) => {
                self.begin_item(Kind::Reasoning, reasoning_item(), out);
                self.delta(text, out);
            }
            AnswerEvent::CallStart { id, name } => {
                let call_id = id.clone().unwrap_or_else(|| random_id("call_"));
                let item = json!({ "id": random_id("fc_"), "type": "function_call", "status": "in_progress",
                    "call_id": call_id, "name": name, "arguments": "" });
                self.begin_item(Kind::Call, item, out);
            }
            AnswerEvent::CallArguments(json) => self.delta(json, out),
            // Whether it is whole is known at the end; only the last item may not be.
            AnswerEvent::CallEnd => {}
        }
        self.message.absorb(event);
    }

    /// The response in its final form, kept if it is to be.
    fn complete(&mut self, generation: &Generation, num_reasoning_tokens: u64) -> Value {
        let is_cut = self.finish == Finish::Length;
        self.response
            .insert("status".to_owned(), Value::from(if is_cut { "incomplete" } else { "completed" }));
        if is_cut {
            self.response.insert("incomplete_details".to_owned(), json!({ "reason": "max_output_tokens" }));
        } else {
            self.response.insert("completed_at".to_owned(), Value::from(unix_seconds()));
        }
        self.response.insert("output".to_owned(), Value::Array(std::mem::take(&mut self.items)));
        self.response.insert("usage".to_owned(), usage(&generation.account(), num_reasoning_tokens));
        let response = Value::Object(self.response.clone());
        if let Some(recorder) = self.recorder.take() {
            recorder.record(&response, std::mem::take(&mut self.message));
        }
        response
    }

    fn finish_with(&mut self, finish: Finish) {
        self.finish = if self.only_warms { Finish::Stop } else { finish };
    }

    fn last_status(&self) -> &'static str {
        if self.finish == Finish::Length { "incomplete" } else { "completed" }
    }
}

/// The account of a response's tokens.
pub(super) fn usage(account: &Account, num_reasoning_tokens: u64) -> Value {
    json!({
        "input_tokens": account.num_prompt_tokens,
        "input_tokens_details": { "cached_tokens": account.num_cached_tokens },
        "output_tokens": account.num_output_tokens,
        "output_tokens_details": { "reasoning_tokens": num_reasoning_tokens },
        "total_tokens": account.num_prompt_tokens + account.num_output_tokens,
    })
}

fn part(kind: Kind, text: &str) -> Value {
    match kind {
        Kind::Reasoning => json!({ "type": "reasoning_text", "text": text }),
        _ => json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] }),
    }
}

fn message_item() -> Value {
    json!({ "id": random_id("msg_"), "type": "message", "status": "in_progress", "role": "assistant", "content": [] })
}

fn reasoning_item() -> Value {
    json!({ "id": random_id("rs_"), "type": "reasoning", "status": "in_progress", "summary": [], "content": [],
        "encrypted_content": null })
}

impl ChatWire for ResponsesWire {
    fn begin(&mut self, _generation: &Generation, out: &mut Vec<u8>) {
        for name in ["response.created", "response.in_progress"] {
            let response = Value::Object(self.response.clone());
            self.send(name, json!({ "response": response }), out);
        }
    }

    fn events(
        &mut self,
        _generation: &Generation,
        _index: usize,
        events: &mut Vec<AnswerEvent>,
        _tokens: &[ScoredToken],
        out: &mut Vec<u8>,
    ) {
        for event in events.drain(..) {
            self.write(event, out);
        }
    }

    fn finish(&mut self, _generation: &Generation, _index: usize, finish: Finish, out: &mut Vec<u8>) {
        self.finish_with(finish);
        self.end_item(self.last_status(), out);
    }

    fn end(&mut self, generation: &Generation, num_reasoning_tokens: u64, out: &mut Vec<u8>) {
        let name = if self.finish == Finish::Length { "response.incomplete" } else { "response.completed" };
        let response = self.complete(generation, num_reasoning_tokens);
        self.send(name, json!({ "response": response }), out);
        if self.framing == Framing::Events {
            out.extend_from_slice(b"data: [DONE]\n\n");
        }
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        self.response.insert("status".to_owned(), Value::from("failed"));
        let code = error.code.unwrap_or("server_error");
        self.response.insert("error".to_owned(), json!({ "code": code, "message": error.message }));
        let response = Value::Object(self.response.clone());
        self.send("response.failed", json!({ "response": response }), out);
    }

    fn whole(&mut self, generation: &Generation, answers: Vec<ChatAnswer>, out: &mut Vec<u8>) {
        let ChatAnswer { message, finish, num_reasoning_tokens, .. } =
            answers.into_iter().next().expect("one answer was asked for: this is a bug");
        // The same steps as streamed, with nobody to see the events.
        let mut unseen = Vec::new();
        let mut events = Vec::new();
        if !message.reasoning.is_empty() {
            events.push(AnswerEvent::Reasoning(message.reasoning));
        }
        if !message.text.is_empty() {
            events.push(AnswerEvent::Text(message.text));
        }
        for call in message.calls {
            events.push(AnswerEvent::CallStart { id: call.id, name: call.name });
            events.push(AnswerEvent::CallArguments(call.arguments));
        }
        events.into_iter().for_each(|event| self.write(event, &mut unseen));
        self.finish_with(finish);
        self.end_item(self.last_status(), &mut unseen);
        json(out, &self.complete(generation, num_reasoning_tokens));
    }
}
