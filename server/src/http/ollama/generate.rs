//! `POST /api/generate`: a question to the model, a text to go on with (`raw`), or a gap to fill (`suffix`).

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::fields::{OllamaCommon, Options, format, think};
use super::wire::{OllamaWire, Said};
use crate::http::body::JsonBody;
use crate::http::chat::{ChatStream, Conversation, ReadingPlan, ToolChoice};
use crate::http::error::ApiError;
use crate::http::fields::Bounded;
use crate::http::generation::Prompt;
use crate::http::intake::{Intake, answer_tokens};
use crate::http::lanes::Work;
use crate::http::prompt::{PreparedPrompt, PromptInput, PromptOptions, fim_of, prepare};
use crate::http::state::AppState;
use crate::http::wire::respond;

/// The fields that only this endpoint has.
#[derive(Deserialize, ToSchema)]
pub(super) struct GenerateFields {
    prompt: Option<String>,
    suffix: Option<String>,
    system: Option<String>,
    raw: Option<bool>,
    think: Option<Bounded>,
    format: Option<Bounded>,
    options: Option<Options>,
}

pub(super) async fn generate(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { common, mut fields, size_bytes }: JsonBody<OllamaCommon, GenerateFields>,
) -> Result<Response, ApiError> {
    let format = format(fields.format.take())?;
    let (common, asked) = common.resolve(fields.options.take())?;
    let suffix = fields.suffix.take().filter(|suffix| !suffix.is_empty());
    let text = fields.prompt.take().unwrap_or_default();
    let is_raw = fields.raw == Some(true);
    let work = match (&suffix, is_raw) {
        (Some(_), _) => Work::Gap,
        (None, true) => Work::Completion { max_tokens: asked.map_or(u64::MAX, |asked| asked as u64) },
        (None, false) => Work::Chat,
    };
    let mut intake = Intake::new(&state, &headers, common, work, suffix.is_some())?;
    intake.common.format = format;
    let (prompt, plan) = if suffix.is_some() || is_raw {
        if suffix.is_some() {
            fim_of(intake.served, "model")?;
        }
        let max_model_len = intake.max_model_len();
        let options =
            PromptOptions { echo: false, max_tokens: asked, default_max_tokens: None, max_model_len };
        let inputs = vec![PromptInput::Text(text)];
        let prompts = prepare(&state, intake.served, inputs, suffix, options).await?;
        let prompt = prompts.first().map(PreparedPrompt::to_run).expect("one was given: this is a bug");
        (prompt, ReadingPlan::default())
    } else {
        let rendered = question(fields, text, size_bytes)?.render(&mut intake).await?;
        let max_tokens = answer_tokens(asked, None, rendered.tokens.len(), intake.max_model_len())?;
        (Prompt { tokens: rendered.tokens, text: None, max_tokens, gap: None }, rendered.plan)
    };
    let (generation, reply) = intake.start(vec![prompt]).await?;
    let wire = OllamaWire::new(&reply, Said::Response);
    respond(generation, ChatStream::new(wire, plan, false, 1), &reply).await
}

fn question(fields: GenerateFields, text: String, size_bytes: usize) -> Result<Conversation, ApiError> {
    let mut variables = Map::new();
    think(fields.think, &mut variables)?;
    let message = |role: &str, text: String| {
        Map::from_iter([("role".to_owned(), json!(role)), ("content".to_owned(), Value::String(text))])
    };
    let mut messages = Vec::new();
    messages.extend(fields.system.filter(|text| !text.is_empty()).map(|text| message("system", text)));
    messages.push(message("user", text));
    Ok(Conversation {
        messages,
        path: "prompt",
        tools: vec![],
        tool_choice: ToolChoice::None,
        prefill: String::new(),
        variables,
        size_bytes,
    })
}
