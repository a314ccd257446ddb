//! A `tokenizer.json` of byte-level or SentencePiece's byte-pair merging as the metadata of a GGUF file: what [`super::gguf_tokenizer`] reads.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use super::chat_template::{named_template, read_template};
use super::gguf_pre::PreTokenizer;
use super::tokenizer::{TOKENIZER_FILE, Tokenizer, read_tokenizer_config};
use crate::ModelError;
use crate::files::read_text;
use crate::weights::gguf::{ArrayValues, GgufBuilder};

const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Adds the tokenizer and the chat template of the folder `dir` to `file`, filled up to `vocab_size` tokens.
/// `tokenizer` is that of the folder.
///
/// # Errors
/// If the tokenizer is of a kind that GGUF has no name for, or has more tokens than that.
pub(crate) fn add_tokenizer(
    dir: &Path,
    tokenizer: &Tokenizer,
    vocab_size: usize,
    file: &mut GgufBuilder,
) -> Result<(), ModelError> {
    let path = dir.join(TOKENIZER_FILE);
    let text = read_text(&path, MAX_TOKENIZER_BYTES)?;
    let json: Value = serde_json::from_str(&text).map_err(|source| ModelError::json(&path, source))?;
    let config = read_tokenizer_config(dir)?;
    add_json(&json, vocab_size, file)
        .map_err(|reason| ModelError::Tokenizer { path: path.clone(), reason })?;
    let token = |key: &str| -> Option<u32> {
        let value = config.get(key)?;
        let text = value.as_str().or_else(|| value["content"].as_str())?;
        tokenizer.token_to_id(text)
    };
    // What the tokenizer begins a text with is the file's word on that, whatever its configuration says.
    let begins = |special: bool| tokenizer.encode("a", special).map(|ids| ids.first().copied());
    let first = begins(true)?.filter(|_| begins(true).ok() != begins(false).ok());
    for (key, id) in [
        ("bos", first.or_else(|| token("bos_token"))),
        ("eos", token("eos_token")),
        ("padding", token("pad_token")),
        ("unknown", json["model"]["unk_token"].as_str().and_then(|text| tokenizer.token_to_id(text))),
    ] {
        if let Some(id) = id {
            file.u32(&format!("tokenizer.ggml.{key}_token_id"), id);
        }
    }
    file.bool("tokenizer.ggml.add_bos_token", first.is_some());
    add_templates(dir, file)
}

/// Adds the chat templates of the folder `dir`.
fn add_templates(dir: &Path, file: &mut GgufBuilder) -> Result<(), ModelError> {
    let (_, value) = read_template(dir)?;
    let named: Vec<(&str, &str)> = match &value {
        Value::String(source) => vec![("default", source.as_str())],
        Value::Array(list) => list.iter().filter_map(named_template).collect(),
        _ => vec![],
    };
    let mut others = Vec::new();
    for (name, source) in named {
        match name {
            "default" => file.string("tokenizer.chat_template", source),
            name => {
                others.push(name.to_owned());
                file.string(&format!("tokenizer.chat_template.{name}"), source)
            }
        };
    }
    if !others.is_empty() {
        file.array("tokenizer.chat_templates", ArrayValues::Strings(&others));
    }
    Ok(())
}

/// Adds the tokenizer that `json`, a `tokenizer.json`, describes.
pub(crate) fn add_json(json: &Value, vocab_size: usize, file: &mut GgufBuilder) -> Result<(), String> {
    let model = &json["model"];
    let prefix = space_prefix(json);
    let vocab = model["vocab"].as_object().filter(|_| is_byte_level(json) || prefix.is_some());
    let vocab =
        vocab.ok_or("is neither byte-level BPE nor SentencePiece's; others cannot be written to GGUF")?;
    let mut tokens: Vec<String> = (0..vocab_size).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![UNUSED; vocab_size];
    let mut place = |id: Option<u64>, text: &str, kind: i32| -> Result<(), String> {
        let id = id.and_then(|id| usize::try_from(id).ok()).filter(|id| *id < vocab_size);
        let id = id.ok_or_else(|| format!("token {text:?} does not fit in {vocab_size} rows"))?;
        (tokens[id], types[id]) = (text.to_owned(), kind);
        Ok(())
    };
    let unknown = model["unk_token"].as_str();
    for (text, id) in vocab {
        let is_byte = prefix.is_some() && text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
        let kind = if is_byte { BYTE } else { NORMAL };
        place(id.as_u64(), text, kind)?;
    }
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let kind = match token["special"] == true {
            true if token["content"].as_str() == unknown => UNKNOWN,
            true => CONTROL,
            false => USER_DEFINED,
        };
        place(token["id"].as_u64(), token["content"].as_str().unwrap_or_default(), kind)?;
    }
    let merges = model["merges"].as_array().into_iter().flatten();
    let merges: Vec<String> = merges
        .map(|merge| match merge {
            Value::Array(parts) => parts.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
            other => other.as_str().unwrap_or_default().to_owned(),
        })
        .collect();
    file.array("tokenizer.ggml.tokens", ArrayValues::Strings(&tokens))
        .array("tokenizer.ggml.token_type", ArrayValues::I32(&types));
    if let Some(prefix) = prefix {
        file.string("tokenizer.ggml.model", "llama")
            .array("tokenizer.ggml.scores", ArrayValues::F32(&scores(&tokens, &merges)))
            .bool("tokenizer.ggml.add_space_prefix", prefix);
        return Ok(());
    }
    let pre = PreTokenizer::name_of(&split_patterns(&json["pre_tokenizer"]))
        .ok_or("cuts text in a way that GGUF has no name for")?;
    file.string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", pre)
        .array("tokenizer.ggml.merges", ArrayValues::Strings(&merges));
    Ok(())
}

/// SentencePiece merges what has the best score first, byte-pair merging what stands first in the list: a
/// token's score is its first merge's place, and the worst without one.
fn scores(tokens: &[String], merges: &[String]) -> Vec<f32> {
    let mut place = HashMap::new();
    for (index, merge) in merges.iter().enumerate() {
        place.entry(merge.replacen(' ', "", 1)).or_insert(index);
    }
    tokens.iter().map(|token| -(place.get(token).copied().unwrap_or(merges.len()) as f32)).collect()
}

/// Of a byte-pair merging with SentencePiece's sign for spaces and bytes for what it does not know: true if a
/// text begins with a space that is not there. `None` if `json` is none.
fn space_prefix(json: &Value) -> Option<bool> {
    if json["model"]["type"] != "BPE" || json["model"]["byte_fallback"] != true {
        return None;
    }
    let steps = |value: &Value, list: &str| -> Vec<Value> {
        value[list].as_array().cloned().unwrap_or_else(|| vec![value.clone()])
    };
    let normal = steps(&json["normalizer"], "normalizers");
    let kinds: Vec<&str> = normal.iter().filter_map(|step| step["type"].as_str()).collect();
    let pre = &json["pre_tokenizer"];
    match (kinds.as_slice(), pre["type"].as_str()) {
        (["Prepend", "Replace"], None) => Some(true),
        (["Replace"], None | Some("Split")) => Some(false),
        ([], Some("Metaspace")) => Some(pre["prepend_scheme"] != "never"),
        _ => None,
    }
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
