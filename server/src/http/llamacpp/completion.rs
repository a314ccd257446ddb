//! `POST /completion` and `POST /infill`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;

use super::fields::{Extra, LlamaFields};
use super::wire::LlamaWire;
use crate::http::body::JsonBody;
use crate::http::error::ApiError;
use crate::http::fields::CommonFields;
use crate::http::gap::{Gap, OtherFile};
use crate::http::intake::Intake;
use crate::http::lanes::Work;
use crate::http::prompt::{PreparedPrompt, PromptField, PromptInput, PromptOptions, prepare};
use crate::http::state::AppState;
use crate::http::wire::respond;

pub(super) async fn completion(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { mut common, fields, .. }: JsonBody<CommonFields, LlamaFields>,
) -> Result<Response, ApiError> {
    let max_tokens = fields.apply(&mut common)?;
    let work = Work::Completion { max_tokens: max_tokens.map_or(u64::MAX, |max_tokens| max_tokens as u64) };
    let inputs = fields.prompt.map(|PromptField(inputs)| inputs).unwrap_or_default();
    if inputs.len() != 1 {
        let message =
            format!("prompt holds {} prompts; it must be one string or one array of token ids", inputs.len());
        return Err(ApiError::invalid("prompt", message));
    }
    let mut intake = Intake::new(&state, &headers, common, work, false)?;
    intake.common.num_choices = 1;
    let max_model_len = intake.max_model_len();
    let options = PromptOptions { echo: false, max_tokens, default_max_tokens: None, max_model_len };
    let prompts = prepare(&state, intake.served, inputs, None, options).await?;
    let (generation, reply) = intake.start(prompts.iter().map(PreparedPrompt::to_run).collect()).await?;
    respond(generation, LlamaWire::new(&reply), &reply).await
}

pub(super) async fn infill(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { mut common, fields, size_bytes }: JsonBody<CommonFields, LlamaFields>,
) -> Result<Response, ApiError> {
    let max_tokens = fields.apply(&mut common)?;
    let begun = match fields.prompt.map(|PromptField(inputs)| inputs).as_deref() {
        None | Some([]) => String::new(),
        Some([PromptInput::Text(text)]) => text.clone(),
        Some(_) => {
            return Err(ApiError::invalid("prompt", "prompt must be a string, the text before the cursor"));
        }
    };
    let mut intake = Intake::new(&state, &headers, common, Work::Gap, true)?;
    intake.common.num_choices = 1;
    let other =
        |extra: Extra| OtherFile { name: extra.filename.unwrap_or("file".to_owned()), text: extra.text };
    let gap = Gap {
        files: fields.input_extra.unwrap_or_default().into_iter().map(other).collect(),
        prefix: fields.input_prefix.unwrap_or_default(),
        begun,
        suffix: fields.input_suffix.unwrap_or_default(),
    };
    let prompt = gap.prompt(&state, intake.served, max_tokens, size_bytes).await?;
    let (generation, reply) = intake.start(vec![prompt]).await?;
    respond(generation, LlamaWire::new(&reply), &reply).await
}
