//! `tokenizer.json` through the `tokenizers` crate, with what serving needs beside it: encoding of
//! user text that cannot turn into control tokens, the raw bytes of a token, and decoding that an
//! incremental detokenizer can reproduce exactly.
//!
//! Immutable after loading, so it is shared between threads without a lock.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde_json::{Map, Value};
use tokenizers::tokenizer::{
    Model, NormalizedString, Normalizer, OffsetType, PreTokenizedString, PreTokenizer,
};

use super::gguf_tokenizer;
use super::tokenizer_check::check;
use crate::ModelError;
use crate::files::{read_json, read_text};
use crate::weights::gguf::{is_gguf, open_first_part};

/// The tokenizer's file name in a checkpoint folder.
pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";
/// The file with the special tokens' roles and, usually, the chat template.
pub(crate) const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";

/// The largest published tokenizers have about 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
const MAX_TOKENIZER_CONFIG_BYTES: u64 = 32 << 20;

/// How the strings in the vocabulary stand for bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// GPT-2's: each char of a token is one byte under a fixed permutation.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0xNN>` a byte, the rest UTF-8; `strip` leading spaces of a
    /// text are dropped.
    ByteFallback { strip: usize },
    /// Anything else: only the `tokenizers` crate's decoder knows.
    Other,
}

/// A model's tokenizer.
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    scheme: Scheme,
    special_ids: HashSet<u32>,
    vocab_size: usize,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and `tokenizer_config.json` if there is one, of the folder `dir`. Of a
    /// GGUF file it is the files beside it if they are there, and else what is in it.
    ///
    /// # Errors
    /// If there is no tokenizer, or a file is damaged.
    pub fn from_dir(dir: &Path) -> Result<Self, ModelError> {
        let path = model_dir(dir).join(TOKENIZER_FILE);
        if !path.exists() {
            if is_gguf(dir) {
                let file = open_first_part(dir)?;
                let config = read_tokenizer_config(dir)?;
                return Self::new(file.path(), gguf_tokenizer::build(&file)?, &config);
            }
            return Err(ModelError::Tokenizer {
                path,
                reason: "no such file; a SentencePiece tokenizer.model must be converted first".to_owned(),
            });
        }
        let config = read_tokenizer_config(dir)?;
        Self::from_json(&path, &read_text(&path, MAX_TOKENIZER_BYTES)?, &config)
    }

    /// `path` is only for messages.
    fn from_json(path: &Path, json: &str, config: &Map<String, Value>) -> Result<Self, ModelError> {
        let error = |source: tokenizers::Error| ModelError::Tokenizer {
            path: path.to_owned(),
            reason: source.to_string(),
        };
        let parsed: Value = serde_json::from_str(json).map_err(|source| error(source.into()))?;
        check(&parsed).map_err(|reason| error(reason.into()))?;
        drop(parsed);
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(error)?;
        // A file saved during training may cut or pad every prompt. Prompts are the server's business.
        inner.with_truncation(None).map_err(error)?;
        inner.with_padding(None);
        Self::new(path, inner, config)
    }

    fn new(
        path: &Path,
        inner: tokenizers::Tokenizer,
        config: &Map<String, Value>,
    ) -> Result<Self, ModelError> {
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let added = inner.get_added_vocabulary().get_added_tokens_decoder();
        let special_ids = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        Ok(Tokenizer {
            path: path.to_owned(),
            scheme: find_scheme(&inner),
            special_ids,
            vocab_size,
            bos_token: special_token(config, "bos_token"),
            eos_token: special_token(config, "eos_token"),
            inner,
        })
    }

    /// True if both make the same tokens of the same text. Writes both out, which takes a moment with large
    /// vocabularies.
    pub fn reads_like(&self, other: &Tokenizer) -> bool {
        let written = |tokenizer: &Tokenizer| tokenizer.inner.to_string(false).ok();
        written(self).is_some_and(|written_self| Some(written_self) == written(other))
    }

    /// The ids of `text`. Strings of special tokens in it become those tokens: right for a rendered
    /// chat template, wrong for text that somebody else wrote; see [`Tokenizer::encode_text`].
    /// `add_special` adds what the model wants around every input, usually a beginning-of-sequence token.
    ///
    /// # Errors
    /// If the tokenizer has no token for some part of the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ModelError> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(|error| self.error(error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of `text` taken as plain text: no string in it becomes an added token, special or not,
    /// so nothing in it can act as a control token.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_text(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ModelError> {
        self.encode_without_added(text, add_special).map_err(|error| self.error(error))
    }

    /// The `tokenizers` pipeline without its first step, which is the search for added tokens.
    fn encode_without_added(&self, text: &str, add_special: bool) -> Result<Vec<u32>, tokenizers::Error> {
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = self.inner.get_normalizer() {
            normalizer.normalize(&mut normalized)?;
        }
        let mut pieces = PreTokenizedString::from(normalized);
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        pieces.tokenize(|piece| self.inner.get_model().tokenize(piece.get()))?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None)?;
        Ok(self.inner.post_process(encoding, None, add_special)?.get_ids().to_vec())
    }

    /// The text of `ids`; bytes that are not UTF-8 become U+FFFD. Ids without a token (rows that pad
    /// the embedding) have no text.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, ModelError> {
        let Scheme::ByteFallback { strip } = self.scheme else {
            return self.inner.decode(ids, skip_special).map_err(|error| self.error(error));
        };
        // The crate turns a whole run of byte tokens to U+FFFD if any of it is not UTF-8, which text
        // already streamed to a client cannot follow. Only the bytes at fault are replaced here.
        let bytes: Vec<u8> = ids
            .iter()
            .filter(|&&id| !(skip_special && self.is_special(id)))
            .flat_map(|&id| self.token_bytes(id))
            .collect();
        let spaces = bytes.iter().take(strip).take_while(|&&byte| byte == b' ').count();
        Ok(String::from_utf8_lossy(&bytes[spaces..]).into_owned())
    }

    /// The raw bytes that one token stands for; often not UTF-8 by themselves. Empty for an id
    /// without a token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        // The crate's decoders see this form of an added token, not `id_to_token`'s.
        let added = self.inner.get_added_vocabulary().simple_id_to_token(id);
        let is_added = added.is_some();
        let Some(token) = added.or_else(|| self.inner.get_model().id_to_token(id)) else {
            return vec![];
        };
        match self.scheme {
            Scheme::ByteLevel => byte_level_bytes(&token).unwrap_or_else(|| token.into_bytes()),
            Scheme::ByteFallback { .. } if is_added => token.into_bytes(),
            Scheme::ByteFallback { .. } => match fallback_byte(&token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            },
            Scheme::Other => {
                self.inner.decode(&[id], false).map_or_else(|_| token.into_bytes(), String::into_bytes)
            }
        }
    }

    /// True if [`Tokenizer::token_bytes`] is all that decides what a token adds to a text.
    pub fn has_exact_bytes(&self) -> bool {
        self.scheme != Scheme::Other
    }

    /// The id of `token`, spelled as in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The vocabulary's spelling of `id`.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// One more than the highest id, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// True for control tokens: those the tokenizer marks as special.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// The token that begins a sequence, as text.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_deref()
    }

    /// The token that ends a sequence, as text.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_deref()
    }

    pub(crate) fn scheme(&self) -> Scheme {
        self.scheme
    }

    fn error(&self, source: tokenizers::Error) -> ModelError {
        ModelError::Tokenizer { path: self.path.clone(), reason: source.to_string() }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("vocab_size", &self.vocab_size)
            .field("scheme", &self.scheme)
            .finish_non_exhaustive()
    }
}

/// The content of `tokenizer_config.json` in `dir`; empty if there is none. Of a GGUF file it is the one
/// beside it, and else what the file itself says.
pub(crate) fn read_tokenizer_config(dir: &Path) -> Result<Map<String, Value>, ModelError> {
    let path = model_dir(dir).join(TOKENIZER_CONFIG_FILE);
    if path.exists() {
        read_json(&path, MAX_TOKENIZER_CONFIG_BYTES)
    } else if is_gguf(dir) {
        gguf_tokenizer::tokenizer_config(&open_first_part(dir)?)
    } else {
        Ok(Map::new())
    }
}

/// The folder of a model that is named by its folder or by its GGUF file.
pub(super) fn model_dir(model: &Path) -> &Path {
    if is_gguf(model) { model.parent().unwrap_or(model) } else { model }
}

/// A token is written as its text, or as an object that holds it.
fn special_token(config: &Map<String, Value>, key: &str) -> Option<String> {
    let value = config.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

fn find_scheme(tokenizer: &tokenizers::Tokenizer) -> Scheme {
    let Some(decoder) = tokenizer.get_decoder().and_then(|decoder| serde_json::to_value(decoder).ok()) else {
        return Scheme::Other;
    };
    let kind = |step: &Value| step["type"].as_str().unwrap_or_default().to_owned();
    if kind(&decoder) == "ByteLevel" {
        return Scheme::ByteLevel;
    }
    let steps = decoder["decoders"].as_array().map_or(&[][..], Vec::as_slice);
    let kinds: Vec<String> = steps.iter().map(kind).collect();
    match kinds.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["Replace", "ByteFallback", "Fuse", rest @ ..] if is_space_replace(&steps[0]) => match rest {
            [] => Scheme::ByteFallback { strip: 0 },
            ["Strip"] if steps[3]["content"] == " " && steps[3]["stop"] == 0 => {
                Scheme::ByteFallback { strip: steps[3]["start"].as_u64().unwrap_or(0) as usize }
            }
            _ => Scheme::Other,
        },
        _ => Scheme::Other,
    }
}

fn is_space_replace(step: &Value) -> bool {
    step["pattern"]["String"] == "▁" && step["content"] == " "
}

/// `<0x0A>` to 10.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The inverse of GPT-2's map; `None` if some char is not in it.
fn byte_level_bytes(token: &str) -> Option<Vec<u8>> {
    // GPT-2 keeps printable Latin-1 as it is and gives the other bytes, in order, the chars from
    // U+0100 on, so 324 chars are in use.
    static BYTE_OF_CHAR: LazyLock<[Option<u8>; 324]> = LazyLock::new(|| {
        let mut byte_of_char = [None; 324];
        let mut next_free = 256;
        for byte in 0..=255u8 {
            let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let char = if printable { byte as usize } else { next_free };
            next_free += usize::from(!printable);
            byte_of_char[char] = Some(byte);
        }
        byte_of_char
    });
    token.chars().map(|char| BYTE_OF_CHAR.get(char as usize).copied().flatten()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_map_is_a_bijection() {
        let chars = "!~¡¬®ÿĀġĠĊŃ";
        assert_eq!(byte_level_bytes(chars).unwrap(), b"!~\xA1\xAC\xAE\xFF\x00\x7F \n\xAD");
        let mut seen: Vec<u8> = (0..324)
            .filter_map(|code| byte_level_bytes(&char::from_u32(code).unwrap().to_string()))
            .flatten()
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_level_bytes("a b"), None);
        assert_eq!(byte_level_bytes("｜"), None);
    }

    #[test]
    fn fallback_bytes_are_exactly_two_hex_digits() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        assert_eq!(fallback_byte("<0xff>"), Some(255));
        for token in ["<0x>", "<0x1>", "<0x123>", "0x12", "<0xZZ>"] {
            assert_eq!(fallback_byte(token), None, "{token}");
        }
    }
}
