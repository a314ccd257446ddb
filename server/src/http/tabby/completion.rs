//! `POST /v1/completions` with `segments`.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use serde::Deserialize;
use serde_json::json;
use utoipa::ToSchema;

use crate::http::error::ApiError;
use crate::http::fields::CommonFields;
use crate::http::gap::{Gap, OtherFile};
use crate::http::intake::{Intake, asked_tokens};
use crate::http::lanes::Work;
use crate::http::state::AppState;
use crate::http::wire::random_id;

/// Ghost text of a few lines, as Tabby has it.
const DEFAULT_MAX_TOKENS: i128 = 64;

/// What the editor knows around the cursor.
#[derive(Deserialize, ToSchema)]
pub(in crate::http) struct Segments {
    prefix: Option<String>,
    suffix: Option<String>,
    declarations: Option<Vec<Snippet>>,
    relevant_snippets_from_changed_files: Option<Vec<Snippet>>,
    relevant_snippets_from_recently_opened_files: Option<Vec<Snippet>>,
}

#[derive(Deserialize, ToSchema)]
struct Snippet {
    filepath: Option<String>,
    body: Option<String>,
}

impl Segments {
    /// Declarations matter most: what the code at the cursor uses.
    fn gap(self) -> Gap {
        let lists = [
            self.relevant_snippets_from_recently_opened_files,
            self.relevant_snippets_from_changed_files,
            self.declarations,
        ];
        // The editor lists the best first.
        let files = lists.into_iter().flatten().flat_map(|list| list.into_iter().rev());
        let file = |snippet: Snippet| OtherFile {
            name: snippet.filepath.unwrap_or_else(|| "snippet".to_owned()),
            text: snippet.body.unwrap_or_default(),
        };
        Gap {
            files: files.map(file).collect(),
            prefix: String::new(),
            begun: self.prefix.unwrap_or_default(),
            suffix: self.suffix.unwrap_or_default(),
        }
    }
}

/// Fills the gap and answers as Tabby does, always whole.
///
/// # Errors
/// What is wrong with the request, and what the engine refuses.
pub(in crate::http) async fn complete(
    state: &Arc<AppState>,
    headers: &HeaderMap,
    common: CommonFields,
    segments: Segments,
    size_bytes: usize,
) -> Result<Response, ApiError> {
    let max_tokens = asked_tokens("max_tokens", common.max_tokens, 1)?.unwrap_or(DEFAULT_MAX_TOKENS);
    let mut intake = Intake::new(state, headers, common, Work::Gap, true)?;
    intake.common.num_choices = 1;
    let prompt = segments.gap().prompt(state, intake.served, Some(max_tokens), size_bytes).await?;
    let (mut generation, reply) = intake.start(vec![prompt]).await?;
    let answer = generation.collect().await?.pop().expect("one answer was asked for: this is a bug");
    let choice = json!({ "index": 0, "text": answer.answer.text });
    let mut response = Json(json!({ "id": random_id("cmpl-"), "choices": [choice] })).into_response();
    reply.add_headers(&mut response);
    Ok(response)
}
