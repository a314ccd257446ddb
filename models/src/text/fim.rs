//! Fill-in-the-middle: the control tokens under which code models were trained to write what belongs
//! between a prefix and a suffix (Bavarian et al., arXiv 2207.14255).

use std::path::Path;

use super::Tokenizer;
use super::tokenizer::{TOKENIZER_CONFIG_FILE, read_tokenizer_config};
use crate::ModelError;

/// The key of `tokenizer_config.json` that states a model's [`FimOrder`].
const FIM_ORDER_KEY: &str = "fim_order";

/// The control tokens of a model that fills in the middle, and the order in which it likes its
/// prompts. The one place that knows how such a prompt is laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FimTokens {
    /// Stands before the text before the gap.
    pub prefix: String,
    /// Stands before the text after the gap.
    pub suffix: String,
    /// Stands before the answer.
    pub middle: String,
    /// What [`FimTokens::encode`] writes.
    pub order: FimOrder,
    /// Of prefix, suffix and middle.
    ids: [u32; 3],
    spelling: Spelling,
    /// Stands before each file of a repository, if the model was trained on whole ones.
    file_separator: Option<u32>,
}

/// A file that a prompt shows beside the one with the gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FimFile<'a> {
    /// Its path, as the model is to know it.
    pub name: &'a str,
    /// Its text, or a part of it.
    pub text: &'a str,
}

/// A gap with all that is known around it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FimContext<'a> {
    /// Other files, the least important first.
    pub files: &'a [FimFile<'a>],
    /// The text before the gap.
    pub prefix: &'a str,
    /// Where that ends and the answer is to go on, such as the line that is being typed.
    pub begun: &'a str,
    /// The text after the gap.
    pub suffix: &'a str,
}

/// In which order a prompt gives the texts around the gap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FimOrder {
    /// `<prefix>P<suffix>S<middle>`: the one every such model knows.
    #[default]
    PrefixSuffixMiddle,
    /// `<prefix><suffix>S<middle>P`: ends with the text at the cursor, so that what was computed for a
    /// suffix serves every keystroke before it.
    SuffixPrefixMiddle,
}

/// What the three tokens stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// The texts around the gap and the answer.
    Parts,
    /// `<begin>P<hole>S<end>`: DeepSeek's are the same three places by other names, and have no other
    /// order.
    Hole,
}

/// What stands around the text before the gap in every prompt with the same suffix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FimFrame {
    head: Vec<u32>,
    tail: Vec<u32>,
}

impl FimFrame {
    /// The prompt for the gap between `prefix` and the frame's suffix. Nothing in the text becomes a
    /// control token.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn around(&self, tokenizer: &Tokenizer, prefix: &str) -> Result<Vec<u32>, ModelError> {
        let prefix = tokenizer.encode_text(prefix, false)?;
        Ok([self.head.as_slice(), &prefix, &self.tail].concat())
    }
}

/// Spelling of (prefix, suffix, middle). Qwen2.5-Coder and our own; StarCoder, SantaCoder, Granite;
/// CodeLlama; CodeGemma is spelled as Qwen; DeepSeek-Coder; Codestral's order differs and is not here.
const SPELLINGS: &[(&str, &str, &str, Spelling)] = &[
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", Spelling::Parts),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", Spelling::Parts),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", Spelling::Parts),
    ("▁<PRE>", "▁<SUF>", "▁<MID>", Spelling::Parts),
    ("<PRE>", "<SUF>", "<MID>", Spelling::Parts),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", Spelling::Hole),
];

/// What stands before each file: Qwen2.5-Coder; StarCoder2; Granite and the first StarCoder.
const FILE_SEPARATORS: &[&str] = &["<|file_sep|>", "<file_sep>", "<filename>"];

/// Stands between other files and the text before the gap where a model knows no separator.
const SNIPPET: &str = "\n\n--- snippet ---\n\n";

impl FimTokens {
    /// Finds the tokens in `tokenizer`; `None` if the model was not trained to fill in. The order is
    /// prefix, suffix, middle.
    pub fn detect(tokenizer: &Tokenizer) -> Option<FimTokens> {
        SPELLINGS.iter().find_map(|&(prefix, suffix, middle, spelling)| {
            let id = |token: &str| tokenizer.token_to_id(token);
            Some(FimTokens {
                ids: [id(prefix)?, id(suffix)?, id(middle)?],
                prefix: prefix.to_owned(),
                suffix: suffix.to_owned(),
                middle: middle.to_owned(),
                order: FimOrder::default(),
                spelling,
                file_separator: FILE_SEPARATORS.iter().find_map(|token| id(token)),
            })
        })
    }

    /// Finds the tokens in `tokenizer`, and the order in the key `fim_order` (`"psm"` or `"spm"`) of
    /// the folder's `tokenizer_config.json`.
    ///
    /// # Errors
    /// If the key has another value, or names an order that these tokens do not have.
    pub fn from_dir(dir: &Path, tokenizer: &Tokenizer) -> Result<Option<FimTokens>, ModelError> {
        let config = read_tokenizer_config(dir)?;
        let fault = |wanted: &'static str| ModelError::Config {
            path: dir.join(TOKENIZER_CONFIG_FILE),
            key: FIM_ORDER_KEY.to_owned(),
            found: config[FIM_ORDER_KEY].to_string(),
            wanted: wanted.to_owned(),
        };
        let order = match config.get(FIM_ORDER_KEY).map(|order| order.as_str()) {
            None | Some(Some("psm")) => FimOrder::PrefixSuffixMiddle,
            Some(Some("spm")) => FimOrder::SuffixPrefixMiddle,
            Some(_) => return Err(fault("\"psm\" or \"spm\"")),
        };
        let Some(tokens) = Self::detect(tokenizer) else { return Ok(None) };
        if tokens.spelling == Spelling::Hole && order == FimOrder::SuffixPrefixMiddle {
            return Err(fault("\"psm\": a model with a hole token knows no other order"));
        }
        Ok(Some(FimTokens { order, ..tokens }))
    }

    /// The prompt in the order prefix, suffix, middle.
    pub fn psm(&self, prefix: &str, suffix: &str) -> String {
        format!("{}{prefix}{}{suffix}{}", self.prefix, self.suffix, self.middle)
    }

    /// The prompt in the order suffix, prefix, middle; `None` for models that cannot know it.
    pub fn spm(&self, prefix: &str, suffix: &str) -> Option<String> {
        match self.spelling {
            Spelling::Parts => Some(format!("{}{}{suffix}{}{prefix}", self.prefix, self.suffix, self.middle)),
            Spelling::Hole => None,
        }
    }

    /// What prompts with this suffix have in common, in the model's own order. Nothing in the text
    /// becomes a control token.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn frame(&self, tokenizer: &Tokenizer, suffix: &str) -> Result<FimFrame, ModelError> {
        let [prefix_id, suffix_id, middle_id] = self.ids;
        // What the model wants around every input (a beginning-of-sequence token) comes first.
        let mut head = tokenizer.encode_text("", true)?;
        head.push(prefix_id);
        let mut rest = vec![suffix_id];
        rest.extend(tokenizer.encode_text(suffix, false)?);
        rest.push(middle_id);
        Ok(match self.order {
            FimOrder::PrefixSuffixMiddle => FimFrame { head, tail: rest },
            FimOrder::SuffixPrefixMiddle => FimFrame { head: [head, rest].concat(), tail: Vec::new() },
        })
    }

    /// The prompt for a gap as token ids, in the model's own order.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn encode(&self, tokenizer: &Tokenizer, prefix: &str, suffix: &str) -> Result<Vec<u32>, ModelError> {
        self.frame(tokenizer, suffix)?.around(tokenizer, prefix)
    }

    /// The prompt for a gap with its context, in at most `max_tokens` tokens. What does not fit is left
    /// out: other files from the first on, then the text farthest from the gap, three quarters of
    /// the room being the prefix's. Nothing in the text becomes a control token.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn encode_context(
        &self,
        tokenizer: &Tokenizer,
        context: &FimContext<'_>,
        max_tokens: usize,
    ) -> Result<Vec<u32>, ModelError> {
        let text = |text: &str| tokenizer.encode_text(text, false);
        let [prefix_id, suffix_id, middle_id] = self.ids;
        let begin = tokenizer.encode_text("", true)?;
        let (mut prefix, begun, mut suffix) =
            (text(context.prefix)?, text(context.begun)?, text(context.suffix)?);
        let room = max_tokens.saturating_sub(begin.len() + self.ids.len() + begun.len());
        if prefix.len() + suffix.len() > room {
            // What one of them leaves of its share is the other's.
            let for_suffix = (room / 4).max(room.saturating_sub(prefix.len()));
            suffix.truncate(for_suffix);
            prefix.drain(..prefix.len().saturating_sub(room - suffix.len()));
        }
        let files = self.files(tokenizer, context.files, room - prefix.len() - suffix.len())?;
        let after = [&[suffix_id][..], &suffix, &[middle_id]].concat();
        Ok(match self.order {
            FimOrder::PrefixSuffixMiddle => [begin, files, vec![prefix_id], prefix, after, begun].concat(),
            FimOrder::SuffixPrefixMiddle => [begin, files, vec![prefix_id], after, prefix, begun].concat(),
        })
    }

    /// The last of the files that fit into `room` tokens together.
    fn files(
        &self,
        tokenizer: &Tokenizer,
        files: &[FimFile<'_>],
        room: usize,
    ) -> Result<Vec<u32>, ModelError> {
        let mut parts: Vec<Vec<u32>> = Vec::new();
        let mut left = room;
        for file in files.iter().rev() {
            let part = match self.file_separator {
                Some(separator) => {
                    let text = tokenizer.encode_text(&format!("{}\n{}\n", file.name, file.text), false)?;
                    [vec![separator], text].concat()
                }
                None => tokenizer.encode_text(&format!("{SNIPPET}{}", file.text), false)?,
            };
            let Some(rest) = left.checked_sub(part.len()) else { break };
            left = rest;
            parts.push(part);
        }
        parts.reverse();
        // The file with the gap is one, too.
        if let Some(separator) = self.file_separator
            && !parts.is_empty()
            && left > 0
        {
            parts.push(vec![separator]);
        }
        Ok(parts.concat())
    }
}
