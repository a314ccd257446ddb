//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use serde::{Deserialize, Serialize};
use serde_json::Map;
use tandem_engine::MAX_LOGPROBS;
use tandem_models::Tokenizer;
use utoipa::ToSchema;

use super::logprobs::ChatLogprobs;
use super::write::{ChunkWriter, Identity};
use crate::http::body::JsonBody;
use crate::http::chat::{
    ChatAnswer, ChatStream, ChatWire, Conversation, Finish, ReadingPlan, ToolFields, only_text,
    reasoning_variables,
};
use crate::http::error::ApiError;
use crate::http::fields::{Bounded, CommonFields, in_range, integer, object, objects};
use crate::http::generation::{Generation, Prompt, ScoredToken};
use crate::http::intake::{Intake, Reply, answer_tokens, asked_tokens};
use crate::http::lanes::Work;
use crate::http::state::AppState;
use crate::http::wire::{json, random_id, respond};
use crate::text::answer::{AnswerEvent, AnswerMessage};

/// The fields that only chat completions have.
#[derive(Deserialize, ToSchema)]
pub(super) struct ChatFields {
    messages: Option<Bounded>,
    tools: Option<Bounded>,
    tool_choice: Option<Bounded>,
    response_format: Option<Bounded>,
    parallel_tool_calls: Option<bool>,
    #[serde(default, deserialize_with = "integer")]
    max_completion_tokens: Option<i128>,
    logprobs: Option<bool>,
    #[serde(default, deserialize_with = "integer")]
    top_logprobs: Option<i128>,
    reasoning_effort: Option<String>,
    chat_template_kwargs: Option<Bounded>,
}

pub(super) async fn chat_completions(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    body: JsonBody<CommonFields, ChatFields>,
) -> Result<Response, ApiError> {
    let PreparedChat { intake, prompt, plan, one_call } = PreparedChat::new(&state, &headers, body).await?;
    let has_logprobs = intake.common.params.logprobs.is_some();
    let tokenizer = has_logprobs.then(|| intake.served.model.tokenizer.clone());
    let (generation, reply) = intake.start(vec![prompt]).await?;
    answer(generation, &reply, plan, one_call, tokenizer).await
}

/// A request that has been checked, with its conversation as tokens.
pub(super) struct PreparedChat<'a> {
    pub(super) intake: Intake<'a>,
    pub(super) prompt: Prompt,
    plan: ReadingPlan,
    one_call: bool,
}

impl<'a> PreparedChat<'a> {
    pub(super) async fn new(
        state: &'a Arc<AppState>,
        headers: &HeaderMap,
        JsonBody { common, fields, size_bytes }: JsonBody<CommonFields, ChatFields>,
    ) -> Result<Self, ApiError> {
        only_text("response_format", fields.response_format.as_ref().map(|Bounded(format)| format))?;
        let (param, asked) = match fields.max_completion_tokens {
            Some(value) => ("max_completion_tokens", Some(value)),
            None => ("max_tokens", common.max_tokens),
        };
        let mut intake = Intake::new(state, headers, common, Work::Chat, false)?;
        intake.common.params.logprobs = top_logprobs(fields.logprobs, fields.top_logprobs)?;
        intake.check_sequences(1)?;
        let asked = asked_tokens(param, asked, 1)?;
        let one_call = fields.parallel_tool_calls == Some(false);
        let rendered = conversation(fields, size_bytes)?.render(&mut intake).await?;
        let max_tokens = answer_tokens(asked, None, rendered.tokens.len(), intake.max_model_len())?;
        let prompt = Prompt { tokens: rendered.tokens, text: None, max_tokens };
        Ok(PreparedChat { intake, prompt, plan: rendered.plan, one_call })
    }
}

/// `tokenizer`: set if log-probabilities are to be written.
pub(super) async fn answer(
    generation: Generation,
    reply: &Reply,
    plan: ReadingPlan,
    one_call: bool,
    tokenizer: Option<Arc<Tokenizer>>,
) -> Result<Response, ApiError> {
    let object = if reply.stream { "chat.completion.chunk" } else { "chat.completion" };
    let identity = Identity::new("chatcmpl-", object, reply);
    let num_answers = generation.num_sequences();
    let wire = OpenAiChat {
        writer: ChunkWriter::new(&identity),
        has_begun: vec![false; num_answers],
        num_calls: vec![0; num_answers],
        identity,
        tokenizer,
    };
    respond(generation, ChatStream::new(wire, plan, one_call, num_answers), reply).await
}

fn conversation(fields: ChatFields, size_bytes: usize) -> Result<Conversation, ApiError> {
    let messages = objects("messages", fields.messages)?;
    let tools = ToolFields { tools: fields.tools, tool_choice: fields.tool_choice };
    let (tools, tool_choice) = tools.resolve()?;
    let mut variables = Map::new();
    if let Some(effort) = fields.reasoning_effort {
        reasoning_variables(&effort, &mut variables)?;
    }
    variables.extend(object("chat_template_kwargs", fields.chat_template_kwargs)?);
    let prefill = String::new();
    Ok(Conversation { messages, path: "messages", tools, tool_choice, prefill, variables, size_bytes })
}

fn top_logprobs(logprobs: Option<bool>, top: Option<i128>) -> Result<Option<u8>, ApiError> {
    match (logprobs.unwrap_or(false), top) {
        (true, top) => {
            in_range("top_logprobs", top.unwrap_or(0), 0, MAX_LOGPROBS.into()).map(|count| Some(count as u8))
        }
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true")),
    }
}

#[derive(Serialize)]
struct ChatChoice {
    index: usize,
    message: ChatMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct ChatMessage {
    role: &'static str,
    content: Option<String>,
    refusal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<WholeCall>,
}

#[derive(Serialize)]
struct WholeCall {
    id: String,
    r#type: &'static str,
    function: WholeFunction,
}

#[derive(Serialize)]
struct WholeFunction {
    name: String,
    arguments: String,
}

impl From<AnswerMessage> for ChatMessage {
    fn from(message: AnswerMessage) -> Self {
        let AnswerMessage { text, reasoning, calls } = message;
        ChatMessage {
            role: "assistant",
            content: (calls.is_empty() || !text.is_empty()).then_some(text),
            refusal: None,
            reasoning_content: (!reasoning.is_empty()).then_some(reasoning),
            tool_calls: calls
                .into_iter()
                .map(|call| WholeCall {
                    id: call.id.unwrap_or_else(call_id),
                    r#type: "function",
                    function: WholeFunction { name: call.name, arguments: call.arguments },
                })
                .collect(),
        }
    }
}

/// Clients send it back with the tool's result.
fn call_id() -> String {
    random_id("call_")
}

fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop | Finish::StopString => "stop",
        Finish::Length => "length",
        Finish::ToolCalls => "tool_calls",
    }
}

struct OpenAiChat {
    writer: ChunkWriter,
    identity: Identity,
    /// `[num_sequences]`: the chunk that names the role was written.
    has_begun: Vec<bool>,
    /// `[num_sequences]`: tool calls begun.
    num_calls: Vec<usize>,
    /// Set if log-probabilities are to be written.
    tokenizer: Option<Arc<Tokenizer>>,
}

/// `delta` of a chunk.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum ChatDelta<'a> {
    Content(&'a str),
    ReasoningContent(&'a str),
    ToolCalls([CallDelta<'a>; 1]),
}

#[derive(Serialize)]
struct CallDelta<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

impl OpenAiChat {
    /// What an event adds; a call's end adds nothing.
    fn delta<'a>(&mut self, index: usize, event: &'a mut AnswerEvent) -> Option<ChatDelta<'a>> {
        Some(match event {
            AnswerEvent::Text(text) => ChatDelta::Content(text),
            AnswerEvent::Reasoning(text) => ChatDelta::ReasoningContent(text),
            AnswerEvent::CallStart { id, name } => {
                self.num_calls[index] += 1;
                ChatDelta::ToolCalls([CallDelta {
                    index: self.num_calls[index] - 1,
                    id: Some(id.take().unwrap_or_else(call_id)),
                    r#type: Some("function"),
                    function: FunctionDelta { name: Some(name), arguments: "" },
                }])
            }
            AnswerEvent::CallArguments(arguments) => ChatDelta::ToolCalls([CallDelta {
                index: self.num_calls[index].saturating_sub(1),
                id: None,
                r#type: None,
                function: FunctionDelta { name: None, arguments },
            }]),
            AnswerEvent::CallEnd => return None,
        })
    }

    fn chunk(
        &mut self,
        generation: &Generation,
        index: usize,
        delta: Option<&ChatDelta<'_>>,
        tokens: &[ScoredToken],
        out: &mut Vec<u8>,
    ) {
        self.writer.open(index, out);
        out.extend_from_slice(b"\"delta\":");
        match delta {
            Some(delta) => json(out, delta),
            None => out.extend_from_slice(b"{}"),
        }
        out.extend_from_slice(b",\"logprobs\":");
        let tokenizer = self.tokenizer.as_ref().filter(|_| !tokens.is_empty());
        json(out, &tokenizer.map(|tokenizer| ChatLogprobs::new(tokenizer, tokens)));
        self.writer.close(generation, None, out);
    }
}

impl ChatWire for OpenAiChat {
    fn events(
        &mut self,
        generation: &Generation,
        index: usize,
        events: &mut Vec<AnswerEvent>,
        tokens: &[ScoredToken],
        out: &mut Vec<u8>,
    ) {
        if !std::mem::replace(&mut self.has_begun[index], true) {
            self.writer.open(index, out);
            out.extend_from_slice(b"\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null");
            self.writer.close(generation, None, out);
        }
        // The scores go with the first of them.
        let mut tokens = tokens;
        for event in events {
            let Some(delta) = self.delta(index, event) else { continue };
            self.chunk(generation, index, Some(&delta), std::mem::take(&mut tokens), out);
        }
        if !tokens.is_empty() {
            self.chunk(generation, index, None, tokens, out);
        }
    }

    fn finish(&mut self, generation: &Generation, index: usize, finish: Finish, out: &mut Vec<u8>) {
        self.writer.open(index, out);
        out.extend_from_slice(b"\"delta\":{},\"logprobs\":null");
        self.writer.close(generation, Some(finish_reason(finish)), out);
    }

    fn end(&mut self, generation: &Generation, num_reasoning_tokens: u64, out: &mut Vec<u8>) {
        self.writer.end(generation, num_reasoning_tokens, out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        ChunkWriter::error(error, out);
    }

    fn whole(&mut self, generation: &Generation, answers: Vec<ChatAnswer>, out: &mut Vec<u8>) {
        let tokenizer = self.tokenizer.as_ref();
        let num_reasoning_tokens = answers.iter().map(|answer| answer.num_reasoning_tokens).sum();
        let choices: Vec<ChatChoice> = answers
            .into_iter()
            .enumerate()
            .map(|(index, answer)| ChatChoice {
                index,
                logprobs: tokenizer.map(|tokenizer| ChatLogprobs::new(tokenizer, &answer.tokens)),
                message: answer.message.into(),
                finish_reason: finish_reason(answer.finish),
            })
            .collect();
        self.identity.write_whole(generation, &choices, num_reasoning_tokens, out);
    }
}
