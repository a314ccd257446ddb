//! `POST /v1/messages` and `POST /v1/messages/count_tokens`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use serde::Serialize;

use super::request::MessagesFields;
use super::wire::AnthropicWire;
use crate::http::body::JsonBody;
use crate::http::chat::ChatStream;
use crate::http::error::ApiError;
use crate::http::fields::CommonFields;
use crate::http::generation::Prompt;
use crate::http::intake::{Intake, answer_tokens, asked_tokens};
use crate::http::lanes::Work;
use crate::http::state::AppState;
use crate::http::wire::respond;

pub(super) async fn messages(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { mut common, mut fields, size_bytes }: JsonBody<CommonFields, MessagesFields>,
) -> Result<Response, ApiError> {
    let asked = asked_tokens("max_tokens", common.max_tokens, 1)?;
    if asked.is_none() {
        return Err(ApiError::invalid("max_tokens", "max_tokens is missing; it must be an integer from 1"));
    }
    common.stop = fields.stop_sequences.take();
    let mut intake = Intake::new(&state, &headers, common, Work::Chat, false)?;
    let (one_call, shows_thinking) = (fields.one_call(), fields.shows_thinking()?);
    let rendered = fields.conversation(size_bytes)?.render(&mut intake).await?;
    let num_prompt_tokens = rendered.tokens.len();
    let max_model_len = intake.max_model_len();
    let max_tokens = answer_tokens(asked, None, num_prompt_tokens, max_model_len)?;
    intake.common.num_choices = 1;
    let prompt = Prompt { tokens: rendered.tokens, text: None, max_tokens };
    let (generation, reply) = intake.start(vec![prompt]).await?;
    let wire = AnthropicWire::new(&reply, num_prompt_tokens, shows_thinking);
    respond(generation, ChatStream::new(wire, rendered.plan, one_call, 1), &reply).await
}

#[derive(Serialize)]
pub(super) struct TokenCount {
    input_tokens: usize,
}

pub(super) async fn count_tokens(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { common, fields, size_bytes }: JsonBody<CommonFields, MessagesFields>,
) -> Result<Json<TokenCount>, ApiError> {
    let mut intake = Intake::new(&state, &headers, common, Work::Chat, false)?;
    fields.shows_thinking()?;
    let rendered = fields.conversation(size_bytes)?.render(&mut intake).await?;
    Ok(Json(TokenCount { input_tokens: rendered.tokens.len() }))
}
