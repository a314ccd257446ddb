//! `POST /v1/completions/render` and `POST /v1/chat/completions/render`: the token ids that a request would be
//! answered from, without answering it. Routers ask for them to find who has a prompt's beginning in the cache.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use http::HeaderMap;
use serde_json::{Value, json};

use super::chat::{ChatFields, PreparedChat};
use super::completions::{CompletionFields, PreparedCompletion};
use crate::http::body::JsonBody;
use crate::http::error::ApiError;
use crate::http::fields::{Common, CommonFields};
use crate::http::generation::Prompt;
use crate::http::lanes::lane_name;
use crate::http::state::{AppState, ServedModel};
use crate::http::wire::random_id;

fn rendered(prompt: &Prompt, common: &Common, served: &ServedModel) -> Value {
    let params = &common.params;
    json!({
        "request_id": random_id("req_"), "token_ids": &*prompt.tokens, "model": served.model.name,
        "lane": lane_name(served.lane), "stream": common.stream,
        "sampling_params": { "n": common.num_choices, "max_tokens": prompt.max_tokens,
            "temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k,
            "min_p": params.min_p, "stop": common.stop },
    })
}

/// One object a prompt.
pub(super) async fn completions(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    JsonBody { common, fields, .. }: JsonBody<CommonFields, CompletionFields>,
) -> Result<Json<Value>, ApiError> {
    let PreparedCompletion { intake, prompts, .. } =
        PreparedCompletion::new(&state, &headers, common, fields).await?;
    let objects = prompts.iter().map(|prompt| rendered(&prompt.to_run(), &intake.common, intake.served));
    Ok(Json(Value::Array(objects.collect())))
}

pub(super) async fn chat_completions(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    body: JsonBody<CommonFields, ChatFields>,
) -> Result<Json<Value>, ApiError> {
    let PreparedChat { intake, prompt, .. } = PreparedChat::new(&state, &headers, body).await?;
    Ok(Json(rendered(&prompt, &intake.common, intake.served)))
}
