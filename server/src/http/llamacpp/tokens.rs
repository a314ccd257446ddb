//! `POST /tokenize`, `POST /detokenize` and `POST /apply-template`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use http::HeaderMap;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::http::body::JsonBody;
use crate::http::chat::{Conversation, ToolFields};
use crate::http::error::ApiError;
use crate::http::fields::{Bounded, CommonFields, ModelField, object, objects};
use crate::http::intake::Intake;
use crate::http::lanes::{Work, resolve};
use crate::http::prompt::{INLINE_TEXT_BYTES, PromptField, PromptInput, check_text_fits, untokenizable};
use crate::http::state::AppState;

#[derive(Deserialize, ToSchema)]
pub(super) struct TokenizeFields {
    content: Option<String>,
    add_special: Option<bool>,
    parse_special: Option<bool>,
    with_pieces: Option<bool>,
}

pub(super) async fn tokenize(
    State(state): State<Arc<AppState>>,
    JsonBody { common, fields, .. }: JsonBody<ModelField, TokenizeFields>,
) -> Result<Json<Value>, ApiError> {
    let Some(content) = fields.content else {
        return Err(ApiError::invalid("content", "content is missing; it must be a string"));
    };
    let served = resolve(&state, common.model.as_deref())?;
    check_text_fits("content", content.len(), served, state.engine.max_model_len())?;
    let tokenizer = served.model.tokenizer.clone();
    let is_long = content.len() > INLINE_TEXT_BYTES;
    let add_special = fields.add_special.unwrap_or(false);
    let work = move || {
        let ids = match fields.parse_special.unwrap_or(true) {
            true => tokenizer.encode(&content, add_special),
            false => tokenizer.encode_text(&content, add_special),
        };
        let ids = ids.map_err(untokenizable)?;
        if !fields.with_pieces.unwrap_or(false) {
            return Ok(json!({ "tokens": ids }));
        }
        let piece = |id: u32| match String::from_utf8(tokenizer.token_bytes(id)) {
            Ok(text) => Value::from(text),
            // Part of a character: its bytes.
            Err(error) => Value::from(error.into_bytes()),
        };
        let pieces: Vec<Value> = ids.into_iter().map(|id| json!({ "id": id, "piece": piece(id) })).collect();
        Ok(json!({ "tokens": pieces }))
    };
    state.heavy.run_if(is_long, work).await.map(Json)
}

#[derive(Deserialize, ToSchema)]
pub(super) struct DetokenizeFields {
    tokens: Option<PromptField>,
}

pub(super) async fn detokenize(
    State(state): State<Arc<AppState>>,
    JsonBody { common, fields, .. }: JsonBody<ModelField, DetokenizeFields>,
) -> Result<Json<Value>, ApiError> {
    let tokens = match fields.tokens.map(|PromptField(inputs)| inputs).as_deref() {
        Some([]) => vec![],
        Some([PromptInput::Tokens(tokens)]) => tokens.clone(),
        _ => return Err(ApiError::invalid("tokens", "tokens must be an array of token ids")),
    };
    let served = resolve(&state, common.model.as_deref())?;
    let tokenizer = served.model.tokenizer.clone();
    let is_long = tokens.len() > INLINE_TEXT_BYTES;
    let work = move || {
        let vocab_size = tokenizer.vocab_size();
        if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab_size) {
            let message = format!("tokens holds {id}; the vocabulary ends at {}", vocab_size - 1);
            return Err(ApiError::invalid("tokens", message));
        }
        let content = tokenizer.decode(&tokens, false).map_err(untokenizable)?;
        Ok(json!({ "content": content }))
    };
    state.heavy.run_if(is_long, work).await.map(Json)
}

#[derive(Deserialize, ToSchema)]
pub(super) struct TemplateFields {
    messages: Option<Bounded>,
    tools: Option<Bounded>,
    chat_template_kwargs: Option<Bounded>,
}

pub(super) async fn apply_template(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { common, fields, size_bytes }: JsonBody<CommonFields, TemplateFields>,
) -> Result<Json<Value>, ApiError> {
    let mut intake = Intake::new(&state, &headers, common, Work::Chat, false)?;
    let (tools, tool_choice) = ToolFields { tools: fields.tools, tool_choice: None }.resolve()?;
    let variables: Map<String, Value> = object("chat_template_kwargs", fields.chat_template_kwargs)?;
    let conversation = Conversation {
        messages: objects("messages", fields.messages)?,
        path: "messages",
        tools,
        tool_choice,
        prefill: String::new(),
        variables,
        size_bytes,
    };
    Ok(Json(json!({ "prompt": conversation.render(&mut intake).await?.text })))
}
