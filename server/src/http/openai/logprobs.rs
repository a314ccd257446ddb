//! Log-probabilities in the two shapes of OpenAI's protocol.

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use tandem_engine::TokenLogprobs;
use tandem_models::Tokenizer;

use crate::http::generation::ScoredToken;

/// A token as text. Tokens that are not whole UTF-8 are written as their bytes, as OpenAI does, so
/// that two of them never look alike.
fn token_text(tokenizer: &Tokenizer, id: u32) -> String {
    match String::from_utf8(tokenizer.token_bytes(id)) {
        Ok(text) => text,
        Err(error) => {
            let escaped: String = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("bytes:{escaped}")
        }
    }
}

/// Completions: parallel arrays.
#[derive(Default, Serialize)]
pub(super) struct CompletionLogprobs {
    tokens: Vec<String>,
    /// Null for a prompt's first token.
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<TopLogprobs>>,
    /// In characters from the start of the answer (of the prompt, if it is echoed).
    text_offset: Vec<usize>,
}

/// `{"token": logprob, ...}`, most likely first.
struct TopLogprobs(Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

impl CompletionLogprobs {
    /// Appends a token whose text begins `offset` characters in; returns where the next begins.
    fn push(
        &mut self,
        tokenizer: &Tokenizer,
        id: u32,
        scores: Option<&TokenLogprobs>,
        offset: usize,
    ) -> usize {
        self.tokens.push(token_text(tokenizer, id));
        self.token_logprobs.push(scores.map(|scores| scores.logprob));
        self.top_logprobs.push(scores.map(|scores| {
            let mut top: Vec<(String, f32)> =
                scores.top.iter().map(|&(id, logprob)| (token_text(tokenizer, id), logprob)).collect();
            // The token itself is always among them, as OpenAI has it.
            if scores.top.iter().all(|(other, _)| *other != id) {
                top.push((token_text(tokenizer, id), scores.logprob));
            }
            TopLogprobs(top)
        }));
        self.text_offset.push(offset);
        // Every character has one byte that is not a continuation byte.
        offset + tokenizer.token_bytes(id).iter().filter(|byte| (**byte & 0xc0) != 0x80).count()
    }

    /// Appends an echoed prompt; `offset` is left after it.
    pub(super) fn push_prompt(
        &mut self,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        scores: &[Option<TokenLogprobs>],
        offset: &mut usize,
    ) {
        for (&id, scores) in prompt.iter().zip(scores) {
            *offset = self.push(tokenizer, id, scores.as_ref(), *offset);
        }
    }

    /// Appends output tokens; `offset` is left after them.
    pub(super) fn push_output(&mut self, tokenizer: &Tokenizer, tokens: &[ScoredToken], offset: &mut usize) {
        for token in tokens {
            *offset = self.push(tokenizer, token.id, Some(&token.logprobs), *offset);
        }
    }
}

/// Chat: one object a token.
#[derive(Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatTokenLogprob>,
}

#[derive(Serialize)]
struct ChatTokenLogprob {
    #[serde(flatten)]
    token: ChatToken,
    top_logprobs: Vec<ChatToken>,
}

#[derive(Serialize)]
struct ChatToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatToken {
    fn new(tokenizer: &Tokenizer, id: u32, logprob: f32) -> Self {
        let bytes = tokenizer.token_bytes(id);
        ChatToken { token: String::from_utf8_lossy(&bytes).into_owned(), logprob, bytes }
    }
}

impl ChatLogprobs {
    pub(super) fn new(tokenizer: &Tokenizer, tokens: &[ScoredToken]) -> Self {
        let one = |token: &ScoredToken| ChatTokenLogprob {
            token: ChatToken::new(tokenizer, token.id, token.logprobs.logprob),
            top_logprobs: token
                .logprobs
                .top
                .iter()
                .map(|&(id, logprob)| ChatToken::new(tokenizer, id, logprob))
                .collect(),
        };
        ChatLogprobs { content: tokens.iter().map(one).collect() }
    }
}
