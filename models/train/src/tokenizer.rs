//! The tokenizer: a byte-level BPE trained on the corpus, or an existing `tokenizer.json`.
//!
//! Layout of Qwen2's: its split expression, byte-level alphabet, no normaliser. Special tokens take
//! the last ids, so that the vocabulary size counts them.

use std::fs;
use std::path::Path;

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer, TokenizerImpl};
use tokenizers::{DecoderWrapper, NormalizerWrapper, PostProcessorWrapper};

use crate::TrainError;
use crate::corpus::{Corpus, floor_boundary};

pub(crate) const END_OF_TEXT: &str = "<|endoftext|>";
pub(crate) const FIM_PREFIX: &str = "<|fim_prefix|>";
pub(crate) const FIM_MIDDLE: &str = "<|fim_middle|>";
pub(crate) const FIM_SUFFIX: &str = "<|fim_suffix|>";
pub(crate) const FIM_PAD: &str = "<|fim_pad|>";
pub(crate) const CHAT_START: &str = "<|im_start|>";
pub(crate) const CHAT_END: &str = "<|im_end|>";
/// In the order of their ids.
const SPECIAL: [&str; 9] = [
    END_OF_TEXT,
    FIM_PREFIX,
    FIM_MIDDLE,
    FIM_SUFFIX,
    FIM_PAD,
    "<|repo_name|>",
    "<|file_sep|>",
    CHAT_START,
    CHAT_END,
];
/// Qwen2's: contractions, words with one leading character, single digits, punctuation, newlines.
const SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Text that the merges are learned from; more changes nothing that can be measured.
const MAX_TRAINING_BYTES: usize = 32 << 20;

/// Ids of the special tokens that samples are built from. `None` where a reused tokenizer lacks
/// them; such samples are then not made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SpecialIds {
    pub(crate) end_of_text: u32,
    /// prefix, middle, suffix
    pub(crate) fim: Option<[u32; 3]>,
    /// start, end
    pub(crate) chat: Option<[u32; 2]>,
}

/// A tokenizer and its file's text.
pub(crate) struct Text {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) special: SpecialIds,
    /// Contents of `tokenizer.json`.
    pub(crate) json: String,
}

impl Text {
    /// Learns a vocabulary of `vocab_size` entries, special tokens included.
    pub(crate) fn train(corpus: &Corpus, vocab_size: usize) -> Result<Self, TrainError> {
        const ALPHABET: usize = 256;
        if vocab_size < ALPHABET + SPECIAL.len() {
            return Err(TrainError::Option {
                option: "vocab_size",
                found: vocab_size.to_string(),
                wanted: format!(
                    "at least {} (256 bytes and {} special tokens)",
                    ALPHABET + SPECIAL.len(),
                    SPECIAL.len()
                ),
            });
        }
        let split = Split::new(SplitPattern::Regex(SPLIT.into()), SplitDelimiterBehavior::Isolated, false)
            .map_err(reason)?;
        let pieces = vec![
            PreTokenizerWrapper::Split(split),
            PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)),
        ];
        let mut model: TokenizerImpl<
            BPE,
            NormalizerWrapper,
            PreTokenizerWrapper,
            PostProcessorWrapper,
            DecoderWrapper,
        > = TokenizerImpl::new(BPE::default());
        model
            .with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(Sequence::new(pieces))))
            .with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::new(false, true, false))));
        let mut trainer = BpeTrainer::builder()
            .vocab_size(vocab_size - SPECIAL.len())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .show_progress(false)
            .build();
        model.train(&mut trainer, training_text(corpus).into_iter()).map_err(reason)?;
        let special = SPECIAL.map(|token| AddedToken::from(token, true).normalized(false));
        model.add_special_tokens(special).map_err(reason)?;
        let found = model.get_vocab_size(true);
        if found != vocab_size {
            return Err(TrainError::SmallCorpus {
                corpus_bytes: corpus.train_bytes(),
                found,
                wanted: vocab_size,
            });
        }
        Self::parse(model.to_string(true).map_err(reason)?)
    }

    /// Reads a `tokenizer.json`, or the one in a folder.
    pub(crate) fn read(path: &Path) -> Result<Self, TrainError> {
        let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
        let json = fs::read_to_string(&file).map_err(TrainError::io(&file))?;
        Self::parse(json).map_err(|error| TrainError::Tokenizer(format!("{}: {error}", file.display())))
    }

    fn parse(json: String) -> Result<Self, TrainError> {
        let tokenizer: Tokenizer = json.parse().map_err(reason)?;
        let id = |token: &str| tokenizer.token_to_id(token);
        let ends = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>"];
        let Some(end_of_text) = ends.iter().find_map(|token| id(token)) else {
            return Err(TrainError::Tokenizer(format!(
                "has no end-of-text token; wanted one of {}",
                ends.join(" ")
            )));
        };
        let fim = [FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX].map(id);
        let chat = [CHAT_START, CHAT_END].map(id);
        let special = SpecialIds {
            end_of_text,
            fim: if let [Some(prefix), Some(middle), Some(suffix)] = fim {
                Some([prefix, middle, suffix])
            } else {
                None
            },
            chat: if let [Some(start), Some(end)] = chat { Some([start, end]) } else { None },
        };
        Ok(Self { tokenizer, special, json })
    }

    /// Entries, special tokens included.
    pub(crate) fn vocab_size(&self) -> usize {
        // Ids may have gaps; a model needs a row for the largest.
        self.tokenizer.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
    }

    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>, TrainError> {
        Ok(self.tokenizer.encode_fast(text, false).map_err(reason)?.get_ids().to_vec())
    }

    /// At most `limit` tokens of the start of `text`, and how many bytes of it they stand for.
    pub(crate) fn encode_start(&self, text: &str, limit: usize) -> Result<(Vec<u32>, usize), TrainError> {
        // No vocabulary of ours packs more than 16 bytes a token on average.
        let encoding =
            self.tokenizer.encode(&text[..floor_boundary(text, limit * 16)], false).map_err(reason)?;
        let count = encoding.get_ids().len().min(limit);
        let bytes = encoding.get_offsets()[..count].last().map_or(0, |&(_, end)| end);
        Ok((encoding.get_ids()[..count].to_vec(), bytes))
    }
}

fn reason(error: tokenizers::Error) -> TrainError {
    TrainError::Tokenizer(error.to_string())
}

/// Whole files, evenly picked over the corpus where it exceeds what is needed.
fn training_text(corpus: &Corpus) -> Vec<&str> {
    let stride = (corpus.train_bytes() as usize).div_ceil(MAX_TRAINING_BYTES).max(1);
    corpus.train.iter().step_by(stride).map(|document| document.text.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::Document;

    fn corpus(text: &str) -> Corpus {
        let document = Document { path: "a.py".into(), text: text.to_owned() };
        Corpus { train: vec![document], held_out: Vec::new(), skipped: 0 }
    }

    #[test]
    fn learns_reloads_and_round_trips() {
        let source = "def add_numbers(first, second):\n    return first + second\n\n".repeat(30);
        let text = Text::train(&corpus(&source), 290).expect("train");
        assert_eq!(text.vocab_size(), 290);
        assert_eq!(text.special.end_of_text, 281);
        assert_eq!(text.special.fim, Some([282, 283, 284]));
        let sample = "def caf\u{e9}():\n\treturn 'it''s' \u{1f600}\n";
        let ids = text.encode(sample).expect("encode");
        assert_eq!(text.tokenizer.decode(&ids, false).expect("decode"), sample);
        let again = Text::parse(text.json.clone()).expect("parse");
        assert_eq!(again.encode(sample).expect("encode"), ids);
        let (start, bytes) = text.encode_start(sample, 3).expect("encode");
        assert_eq!(start, ids[..3]);
        assert_eq!(text.tokenizer.decode(&start, false).expect("decode").len(), bytes);
    }

    #[test]
    fn refuses_what_cannot_be_filled() {
        let error = Text::train(&corpus("x = 1\n"), 4096).err().expect("too small").to_string();
        assert!(error.contains("6 bytes") && error.contains("4096"), "{error}");
        let error = Text::train(&corpus("x = 1\n"), 100).err().expect("no room").to_string();
        assert!(error.contains("265"), "{error}");
    }
}
