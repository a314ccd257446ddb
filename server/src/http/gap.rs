//! A gap that an editor wants filled, with what stands around it and in other files: the prompt that has the most
//! of it, whatever the protocol.

use std::sync::Arc;

use tandem_models::{FimContext, FimFile};

use super::error::ApiError;
use super::generation::{Prompt, PromptText};
use super::intake::answer_tokens;
use super::prompt::{INLINE_TEXT_BYTES, fim_of, untokenizable};
use super::state::{AppState, ServedModel};

/// Text of another file.
pub(super) struct OtherFile {
    pub(super) name: String,
    pub(super) text: String,
}

/// What an editor knows.
pub(super) struct Gap {
    /// The least important first.
    pub(super) files: Vec<OtherFile>,
    /// What stands before the gap,
    pub(super) prefix: String,
    /// and what of it is on the cursor's line or was typed since.
    pub(super) begun: String,
    /// What stands after it.
    pub(super) suffix: String,
}

impl Gap {
    /// The prompt. Never too long: files are left out from the first on, then what is farthest from the gap.
    ///
    /// # Errors
    /// If the model fills no gaps.
    pub(super) async fn prompt(
        self,
        state: &Arc<AppState>,
        served: &ServedModel,
        max_tokens: Option<i128>,
        size_bytes: usize,
    ) -> Result<Prompt, ApiError> {
        let fim = fim_of(served, "model")?.clone();
        let max_model_len = state.engine.max_model_len();
        let most_bytes = max_model_len.saturating_mul(served.max_token_bytes);
        let tokenizer = served.model.tokenizer.clone();
        let prepare = move || {
            let files: Vec<FimFile<'_>> = self
                .files
                .iter()
                // What could not fit even in the vocabulary's longest tokens is not encoded.
                .filter(|file| file.text.len() <= most_bytes)
                .map(|file| FimFile { name: &file.name, text: &file.text })
                .collect();
            let context = FimContext {
                files: &files,
                prefix: last_bytes(&self.prefix, most_bytes),
                begun: last_bytes(&self.begun, most_bytes),
                suffix: first_bytes(&self.suffix, most_bytes),
            };
            // The answer has room first; a bound that is larger than the context leaves half.
            let wanted = max_tokens.unwrap_or(0).clamp(1, max_model_len as i128 / 2) as usize;
            let tokens =
                fim.encode_context(&tokenizer, &context, max_model_len - wanted).map_err(untokenizable)?;
            let max_tokens = answer_tokens(max_tokens, None, tokens.len(), max_model_len)?;
            let text = self.files.is_empty().then(|| PromptText {
                before: format!("{}{}", self.prefix, self.begun).into(),
                after: Some(self.suffix.as_str().into()),
            });
            Ok(Prompt { tokens: tokens.into(), text, max_tokens })
        };
        state.heavy.run_if(size_bytes > INLINE_TEXT_BYTES, prepare).await
    }
}

fn last_bytes(text: &str, most: usize) -> &str {
    let from = text.len().saturating_sub(most);
    &text[(from..=text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len())..]
}

fn first_bytes(text: &str, most: usize) -> &str {
    let to = most.min(text.len());
    &text[..(0..=to).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)]
}
