//! `POST /v1/completions`: continuation, and with `suffix` fill-in-the-middle.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use serde::{Deserialize, Serialize};
use tandem_engine::MAX_LOGPROBS;
use tandem_models::Tokenizer;
use utoipa::ToSchema;

use super::logprobs::CompletionLogprobs;
use super::types::finish_reason;
use super::write::{ChunkWriter, Identity};
use crate::http::body::JsonBody;
use crate::http::error::ApiError;
use crate::http::fields::{CommonFields, in_range, integer};
use crate::http::generation::{CompletedChoice, Delta, Generation, Progress};
use crate::http::intake::{Intake, asked_tokens};
use crate::http::lanes::Work;
use crate::http::prompt::{PreparedPrompt, PromptField, PromptInput, PromptOptions, prepare};
use crate::http::state::AppState;
use crate::http::tabby::{self, Segments};
use crate::http::wire::{Wire, json, respond};

/// OpenAI's default.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// The fields that only completions have.
#[derive(Deserialize, ToSchema)]
pub(super) struct CompletionFields {
    /// Tabby's, which asks on the same path.
    segments: Option<Segments>,
    prompt: Option<PromptField>,
    suffix: Option<String>,
    echo: Option<bool>,
    #[serde(default, deserialize_with = "integer")]
    logprobs: Option<i128>,
    #[serde(default, deserialize_with = "integer")]
    best_of: Option<i128>,
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
    JsonBody { common, mut fields, size_bytes }: JsonBody<CommonFields, CompletionFields>,
) -> Result<Response, ApiError> {
    if let Some(segments) = fields.segments.take() {
        return tabby::complete(&state, &headers, common, segments, size_bytes).await;
    }
    let PreparedCompletion { intake, prompts } =
        PreparedCompletion::new(&state, &headers, common, fields).await?;
    let tokenizer = intake.served.model.tokenizer.clone();
    let (num_choices, logprobs) = (intake.common.num_choices, intake.common.params.logprobs);
    let (generation, reply) = intake.start(prompts.iter().map(PreparedPrompt::to_run).collect()).await?;
    let shape = Shape { tokenizer, prompts, num_choices, has_logprobs: logprobs.is_some() };
    let identity = Identity::new("cmpl-", "text_completion", &reply);
    let wire = CompletionWire {
        writer: ChunkWriter::new(&identity),
        offsets: vec![None; generation.num_sequences()],
        identity,
        shape,
    };
    respond(generation, wire, &reply).await
}

/// A request that has been checked, with its prompts as tokens.
pub(super) struct PreparedCompletion<'a> {
    pub(super) intake: Intake<'a>,
    pub(super) prompts: Vec<PreparedPrompt>,
}

impl<'a> PreparedCompletion<'a> {
    pub(super) async fn new(
        state: &'a Arc<AppState>,
        headers: &HeaderMap,
        common: CommonFields,
        fields: CompletionFields,
    ) -> Result<Self, ApiError> {
        let echo = fields.echo.unwrap_or(false);
        // 0 is for scoring a prompt.
        let max_tokens = asked_tokens("max_tokens", common.max_tokens, if echo { 0 } else { 1 })?;
        let work = Work::Completion {
            max_tokens: max_tokens.map_or(DEFAULT_MAX_TOKENS.into(), |max_tokens| max_tokens as u64),
        };
        // An empty suffix is how some clients say that there is none.
        let suffix = fields.suffix.filter(|suffix| !suffix.is_empty());
        let mut intake = Intake::new(state, headers, common, work, suffix.is_some())?;
        let logprobs = fields
            .logprobs
            .map(|count| in_range("logprobs", count, 0, MAX_LOGPROBS.into()).map(|count| count as u8))
            .transpose()?;
        intake.common.params.logprobs = logprobs;
        intake.common.params.prompt_logprobs = if echo { logprobs } else { None };
        check_best_of(fields.best_of, intake.common.num_choices)?;

        let inputs: Vec<PromptInput> = fields.prompt.map(|PromptField(inputs)| inputs).unwrap_or_default();
        if inputs.is_empty() || inputs.len() > state.limits.max_prompts {
            let message = format!(
                "prompt holds {} prompts; 1 to {} are taken, each a string or an array of token ids",
                inputs.len(),
                state.limits.max_prompts
            );
            return Err(ApiError::invalid("prompt", message));
        }
        intake.check_sequences(inputs.len())?;
        let options = PromptOptions {
            echo,
            max_tokens,
            default_max_tokens: Some(DEFAULT_MAX_TOKENS),
            max_model_len: intake.max_model_len(),
        };
        let prompts = prepare(state, intake.served, inputs, suffix, options).await?;
        Ok(PreparedCompletion { intake, prompts })
    }
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

struct CompletionWire {
    identity: Identity,
    writer: ChunkWriter,
    shape: Shape,
    /// `[num_sequences]`: characters written of each choice; `None` before its first chunk.
    offsets: Vec<Option<usize>>,
}

impl Wire for CompletionWire {
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
        self.writer.end(generation, 0, out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        ChunkWriter::error(error, out);
    }

    fn whole(&mut self, generation: &Generation, answers: Vec<CompletedChoice>, out: &mut Vec<u8>) {
        let choices: Vec<CompletionChoice> = answers
            .into_iter()
            .enumerate()
            .map(|(index, answer)| {
                let mut text = self.shape.echo(index).to_owned();
                text.push_str(&answer.answer.text);
                let logprobs = self.shape.logprobs(index, &answer.answer, &mut 0);
                CompletionChoice { index, text, logprobs, finish_reason: finish_reason(answer.end) }
            })
            .collect();
        self.identity.write_whole(generation, &choices, 0, out);
    }
}
