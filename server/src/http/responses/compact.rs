//! `POST /v1/responses/compact`: a conversation, said shorter. The model itself writes the summary, and the
//! item that holds it stands for everything before it when it comes back as input.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use http::HeaderMap;
use serde_json::{Map, Value, json};

use super::record::History;
use super::request::{Input, message};
use super::turn::ResponseBody;
use super::wire::usage;
use crate::http::body::JsonBody;
use crate::http::chat::{Conversation, Reading, ToolChoice};
use crate::http::error::ApiError;
use crate::http::generation::Prompt;
use crate::http::intake::{Intake, answer_tokens};
use crate::http::lanes::Work;
use crate::http::state::{AppState, unix_seconds};
use crate::http::wire::random_id;

/// Longest summary, in tokens: some pages.
const MAX_SUMMARY_TOKENS: i128 = 4096;

const REQUEST: &str = "Summarise this conversation for whoever goes on with it and will see nothing else of it: \
    what was asked, what was decided and done, every file name, value and open task that still matters. Answer \
    with the summary alone.";

pub(super) async fn compact(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { common, mut fields, size_bytes }: ResponseBody,
) -> Result<Json<Value>, ApiError> {
    if common.model.is_none() {
        return Err(ApiError::invalid(
            "model",
            "model is missing; it must name the model that is to compact",
        ));
    }
    let tenant = state.cache_salt(&headers, None);
    let history = History::before(&state, tenant, None, fields.previous_response_id.as_deref())?;
    let mut intake = Intake::new(&state, &headers, common, Work::Chat, false)?;
    intake.common.num_choices = 1;
    let mut messages = Vec::new();
    messages.extend(fields.instructions.map(|text| message("system", Value::String(text))));
    messages.extend(history.messages);
    messages.extend(Input::read(fields.input.take())?.messages);
    messages.push(message("user", Value::from(REQUEST)));
    let conversation = Conversation {
        messages,
        path: "input",
        tools: vec![],
        tool_choice: ToolChoice::None,
        prefill: String::new(),
        variables: Map::new(),
        size_bytes: size_bytes + history.size_bytes,
    };
    let rendered = conversation.render(&mut intake).await?;
    let num_prompt_tokens = rendered.tokens.len();
    let max_model_len = intake.max_model_len();
    let max_tokens = answer_tokens(Some(MAX_SUMMARY_TOKENS), None, num_prompt_tokens, max_model_len)?;
    let prompt = Prompt { tokens: rendered.tokens, text: None, max_tokens };
    let (mut generation, _) = intake.start(vec![prompt]).await?;
    let answer = generation.collect().await?.pop().expect("one answer was asked for: this is a bug");
    let answer = Reading::new(&rendered.plan, false).whole(answer);
    Ok(Json(json!({
        "id": random_id("resp_"), "object": "response.compaction", "created_at": unix_seconds(),
        "output": [{ "id": random_id("cmp_"), "type": "compaction", "encrypted_content": answer.message.text.trim() }],
        "usage": usage(&generation.account(), answer.num_reasoning_tokens),
    })))
}
