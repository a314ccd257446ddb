//! `POST /api/chat`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::fields::{OllamaCommon, Options, format, think};
use super::wire::{OllamaWire, Said};
use crate::http::body::JsonBody;
use crate::http::chat::{ChatStream, Conversation, ToolFields};
use crate::http::error::ApiError;
use crate::http::fields::{Bounded, objects};
use crate::http::generation::Prompt;
use crate::http::intake::{Intake, answer_tokens};
use crate::http::lanes::Work;
use crate::http::state::AppState;
use crate::http::wire::respond;

/// The fields that only chats have.
#[derive(Deserialize, ToSchema)]
pub(super) struct OllamaChatFields {
    messages: Option<Bounded>,
    tools: Option<Bounded>,
    think: Option<Bounded>,
    format: Option<Bounded>,
    options: Option<Options>,
}

pub(super) async fn chat(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { common, fields, size_bytes }: JsonBody<OllamaCommon, OllamaChatFields>,
) -> Result<Response, ApiError> {
    let format = format(fields.format)?;
    let (common, max_tokens) = common.resolve(fields.options)?;
    let mut intake = Intake::new(&state, &headers, common, Work::Chat, false)?;
    intake.common.format = format;
    let mut variables = Map::new();
    think(fields.think, &mut variables)?;
    let (tools, tool_choice) = ToolFields { tools: fields.tools, tool_choice: None }.resolve()?;
    let messages = objects("messages", fields.messages)?;
    let conversation = Conversation {
        messages: messages.into_iter().map(translate).collect(),
        path: "messages",
        tools,
        tool_choice,
        prefill: String::new(),
        variables,
        size_bytes,
    };
    let rendered = conversation.render(&mut intake).await?;
    let max_tokens = answer_tokens(max_tokens, None, rendered.tokens.len(), intake.max_model_len())?;
    let prompt = Prompt { tokens: rendered.tokens, text: None, max_tokens, gap: None };
    let (generation, reply) = intake.start(vec![prompt]).await?;
    let wire = OllamaWire::new(&reply, Said::Message);
    respond(generation, ChatStream::new(wire, rendered.plan, false, 1), &reply).await
}

/// Their names of what templates know by others.
fn translate(mut message: Map<String, Value>) -> Map<String, Value> {
    for (theirs, ours) in [("thinking", "reasoning_content"), ("tool_name", "name")] {
        if let Some(value) = message.remove(theirs) {
            message.insert(ours.to_owned(), value);
        }
    }
    message
}
