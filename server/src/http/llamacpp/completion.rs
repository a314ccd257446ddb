//! `POST /completion` and `POST /infill`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use tandem_models::{FimContext, FimFile};

use super::fields::LlamaFields;
use super::wire::LlamaWire;
use crate::http::body::JsonBody;
use crate::http::error::ApiError;
use crate::http::fields::CommonFields;
use crate::http::generation::{Prompt, PromptText};
use crate::http::intake::{Intake, answer_tokens};
use crate::http::lanes::Work;
use crate::http::prompt::{
    INLINE_TEXT_BYTES, PreparedPrompt, PromptField, PromptInput, PromptOptions, fim_of, prepare,
    untokenizable,
};
use crate::http::state::AppState;
use crate::http::wire::respond;
use crate::text::Gap;

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
    let min_indent = fields.min_indent();
    let begun = match fields.prompt.map(|PromptField(inputs)| inputs).as_deref() {
        None | Some([]) => String::new(),
        Some([PromptInput::Text(text)]) => text.clone(),
        Some(_) => {
            return Err(ApiError::invalid("prompt", "prompt must be a string, the text before the cursor"));
        }
    };
    let mut intake = Intake::new(&state, &headers, common, Work::Gap, true)?;
    intake.common.num_choices = 1;
    let fim = fim_of(intake.served, "model")?.clone();
    let max_model_len = intake.max_model_len();
    let most_bytes = max_model_len.saturating_mul(intake.served.max_token_bytes);
    let tokenizer = intake.served.model.tokenizer.clone();
    let (prefix, suffix) = (fields.input_prefix.unwrap_or_default(), fields.input_suffix.unwrap_or_default());
    let extra = fields.input_extra.unwrap_or_default();
    let prepare = move || {
        let files: Vec<FimFile<'_>> = extra
            .iter()
            // What could not fit even in the vocabulary's longest tokens is not encoded.
            .filter(|extra| extra.text.len() <= most_bytes)
            .map(|extra| FimFile { name: extra.filename.as_deref().unwrap_or("file"), text: &extra.text })
            .collect();
        let context = FimContext {
            files: &files,
            prefix: last_bytes(&prefix, most_bytes),
            begun: last_bytes(&begun, most_bytes),
            suffix: first_bytes(&suffix, most_bytes),
        };
        // The answer has room first; a bound that is larger than the context leaves half.
        let wanted = max_tokens.unwrap_or(0).clamp(1, max_model_len as i128 / 2) as usize;
        let tokens =
            fim.encode_context(&tokenizer, &context, max_model_len - wanted).map_err(untokenizable)?;
        let max_tokens = answer_tokens("n_predict", max_tokens, None, tokens.len(), max_model_len, false)?;
        let gap = Gap { before: format!("{prefix}{begun}").into(), after: suffix.into(), min_indent };
        let text = extra
            .is_empty()
            .then(|| PromptText { before: gap.before.clone(), after: Some(gap.after.clone()) });
        Ok(Prompt { tokens: tokens.into(), text, max_tokens, gap: Some(gap) })
    };
    let prompt = state.heavy.run_if(size_bytes > INLINE_TEXT_BYTES, prepare).await?;
    let (generation, reply) = intake.start(vec![prompt]).await?;
    respond(generation, LlamaWire::new(&reply), &reply).await
}

fn last_bytes(text: &str, most: usize) -> &str {
    let from = text.len().saturating_sub(most);
    &text[(from..=text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len())..]
}

fn first_bytes(text: &str, most: usize) -> &str {
    let to = most.min(text.len());
    &text[..(0..=to).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)]
}
