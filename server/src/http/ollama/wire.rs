//! Ollama's answers: objects, the last of which has the account. A stream is a line each.

use serde_json::{Map, Value, json};

use super::error_json;
use crate::http::chat::{ChatAnswer, ChatWire, Finish};
use crate::http::error::ApiError;
use crate::http::generation::{Generation, ScoredToken};
use crate::http::intake::Reply;
use crate::http::state::unix_seconds;
use crate::http::wire::json;
use crate::text::answer::{AnswerEvent, ToolCall};

/// Lines of JSON.
pub(super) const LINES: &str = "application/x-ndjson";

/// Where the text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// `response`, of generate.
    Response,
    /// `message`, of chat.
    Message,
}

pub(super) struct OllamaWire {
    model: String,
    said: Said,
    finish: Finish,
    /// Calls are sent whole.
    call: Option<ToolCall>,
}

impl OllamaWire {
    pub(super) fn new(reply: &Reply, said: Said) -> Self {
        OllamaWire { model: reply.model.clone(), said, finish: Finish::Stop, call: None }
    }

    /// An object with these words.
    fn object(&self, text: &str, thinking: &str, calls: &[ToolCall]) -> Map<String, Value> {
        let mut object = Map::new();
        object.insert("model".to_owned(), Value::from(self.model.as_str()));
        object.insert("created_at".to_owned(), Value::from(timestamp(unix_seconds())));
        let mut words = Map::new();
        if !thinking.is_empty() {
            words.insert("thinking".to_owned(), Value::from(thinking));
        }
        match self.said {
            Said::Response => {
                object.insert("response".to_owned(), Value::from(text));
                object.append(&mut words);
            }
            Said::Message => {
                words.insert("role".to_owned(), Value::from("assistant"));
                words.insert("content".to_owned(), Value::from(text));
                if !calls.is_empty() {
                    words.insert("tool_calls".to_owned(), calls.iter().map(whole_call).collect());
                }
                object.insert("message".to_owned(), Value::Object(words));
            }
        }
        object.insert("done".to_owned(), Value::from(false));
        object
    }

    /// The same with the account.
    fn last(&self, generation: &Generation, text: &str, thinking: &str, calls: &[ToolCall]) -> Value {
        let account = generation.account();
        let reason = if self.finish == Finish::Length { "length" } else { "stop" };
        let nanoseconds = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let total = account.queue_time + account.prefill_time + account.decode_time;
        let mut object = self.object(text, thinking, calls);
        object.extend([
            ("done".to_owned(), json!(true)),
            ("done_reason".to_owned(), json!(reason)),
            ("total_duration".to_owned(), json!(nanoseconds(total))),
            ("load_duration".to_owned(), json!(nanoseconds(account.queue_time))),
            ("prompt_eval_count".to_owned(), json!(account.num_prompt_tokens)),
            ("prompt_eval_duration".to_owned(), json!(nanoseconds(account.prefill_time))),
            ("eval_count".to_owned(), json!(account.num_output_tokens)),
            ("eval_duration".to_owned(), json!(nanoseconds(account.decode_time))),
        ]);
        Value::Object(object)
    }

    fn line(value: &impl serde::Serialize, out: &mut Vec<u8>) {
        json(out, value);
        out.push(b'\n');
    }

    fn send_call(&mut self, out: &mut Vec<u8>) {
        if let Some(call) = self.call.take() {
            Self::line(&self.object("", "", &[call]), out);
        }
    }
}

/// Arguments are an object here; what is none, because the answer was cut, is left out.
fn whole_call(call: &ToolCall) -> Value {
    let arguments = serde_json::from_str(&call.arguments).ok().filter(Value::is_object);
    json!({ "function": { "name": call.name, "arguments": arguments.unwrap_or_else(|| json!({})) } })
}

impl ChatWire for OllamaWire {
    fn content_type(&self) -> &'static str {
        LINES
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
                AnswerEvent::Text(text) => Self::line(&self.object(&text, "", &[]), out),
                AnswerEvent::Reasoning(text) => Self::line(&self.object("", &text, &[]), out),
                AnswerEvent::CallStart { id, name } => {
                    self.send_call(out);
                    self.call = Some(ToolCall { id, name, arguments: String::new() });
                }
                AnswerEvent::CallArguments(json) => {
                    if let Some(call) = &mut self.call {
                        call.arguments.push_str(&json);
                    }
                }
                AnswerEvent::CallEnd => self.send_call(out),
            }
        }
    }

    fn finish(&mut self, _generation: &Generation, _index: usize, finish: Finish, out: &mut Vec<u8>) {
        self.finish = finish;
        self.send_call(out);
    }

    fn end(&mut self, generation: &Generation, _num_reasoning_tokens: u64, out: &mut Vec<u8>) {
        Self::line(&self.last(generation, "", "", &[]), out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        Self::line(&error_json(error), out);
    }

    /// Its clients take every line for JSON with words in it.
    fn keep_alive(&mut self, _out: &mut Vec<u8>) {}

    fn whole(&mut self, generation: &Generation, answers: Vec<ChatAnswer>, out: &mut Vec<u8>) {
        let ChatAnswer { message, finish, .. } =
            answers.into_iter().next().expect("one answer was asked for: this is a bug");
        self.finish = finish;
        json(out, &self.last(generation, &message.text, &message.reasoning, &message.calls));
    }
}

/// Seconds since the epoch as RFC 3339 in UTC. The calendar is Howard Hinnant's `civil_from_days`.
pub(super) fn timestamp(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::timestamp;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, wanted) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_827_696, "2000-02-29T12:34:56Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(timestamp(seconds), wanted);
        }
    }
}
