//! `POST /v1/completions`: continuation, and with `suffix` fill-in-the-middle.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use serde::{Deserialize, Serialize};
use tandem_engine::MAX_LOGPROBS;
use tandem_models::Tokenizer;

use super::logprobs::CompletionLogprobs;
use super::params::{SharedFields, in_range, integer};
use super::prompt::{PreparedPrompt, PromptField, PromptInput, PromptOptions, check_sequences, prepare};
use super::types::{Timings, Usage, finish_reason};
use super::write::{ChunkWriter, Identity, Reply, json, response_id, with_headers};
use crate::http::body::JsonBody;
use crate::http::error::ApiError;
use crate::http::generation::{Delta, Generation, Progress};
use crate::http::lanes::{Work, lane_name, resolve};
use crate::http::sse::{self, EventEncoder};
use crate::http::state::AppState;

/// OpenAI's default.
pub(super) const DEFAULT_MAX_TOKENS: u32 = 16;

/// The fields that only completions have.
#[derive(Deserialize)]
pub(super) struct CompletionFields {
    prompt: Option<PromptField>,
    suffix: Option<String>,
    echo: Option<bool>,
    #[serde(default, deserialize_with = "integer")]
    logprobs: Option<i128>,
    #[serde(default, deserialize_with = "integer")]
    best_of: Option<i128>,
}

#[derive(Serialize)]
struct CompletionResponse {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<CompletionChoice>,
    usage: Usage,
    seed: i128,
    timings: Timings,
}

#[derive(Serialize)]
struct CompletionChoice {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: &'static str,
}

pub(super) async fn completions(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { mut shared, fields, .. }: JsonBody<SharedFields, CompletionFields>,
) -> Result<Response, ApiError> {
    let echo = fields.echo.unwrap_or(false);
    let max_tokens = max_tokens(&state, &shared, echo)?;
    let work = Work::Completion {
        max_tokens: max_tokens.map_or(DEFAULT_MAX_TOKENS.into(), |max_tokens| max_tokens as u64),
    };
    let served = resolve(&state, shared.model.as_deref(), work)?;
    // An empty suffix is how some clients say that there is none.
    let suffix = fields.suffix.filter(|suffix| !suffix.is_empty());
    let fim_stops = if suffix.is_some() { served.fim_stop_token_ids.as_slice() } else { &[] };
    let mut common = shared.resolve(served, &state.limits, fim_stops)?;
    let logprobs = fields
        .logprobs
        .map(|count| in_range("logprobs", count, 0, MAX_LOGPROBS.into()).map(|count| count as u8))
        .transpose()?;
    common.params.logprobs = logprobs;
    common.params.prompt_logprobs = if echo { logprobs } else { None };
    check_best_of(fields.best_of, common.num_choices)?;

    let inputs: Vec<PromptInput> = fields.prompt.map(|PromptField(inputs)| inputs).unwrap_or_default();
    if inputs.is_empty() || inputs.len() > state.limits.max_prompts {
        let message = format!(
            "prompt holds {} prompts; 1 to {} are taken, each a string or an array of token ids",
            inputs.len(),
            state.limits.max_prompts
        );
        return Err(ApiError::invalid("prompt", message));
    }
    check_sequences(&state, inputs.len(), common.num_choices)?;
    let options = PromptOptions { echo, max_tokens, max_model_len: state.engine.max_model_len() };
    let cache_salt = state.cache_salt(&headers, shared.cache_salt()?);
    if let Some(prediction) = shared.take_prediction() {
        common.speculation.prediction = prediction.encode(&state, served).await?;
    }
    let prompts = prepare(&state, served, inputs, suffix, options).await?;
    let reply = Reply {
        model: shared.model,
        lane: lane_name(served.lane),
        seed: common.seed,
        stream: common.stream,
        include_usage: common.include_usage,
    };
    let num_choices = common.num_choices;
    let to_run = prompts.iter().map(PreparedPrompt::to_run).collect();
    let generation = Generation::start(&state, served, &common.into_request(to_run, cache_salt))?;
    let tokenizer = served.model.tokenizer.clone();
    let shape = Shape { tokenizer, prompts, num_choices, has_logprobs: logprobs.is_some() };
    answer(generation, shape, reply).await
}

async fn answer(mut generation: Generation, shape: Shape, reply: Reply) -> Result<Response, ApiError> {
    let (seed, shared) = (reply.seed(&generation), generation.shared());
    let identity = Identity::new(response_id("cmpl"), "text_completion", reply.model, seed);
    let response = if reply.stream {
        let encoder = CompletionEncoder {
            writer: ChunkWriter::new(&identity, reply.include_usage),
            offsets: vec![None; generation.num_sequences()],
            shape,
        };
        sse::respond(generation, encoder)
    } else {
        let answers = generation.collect().await?;
        let account = generation.account();
        let choices = answers.into_iter().enumerate().map(|(index, answer)| {
            let mut text = shape.echo(index).to_owned();
            text.push_str(&answer.answer.text);
            let logprobs = shape.logprobs(index, &answer.answer, &mut 0);
            CompletionChoice { index, text, logprobs, finish_reason: finish_reason(answer.end) }
        });
        Json(CompletionResponse {
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

/// The client's own bound, checked. 0 is for scoring a prompt.
fn max_tokens(state: &AppState, shared: &SharedFields, echo: bool) -> Result<Option<i128>, ApiError> {
    let least = if echo { 0 } else { 1 };
    let most = state.engine.max_model_len() as i128;
    shared.max_tokens.map(|value| in_range("max_tokens", value, least, most)).transpose()
}

fn check_best_of(best_of: Option<i128>, num_choices: usize) -> Result<(), ApiError> {
    match best_of {
        Some(best_of) if best_of != num_choices as i128 => {
            let message = format!(
                "best_of is {best_of} and n is {num_choices}; answers are not ranked here, so they must be equal"
            );
            Err(ApiError::invalid("best_of", message))
        }
        _ => Ok(()),
    }
}

/// What the answer's wire form needs besides the answer.
struct Shape {
    tokenizer: Arc<Tokenizer>,
    prompts: Vec<PreparedPrompt>,
    num_choices: usize,
    has_logprobs: bool,
}

impl Shape {
    fn prompt(&self, index: usize) -> &PreparedPrompt {
        &self.prompts[index / self.num_choices]
    }

    fn echo(&self, index: usize) -> &str {
        self.prompt(index).echo.as_deref().unwrap_or("")
    }

    /// The log-probabilities of a delta whose first token's text begins `offset` characters in.
    fn logprobs(&self, index: usize, delta: &Delta, offset: &mut usize) -> Option<CompletionLogprobs> {
        if !self.has_logprobs {
            return None;
        }
        let mut logprobs = CompletionLogprobs::default();
        if let Some(scores) = &delta.prompt_logprobs {
            logprobs.push_prompt(&self.tokenizer, &self.prompt(index).tokens, scores, offset);
        }
        logprobs.push_output(&self.tokenizer, &delta.tokens, offset);
        Some(logprobs)
    }
}

struct CompletionEncoder {
    writer: ChunkWriter,
    shape: Shape,
    /// `[num_sequences]`: characters written of each choice; `None` before its first chunk.
    offsets: Vec<Option<usize>>,
}

impl EventEncoder for CompletionEncoder {
    fn progress(&mut self, generation: &Generation, progress: Progress, out: &mut Vec<u8>) {
        let index = progress.index;
        let delta = generation.delta(index);
        self.writer.open(index, out);
        out.extend_from_slice(b"\"text\":");
        let is_first = self.offsets[index].is_none();
        let offset = self.offsets[index].get_or_insert(0);
        match self.shape.echo(index) {
            echo if is_first && !echo.is_empty() => json(out, &format!("{echo}{}", delta.text)),
            _ => json(out, &delta.text),
        }
        out.extend_from_slice(b",\"logprobs\":");
        json(out, &self.shape.logprobs(index, delta, offset));
        self.writer.close(generation, progress.end.map(finish_reason), out);
    }

    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>) {
        self.writer.end(generation, out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        ChunkWriter::error(error, out);
    }
}
