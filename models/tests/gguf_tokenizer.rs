//! Tokenizers inside GGUF files: the same ids, bytes and roles as the `tokenizer.json` they were made of.
//! (Published vocabularies are in `gguf_vocabularies.rs`.)

mod checkpoint_support;

use std::path::Path;

use checkpoint_support::{byte_fallback_tokenizer, byte_level_tokenizer};
use serde_json::{Map, Value, json};
use tandem_models::weights::gguf::{ArrayValues, GgufBuilder};
use tandem_models::{ChatTemplate, Tokenizer};

const TEXTS: [&str; 9] = [
    "",
    " ",
    "def add(a, b): return a + b",
    "the theory\n\n  then 123 the thing",
    "größer 漢字 😀",
    "a ab  aab é漢 b",
    "it's I'll\tx",
    "<s>a</s>",
    "a<|x|>b",
];

/// The vocabulary of a `tokenizer.json` by id, and the types GGUF gives its tokens.
fn vocabulary(json: &Value) -> (Vec<String>, Vec<i32>) {
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    for (text, id) in vocab {
        tokens[id.as_u64().unwrap() as usize] = text.clone();
    }
    let mut types: Vec<i32> =
        tokens.iter().map(|token| if token.starts_with("<0x") { 6 } else { 1 }).collect();
    for token in json["added_tokens"].as_array().unwrap() {
        let id = token["id"].as_u64().unwrap() as usize;
        if id >= tokens.len() {
            tokens.resize(id + 1, String::new());
            types.resize(id + 1, 1);
        }
        tokens[id] = token["content"].as_str().unwrap().to_owned();
        types[id] = if tokens[id] == "<unk>" { 2 } else { 3 };
    }
    (tokens, types)
}

fn byte_level_file(json: &Value, pre: &str) -> GgufBuilder {
    let (mut tokens, mut types) = vocabulary(json);
    // What converters fill the embedding's rows with.
    for id in tokens.len()..tokens.len() + 3 {
        tokens.push(format!("[PAD{id}]"));
        types.push(4);
    }
    let merges: Vec<String> = json["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()))
        .collect();
    let mut file = GgufBuilder::new();
    file.string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", pre)
        .array("tokenizer.ggml.tokens", ArrayValues::Strings(&tokens))
        .array("tokenizer.ggml.token_type", ArrayValues::I32(&types))
        .array("tokenizer.ggml.merges", ArrayValues::Strings(&merges));
    file
}

fn save(folder: &Path, file: GgufBuilder) -> std::path::PathBuf {
    let path = folder.join("model.gguf");
    std::fs::write(&path, file.begin(Vec::new()).unwrap().finish().unwrap()).unwrap();
    path
}

fn open_json(json: &str) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json).unwrap();
    Tokenizer::from_dir(folder.path()).unwrap()
}

fn assert_same(found: &Tokenizer, wanted: &Tokenizer) {
    assert_eq!(found.vocab_size(), wanted.vocab_size());
    for id in 0..wanted.vocab_size() as u32 {
        assert_eq!(found.id_to_token(id), wanted.id_to_token(id), "{id}");
        assert_eq!(found.token_bytes(id), wanted.token_bytes(id), "{id}");
        assert_eq!(found.is_special(id), wanted.is_special(id), "{id}");
    }
    for text in TEXTS {
        let ids = wanted.encode(text, false).unwrap();
        assert_eq!(found.encode(text, false).unwrap(), ids, "{text:?}");
        assert_eq!(
            found.encode_text(text, false).unwrap(),
            wanted.encode_text(text, false).unwrap(),
            "{text:?}"
        );
        assert_eq!(found.decode(&ids, false).unwrap(), wanted.decode(&ids, false).unwrap(), "{text:?}");
    }
}

#[test]
fn byte_level_is_as_in_tokenizer_json() {
    let source = byte_level_tokenizer(&["<|end|>", "<|x|>"]);
    let json: Value = serde_json::from_str(&source).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), byte_level_file(&json, "gpt-2"));
    assert_same(&Tokenizer::from_dir(&path).unwrap(), &open_json(&source));
}

#[test]
fn sentence_piece_is_as_in_tokenizer_json() {
    let source = byte_fallback_tokenizer();
    let json: Value = serde_json::from_str(&source).unwrap();
    let (tokens, types) = vocabulary(&json);
    // Merges in the order of that file: "▁a", "ab", "▁ab".
    let score = |token: &String| match token.as_str() {
        "▁a" => -1.0,
        "ab" => -2.0,
        "▁ab" => -3.0,
        _ => -100.0,
    };
    let scores: Vec<f32> = tokens.iter().map(score).collect();
    let mut file = GgufBuilder::new();
    file.string("tokenizer.ggml.model", "llama")
        .array("tokenizer.ggml.tokens", ArrayValues::Strings(&tokens))
        .array("tokenizer.ggml.scores", ArrayValues::F32(&scores))
        .array("tokenizer.ggml.token_type", ArrayValues::I32(&types))
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2);
    let folder = tempfile::tempdir().unwrap();
    let found = Tokenizer::from_dir(&save(folder.path(), file)).unwrap();
    assert_same(&found, &open_json(&source));
    assert_eq!((found.bos_token(), found.eos_token()), (Some("<s>"), Some("</s>")));
    // This kind begins every text with its token unless the file says otherwise.
    let plain = found.encode("ab", false).unwrap();
    assert_eq!(found.encode("ab", true).unwrap(), [&[1], plain.as_slice()].concat());
}

#[test]
fn files_beside_the_model_win_over_what_is_in_it() {
    let source = byte_level_tokenizer(&["<|end|>"]);
    let json: Value = serde_json::from_str(&source).unwrap();
    let mut file = byte_level_file(&json, "gpt-2");
    file.u32("tokenizer.ggml.eos_token_id", json["added_tokens"][0]["id"].as_u64().unwrap() as u32)
        .string("tokenizer.chat_template", "inner {{ messages[0].content }}{{ eos_token }}");
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), file);
    let render = || {
        let tokenizer = Tokenizer::from_dir(&path).unwrap();
        let template = ChatTemplate::from_dir(&path, &tokenizer).unwrap().unwrap();
        template.render(&json!([{"role": "user", "content": "x"}]), None, false, &Map::new()).unwrap()
    };
    assert_eq!(render(), "inner x<|end|>");
    std::fs::write(folder.path().join("chat_template.jinja"), "outer {{ messages[0].content }}").unwrap();
    assert_eq!(render(), "outer x");
    std::fs::write(folder.path().join("tokenizer.json"), byte_fallback_tokenizer()).unwrap();
    assert_eq!(Tokenizer::from_dir(&path).unwrap().token_to_id("<0x0A>"), Some(13));
}

#[test]
fn what_does_not_fit_together_is_named() {
    let json: Value = serde_json::from_str(&byte_level_tokenizer(&[])).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let message =
        |file: GgufBuilder| Tokenizer::from_dir(&save(folder.path(), file)).unwrap_err().to_string();
    let found = message(byte_level_file(&json, "of-my-own"));
    assert!(found.contains("`tokenizer.ggml.pre` is \"of-my-own\"") && found.contains("qwen2"), "{found}");
    assert!(message(GgufBuilder::new()).contains("`tokenizer.ggml.tokens` is absent"));
    let broken = |merges: &[&str], types: &[i32]| {
        let strings = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let mut file = GgufBuilder::new();
        file.string("tokenizer.ggml.model", "gpt2")
            .string("tokenizer.ggml.pre", "gpt-2")
            .array("tokenizer.ggml.tokens", ArrayValues::Strings(&strings(&["a", "b", "ab", "abab"])))
            .array("tokenizer.ggml.token_type", ArrayValues::I32(types))
            .array("tokenizer.ggml.merges", ArrayValues::Strings(&strings(merges)));
        message(file)
    };
    // The second would be read beyond the longest token.
    for merges in [&["a b", "b a"], &["a b", "abab abab"], &["a b", "ab"], &["a b", ""]] {
        let found = broken(merges, &[1, 1, 1, 1]);
        assert!(
            found.contains("merge 1 is not") && found.contains("two tokens that make a third"),
            "{found}"
        );
    }
    assert!(broken(&["a b"], &[1, 1]).contains("one for each of the 4 tokens"));
    assert!(broken(&["a b"], &[1, 1, 1, 9]).contains("token 3 has 9"));
}
