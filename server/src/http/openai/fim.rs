//! `POST /v1/fim/completions`, as Mistral has it: a prompt, a suffix, and the answer of a chat.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use serde::Deserialize;
use utoipa::ToSchema;

use super::chat::answer;
use crate::http::body::JsonBody;
use crate::http::chat::ReadingPlan;
use crate::http::error::ApiError;
use crate::http::fields::{CommonFields, integer};
use crate::http::intake::{Intake, asked_tokens};
use crate::http::lanes::Work;
use crate::http::prompt::{PreparedPrompt, PromptInput, PromptOptions, fim_of, prepare};
use crate::http::state::AppState;

/// The fields that only this endpoint has.
#[derive(Deserialize, ToSchema)]
pub(super) struct FimFields {
    prompt: Option<String>,
    suffix: Option<String>,
    #[serde(default, deserialize_with = "integer")]
    random_seed: Option<i128>,
}

pub(super) async fn fim_completions(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { mut common, fields, .. }: JsonBody<CommonFields, FimFields>,
) -> Result<Response, ApiError> {
    let Some(prompt) = fields.prompt else {
        return Err(ApiError::invalid("prompt", "prompt is missing; it must be a string"));
    };
    common.seed = common.seed.or(fields.random_seed);
    let max_model_len = state.engine.max_model_len();
    let max_tokens = asked_tokens("max_tokens", common.max_tokens, 1)?;
    let intake = Intake::new(&state, &headers, common, Work::Gap, true)?;
    fim_of(intake.served, "model")?;
    intake.check_sequences(1)?;
    let suffix = Some(fields.suffix.unwrap_or_default());
    let options = PromptOptions { echo: false, max_tokens, default_max_tokens: None, max_model_len };
    let prompts = prepare(&state, intake.served, vec![PromptInput::Text(prompt)], suffix, options).await?;
    let (generation, reply) = intake.start(prompts.iter().map(PreparedPrompt::to_run).collect()).await?;
    answer(generation, &reply, ReadingPlan::default(), false, None).await
}
