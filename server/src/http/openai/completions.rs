//! `POST /v1/completions`: continuation, and with `suffix` fill-in-the-middle.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use tandem_engine::MAX_LOGPROBS;
use tandem_models::{ModelError, Tokenizer};

use super::logprobs::CompletionLogprobs;
use super::params::{Shared, SharedFields, answer_tokens, in_range, integer};
use super::types::{Timings, Usage, finish_reason};
use super::write::{ChunkWriter, Identity, json, response_id, with_headers};
use crate::http::body::JsonBody;
use crate::http::error::{ApiError, ErrorKind};
use crate::http::generation::{Delta, Generation, GenerationRequest, Progress, Prompt};
use crate::http::lanes::{Work, lane_name, resolve};
use crate::http::sse::{self, EventEncoder};
use crate::http::state::{AppState, ServedModel};

/// OpenAI's default.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// Text longer than this is tokenized off the async threads.
pub(super) const INLINE_TEXT_BYTES: usize = 16 << 10;

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

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, an array of strings, an array of token ids, or an array of arrays of token ids"
)]
enum PromptField {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

enum PromptInput {
    Text(String),
    Tokens(Vec<u32>),
}

impl PromptField {
    fn into_inputs(self) -> Vec<PromptInput> {
        match self {
            PromptField::Text(text) => vec![PromptInput::Text(text)],
            PromptField::Tokens(tokens) => vec![PromptInput::Tokens(tokens)],
            PromptField::Texts(texts) => texts.into_iter().map(PromptInput::Text).collect(),
            PromptField::TokenLists(lists) => lists.into_iter().map(PromptInput::Tokens).collect(),
        }
    }
}

/// A prompt ready to run, and its text if it is to be echoed.
struct PreparedPrompt {
    tokens: Arc<[u32]>,
    echo: Option<String>,
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
    JsonBody(shared, fields): JsonBody<SharedFields, CompletionFields>,
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

    let inputs = fields.prompt.map(PromptField::into_inputs).unwrap_or_default();
    if inputs.is_empty() || inputs.len() > state.limits.max_prompts {
        let message = format!(
            "prompt holds {} prompts; 1 to {} are taken, each a string or an array of token ids",
            inputs.len(),
            state.limits.max_prompts
        );
        return Err(ApiError::invalid("prompt", message));
    }
    let prompts = prepare(served, inputs, suffix, echo).await?;
    let request = generation_request(&state, &common, &prompts, max_tokens)?;
    let mut generation = Generation::start(&state, served, &request)?;

    let lane = lane_name(served.lane);
    let identity = Identity::new(response_id("cmpl"), "text_completion", shared.model, common.seed);
    let tokenizer = served.model.tokenizer.clone();
    let seed = common.seed;
    let shape =
        Shape { tokenizer, prompts, num_choices: common.num_choices, has_logprobs: logprobs.is_some() };
    let response = if common.stream {
        let encoder = CompletionEncoder {
            writer: ChunkWriter::new(&identity, common.include_usage),
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
    Ok(with_headers(response, lane, seed))
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

async fn prepare(
    served: &ServedModel,
    inputs: Vec<PromptInput>,
    suffix: Option<String>,
    echo: bool,
) -> Result<Vec<PreparedPrompt>, ApiError> {
    let fim = match &suffix {
        None => None,
        Some(_) if echo => {
            return Err(ApiError::invalid("echo", "echo and suffix cannot be combined"));
        }
        Some(_) if inputs.iter().any(|input| matches!(input, PromptInput::Tokens(_))) => {
            let message = "with a suffix the prompt must be text, not token ids";
            return Err(ApiError::invalid("prompt", message));
        }
        Some(_) => Some(served.fim.clone().ok_or_else(|| {
            let message = format!(
                "the model {:?} has no fill-in-the-middle tokens in its vocabulary, so it takes no suffix",
                served.model.name
            );
            ApiError::invalid("suffix", message)
        })?),
    };
    let size_bytes: usize = inputs
        .iter()
        .map(|input| match input {
            PromptInput::Text(text) => text.len() + suffix.as_ref().map_or(0, String::len),
            PromptInput::Tokens(_) => 0,
        })
        .sum();
    let tokenizer = served.model.tokenizer.clone();
    let tokenize = move || {
        let one = |input| match (input, &fim, &suffix) {
            (PromptInput::Text(prefix), Some(fim), Some(suffix)) => {
                let tokens = fim.encode_psm(&tokenizer, &prefix, suffix).map_err(untokenizable)?;
                let tokens = tokens.expect("the tokens were found in this vocabulary: this is a bug").into();
                Ok(PreparedPrompt { tokens, echo: None })
            }
            (PromptInput::Text(text), ..) => {
                let tokens = encode(&tokenizer, &text, true)?.into();
                Ok(PreparedPrompt { tokens, echo: echo.then_some(text) })
            }
            (PromptInput::Tokens(tokens), ..) => {
                let text = echo.then(|| decode(&tokenizer, &tokens)).transpose()?;
                Ok(PreparedPrompt { tokens: tokens.into(), echo: text })
            }
        };
        inputs.into_iter().map(one).collect()
    };
    off_thread_if(size_bytes > INLINE_TEXT_BYTES, tokenize).await
}

/// Runs `work` here, or on a blocking thread if it is long: a megabyte of text takes the better part
/// of a second to tokenize and would hold up other clients' tokens.
pub(super) async fn off_thread_if<R: Send + 'static>(
    is_long: bool,
    work: impl FnOnce() -> Result<R, ApiError> + Send + 'static,
) -> Result<R, ApiError> {
    if !is_long {
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::new(ErrorKind::Internal, "reading the prompt failed")),
    }
}

/// Text to tokens. Special tokens written out in the text count as such: clients build their own
/// fill-in-the-middle prompts that way.
pub(super) fn encode(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
    tokenizer.encode(text, add_special).map_err(untokenizable)
}

fn untokenizable(error: ModelError) -> ApiError {
    ApiError::invalid("prompt", format!("the prompt cannot be tokenized: {error}"))
}

fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> Result<String, ApiError> {
    tokenizer
        .decode(tokens, false)
        .map_err(|error| ApiError::invalid("prompt", format!("the prompt cannot be echoed: {error}")))
}

fn generation_request(
    state: &AppState,
    common: &Shared,
    prompts: &[PreparedPrompt],
    max_tokens: Option<i128>,
) -> Result<GenerationRequest, ApiError> {
    let max_model_len = state.engine.max_model_len();
    let one = |prompt: &PreparedPrompt| {
        let default = Some(DEFAULT_MAX_TOKENS);
        let bound =
            answer_tokens("max_tokens", max_tokens, default, prompt.tokens.len(), max_model_len, false)?;
        Ok(Prompt { tokens: prompt.tokens.clone(), max_tokens: bound })
    };
    Ok(GenerationRequest {
        prompts: prompts.iter().map(one).collect::<Result<_, ApiError>>()?,
        num_choices: common.num_choices,
        params: common.params.clone(),
        stop: common.stop.clone(),
        max_draft_tokens: common.max_draft_tokens,
    })
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
