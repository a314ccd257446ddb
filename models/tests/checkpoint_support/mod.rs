//! Tiny checkpoint folders, made on the spot.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tokenizers::models::bpe::BpeTrainerBuilder;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

/// `config.json` of a Llama of width 8; `vocab_size` as given.
pub(crate) fn llama_config(vocab_size: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": vocab_size,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    })
}

/// A safetensors file with the given f32 tensors, all zero.
pub(crate) fn safetensors_bytes(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let data: BTreeMap<&str, Vec<u8>> =
        tensors.iter().map(|(name, shape)| (*name, vec![0; 4 * shape.iter().product::<usize>()])).collect();
    let views = tensors.iter().map(|(name, shape)| {
        (*name, TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &data[name]).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// `tokenizer.json` of a byte-level BPE with a few merges; `special` become special tokens.
pub(crate) fn byte_level_tokenizer(special: &[&str]) -> String {
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(300)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special.iter().map(|token| AddedToken::from(*token, true)).collect())
        .build();
    let mut tokenizer = TokenizerBuilder::<_, tokenizers::NormalizerWrapper, _, _, _>::new()
        .with_model(tokenizers::models::bpe::BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)))
        .with_post_processor(Some(ByteLevel::default()))
        .with_decoder(Some(ByteLevel::default()))
        .build()
        .unwrap();
    let corpus = ["def add(a, b): return a + b", "the theory then the thing", "größer 漢字 漢字 😀😀"];
    tokenizer.train(&mut trainer, corpus.iter()).unwrap();
    tokenizer.to_string(false).unwrap()
}

/// `tokenizer.json` as converted from a Llama 2 SentencePiece model: bytes `<0xNN>` and a few pieces.
pub(crate) fn byte_fallback_tokenizer() -> String {
    let mut vocab: serde_json::Map<String, Value> = serde_json::Map::new();
    let pieces = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter();
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    let letters = ["▁", "a", "b", "é", "▁a", "ab", "▁ab", "漢"].map(str::to_owned);
    for piece in pieces.chain(bytes).chain(letters) {
        let id = vocab.len();
        vocab.insert(piece, id.into());
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                  "merges": [["▁", "a"], ["a", "b"], ["▁a", "b"]]},
    })
    .to_string()
}

/// Writes a whole checkpoint that opens: config, one tensor, tokenizer.
pub(crate) fn write_checkpoint(dir: &Path, vocab_size: usize, special: &[&str]) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), llama_config(vocab_size).to_string()).unwrap();
    std::fs::write(dir.join("tokenizer.json"), byte_level_tokenizer(special)).unwrap();
    let weights = safetensors_bytes(&[("model.embed_tokens.weight", &[vocab_size, 8])]);
    std::fs::write(dir.join("model.safetensors"), weights).unwrap();
}
