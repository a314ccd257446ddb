//! Folders written as GGUF files: what comes out computes the logits that transformers computed for the folder,
//! with its tokenizer, its chat template and its end tokens; and what GGUF cannot say is refused.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Value, json};
use tandem_models::export::to_gguf;
use tandem_models::{BackendKind, ChatTemplate, Checkpoint, Dtype, FileType, Tokenizer};

mod support;

/// As in `golden.rs`: f32 sums in another order, and factors of the rotation that were written as f32.
const TOLERANCE: f32 = 1e-4;

fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// A byte-level tokenizer that fits the vocabulary of 64.
fn byte_level() -> Value {
    let mut tokens: Vec<String> = ["<|pad|>", "<|bos|>", "<|eos|>"].map(str::to_owned).into();
    tokens.extend(('a'..='z').map(|c| c.to_string()));
    tokens.extend(["Ġ", "Ċ", "0", "1", "(", ")", "in", "Ġin", "re"].map(str::to_owned));
    json!({
        "model": {"type": "BPE", "vocab": ids(&tokens), "merges": [["i", "n"], ["Ġ", "in"], ["r", "e"]]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "added_tokens": specials(&tokens), "normalizer": null, "post_processor": null, "version": "1.0",
    })
}

/// SentencePiece's kind, with a token before every text.
fn sentence_piece() -> Value {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xE4>"].map(str::to_owned).into();
    tokens.extend(('a'..='z').map(|c| c.to_string()));
    tokens.extend(["▁", "0", "1", "re", "▁re", "ret", "▁ret"].map(str::to_owned));
    let merges = json!([["r", "e"], ["▁", "re"], ["re", "t"], ["▁re", "t"], ["▁", "ret"]]);
    json!({
        "model": {"type": "BPE", "vocab": ids(&tokens), "merges": merges, "byte_fallback": true,
            "fuse_unk": true, "unk_token": "<unk>"},
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "added_tokens": specials(&tokens), "pre_tokenizer": null, "version": "1.0",
    })
}

fn ids(tokens: &[String]) -> Value {
    tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (token.clone(), json!(id)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// The first three.
fn specials(tokens: &[String]) -> Value {
    let special = |(id, content): (usize, &String)| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false})
    };
    tokens[..3].iter().enumerate().map(special).collect()
}

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";

/// A copy of a golden folder with a tokenizer.
fn with_tokenizer(case: &str, tokenizer: &Value, to: &Path) {
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        let from = golden_dir().join(case).join(file);
        if from.exists() {
            std::fs::copy(from, to.join(file)).unwrap();
        }
    }
    std::fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let names = tokenizer["added_tokens"].as_array().unwrap();
    let config = json!({"bos_token": names[1]["content"], "eos_token": names[2]["content"]});
    std::fs::write(to.join("tokenizer_config.json"), config.to_string()).unwrap();
    std::fs::write(to.join("chat_template.jinja"), TEMPLATE).unwrap();
}

fn golden(case: &str) -> (Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(golden_dir().join(case).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> { file.tensor(name).unwrap().data().as_chunks().0.to_vec() };
    (
        words("tokens").into_iter().map(u32::from_le_bytes).collect(),
        words("logits").into_iter().map(f32::from_le_bytes).collect(),
    )
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |worst: f32, (a, b)| worst.max((a - b).abs()))
}

/// Writes `case` as a file of f32 and compares its logits with transformers'; says what is wrong.
fn same_model(case: &str, tokenizer: &Value) -> Result<(), String> {
    let (folder, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    with_tokenizer(case, tokenizer, folder.path());
    // Alone in its folder, so that nothing beside it is read.
    let file = out.path().join("model.gguf");
    to_gguf(folder.path(), FileType::F32, &file).map_err(|error| format!("{case}: {error}"))?;
    let (tokens, wanted) = golden(case);
    let found = support::logits(&Checkpoint::open(&file).unwrap(), BackendKind::Cpu, &tokens);
    let distance = distance(&found, &wanted);
    if distance.is_nan() || distance > TOLERANCE {
        return Err(format!("{case}: logits differ by {distance}"));
    }
    let tokenizers = [folder.path(), &file].map(|path| Tokenizer::from_dir(path).unwrap());
    let text = "return in  return\n0110 ret ä";
    let [wanted, found] = tokenizers.each_ref().map(|tokenizer| tokenizer.encode(text, true).unwrap());
    assert_eq!(wanted, found, "{case}");
    let messages = json!([{"role": "user", "content": "hi"}]);
    let [wanted, found] = [folder.path(), &file].map(|path| {
        let template = ChatTemplate::from_dir(path, &tokenizers[0]).unwrap().expect("a template");
        template.render(&messages, None, true, &serde_json::Map::new()).unwrap()
    });
    assert_eq!(wanted, found, "{case}");
    let ends = [folder.path(), &file].map(|path| Checkpoint::open(path).unwrap().generation.eos_token_ids);
    assert_eq!(ends[0], ends[1], "{case}");
    Ok(())
}

#[test]
fn a_written_file_computes_what_transformers_computed_for_the_folder() {
    let cases = [
        "llama_plain",
        "llama_rope_llama3",
        "llama_biases",
        "llama_head_dim",
        "llama_rope_yarn",
        "qwen2_tied",
        "qwen2_untied",
        "qwen3",
        "granite",
        "phi3_longrope",
        "glm4",
        "deepseek_v2_lite",
        "deepseek_v2",
        "deepseek_v3",
    ];
    let wrong: Vec<String> =
        cases.into_iter().filter_map(|case| same_model(case, &byte_level()).err()).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A rotary scaling that is asked for takes the place of a file's own, the one in a tensor too.
#[test]
fn a_written_file_is_stretched_as_its_folder() {
    let original = r#"{"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32}"#;
    for (case, text) in [("llama_plain", "yarn:4"), ("llama_rope_llama3", original)] {
        let (folder, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        with_tokenizer(case, &byte_level(), folder.path());
        let file = out.path().join("model.gguf");
        to_gguf(folder.path(), FileType::F32, &file).unwrap();
        let rope = text.parse().unwrap();
        let open = |path: &Path| Checkpoint::open_with(path, Some(&rope)).unwrap();
        let [wanted, found] = [folder.path(), &file].map(open);
        assert_eq!(wanted.config.rope.scaling, found.config.rope.scaling, "{case}");
        assert_eq!(wanted.config.max_position_embeddings, found.config.max_position_embeddings, "{case}");
        let (tokens, _) = golden(case);
        let logits =
            [&wanted, &found].map(|checkpoint| support::logits(checkpoint, BackendKind::Cpu, &tokens));
        assert!(distance(&logits[0], &logits[1]) <= TOLERANCE, "{case}");
        if case == "llama_rope_llama3" {
            let error = Checkpoint::open_with(&file, Some(&"yarn:4".parse().unwrap())).unwrap_err();
            assert!(error.to_string().contains("original_max_position_embeddings"), "{error}");
        }
    }
}

#[test]
fn sentence_pieces_are_written_too() {
    same_model("llama_plain", &sentence_piece()).unwrap();
}

/// Whole experts packed by somebody else go into the file as the blocks that they are.
#[test]
fn packed_folders_are_written() {
    for (case, block) in
        [("packed/mxfp4", "MXFP4"), ("packed/gptq_sym", "Q4_0"), ("packed/fp8_block", "BF16")]
    {
        let (folder, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        with_tokenizer(case, &byte_level(), folder.path());
        let file = out.path().join("model.gguf");
        to_gguf(folder.path(), FileType::Bf16, &file).unwrap_or_else(|error| panic!("{case}: {error}"));
        let checkpoint = Checkpoint::open(&file).unwrap();
        let names = checkpoint.weights.names();
        let types = |name: &String| checkpoint.weights.tensor(name).unwrap().dtype.name();
        assert!(names.iter().any(|name| types(name) == block), "{case}");
        let (tokens, wanted) = golden(case);
        let found = distance(&support::logits(&checkpoint, BackendKind::Reference, &tokens), &wanted);
        assert!(found <= TOLERANCE, "{case}: {found}");
    }
}

#[test]
fn what_gguf_cannot_say_is_refused() {
    for (case, what) in [
        ("mistral_window", "window"),
        ("starcoder2", "window"),
        ("qwen2_window", "window"),
        ("llama_rope_dynamic", "dynamic scaling"),
        ("qwen3_moe", "dense"),
        // Options that these families' published models do not set otherwise.
        ("gemma2", "0.2236"),
        ("olmo2", "qkv_bias"),
        ("gpt_oss", "limit: 1.5"),
        ("deepseek_v3_half_split", "interleaved: false"),
    ] {
        let (folder, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        with_tokenizer(case, &byte_level(), folder.path());
        let error =
            to_gguf(folder.path(), FileType::F32, &out.path().join("model.gguf")).unwrap_err().to_string();
        assert!(error.contains(what), "{case}: {error}");
    }
}

#[test]
fn a_folder_without_what_a_file_needs_is_refused() {
    let (folder, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    with_tokenizer(
        "llama_plain",
        &json!({"added_tokens": specials(&["a", "b", "c"].map(str::to_owned))}),
        folder.path(),
    );
    let error =
        to_gguf(folder.path(), FileType::Q8_0, &out.path().join("model.gguf")).unwrap_err().to_string();
    assert!(error.contains("tokenizer"), "{error}");
}

#[test]
fn matrices_are_of_the_kind_that_was_asked_for() {
    let (folder, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    with_tokenizer("qwen2_tied", &byte_level(), folder.path());
    let file = out.path().join("model.gguf");
    let (before, after) = to_gguf(folder.path(), FileType::Q8_0, &file).unwrap();
    assert!(after < before, "{before} to {after}");
    let checkpoint = Checkpoint::open(&file).unwrap();
    let dtype = |name: &str| checkpoint.weights.tensor(name).unwrap().dtype;
    assert_eq!(dtype("blk.0.attn_q.weight").name(), "Q8_0");
    // Rows of 40 are not whole blocks.
    assert_eq!(dtype("blk.0.ffn_down.weight"), Dtype::F16);
    assert_eq!(dtype("blk.0.attn_norm.weight"), Dtype::F32);
}
