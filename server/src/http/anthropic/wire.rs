//! Anthropic's answers: content blocks, as named events or as one message.

use serde_json::{Map, Value, json};

use super::error_json;
use crate::http::chat::{ChatAnswer, ChatWire, Finish};
use crate::http::error::ApiError;
use crate::http::generation::{Generation, ScoredToken};
use crate::http::intake::Reply;
use crate::http::wire::{json, named_event, random_id};
use crate::text::answer::AnswerEvent;

pub(super) struct AnthropicWire {
    id: String,
    model: String,
    num_prompt_tokens: usize,
    shows_thinking: bool,
    /// The block that is open.
    open: Option<Block>,
    /// Blocks begun.
    num_blocks: usize,
    finish: Finish,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Text,
    Thinking,
    ToolUse,
}

impl AnthropicWire {
    pub(super) fn new(reply: &Reply, num_prompt_tokens: usize, shows_thinking: bool) -> Self {
        AnthropicWire {
            id: random_id("msg_"),
            model: reply.model.clone(),
            num_prompt_tokens,
            shows_thinking,
            open: None,
            num_blocks: 0,
            finish: Finish::Stop,
        }
    }

    fn message(&self, content: Vec<Value>, stop_reason: Value, stop_sequence: Value, usage: Value) -> Value {
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": stop_reason, "stop_sequence": stop_sequence, "usage": usage,
        })
    }

    /// Opens a block of this kind unless one is open.
    fn open(&mut self, kind: Block, content_block: Value, out: &mut Vec<u8>) {
        if self.open == Some(kind) && kind != Block::ToolUse {
            return;
        }
        self.close(out);
        let start = json!({ "type": "content_block_start", "index": self.num_blocks, "content_block": content_block });
        named_event(out, "content_block_start", &start);
        self.open = Some(kind);
        self.num_blocks += 1;
    }

    fn delta(&self, delta: &Value, out: &mut Vec<u8>) {
        let index = self.num_blocks.saturating_sub(1);
        let event = json!({ "type": "content_block_delta", "index": index, "delta": delta });
        named_event(out, "content_block_delta", &event);
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        if self.open.take().is_some() {
            let stop = json!({ "type": "content_block_stop", "index": self.num_blocks - 1 });
            named_event(out, "content_block_stop", &stop);
        }
    }
}

/// Tokens found in the cache are not input tokens, with Anthropic.
fn usage(generation: &Generation) -> Value {
    let account = generation.account();
    json!({
        "input_tokens": account.num_prompt_tokens.saturating_sub(account.num_cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": account.num_cached_tokens,
        "output_tokens": account.num_output_tokens,
    })
}

fn stop(generation: &Generation, finish: Finish) -> (Value, Value) {
    match finish {
        Finish::Stop => (Value::from("end_turn"), Value::Null),
        Finish::Length => (Value::from("max_tokens"), Value::Null),
        Finish::ToolCalls => (Value::from("tool_use"), Value::Null),
        Finish::StopString => (Value::from("stop_sequence"), Value::from(generation.stop_string(0))),
    }
}

/// Clients send it back with the tool's result.
fn tool_use_id() -> String {
    random_id("toolu_")
}

impl ChatWire for AnthropicWire {
    fn begin(&mut self, _generation: &Generation, out: &mut Vec<u8>) {
        let usage = json!({
            "input_tokens": self.num_prompt_tokens, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0, "output_tokens": 0,
        });
        let message = self.message(vec![], Value::Null, Value::Null, usage);
        named_event(out, "message_start", &json!({ "type": "message_start", "message": message }));
        self.keep_alive(out);
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
            match event {
                AnswerEvent::Text(text) => {
                    self.open(Block::Text, json!({ "type": "text", "text": "" }), out);
                    self.delta(&json!({ "type": "text_delta", "text": text }), out);
                }
                AnswerEvent::Reasoning(_) if !self.shows_thinking => {}
                AnswerEvent::Reasoning(thinking) => {
                    let block = json!({ "type": "thinking", "thinking": "", "signature": "" });
                    self.open(Block::Thinking, block, out);
                    self.delta(&json!({ "type": "thinking_delta", "thinking": thinking }), out);
                }
                AnswerEvent::CallStart { id, name } => {
                    let id = id.unwrap_or_else(tool_use_id);
                    let block = json!({ "type": "tool_use", "id": id, "name": name, "input": {} });
                    self.open(Block::ToolUse, block, out);
                }
                AnswerEvent::CallArguments(json) => {
                    self.delta(&json!({ "type": "input_json_delta", "partial_json": json }), out);
                }
                AnswerEvent::CallEnd => self.close(out),
            }
        }
    }

    fn finish(&mut self, _generation: &Generation, _index: usize, finish: Finish, out: &mut Vec<u8>) {
        self.close(out);
        self.finish = finish;
    }

    fn end(&mut self, generation: &Generation, _num_reasoning_tokens: u64, out: &mut Vec<u8>) {
        let (stop_reason, stop_sequence) = stop(generation, self.finish);
        let delta = json!({
            "type": "message_delta", "delta": { "stop_reason": stop_reason, "stop_sequence": stop_sequence },
            "usage": usage(generation),
        });
        named_event(out, "message_delta", &delta);
        named_event(out, "message_stop", &json!({ "type": "message_stop" }));
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        named_event(out, "error", &error_json(error));
    }

    fn keep_alive(&mut self, out: &mut Vec<u8>) {
        named_event(out, "ping", &json!({ "type": "ping" }));
    }

    fn whole(&mut self, generation: &Generation, answers: Vec<ChatAnswer>, out: &mut Vec<u8>) {
        let ChatAnswer { message, finish, .. } =
            answers.into_iter().next().expect("one answer was asked for: this is a bug");
        let mut content = Vec::new();
        if self.shows_thinking && !message.reasoning.is_empty() {
            content.push(json!({ "type": "thinking", "thinking": message.reasoning, "signature": "" }));
        }
        if !message.text.is_empty() {
            content.push(json!({ "type": "text", "text": message.text }));
        }
        for call in message.calls {
            let id = call.id.unwrap_or_else(tool_use_id);
            // Arguments that broke off, or were no object, cannot be shown in this protocol.
            let input: Map<String, Value> = serde_json::from_str(&call.arguments).unwrap_or_default();
            content.push(json!({ "type": "tool_use", "id": id, "name": call.name, "input": input }));
        }
        let (stop_reason, stop_sequence) = stop(generation, finish);
        json(out, &self.message(content, stop_reason, stop_sequence, usage(generation)));
    }
}
