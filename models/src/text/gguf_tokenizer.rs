//! The tokenizer inside a GGUF file, built as the `tokenizers` crate's: byte-pair merging over bytes
//! ("gpt2"), or SentencePiece's merging by score with byte fallback ("llama").
//!
//! The vocabulary is untrusted: ids, merges and types are checked before the crate sees them (it trusts
//! merges to stay within the vocabulary, and indexes by them).

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, BpeBuilder};
use tokenizers::normalizers::{Prepend, Replace, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizerSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::gguf_pre::PreTokenizer;
use crate::ModelError;
use crate::weights::gguf::{Array, GgufFile, Value, ValueType};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const BOS_ID: &str = "tokenizer.ggml.bos_token_id";
const EOS_ID: &str = "tokenizer.ggml.eos_token_id";
const UNKNOWN_ID: &str = "tokenizer.ggml.unknown_token_id";
const TEMPLATE: &str = "tokenizer.chat_template";
/// The names of further templates, each at `tokenizer.chat_template.<name>`.
const TEMPLATE_NAMES: &str = "tokenizer.chat_templates";

/// SentencePiece's sign for a space.
const SPACE: &str = "▁";
/// Longest token that merges lead to; SentencePiece makes none longer than 16 characters by itself.
const MAX_MERGED_BYTES: usize = 256;
/// Merges for each token; published vocabularies have 2 to 3.
const MAX_MERGES_PER_TOKEN: usize = 16;

/// What a token is for; the numbers are SentencePiece's.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl TokenType {
    fn from_id(id: i128) -> Option<Self> {
        Some(match id {
            1 => TokenType::Normal,
            2 => TokenType::Unknown,
            3 => TokenType::Control,
            4 => TokenType::UserDefined,
            5 => TokenType::Unused,
            6 => TokenType::Byte,
            _ => return None,
        })
    }
}

/// The tokens of a file. Those that only pad the embedding are left out.
struct Vocabulary<'a> {
    file: &'a GgufFile,
    /// Text and type of each id.
    tokens: Vec<(&'a str, TokenType)>,
    ids: HashMap<&'a str, u32>,
}

/// Builds the tokenizer of `file`.
///
/// # Errors
/// If there is none, it is of a kind that is not known, or its parts do not fit together.
pub(super) fn build(file: &GgufFile) -> Result<Tokenizer, ModelError> {
    let vocabulary = Vocabulary::read(file)?;
    let crate_error = |source: tokenizers::Error| ModelError::Tokenizer {
        path: file.path().to_owned(),
        reason: source.to_string(),
    };
    let (mut tokenizer, add_bos, strip_right) = match file.string(MODEL)? {
        Some("gpt2") => {
            let (tokenizer, add_bos) = byte_level(&vocabulary)?;
            (tokenizer, add_bos, false)
        }
        Some("llama") => {
            // Phi-3 is the one that eats the spaces after its control tokens.
            let is_phi3 = file.string("general.architecture")? == Some("phi3");
            (sentence_piece(&vocabulary)?, true, is_phi3)
        }
        _ => return Err(file.wrong(MODEL, "\"gpt2\" (byte-level BPE) or \"llama\" (SentencePiece BPE)")),
    };
    tokenizer.add_tokens(vocabulary.added_tokens(strip_right)).map_err(crate_error)?;
    let bos = file.bool(ADD_BOS)?.unwrap_or(add_bos).then_some(BOS_ID);
    let eos = file.bool(ADD_EOS)?.unwrap_or(false).then_some(EOS_ID);
    if let Some(template) = vocabulary.template(bos, eos)? {
        tokenizer.with_post_processor(Some(template));
    }
    Ok(tokenizer)
}

/// What a `tokenizer_config.json` would say: the roles of special tokens and the chat templates.
///
/// # Errors
/// If an id is not one of a token, or a template is not a string.
pub(super) fn tokenizer_config(file: &GgufFile) -> Result<Map<String, Json>, ModelError> {
    let mut config = Map::new();
    for (name, key) in [("bos_token", BOS_ID), ("eos_token", EOS_ID)] {
        if let Some(token) = token_at(file, key)? {
            config.insert(name.to_owned(), token.into());
        }
    }
    if let Some(default) = file.string(TEMPLATE)? {
        let mut templates = vec![json!({"name": "default", "template": default})];
        for name in file.array(TEMPLATE_NAMES, ValueType::String)?.iter().flat_map(Array::iter) {
            let Value::String(name) = name else { continue };
            let name = String::from_utf8_lossy(name);
            if let Some(template) = file.string(&format!("{TEMPLATE}.{name}"))? {
                templates.push(json!({"name": name, "template": template}));
            }
        }
        config.insert("chat_template".to_owned(), templates.into());
    }
    Ok(config)
}

/// The text of the token whose id is the value of `key`; `None` if the file has no such key.
///
/// # Errors
/// If the id is not one of a token.
pub(super) fn token_at<'a>(file: &'a GgufFile, key: &str) -> Result<Option<&'a str>, ModelError> {
    let Some(id) = file.u64(key)? else { return Ok(None) };
    let tokens = file.array(TOKENS, ValueType::String)?;
    let token = tokens.and_then(|tokens| tokens.iter().nth(usize::try_from(id).ok()?));
    match token {
        Some(Value::String(text)) => {
            std::str::from_utf8(text).map(Some).map_err(|_| file.wrong(TOKENS, "UTF-8"))
        }
        _ => Err(file.wrong(key, "the id of a token of this file")),
    }
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a GgufFile) -> Result<Self, ModelError> {
        let texts = file.array(TOKENS, ValueType::String)?;
        let texts = texts.ok_or_else(|| file.wrong(TOKENS, "the vocabulary, an array of strings"))?;
        let types = file.array(TYPES, ValueType::I32)?;
        if types.is_some_and(|types| types.len() != texts.len()) {
            return Err(file.wrong(TYPES, &format!("one for each of the {} tokens", texts.len())));
        }
        let mut types = types.map(|types| types.iter());
        let mut vocabulary = Vocabulary { file, tokens: Vec::new(), ids: HashMap::new() };
        for (id, text) in texts.iter().enumerate() {
            let Value::String(text) = text else { continue };
            let text = std::str::from_utf8(text)
                .map_err(|_| file.wrong(TOKENS, &format!("UTF-8; token {id} is not")))?;
            let kind = match types.as_mut().and_then(Iterator::next) {
                None => TokenType::Normal,
                Some(Value::Int(kind)) => TokenType::from_id(kind)
                    .ok_or_else(|| file.wrong(TYPES, &format!("types from 1 to 6; token {id} has {kind}")))?,
                Some(_) => return Err(file.wrong(TYPES, "integers")),
            };
            vocabulary.tokens.push((text, kind));
            let pads = text.is_empty() || is_padding(text, id);
            if !pads && vocabulary.ids.insert(text, id as u32).is_some() {
                return Err(file.wrong(TOKENS, &format!("every token once; {text:?} is there twice")));
            }
        }
        Ok(vocabulary)
    }

    fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    fn owned_ids(&self) -> tokenizers::models::bpe::Vocab {
        self.ids.iter().map(|(&text, &id)| (text.to_owned(), id)).collect()
    }

    /// Tokens that are looked for in a text before anything else.
    fn added_tokens(&self, strip_right: bool) -> Vec<AddedToken> {
        let added = |(id, (text, kind)): (usize, &(&str, TokenType))| {
            let special = matches!(kind, TokenType::Control | TokenType::Unknown);
            let listed = special || *kind == TokenType::UserDefined;
            let keeps_spaces = ["<unk>", "<s>", "<|endoftext|>"].contains(text);
            (listed && self.id(text) == Some(id as u32)).then(|| {
                AddedToken::from(*text, special).normalized(false).rstrip(strip_right && !keeps_spaces)
            })
        };
        self.tokens.iter().enumerate().filter_map(added).collect()
    }

    /// What surrounds a text; `None` if nothing does.
    fn template(
        &self,
        bos: Option<&str>,
        eos: Option<&str>,
    ) -> Result<Option<TemplateProcessing>, ModelError> {
        let mut pieces = vec!["$A".to_owned()];
        let mut special = Vec::new();
        for (key, at_start) in [(bos, true), (eos, false)] {
            let Some(key) = key else { continue };
            let Some(token) = token_at(self.file, key)? else { continue };
            let Some(id) = self.id(token) else { continue };
            // The crate's templates split at spaces and know "$"; names keep both out.
            let name = if at_start { "bos" } else { "eos" };
            pieces.insert(if at_start { 0 } else { pieces.len() }, name.to_owned());
            let token = tokenizers::processors::template::SpecialToken::new(
                name.to_owned(),
                vec![id],
                vec![token.to_owned()],
            );
            special.push(token.map_err(|source| self.error(source.to_string()))?);
        }
        if special.is_empty() {
            return Ok(None);
        }
        let template = TemplateProcessing::builder()
            .try_single(pieces)
            .map_err(|reason| self.error(reason))?
            .special_tokens(special)
            .build();
        template.map(Some).map_err(|source| self.error(source.to_string()))
    }

    fn error(&self, reason: String) -> ModelError {
        ModelError::Tokenizer { path: self.file.path().to_owned(), reason }
    }
}

/// Converters fill the vocabulary up to the embedding's rows with such names.
fn is_padding(text: &str, id: usize) -> bool {
    text.strip_prefix("[PAD").and_then(|rest| rest.strip_suffix(']')) == Some(id.to_string().as_str())
}

/// GPT-2's scheme, and whether its kind puts a token before every text.
fn byte_level(vocabulary: &Vocabulary<'_>) -> Result<(Tokenizer, bool), ModelError> {
    let file = vocabulary.file;
    let name = file.string(PRE)?.unwrap_or("default");
    let kind = PreTokenizer::find(name)
        .ok_or_else(|| file.wrong(PRE, &format!("one of {}", PreTokenizer::known())))?;
    let merges = file.array(MERGES, ValueType::String)?;
    let merges = merges.ok_or_else(|| file.wrong(MERGES, "the merges, an array of strings"))?;
    let model = BpeBuilder::new()
        .vocab_and_merges(vocabulary.owned_ids(), read_merges(vocabulary, merges)?)
        .ignore_merges(kind.ignore_merges)
        .build()
        .map_err(|source| vocabulary.error(source.to_string()))?;
    let mut steps = Vec::new();
    for pattern in kind.patterns {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
        steps.push(split.map_err(|source| vocabulary.error(source.to_string()))?.into());
    }
    let bytes = ByteLevel::new(false, false, false);
    steps.push(bytes.into());
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(PreTokenizerSequence::new(steps)));
    tokenizer.with_decoder(Some(bytes));
    Ok((tokenizer, kind.add_bos))
}

/// "left right", each a token, and so their concatenation.
fn read_merges(vocabulary: &Vocabulary<'_>, merges: Array<'_>) -> Result<Vec<(String, String)>, ModelError> {
    let mut joined = String::new();
    let mut read = Vec::new();
    for (rank, merge) in merges.iter().enumerate() {
        let Value::String(merge) = merge else { continue };
        // A token may begin with a space, so the first byte cannot be the separator.
        let parts = std::str::from_utf8(merge).ok().and_then(|merge| {
            let separator = merge.bytes().skip(1).position(|byte| byte == b' ')? + 1;
            Some((merge.get(..separator)?, merge.get(separator + 1..)?))
        });
        let parts = parts.filter(|(left, right)| {
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            [left, right, joined.as_str()].iter().all(|part| vocabulary.id(part).is_some())
        });
        let Some((left, right)) = parts else {
            let wanted = format!("two tokens that make a third; merge {rank} is not");
            return Err(vocabulary.file.wrong(MERGES, &wanted));
        };
        read.push((left.to_owned(), right.to_owned()));
    }
    Ok(read)
}

/// SentencePiece's scheme. It merges the two neighbours whose union has the best score; written as merges
/// by rank, that is every way to cut a token into two, in the order of the tokens' scores.
fn sentence_piece(vocabulary: &Vocabulary<'_>) -> Result<Tokenizer, ModelError> {
    let file = vocabulary.file;
    let unknown = token_at(file, UNKNOWN_ID)?.or_else(|| {
        vocabulary.tokens.iter().find(|(_, kind)| *kind == TokenType::Unknown).map(|(text, _)| *text)
    });
    let mut builder = BPE::builder()
        .vocab_and_merges(vocabulary.owned_ids(), merges_by_score(vocabulary)?)
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(unknown) = unknown {
        builder = builder.unk_token(unknown.to_owned());
    }
    let crate_error = |source: tokenizers::Error| vocabulary.error(source.to_string());
    let mut tokenizer = Tokenizer::new(builder.build().map_err(crate_error)?);
    let prefix = file.bool(ADD_SPACE_PREFIX)?.unwrap_or(true);
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        Replace::new(SPACE, " ").map_err(crate_error)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if prefix {
        normalizers.push(Prepend::new(SPACE.to_owned()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(Replace::new(" ", SPACE).map_err(crate_error)?.into());
    tokenizer.with_normalizer(Some(NormalizerSequence::new(normalizers))).map_err(crate_error)?;
    tokenizer.with_decoder(Some(DecoderSequence::new(decoders)));
    Ok(tokenizer)
}

fn merges_by_score(vocabulary: &Vocabulary<'_>) -> Result<Vec<(String, String)>, ModelError> {
    let file = vocabulary.file;
    let scores = file.array(SCORES, ValueType::F32)?;
    let scores = scores.filter(|scores| scores.len() == vocabulary.tokens.len()).ok_or_else(|| {
        file.wrong(SCORES, &format!("an f32 for each of {} tokens", vocabulary.tokens.len()))
    })?;
    let mut ranked: Vec<(f64, u32, &str)> = Vec::new();
    for ((id, (text, kind)), score) in vocabulary.tokens.iter().enumerate().zip(scores.iter()) {
        let Value::Float(score) = score else { continue };
        let is_piece = matches!(kind, TokenType::Normal | TokenType::Unused);
        if is_piece && text.len() <= MAX_MERGED_BYTES && vocabulary.id(text) == Some(id as u32) {
            ranked.push((score, id as u32, text));
        }
    }
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut merges = Vec::new();
    for (_, _, text) in ranked {
        let cuts = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
        let mut splits: Vec<(u32, u32, (&str, &str))> = cuts
            .filter_map(|(left, right)| Some((vocabulary.id(left)?, vocabulary.id(right)?, (left, right))))
            .collect();
        splits.sort_unstable_by_key(|(left, right, _)| (*left, *right));
        merges.extend(splits.into_iter().map(|(_, _, (left, right))| (left.to_owned(), right.to_owned())));
        if merges.len() > MAX_MERGES_PER_TOKEN * vocabulary.tokens.len() {
            let wanted = format!("at most {MAX_MERGES_PER_TOKEN} ways to cut a token into two, on average");
            return Err(file.wrong(TOKENS, &wanted));
        }
    }
    Ok(merges)
}
