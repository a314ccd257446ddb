//! The `prompt` of a completion: reading it from JSON and turning it into tokens.
//!
//! Costs stay in proportion to what can be answered: reading decides on a shape at the first element
//! and stops at a cap, and text that cannot fit the context is refused before it is encoded.

use std::fmt;
use std::sync::Arc;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tandem_models::{FimFrame, FimTokens, ModelError, Tokenizer};

use super::error::ApiError;
use super::generation::{Prompt, PromptText};
use super::intake::answer_tokens;
use super::state::{AppState, MAX_PROMPTS, ServedModel};
use crate::text::GapRules;

/// Requests with more text than this are tokenized off the async thread: a few milliseconds of everybody's tokens.
pub(super) const INLINE_TEXT_BYTES: usize = 4 << 10;

/// Most token ids that one request may hold, all prompts together: 16 MiB, and the longest contexts
/// there are several times over.
const MAX_PROMPT_IDS: usize = 4 << 20;

/// One prompt as the client wrote it.
#[derive(Debug, PartialEq)]
pub(super) enum PromptInput {
    Text(String),
    Tokens(Vec<u32>),
}

/// A prompt ready to run, and its text if it is to be echoed.
pub(super) struct PreparedPrompt {
    pub(super) tokens: Arc<[u32]>,
    text: Option<PromptText>,
    gap: Option<GapRules>,
    max_tokens: u32,
    pub(super) echo: Option<String>,
}

impl PreparedPrompt {
    pub(super) fn to_run(&self) -> Prompt {
        Prompt {
            tokens: self.tokens.clone(),
            text: self.text.clone(),
            max_tokens: self.max_tokens,
            gap: self.gap.clone(),
        }
    }
}

/// A string, an array of strings, an array of token ids, or an array of arrays of token ids.
///
/// What the first element is, all must be. A derived untagged enum would copy the whole array into
/// a buffer of many times its size first.
#[derive(Debug)]
pub(super) struct PromptField(pub(super) Vec<PromptInput>);

impl<'de> Deserialize<'de> for PromptField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        inputs(deserializer, MAX_PROMPTS).map(PromptField)
    }
}

/// Reads what a [`PromptField`] can be, at most so many prompts.
pub(super) fn inputs<'de, D: Deserializer<'de>>(
    deserializer: D,
    most: usize,
) -> Result<Vec<PromptInput>, D::Error> {
    deserializer.deserialize_any(PromptVisitor { most })
}

struct PromptVisitor {
    most: usize,
}

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = Vec<PromptInput>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(
            "a string, an array of strings, an array of token ids, or an array of arrays of token ids",
        )
    }

    fn visit_str<E>(self, text: &str) -> Result<Vec<PromptInput>, E> {
        Ok(vec![PromptInput::Text(text.to_owned())])
    }

    fn visit_string<E>(self, text: String) -> Result<Vec<PromptInput>, E> {
        Ok(vec![PromptInput::Text(text)])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Vec<PromptInput>, A::Error> {
        match elements.next_element::<Element>()? {
            None => Ok(vec![]),
            Some(Element::Id(first)) => {
                let ids = more_ids(vec![first], MAX_PROMPT_IDS, &mut elements)?;
                Ok(vec![PromptInput::Tokens(ids)])
            }
            Some(Element::Text(first)) => {
                let mut inputs = vec![PromptInput::Text(first)];
                while let Some(text) = elements.next_element::<String>()? {
                    push_input(&mut inputs, PromptInput::Text(text), self.most)?;
                }
                Ok(inputs)
            }
            Some(Element::Ids(first)) => {
                let mut room = MAX_PROMPT_IDS - first.len();
                let mut inputs = vec![PromptInput::Tokens(first)];
                while let Some(ids) = elements.next_element_seed(IdList { room })? {
                    room -= ids.len();
                    push_input(&mut inputs, PromptInput::Tokens(ids), self.most)?;
                }
                Ok(inputs)
            }
        }
    }
}

fn push_input<E: de::Error>(inputs: &mut Vec<PromptInput>, input: PromptInput, most: usize) -> Result<(), E> {
    if inputs.len() == most {
        return Err(E::custom(format_args!("more than {most} prompts; 1 to {most} are taken")));
    }
    inputs.push(input);
    Ok(())
}

/// The rest of an array of token ids, of which there may be `room` with those that are there.
fn more_ids<'de, A: SeqAccess<'de>>(
    mut ids: Vec<u32>,
    room: usize,
    elements: &mut A,
) -> Result<Vec<u32>, A::Error> {
    while let Some(TokenId(id)) = elements.next_element()? {
        if ids.len() == room {
            return Err(de::Error::custom(format_args!(
                "the prompts hold more than {MAX_PROMPT_IDS} token ids; so many are taken in one request"
            )));
        }
        ids.push(id);
    }
    Ok(ids)
}

/// An element of a prompt that is an array, where it may still be anything.
enum Element {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a string, a token id or an array of token ids")
            }

            fn visit_str<E>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_owned()))
            }

            fn visit_string<E>(self, text: String) -> Result<Element, E> {
                Ok(Element::Text(text))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Element, E> {
                token_id(value, &self).map(Element::Id)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Element, A::Error> {
                more_ids(vec![], MAX_PROMPT_IDS, &mut elements).map(Element::Ids)
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

struct TokenId(u32);

impl<'de> Deserialize<'de> for TokenId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IdVisitor;
        impl Visitor<'_> for IdVisitor {
            type Value = TokenId;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a token id")
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<TokenId, E> {
                token_id(value, &self).map(TokenId)
            }
        }
        deserializer.deserialize_any(IdVisitor)
    }
}

/// Whether the vocabulary has it is the engine's to say.
fn token_id<E: de::Error>(value: u64, wanted: &dyn de::Expected) -> Result<u32, E> {
    u32::try_from(value).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(value), wanted))
}

/// An array of token ids of which at most `room` are taken.
struct IdList {
    room: usize,
}

impl<'de> de::DeserializeSeed<'de> for IdList {
    type Value = Vec<u32>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<u32>, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for IdList {
    type Value = Vec<u32>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an array of token ids")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Vec<u32>, A::Error> {
        more_ids(vec![], self.room, &mut elements)
    }
}

/// Turns every prompt into tokens, with a bound on its answer.
pub(super) async fn prepare(
    state: &AppState,
    served: &ServedModel,
    inputs: Vec<PromptInput>,
    suffix: Option<String>,
    options: PromptOptions,
) -> Result<Vec<PreparedPrompt>, ApiError> {
    let fim = fim_tokens(served, &inputs, suffix.as_deref(), options.echo)?;
    let suffix_bytes = suffix.as_ref().map_or(0, String::len);
    let mut size_bytes = suffix_bytes;
    for input in &inputs {
        match input {
            PromptInput::Text(text) => {
                check_text_fits("prompt", text.len() + suffix_bytes, served, options.max_model_len)?;
                size_bytes += text.len();
            }
            // What is echoed is decoded: more work than a check, less than encoding.
            PromptInput::Tokens(tokens) => size_bytes += tokens.len(),
        }
    }
    let tokenizer = served.model.tokenizer.clone();
    let work = move || {
        let suffix = match fim.zip(suffix) {
            Some((fim, suffix)) => {
                let frame = fim.frame(&tokenizer, &suffix).map_err(untokenizable)?;
                Some(Suffix { frame, text: suffix.into() })
            }
            None => None,
        };
        // Each is checked before the next is encoded: the first fault ends the work.
        inputs.into_iter().map(|input| prepare_one(&tokenizer, input, suffix.as_ref(), options)).collect()
    };
    state.heavy.run_if(size_bytes > INLINE_TEXT_BYTES, work).await
}

/// What preparing needs to know of the request.
#[derive(Clone, Copy)]
pub(super) struct PromptOptions {
    pub(super) echo: bool,
    /// The client's own bound.
    pub(super) max_tokens: Option<i128>,
    /// The bound otherwise; `None`: what the context leaves.
    pub(super) default_max_tokens: Option<u32>,
    pub(super) max_model_len: usize,
}

/// The suffix that follows every prompt of a request, encoded once.
struct Suffix {
    frame: FimFrame,
    text: Arc<str>,
}

fn prepare_one(
    tokenizer: &Tokenizer,
    input: PromptInput,
    suffix: Option<&Suffix>,
    options: PromptOptions,
) -> Result<PreparedPrompt, ApiError> {
    let (tokens, text) = match (input, suffix) {
        (PromptInput::Text(text), Some(suffix)) => {
            // Prompt and suffix are plain text: nothing in them becomes a control token.
            (suffix.frame.around(tokenizer, &text).map_err(untokenizable)?, Some(text))
        }
        (PromptInput::Text(text), None) => (encode(tokenizer, &text, true)?, Some(text)),
        (PromptInput::Tokens(tokens), _) => (tokens, None),
    };
    let PromptOptions { max_tokens, default_max_tokens, max_model_len, .. } = options;
    let max_tokens = answer_tokens(max_tokens, default_max_tokens, tokens.len(), max_model_len)?;
    let (text, echo) = match (options.echo, text) {
        (false, text) => {
            let after = suffix.map(|suffix| suffix.text.clone());
            (text.map(|text| PromptText { before: text.into(), after }), None)
        }
        (true, Some(text)) => (None, Some(text)),
        (true, None) => (None, Some(decode(tokenizer, &tokens)?)),
    };
    let gap_in = |text: &PromptText| {
        Some(GapRules { before: text.before.clone(), after: text.after.clone()?, min_indent: 0 })
    };
    let gap = text.as_ref().and_then(gap_in);
    Ok(PreparedPrompt { tokens: tokens.into(), text, gap, max_tokens, echo })
}

/// The tokens for a gap, if there is a suffix and everything else agrees with that.
fn fim_tokens(
    served: &ServedModel,
    inputs: &[PromptInput],
    suffix: Option<&str>,
    echo: bool,
) -> Result<Option<FimTokens>, ApiError> {
    if suffix.is_none() {
        return Ok(None);
    }
    if echo {
        return Err(ApiError::invalid("echo", "echo and suffix cannot be combined"));
    }
    if inputs.iter().any(|input| matches!(input, PromptInput::Tokens(_))) {
        let message = "with a suffix the prompt must be text, not token ids";
        return Err(ApiError::invalid("prompt", message));
    }
    fim_of(served, "suffix").map(|fim| Some(fim.clone()))
}

/// The model's fill-in-the-middle tokens.
///
/// # Errors
/// If it has none; `param` is what asked for them.
pub(super) fn fim_of<'a>(served: &'a ServedModel, param: &str) -> Result<&'a FimTokens, ApiError> {
    served.model.fim.as_ref().ok_or_else(|| {
        let message = format!(
            "the model {:?} has no fill-in-the-middle tokens in its vocabulary, so it takes no suffix",
            served.model.name
        );
        ApiError::invalid(param, message)
    })
}

/// Refuses text that is too long for the context even if every token were the vocabulary's longest:
/// finding that out by encoding it would take seconds.
pub(super) fn check_text_fits(
    param: &str,
    size_bytes: usize,
    served: &ServedModel,
    max_model_len: usize,
) -> Result<(), ApiError> {
    let most_bytes = max_model_len.saturating_mul(served.max_token_bytes);
    if size_bytes <= most_bytes {
        return Ok(());
    }
    let message = format!(
        "the prompt has {size_bytes} bytes of text; the context of {max_model_len} tokens holds at most \
         {most_bytes}, with the longest tokens there are"
    );
    Err(ApiError::invalid(param, message).with_code("context_length_exceeded"))
}

/// Text to tokens. Special tokens written out in the text count as such: clients build their own
/// fill-in-the-middle prompts that way.
pub(super) fn encode(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
    tokenizer.encode(text, add_special).map_err(untokenizable)
}

pub(super) fn untokenizable(error: ModelError) -> ApiError {
    ApiError::invalid("prompt", format!("the prompt cannot be tokenized: {error}"))
}

fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> Result<String, ApiError> {
    tokenizer
        .decode(tokens, false)
        .map_err(|error| ApiError::invalid("prompt", format!("the prompt cannot be echoed: {error}")))
}

#[cfg(test)]
mod tests {
    use super::{MAX_PROMPT_IDS, MAX_PROMPTS, PromptField, PromptInput};

    fn read(json: &str) -> Result<Vec<PromptInput>, String> {
        serde_json::from_str(json).map(|PromptField(inputs)| inputs).map_err(|error| error.to_string())
    }

    #[test]
    fn the_first_element_decides_what_a_prompt_is() {
        let text = |text: &str| PromptInput::Text(text.to_owned());
        assert_eq!(read("\"a\\n\""), Ok(vec![text("a\n")]));
        assert_eq!(read("[]"), Ok(vec![]));
        assert_eq!(read("[\"a\", \"\\u0062\"]"), Ok(vec![text("a"), text("b")]));
        assert_eq!(read("[1, 2]"), Ok(vec![PromptInput::Tokens(vec![1, 2])]));
        let lists = vec![PromptInput::Tokens(vec![]), PromptInput::Tokens(vec![4_294_967_295])];
        assert_eq!(read("[[], [4294967295]]"), Ok(lists));
        for (json, wanted) in [
            ("{}", "array of token ids"),
            ("[null]", "array of token ids"),
            ("[-1]", "array of token ids"),
            ("[4294967296]", "4294967296"),
            ("[1, -1]", "a token id"),
            ("[1, \"a\"]", "a token id"),
            ("[\"a\", 1]", "a string"),
            ("[[1], 2]", "an array of token ids"),
            ("[[[1]]]", "a token id"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(wanted), "{json} gave {error:?}");
        }
    }

    #[test]
    fn reading_stops_at_the_caps() {
        let list = |count: usize, element: &str| format!("[{}]", vec![element; count].join(","));
        assert_eq!(read(&list(MAX_PROMPTS, "[7]")).map(|inputs| inputs.len()), Ok(MAX_PROMPTS));
        for element in ["[]", "[7]", "\"\""] {
            let error = read(&list(MAX_PROMPTS + 1, element)).unwrap_err();
            assert!(error.contains("more than 128 prompts"), "{error}");
        }
        let full = list(MAX_PROMPT_IDS, "7");
        assert!(read(&full).is_ok());
        for json in [list(MAX_PROMPT_IDS + 1, "7"), format!("[{full},[7]]"), format!("[[7],{full}]")] {
            let error = read(&json).unwrap_err();
            assert!(error.contains("4194304 token ids"), "{error}");
        }
    }
}
