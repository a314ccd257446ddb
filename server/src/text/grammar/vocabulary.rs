//! A model's tokens as llguidance knows them: a trie of their bytes.
//!
//! Control tokens (special ones, and the marks of reasoning and tool calls) stand apart from text, under
//! a byte that no text has, so that a string in an answer can never hold one; a grammar names them by id.
//! After the model's tokens comes one that stands for the end of the answer. It is never sampled: where
//! it may stand, the engine lets the model's own stop tokens come up.

use std::sync::Arc;

use tandem_models::Tokenizer;
use toktrie::{TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use super::compile::GrammarError;

/// What text is checked with before the tokenizer's way to cut it is trusted.
const PROBES: &[&str] = &["{\"key\": [1, 2.5, true], \"b c\":\n  \"d\"}", "x", " x", "  leading", "ä€😀"];

/// The tokens of one tokenizer.
pub(super) struct Vocabulary {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
    /// Text is cut as the model saw it cut in training, so bytes that a grammar forces may be, too.
    is_canonical: bool,
}

impl Vocabulary {
    /// `markers`: tokens that are control tokens although the tokenizer does not say so.
    ///
    /// # Errors
    /// If the tokenizer does not say what bytes its tokens stand for.
    pub(super) fn new(tokenizer: &Arc<Tokenizer>, markers: &[u32]) -> Result<Self, GrammarError> {
        if !tokenizer.has_exact_bytes() {
            return Err(GrammarError::Unsupported(
                "this model's tokenizer does not say which bytes its tokens stand for; structured output needs that"
                    .to_owned(),
            ));
        }
        let num_tokens = tokenizer.vocab_size() as u32;
        let mut words: Vec<Vec<u8>> = (0..num_tokens)
            .map(|id| match tokenizer.id_to_token(id) {
                Some(name) if tokenizer.is_special(id) || markers.contains(&id) => control(&name),
                Some(_) => tokenizer.token_bytes(id),
                None => Vec::new(),
            })
            .collect();
        words.push(control("<|end of answer|>"));
        let info = TokRxInfo::new(num_tokens + 1, num_tokens);
        let trie = TokTrie::from(&info, &words);
        let mut vocabulary = Vocabulary { tokenizer: tokenizer.clone(), trie, is_canonical: false };
        vocabulary.is_canonical = PROBES.iter().all(|probe| vocabulary.encode(probe).is_some());
        Ok(vocabulary)
    }

    /// The tokens of a text; `None` if they do not spell it.
    fn encode(&self, text: &str) -> Option<Vec<TokenId>> {
        let tokens = self.tokenizer.encode_text(text, false).ok()?;
        let mut rest = text.as_bytes();
        for &id in &tokens {
            rest = rest.strip_prefix(self.trie.token(id))?;
        }
        rest.is_empty().then_some(tokens)
    }
}

fn control(name: &str) -> Vec<u8> {
    let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
    word.extend_from_slice(name.as_bytes());
    word
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| {
            self.encode(text).unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
        })
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.is_canonical
    }
}
