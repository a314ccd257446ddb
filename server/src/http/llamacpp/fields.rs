//! Fields that llama.cpp calls by names of its own.

use serde::Deserialize;
use utoipa::ToSchema;

use crate::http::error::ApiError;
use crate::http::fields::{CommonFields, in_range, integer};
use crate::http::prompt::PromptField;

/// Of both endpoints, beside the common fields. `n_indent` and `t_max_prompt_ms` are checked and have no effect.
#[derive(Deserialize, ToSchema)]
pub(super) struct LlamaFields {
    #[serde(default, deserialize_with = "integer")]
    n_predict: Option<i128>,
    repeat_penalty: Option<f64>,
    #[serde(default, deserialize_with = "integer")]
    n_indent: Option<i128>,
    #[serde(default, deserialize_with = "integer")]
    t_max_prompt_ms: Option<i128>,
    pub(super) prompt: Option<PromptField>,
    pub(super) input_prefix: Option<String>,
    pub(super) input_suffix: Option<String>,
    pub(super) input_extra: Option<Vec<Extra>>,
}

/// Text of another file.
#[derive(Deserialize, ToSchema)]
pub(super) struct Extra {
    pub(super) filename: Option<String>,
    pub(super) text: String,
}

/// Largest count or time that is not refused.
const MOST: i128 = i32::MAX as i128;

impl LlamaFields {
    /// Puts what has another name into the common fields; the client's bound on the answer. `None`: what
    /// the context leaves. 0 computes the prompt and nothing else.
    pub(super) fn apply(&self, common: &mut CommonFields) -> Result<Option<i128>, ApiError> {
        // -1 and its unsigned twin ask for a seed to be drawn.
        common.seed = common.seed.filter(|seed| ![-1, i128::from(u32::MAX)].contains(seed));
        common.repetition_penalty = common.repetition_penalty.or(self.repeat_penalty);
        for (name, value) in [("n_indent", self.n_indent), ("t_max_prompt_ms", self.t_max_prompt_ms)] {
            in_range(name, value.unwrap_or(0), -1, MOST)?;
        }
        let (name, asked) = match self.n_predict {
            Some(asked) => ("n_predict", asked),
            None => ("max_tokens", common.max_tokens.unwrap_or(-1)),
        };
        let asked = in_range(name, asked, -1, MOST)?;
        Ok((asked >= 0).then_some(asked))
    }
}
