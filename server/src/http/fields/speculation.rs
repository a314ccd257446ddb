//! The fields that speed an answer up and never change it: `speculative` and `prediction` (OpenAI's
//! Predicted Outputs).

use std::fmt;
use std::sync::Arc;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tandem_engine::{DraftSource, DraftSources, MAX_DRAFT_TOKENS, SpeculationParams};
use utoipa::ToSchema;

use super::json::{Strings, in_range, integer, one_of};
use crate::http::error::ApiError;
use crate::http::prompt::INLINE_TEXT_BYTES;
use crate::http::state::{AppState, ServedModel};

/// `speculative`
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Speculative {
    #[serde(default, deserialize_with = "integer")]
    max_draft_tokens: Option<i128>,
    sources: Option<Strings>,
}

const SOURCES: &[(&str, DraftSource)] =
    &[("draft", DraftSource::Draft), ("ngram", DraftSource::Ngram), ("prediction", DraftSource::Prediction)];

impl Speculative {
    /// Everything but the prediction itself.
    pub(super) fn resolve(&self) -> Result<SpeculationParams, ApiError> {
        let max_draft_tokens = self
            .max_draft_tokens
            .map(|value| in_range("speculative.max_draft_tokens", value, 0, MAX_DRAFT_TOKENS as i128))
            .transpose()?
            .map(|value| value as u8);
        let sources = match &self.sources {
            None => DraftSources::ALL,
            Some(Strings(names)) => names.iter().try_fold(DraftSources::NONE, |set, name| {
                Ok::<_, ApiError>(set.with(one_of("speculative.sources", name, SOURCES)?))
            })?,
        };
        Ok(SpeculationParams { max_draft_tokens, sources, ..SpeculationParams::default() })
    }
}

/// `prediction`: the text that the client expects.
#[derive(Debug, Deserialize)]
pub(in crate::http) struct Prediction {
    r#type: String,
    content: PredictedText,
}

/// A string, or text parts, which are joined.
#[derive(Debug)]
struct PredictedText(String);

#[derive(Deserialize)]
struct TextPart {
    r#type: String,
    text: String,
}

impl<'de> Deserialize<'de> for PredictedText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = PredictedText;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a string or an array of text parts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<PredictedText, E> {
                Ok(PredictedText(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<PredictedText, A::Error> {
                let mut joined = String::new();
                while let Some(TextPart { r#type, text }) = parts.next_element()? {
                    if r#type != "text" {
                        // Without quotation marks: what is in them may be the client's own, and is cut.
                        return Err(de::Error::custom(
                            "a part has another type than text, the only one understood",
                        ));
                    }
                    joined.push_str(&text);
                }
                Ok(PredictedText(joined))
            }
        }
        deserializer.deserialize_any(TextVisitor)
    }
}

impl Prediction {
    /// The expected text as tokens. It is plain text: nothing in it becomes a control token.
    ///
    /// # Errors
    /// If its type is unknown or it is longer than the context.
    pub(in crate::http) async fn encode(
        self,
        state: &AppState,
        served: &ServedModel,
    ) -> Result<Arc<[u32]>, ApiError> {
        one_of("prediction.type", &self.r#type, &[("content", ())])?;
        let PredictedText(text) = self.content;
        let max_model_len = state.engine.max_model_len();
        // What would be too long even if every token were the vocabulary's longest is not encoded.
        if text.len() > max_model_len.saturating_mul(served.max_token_bytes) {
            return Err(too_long(text.len(), "bytes of text", max_model_len));
        }
        let tokenizer = served.model.tokenizer.clone();
        let is_long = text.len() > INLINE_TEXT_BYTES;
        let encode = move || {
            let tokens = tokenizer.encode_text(&text, false).map_err(|error| {
                ApiError::invalid(
                    "prediction.content",
                    format!("the prediction cannot be tokenized: {error}"),
                )
            })?;
            if tokens.len() > max_model_len {
                return Err(too_long(tokens.len(), "tokens", max_model_len));
            }
            Ok(tokens.into())
        };
        state.heavy.run_if(is_long, encode).await
    }
}

fn too_long(count: usize, unit: &str, max_model_len: usize) -> ApiError {
    let message = format!("the prediction has {count} {unit}; the context holds {max_model_len} tokens");
    ApiError::invalid("prediction.content", message).with_code("context_length_exceeded")
}
