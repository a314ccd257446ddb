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
    /// Stands before the answer; empty if the model knows no such token.
    pub middle: String,
    /// What [`FimTokens::encode`] writes.
    pub order: FimOrder,
    prefix_id: u32,
    suffix_id: u32,
    middle_id: Option<u32>,
    spelling: Spelling,
    /// Stands before each file of a repository, if the model was trained on whole ones.
    file_separator: Option<u32>,
    /// Stands before a repository's name, which comes before its files.
    repository: Option<u32>,
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
    /// `<suffix>S<prefix>P<middle>`, with or without the last: Codestral, Seed-Coder.
    SuffixFirst,
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

/// Spelling of (prefix, suffix, middle). Qwen2.5-Coder, CodeGemma and our own; StarCoder, Granite; SantaCoder;
/// CodeLlama; DeepSeek-Coder; Seed-Coder; Codestral, which has no middle.
const SPELLINGS: &[(&str, &str, &str, Spelling)] = &[
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", Spelling::Parts),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", Spelling::Parts),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", Spelling::Parts),
    ("▁<PRE>", "▁<SUF>", "▁<MID>", Spelling::Parts),
    ("<PRE>", "<SUF>", "<MID>", Spelling::Parts),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", Spelling::Hole),
    ("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", Spelling::SuffixFirst),
    ("[PREFIX]", "[SUFFIX]", "", Spelling::SuffixFirst),
];

/// What stands before each file: Qwen2.5-Coder; StarCoder2; Granite and the first StarCoder.
const FILE_SEPARATORS: &[&str] = &["<|file_sep|>", "<file_sep>", "<filename>"];

/// What stands before a repository's name, where files follow: Qwen2.5-Coder; StarCoder2.
const REPOSITORIES: &[&str] = &["<|repo_name|>", "<repo_name>"];

/// The name of a repository whose name is not known.
const REPOSITORY: &str = "project\n";

/// Stands between other files and the text before the gap where a model knows no separator.
const SNIPPET: &str = "\n\n--- snippet ---\n\n";

impl FimTokens {
    /// Finds the tokens in `tokenizer`; `None` if the model was not trained to fill in. The order is
    /// prefix, suffix, middle where the model knows it.
    pub fn detect(tokenizer: &Tokenizer) -> Option<FimTokens> {
        SPELLINGS.iter().find_map(|&(prefix, suffix, middle, spelling)| {
            let id = |token: &str| tokenizer.token_to_id(token);
            Some(FimTokens {
                prefix_id: id(prefix)?,
                suffix_id: id(suffix)?,
                middle_id: if middle.is_empty() { None } else { Some(id(middle)?) },
                prefix: prefix.to_owned(),
                suffix: suffix.to_owned(),
                middle: middle.to_owned(),
                order: match spelling {
                    Spelling::Parts | Spelling::Hole => FimOrder::PrefixSuffixMiddle,
                    Spelling::SuffixFirst => FimOrder::SuffixPrefixMiddle,
                },
                spelling,
                file_separator: FILE_SEPARATORS.iter().find_map(|token| id(token)),
                repository: REPOSITORIES.iter().find_map(|token| id(token)),
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
            None => None,
            Some(Some("psm")) => Some(FimOrder::PrefixSuffixMiddle),
            Some(Some("spm")) => Some(FimOrder::SuffixPrefixMiddle),
            Some(_) => return Err(fault("\"psm\" or \"spm\"")),
        };
        let Some(tokens) = Self::detect(tokenizer) else { return Ok(None) };
        match order {
            None => Ok(Some(tokens)),
            Some(order) if order == tokens.order || tokens.spelling == Spelling::Parts => {
                Ok(Some(FimTokens { order, ..tokens }))
            }
            Some(_) if tokens.spelling == Spelling::Hole => {
                Err(fault("\"psm\": a model with a hole token knows no other order"))
            }
            Some(_) => Err(fault("\"spm\": a model with these tokens knows no other order")),
        }
    }

    /// The prompt in the order prefix, suffix, middle; `None` for models that cannot know it.
    pub fn psm(&self, prefix: &str, suffix: &str) -> Option<String> {
        let is_known = self.spelling != Spelling::SuffixFirst;
        is_known.then(|| format!("{}{prefix}{}{suffix}{}", self.prefix, self.suffix, self.middle))
    }

    /// The prompt in the order suffix, prefix, middle; `None` for models that cannot know it.
    pub fn spm(&self, prefix: &str, suffix: &str) -> Option<String> {
        match self.spelling {
            Spelling::Parts => Some(format!("{}{}{suffix}{}{prefix}", self.prefix, self.suffix, self.middle)),
            Spelling::SuffixFirst => {
                Some(format!("{}{suffix}{}{prefix}{}", self.suffix, self.prefix, self.middle))
            }
            Spelling::Hole => None,
        }
    }

    /// What stands before and behind the text before the gap, in the model's own order.
    fn around_prefix(&self, suffix: &[u32]) -> (Vec<u32>, Vec<u32>) {
        let middle = self.middle_id.as_slice();
        match (self.spelling, self.order) {
            (Spelling::SuffixFirst, _) => {
                ([&[self.suffix_id], suffix, &[self.prefix_id]].concat(), middle.to_vec())
            }
            (_, FimOrder::PrefixSuffixMiddle) => {
                (vec![self.prefix_id], [&[self.suffix_id], suffix, middle].concat())
            }
            (_, FimOrder::SuffixPrefixMiddle) => {
                ([&[self.prefix_id, self.suffix_id], suffix, middle].concat(), Vec::new())
            }
        }
    }

    /// What prompts with this suffix have in common, in the model's own order. Nothing in the text
    /// becomes a control token.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn frame(&self, tokenizer: &Tokenizer, suffix: &str) -> Result<FimFrame, ModelError> {
        // What the model wants around every input (a beginning-of-sequence token) comes first.
        let begin = tokenizer.encode_text("", true)?;
        let (before, tail) = self.around_prefix(&tokenizer.encode_text(suffix, false)?);
        Ok(FimFrame { head: [begin, before].concat(), tail })
    }

    /// The prompt for a gap as token ids, in the model's own order.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn encode(&self, tokenizer: &Tokenizer, prefix: &str, suffix: &str) -> Result<Vec<u32>, ModelError> {
        self.frame(tokenizer, suffix)?.around(tokenizer, prefix)
    }

    /// The prompt for a gap with its context, in at most `max_tokens` tokens. What does not fit is left
    /// out: other files from the first on, then the lines farthest from the gap, three quarters of
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
        let begin = tokenizer.encode_text("", true)?;
        let (mut prefix, begun, mut suffix) =
            (text(context.prefix)?, text(context.begun)?, text(context.suffix)?);
        let num_control_tokens = 2 + usize::from(self.middle_id.is_some());
        let room = max_tokens.saturating_sub(begin.len() + num_control_tokens + begun.len());
        if prefix.len() + suffix.len() > room {
            // What one of them leaves of its share is the other's.
            let for_suffix = (room / 4).max(room.saturating_sub(prefix.len()));
            suffix.truncate(whole_lines_from_start(tokenizer, &suffix, for_suffix)?);
            let for_prefix = room.saturating_sub(suffix.len());
            prefix.drain(..prefix.len() - whole_lines_to_end(tokenizer, &prefix, for_prefix)?);
        }
        let files = self.files(tokenizer, context.files, room - prefix.len() - suffix.len())?;
        let (before, after) = self.around_prefix(&suffix);
        Ok([begin, files, before, prefix, after, begun].concat())
    }

    /// The last of the files that fit into `room` tokens together.
    fn files(
        &self,
        tokenizer: &Tokenizer,
        files: &[FimFile<'_>],
        room: usize,
    ) -> Result<Vec<u32>, ModelError> {
        let repository = match self.repository.filter(|_| self.file_separator.is_some()) {
            Some(token) => [vec![token], tokenizer.encode_text(REPOSITORY, false)?].concat(),
            None => Vec::new(),
        };
        let mut parts: Vec<Vec<u32>> = Vec::new();
        let mut left = room.saturating_sub(repository.len());
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
        if !parts.is_empty() {
            parts.push(repository);
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

/// A text that is cut at a line's end may keep so much less than it could: a part of one in eight.
const MAX_TRIMMED: usize = 8;

/// How many of the first `most` tokens to keep of a text that goes on, so that it ends with a line if one
/// ends near there.
fn whole_lines_from_start(tokenizer: &Tokenizer, tokens: &[u32], most: usize) -> Result<usize, ModelError> {
    if tokens.len() <= most {
        return Ok(tokens.len());
    }
    for keep in (most - most / MAX_TRIMMED..=most).rev() {
        if keep > 0 && ends_line(tokenizer, tokens[keep - 1])? {
            return Ok(keep);
        }
    }
    Ok(most)
}

/// How many of the last `most` tokens to keep of a text that began earlier, so that it begins with a line if one
/// begins near there.
fn whole_lines_to_end(tokenizer: &Tokenizer, tokens: &[u32], most: usize) -> Result<usize, ModelError> {
    if tokens.len() <= most {
        return Ok(tokens.len());
    }
    for keep in (most - most / MAX_TRIMMED..=most).rev() {
        if ends_line(tokenizer, tokens[tokens.len() - keep - 1])? {
            return Ok(keep);
        }
    }
    Ok(most)
}

fn ends_line(tokenizer: &Tokenizer, token: u32) -> Result<bool, ModelError> {
    Ok(tokenizer.decode(&[token], false)?.ends_with('\n'))
}
