//! A byte-level `tokenizer.json` as the metadata of a GGUF file: what [`super::gguf_tokenizer`] reads.

use std::path::Path;

use serde_json::Value;

use super::gguf_pre::PreTokenizer;
use super::tokenizer::{TOKENIZER_FILE, read_tokenizer_config};
use crate::ModelError;
use crate::files::read_text;
use crate::weights::gguf::{ArrayValues, GgufBuilder};

const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Adds the tokenizer and the chat template of the folder `dir` to `file`, filled up to `vocab_size` tokens.
///
/// # Errors
/// If the tokenizer is no byte-level BPE with a known way to cut text, or has more tokens than that.
pub(crate) fn add_tokenizer(dir: &Path, vocab_size: usize, file: &mut GgufBuilder) -> Result<(), ModelError> {
    let path = dir.join(TOKENIZER_FILE);
    let text = read_text(&path, MAX_TOKENIZER_BYTES)?;
    let json: Value = serde_json::from_str(&text).map_err(|source| ModelError::json(&path, source))?;
    let config = read_tokenizer_config(dir)?;
    add_json(&json, vocab_size, file)
        .map_err(|reason| ModelError::Tokenizer { path: path.clone(), reason })?;
    let token = |key: &str| -> Option<u64> {
        let value = config.get(key)?;
        let text = value.as_str().or_else(|| value["content"].as_str())?;
        find_id(&json, text)
    };
    for (key, id) in
        [("bos", token("bos_token")), ("eos", token("eos_token")), ("padding", token("pad_token"))]
    {
        if let Some(id) = id {
            file.u32(&format!("tokenizer.ggml.{key}_token_id"), id as u32);
        }
    }
    let add_bos = config.get("add_bos_token").and_then(Value::as_bool).unwrap_or(false);
    file.bool("tokenizer.ggml.add_bos_token", add_bos);
    if let Some(template) = config.get("chat_template").and_then(Value::as_str) {
        file.string("tokenizer.chat_template", template);
    }
    Ok(())
}

/// Adds the tokenizer that `json`, a `tokenizer.json`, describes.
pub(crate) fn add_json(json: &Value, vocab_size: usize, file: &mut GgufBuilder) -> Result<(), String> {
    let model = &json["model"];
    let vocab = model["vocab"].as_object().filter(|_| is_byte_level(json));
    let vocab = vocab.ok_or("wanted a byte-level BPE; other kinds cannot be written to GGUF")?;
    let pre = PreTokenizer::name_of(&split_patterns(&json["pre_tokenizer"]))
        .ok_or("cuts text in a way that GGUF has no name for")?;
    let mut tokens: Vec<String> = (0..vocab_size).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![UNUSED; vocab_size];
    let mut place = |id: Option<u64>, text: &str, kind: i32| -> Result<(), String> {
        let id = id.and_then(|id| usize::try_from(id).ok()).filter(|id| *id < vocab_size);
        let id = id.ok_or_else(|| format!("token {text:?} does not fit in {vocab_size} rows"))?;
        (tokens[id], types[id]) = (text.to_owned(), kind);
        Ok(())
    };
    for (text, id) in vocab {
        place(id.as_u64(), text, NORMAL)?;
    }
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let kind = if token["special"] == true { CONTROL } else { USER_DEFINED };
        place(token["id"].as_u64(), token["content"].as_str().unwrap_or_default(), kind)?;
    }
    let merges = model["merges"].as_array().into_iter().flatten();
    let merges: Vec<String> = merges
        .map(|merge| match merge {
            Value::Array(parts) => parts.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
            other => other.as_str().unwrap_or_default().to_owned(),
        })
        .collect();
    file.string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", pre)
        .array("tokenizer.ggml.tokens", ArrayValues::Strings(&tokens))
        .array("tokenizer.ggml.token_type", ArrayValues::I32(&types))
        .array("tokenizer.ggml.merges", ArrayValues::Strings(&merges));
    Ok(())
}

fn is_byte_level(json: &Value) -> bool {
    json["model"]["type"] == "BPE" && json["decoder"]["type"] == "ByteLevel" && json["normalizer"].is_null()
}

/// The regular expressions of a `pre_tokenizer`, in order.
fn split_patterns(pre: &Value) -> Vec<&str> {
    match pre["type"].as_str() {
        Some("Sequence") => {
            pre["pretokenizers"].as_array().into_iter().flatten().flat_map(split_patterns).collect()
        }
        Some("Split") => pre["pattern"]["Regex"].as_str().into_iter().collect(),
        Some("Digits") if pre["individual_digits"] == true => vec![r"\p{N}"],
        Some("ByteLevel") if pre["use_regex"] == true => vec![super::gguf_pre::GPT2],
        _ => vec![],
    }
}

fn find_id(json: &Value, text: &str) -> Option<u64> {
    let added = json["added_tokens"].as_array().into_iter().flatten();
    let added =
        added.into_iter().find(|token| token["content"] == text).and_then(|token| token["id"].as_u64());
    added.or_else(|| json["model"]["vocab"][text].as_u64())
}
