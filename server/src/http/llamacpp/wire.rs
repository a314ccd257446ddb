//! llama.cpp's answers: one flat object, or a stream of them without an end mark.

use serde_json::{Value, json};

use crate::http::error::ApiError;
use crate::http::generation::{CompletedChoice, EndReason, Generation, Progress};
use crate::http::intake::Reply;
use crate::http::wire::{Timings, Wire, json};

pub(super) struct LlamaWire {
    model: String,
    seed: i128,
    end: EndReason,
}

impl LlamaWire {
    pub(super) fn new(reply: &Reply) -> Self {
        LlamaWire { model: reply.model.clone(), seed: reply.seed, end: EndReason::Length }
    }

    /// The last object, or the only one.
    fn last(&self, generation: &Generation, content: &str) -> Value {
        let account = generation.account();
        let stop_type = match self.end {
            EndReason::Stop => "eos",
            EndReason::StopString => "word",
            EndReason::GapFilled | EndReason::Length => "limit",
        };
        json!({
            "index": 0, "content": content, "tokens": [], "id_slot": 0, "stop": true, "model": self.model,
            "tokens_predicted": account.num_output_tokens, "tokens_evaluated": account.num_prompt_tokens,
            "generation_settings": { "seed": u64::try_from(self.seed).ok() }, "truncated": false,
            "has_new_line": content.contains('\n'),
            "stop_type": stop_type, "stopping_word": generation.stop_string(0).unwrap_or(""),
            "tokens_cached": account.num_prompt_tokens + account.num_output_tokens,
            "timings": Timings::of(generation, &account),
        })
    }
}

fn event(out: &mut Vec<u8>, value: &Value) {
    out.extend_from_slice(b"data: ");
    json(out, value);
    out.extend_from_slice(b"\n\n");
}

impl Wire for LlamaWire {
    fn progress(&mut self, generation: &Generation, progress: Progress, out: &mut Vec<u8>) {
        let content = generation.delta(progress.index).text.as_str();
        if !content.is_empty() {
            let account = generation.account();
            event(
                out,
                &json!({
                    "index": 0, "content": content, "tokens": [], "stop": false, "id_slot": 0,
                    "tokens_predicted": account.num_output_tokens,
                    "tokens_evaluated": account.num_prompt_tokens,
                }),
            );
        }
        self.end = progress.end.unwrap_or(self.end);
    }

    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>) {
        event(out, &self.last(generation, ""));
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        let error = json!({ "code": error.kind.status().as_u16(), "message": error.message, "type": error.kind.name() });
        event(out, &json!({ "error": error }));
    }

    fn whole(&mut self, generation: &Generation, answers: Vec<CompletedChoice>, out: &mut Vec<u8>) {
        let answer = answers.into_iter().next().expect("one answer was asked for: this is a bug");
        self.end = answer.end;
        json(out, &self.last(generation, &answer.answer.text));
    }
}
