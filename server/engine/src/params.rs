//! What a request may ask of its sequence: how to sample, which decides the output together with the prompt, and how
//! to speculate, which never does.

use std::sync::Arc;

use crate::api::{EngineError, TokenId};

/// How the next token is chosen from the logits.
///
/// Validated by [`SamplingParams::validate`]; the engine refuses values outside the stated ranges.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy (plain argmax); otherwise logits are divided by it. Finite, `0.0..=100.0`.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probability reaches this; `0.0 < top_p <= 1.0`.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the likeliest; `0.0..=1.0`.
    pub min_p: f32,
    /// Divides positive (multiplies negative) logits of tokens seen in prompt or output; 1 is off. `0.01..=100.0`.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of every token in the output so far; `-2.0..=2.0`.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output so far; `-2.0..=2.0`.
    pub frequency_penalty: f32,
    /// Added to the logits of the named tokens, before everything else; finite, `-100.0..=100.0`.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Seed of the noise. The caller draws one when its client named none.
    pub seed: u64,
    /// Report the log-probability of each output token and of this many most likely alternatives.
    pub logprobs: Option<u8>,
    /// The same for the prompt's tokens, reported once before the first output token.
    pub prompt_logprobs: Option<u8>,
    /// Output tokens, from the first on, whose margin is reported ([`TokenChunk::margins`](crate::TokenChunk::margins)).
    pub num_margins: u32,
    /// Tokens that end the sequence; they are not part of the output.
    pub stop_token_ids: Vec<TokenId>,
    /// At least this many tokens before a stop token may end the sequence
    /// (stop tokens are masked out of the logits until then).
    pub min_tokens: u32,
    /// At most this many output tokens; 0 only scores the prompt (`prompt_logprobs`).
    pub max_tokens: u32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
            num_margins: 0,
            stop_token_ids: Vec::new(),
            min_tokens: 0,
            max_tokens: 16,
        }
    }
}

/// The most alternatives that `logprobs` may ask for.
pub const MAX_LOGPROBS: u8 = 20;

impl SamplingParams {
    /// Checks every range.
    ///
    /// # Errors
    /// Names the first parameter that is outside its range, its value and the range.
    pub fn validate(&self, vocab_size: usize) -> Result<(), EngineError> {
        let fault = |name: &'static str, value: String, wanted: &'static str| {
            Err(EngineError::InvalidParameter { name, value, wanted })
        };
        if !(0.0..=100.0).contains(&self.temperature) {
            return fault("temperature", self.temperature.to_string(), "a number from 0 to 100");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return fault("top_p", self.top_p.to_string(), "a number above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return fault("min_p", self.min_p.to_string(), "a number from 0 to 1");
        }
        if !(0.01..=100.0).contains(&self.repetition_penalty) {
            return fault(
                "repetition_penalty",
                self.repetition_penalty.to_string(),
                "a number from 0.01 to 100",
            );
        }
        for (name, value) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            if !(-2.0..=2.0).contains(&value) {
                return fault(name, value.to_string(), "a number from -2 to 2");
            }
        }
        for &(id, bias) in &self.logit_bias {
            if !(-100.0..=100.0).contains(&bias) {
                return fault("logit_bias", bias.to_string(), "values from -100 to 100");
            }
            if id as usize >= vocab_size {
                return fault("logit_bias", id.to_string(), "token ids inside the vocabulary");
            }
        }
        for (name, count) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if count.is_some_and(|count| count > MAX_LOGPROBS) {
                return fault(name, count.unwrap_or(0).to_string(), "at most 20");
            }
        }
        Ok(())
    }
}

/// Who proposes draft tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DraftSource {
    /// The draft model, or the head that drafts in its place.
    Draft,
    /// A continuation found in the sequence's own text or its session's.
    Ngram,
    /// The text that the client expects.
    Prediction,
}

impl DraftSource {
    /// All of them.
    pub const ALL: [DraftSource; 3] = [DraftSource::Draft, DraftSource::Ngram, DraftSource::Prediction];
}

/// A set of [`DraftSource`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftSources(u8);

impl DraftSources {
    /// No source: plain decoding.
    pub const NONE: DraftSources = DraftSources(0);
    /// Every source.
    pub const ALL: DraftSources = DraftSources(0b111);

    /// The set with `source` in it.
    #[must_use]
    pub fn with(self, source: DraftSource) -> DraftSources {
        DraftSources(self.0 | 1 << source as u8)
    }

    /// True if `source` is in the set.
    pub fn contains(self, source: DraftSource) -> bool {
        self.0 & 1 << source as u8 != 0
    }
}

impl Default for DraftSources {
    fn default() -> Self {
        DraftSources::ALL
    }
}

/// How a sequence speculates.
#[derive(Clone, Debug, Default)]
pub struct SpeculationParams {
    /// `None`: the engine's policy chooses source and length. A number: always as many draft tokens as
    /// that, from the first of prediction, draft model and n-gram that may and can; 0 is none.
    pub max_draft_tokens: Option<u8>,
    /// Who may propose.
    pub sources: DraftSources,
    /// The output that the client expects (OpenAI's Predicted Outputs); empty: none.
    pub prediction: Arc<[TokenId]>,
}
