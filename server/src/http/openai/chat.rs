//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tandem_engine::MAX_LOGPROBS;
use tandem_models::Tokenizer;

use super::logprobs::ChatLogprobs;
use super::params::{SharedFields, answer_tokens, in_range, integer};
use super::prompt::{INLINE_TEXT_BYTES, check_sequences, check_text_fits, encode};
use super::types::{Timings, Usage, finish_reason};
use super::write::{ChunkWriter, Identity, Reply, json, response_id, with_headers};
use crate::http::body::JsonBody;
use crate::http::error::ApiError;
use crate::http::generation::{Generation, Progress, Prompt};
use crate::http::lanes::{Work, lane_name, resolve};
use crate::http::sse::{self, EventEncoder};
use crate::http::state::{AppState, ServedModel};

/// The fields that only chat completions have.
#[derive(Deserialize)]
pub(super) struct ChatFields {
    messages: Option<Vec<Map<String, Value>>>,
    tools: Option<Value>,
    #[serde(default, deserialize_with = "integer")]
    max_completion_tokens: Option<i128>,
    logprobs: Option<bool>,
    #[serde(default, deserialize_with = "integer")]
    top_logprobs: Option<i128>,
    chat_template_kwargs: Option<Map<String, Value>>,
}

#[derive(Serialize)]
struct ChatResponse {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<ChatChoice>,
    usage: Usage,
    seed: i128,
    timings: Timings,
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
    content: String,
    refusal: Option<String>,
}

pub(super) async fn chat_completions(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { mut shared, fields, size_bytes }: JsonBody<SharedFields, ChatFields>,
) -> Result<Response, ApiError> {
    let served = resolve(&state, shared.model.as_deref(), Work::Chat)?;
    let mut common = shared.resolve(served, &state.limits, &[])?;
    common.params.logprobs = top_logprobs(fields.logprobs, fields.top_logprobs)?;
    let has_logprobs = common.params.logprobs.is_some();
    check_sequences(&state, 1, common.num_choices)?;
    // Checked before the prompt is rendered; whether it fits beside the prompt is checked after.
    let (param, asked) = match fields.max_completion_tokens {
        Some(value) => ("max_completion_tokens", Some(value)),
        None => ("max_tokens", shared.max_tokens),
    };
    let max_model_len = state.engine.max_model_len();
    let asked = asked.map(|value| in_range(param, value, 1, max_model_len as i128)).transpose()?;

    let cache_salt = state.cache_salt(&headers, shared.cache_salt()?);
    if let Some(prediction) = shared.take_prediction() {
        common.speculation.prediction = prediction.encode(&state, served).await?;
    }
    let tokens = render(&state, served, fields, size_bytes).await?;
    let max_tokens = answer_tokens(param, asked, None, tokens.len(), max_model_len, true)?;
    let reply = Reply {
        model: shared.model,
        lane: lane_name(served.lane),
        seed: common.seed,
        stream: common.stream,
        include_usage: common.include_usage,
    };
    let prompt = Prompt { tokens, text: None, max_tokens };
    let generation = Generation::start(&state, served, &common.into_request(vec![prompt], cache_salt))?;
    answer(generation, &served.model.tokenizer, has_logprobs, reply).await
}

async fn answer(
    mut generation: Generation,
    tokenizer: &Arc<Tokenizer>,
    has_logprobs: bool,
    reply: Reply,
) -> Result<Response, ApiError> {
    let (seed, shared) = (reply.seed(&generation), generation.shared());
    let object = if reply.stream { "chat.completion.chunk" } else { "chat.completion" };
    let identity = Identity::new(response_id("chatcmpl"), object, reply.model, seed);
    let response = if reply.stream {
        let encoder = ChatEncoder {
            writer: ChunkWriter::new(&identity, reply.include_usage),
            has_begun: vec![false; generation.num_sequences()],
            tokenizer: has_logprobs.then(|| tokenizer.clone()),
        };
        sse::respond(generation, encoder)
    } else {
        let answers = generation.collect().await?;
        let account = generation.account();
        let choices = answers.into_iter().enumerate().map(|(index, answer)| ChatChoice {
            index,
            logprobs: has_logprobs.then(|| ChatLogprobs::new(tokenizer, &answer.answer.tokens)),
            message: ChatMessage { role: "assistant", content: answer.answer.text, refusal: None },
            finish_reason: finish_reason(answer.end),
        });
        Json(ChatResponse {
            choices: choices.collect(),
            usage: Usage::from(&account),
            timings: Timings::of(&generation, &account),
            seed,
            id: identity.id,
            object: identity.object,
            created: identity.created,
            model: identity.model,
        })
        .into_response()
    };
    Ok(with_headers(response, reply.lane, seed, shared))
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

/// Messages to tokens, by the model's chat template. Every field can reach the template, so the
/// length of the whole body says whether that is long work.
async fn render(
    state: &Arc<AppState>,
    served: &ServedModel,
    fields: ChatFields,
    size_bytes: usize,
) -> Result<Arc<[u32]>, ApiError> {
    let Some(template) = served.model.chat_template.clone() else {
        let message = format!("the model {:?} has no chat template; use /v1/completions", served.model.name);
        return Err(ApiError::invalid("model", message));
    };
    let mut messages = fields.messages.unwrap_or_default();
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages is empty; it must hold at least one message"));
    }
    let (state_there, lane) = (state.clone(), served.lane);
    let render = move || {
        let served = state_there.served(lane).expect("it was found before: this is a bug");
        for (i, message) in messages.iter_mut().enumerate() {
            normalise(i, message)?;
        }
        let messages = Value::Array(messages.into_iter().map(Value::Object).collect());
        let extra = fields.chat_template_kwargs.unwrap_or_default();
        let tools = fields.tools.as_ref().filter(|tools| !tools.is_null());
        let text = template.render(&messages, tools, true, &extra).map_err(|error| {
            ApiError::invalid("messages", format!("the model's chat template refused the messages: {error}"))
        })?;
        check_text_fits("messages", text.len(), served, state_there.engine.max_model_len())?;
        // The template writes the special tokens itself.
        encode(&served.model.tokenizer, &text, false).map(Arc::from)
    };
    state.heavy.run_if(size_bytes > INLINE_TEXT_BYTES, render).await
}

/// Longest `role`: templates compare it with short words.
const MAX_ROLE_BYTES: usize = 64;

/// Checks a message's shape and joins text parts, which templates of text models do not know.
fn normalise(index: usize, message: &mut Map<String, Value>) -> Result<(), ApiError> {
    let path = |field: &str| format!("messages[{index}].{field}");
    let Some(role) = message.get("role").and_then(Value::as_str) else {
        return Err(ApiError::invalid(path("role"), format!("{} must be a string", path("role"))));
    };
    if role.len() > MAX_ROLE_BYTES {
        let message =
            format!("{} has {} bytes; it must have at most {MAX_ROLE_BYTES}", path("role"), role.len());
        return Err(ApiError::invalid(path("role"), message));
    }
    let content = match message.get("content") {
        // Assistant messages that only call tools have none.
        None | Some(Value::Null | Value::String(_)) => return Ok(()),
        Some(Value::Array(parts)) => join_parts(parts, &path("content"))?,
        Some(_) => {
            let message = format!("{} must be a string or an array of text parts", path("content"));
            return Err(ApiError::invalid(path("content"), message));
        }
    };
    message.insert("content".to_owned(), Value::String(content));
    Ok(())
}

fn join_parts(parts: &[Value], path: &str) -> Result<String, ApiError> {
    let mut joined = String::new();
    for (i, part) in parts.iter().enumerate() {
        let kind = part.get("type").and_then(Value::as_str).unwrap_or("missing");
        match (kind, part.get("text").and_then(Value::as_str)) {
            ("text" | "input_text" | "output_text", Some(text)) => joined.push_str(text),
            _ => {
                let message =
                    format!("{path}[{i}] has the type {kind:?}; only parts of type \"text\" are understood");
                return Err(ApiError::invalid(format!("{path}[{i}]"), message));
            }
        }
    }
    Ok(joined)
}

struct ChatEncoder {
    writer: ChunkWriter,
    /// `[num_sequences]`: the chunk that names the role was written.
    has_begun: Vec<bool>,
    /// Set if log-probabilities are to be written.
    tokenizer: Option<Arc<Tokenizer>>,
}

impl ChatEncoder {
    fn logprobs(&self, generation: &Generation, index: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(b",\"logprobs\":");
        match &self.tokenizer {
            Some(tokenizer) => json(out, &ChatLogprobs::new(tokenizer, &generation.delta(index).tokens)),
            None => out.extend_from_slice(b"null"),
        }
    }
}

impl EventEncoder for ChatEncoder {
    fn progress(&mut self, generation: &Generation, progress: Progress, out: &mut Vec<u8>) {
        let index = progress.index;
        let delta = generation.delta(index);
        if !std::mem::replace(&mut self.has_begun[index], true) {
            self.writer.open(index, out);
            out.extend_from_slice(b"\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null");
            self.writer.close(generation, None, out);
        }
        if !delta.text.is_empty() || !delta.tokens.is_empty() {
            self.writer.open(index, out);
            out.extend_from_slice(b"\"delta\":{\"content\":");
            json(out, &delta.text);
            out.push(b'}');
            self.logprobs(generation, index, out);
            self.writer.close(generation, None, out);
        }
        if let Some(end) = progress.end {
            self.writer.open(index, out);
            out.extend_from_slice(b"\"delta\":{},\"logprobs\":null");
            self.writer.close(generation, Some(finish_reason(end)), out);
        }
    }

    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>) {
        self.writer.end(generation, out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        ChunkWriter::error(error, out);
    }
}
