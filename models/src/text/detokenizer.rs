//! Token ids to text, one at a time, for streaming. Emits only whole characters; what has been
//! emitted never changes, and all pieces together equal [`Tokenizer::decode`] of all ids.
//!
//! Byte-level and byte-fallback vocabularies (nearly all) are decoded as bytes: O(1) a token, at most
//! three bytes held back. Other decoders look at their neighbours, so a window of the last tokens is
//! decoded again for each new one.

use std::sync::Arc;

use super::tokenizer::{Scheme, Tokenizer};
use crate::ModelError;

/// Turns one sequence's tokens into text as they arrive.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    /// `pending` is the beginning of a character; `strip` leading spaces are still to be dropped.
    Bytes { pending: Vec<u8>, strip: usize },
    /// The text of `ids[..num_emitted]` has been emitted. Never shrinks to tokens without text,
    /// because a decoder may treat the first text of its input specially.
    Window { ids: Vec<u32>, num_emitted: usize },
}

impl Detokenizer {
    /// Begins a new text. `skip_special` leaves out control tokens.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        let state = match tokenizer.scheme() {
            Scheme::ByteLevel => State::Bytes { pending: vec![], strip: 0 },
            Scheme::ByteFallback { strip } => State::Bytes { pending: vec![], strip },
            Scheme::Other => State::Window { ids: vec![], num_emitted: 0 },
        };
        Detokenizer { tokenizer, skip_special, state }
    }

    /// Begins the continuation of `prompt`: a leading space of the first token is kept, as a text of
    /// its own would lose it under some tokenizers.
    pub fn continuing(tokenizer: Arc<Tokenizer>, prompt: &[u32], skip_special: bool) -> Self {
        /// Enough to hold a token with text in any real prompt.
        const CONTEXT_TOKENS: usize = 8;
        let mut detokenizer = Self::new(tokenizer, skip_special);
        match &mut detokenizer.state {
            State::Bytes { strip, .. } if !prompt.is_empty() => *strip = 0,
            State::Bytes { .. } => {}
            State::Window { ids, num_emitted } => {
                ids.extend_from_slice(&prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..]);
                *num_emitted = ids.len();
            }
        }
        detokenizer
    }

    /// Takes the next token; the text that has become whole by it, if any.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<Option<String>, ModelError> {
        match &mut self.state {
            State::Bytes { pending, strip } => {
                if self.skip_special && self.tokenizer.is_special(id) {
                    return Ok(None);
                }
                pending.extend(self.tokenizer.token_bytes(id));
                while *strip > 0 && !pending.is_empty() {
                    if pending[0] == b' ' {
                        pending.remove(0);
                        *strip -= 1;
                    } else {
                        *strip = 0;
                    }
                }
                Ok(take_whole(pending))
            }
            State::Window { ids, num_emitted } => {
                ids.push(id);
                let emitted = self.tokenizer.decode(&ids[..*num_emitted], self.skip_special)?;
                let text = self.tokenizer.decode(ids, self.skip_special)?;
                if text.len() <= emitted.len() || text.ends_with(char::REPLACEMENT_CHARACTER) {
                    return Ok(None);
                }
                let new = text.get(emitted.len()..).map(str::to_owned);
                ids.drain(..*num_emitted);
                *num_emitted = ids.len();
                Ok(new)
            }
        }
    }

    /// Ends the text; what was held back, if any. An unfinished character becomes U+FFFD.
    pub fn flush(&mut self) -> Option<String> {
        let rest = match &mut self.state {
            State::Bytes { pending, .. } => String::from_utf8_lossy(&std::mem::take(pending)).into_owned(),
            State::Window { ids, num_emitted } => {
                let emitted = self.tokenizer.decode(&ids[..*num_emitted], self.skip_special).ok()?;
                let text = self.tokenizer.decode(ids, self.skip_special).ok()?;
                *num_emitted = ids.len();
                text.get(emitted.len()..).unwrap_or_default().to_owned()
            }
        };
        (!rest.is_empty()).then_some(rest)
    }
}

/// Removes and returns all of `pending` but an unfinished character at its end. Replaces what is not
/// UTF-8 exactly as `String::from_utf8_lossy` of the whole stream would.
fn take_whole(pending: &mut Vec<u8>) -> Option<String> {
    let unfinished = pending.utf8_chunks().last().map_or(0, |chunk| {
        let invalid = chunk.invalid();
        // An invalid end that more bytes could complete: `error_len` is then None.
        let may_continue = std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if may_continue { invalid.len() } else { 0 }
    });
    let whole: Vec<u8> = pending.drain(..pending.len() - unfinished).collect();
    (!whole.is_empty()).then(|| String::from_utf8_lossy(&whole).into_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::take_whole;

    proptest! {
        #[test]
        fn pieces_equal_lossy_decoding_of_the_whole(
            tokens in proptest::collection::vec(
                prop_oneof![
                    proptest::collection::vec(any::<u8>(), 0..4),
                    "\\PC{0,3}".prop_map(String::into_bytes),
                    proptest::sample::select(vec![vec![0xF0], vec![0x9F, 0x98], vec![0x80], vec![0xE2, 0x82]]),
                ],
                0..40,
            )
        ) {
            let mut pending = vec![];
            let mut text = String::new();
            for token in &tokens {
                pending.extend(token);
                text.extend(take_whole(&mut pending));
                prop_assert!(pending.len() <= 3);
            }
            text.push_str(&String::from_utf8_lossy(&pending));
            let whole = tokens.concat();
            prop_assert_eq!(text, String::from_utf8_lossy(&whole));
        }
    }
}
