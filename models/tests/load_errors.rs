//! A checkpoint or a request that does not fit is an error that names what was found and what was
//! wanted, before anything large is allocated.

mod oracle_support;

use std::sync::Arc;

use oracle_support::{config, random_tokens, write_checkpoint};
use safetensors::Dtype;
use serde_json::{Value, json};
use tandem_kernels::ThreadPool;
use tandem_models::backend::BackendKind;
use tandem_models::verify::compare;
use tandem_models::{Checkpoint, ForwardBatch, Model, ModelError};

/// Loads a checkpoint whose tensors are those of `written` but whose `config.json` is `claimed`.
fn load(written: &Value, claimed: &Value, kind: BackendKind) -> Result<Box<dyn Model>, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), written, Dtype::BF16, 1);
    std::fs::write(dir.path().join("config.json"), claimed.to_string()).unwrap();
    let checkpoint = Checkpoint::open(dir.path())?;
    tandem_models::load(&checkpoint, kind, Arc::new(ThreadPool::new(1)))
}

#[test]
fn a_config_that_is_not_the_checkpoints_names_tensor_found_and_wanted() {
    let written = config("llama", json!({}));
    let cases = [
        (json!({"vocab_size": 97}), "model.embed_tokens.weight", "[96, 64]", "[97, 64]"),
        (json!({"intermediate_size": 1 << 20}), "mlp.gate_proj.weight", "[88, 64]", "[1048576, 64]"),
        (json!({"num_key_value_heads": 4}), "layers.0.self_attn.k_proj.weight", "[32, 64]", "[64, 64]"),
        (json!({"head_dim": 32}), "layers.0.self_attn.q_proj.weight", "[64, 64]", "[128, 64]"),
    ];
    for (changes, name, found, wanted) in cases {
        for kind in [BackendKind::Cpu, BackendKind::Reference] {
            let message = load(&written, &config("llama", changes.clone()), kind).err().unwrap().to_string();
            for part in [name, found, wanted] {
                assert!(message.contains(part), "{message:?} lacks {part}");
            }
        }
    }
}

/// Found by fuzzing: the rotary frequencies of such a head took megabytes before any tensor was looked at.
#[test]
fn a_head_of_a_size_that_no_model_has_is_refused() {
    let written = config("llama", json!({}));
    for changes in [
        json!({"hidden_size": 1 << 20, "num_attention_heads": 2, "num_key_value_heads": 2}),
        json!({"head_dim": 1 << 14}),
    ] {
        let claimed = config("llama", changes.clone());
        let message = load(&written, &claimed, BackendKind::Cpu).err().unwrap().to_string();
        let key = if changes.get("head_dim").is_some() { "head_dim" } else { "hidden_size" };
        assert!(message.contains(key) && message.contains("576"), "{message}");
    }
}

#[test]
fn a_missing_tensor_is_named() {
    let written = config("llama", json!({}));
    let cases = [
        (json!({"num_hidden_layers": 4000}), "model.layers.3.input_layernorm.weight"),
        (json!({"tie_word_embeddings": false}), "lm_head.weight"),
        (json!({"attention_bias": true}), "model.layers.0.self_attn.q_proj.bias"),
    ];
    for (changes, name) in cases {
        let error = load(&written, &config("llama", changes), BackendKind::Cpu).err().unwrap();
        assert!(matches!(&error, ModelError::MissingTensor { name: found, .. } if found == name), "{error}");
    }
}

#[test]
fn a_kv_cache_that_does_not_fit_is_refused() {
    let shape = config("llama", json!({}));
    for kind in [BackendKind::Cpu, BackendKind::Reference] {
        let mut model = load(&shape, &shape, kind).unwrap();
        for (num_blocks, block_size) in [(0, 16), (16, 0), (usize::MAX, 16), (1 << 30, 16)] {
            assert!(model.allocate_kv_cache(num_blocks, block_size).is_err(), "{num_blocks} x {block_size}");
        }
    }
}

#[test]
fn a_pass_without_a_cache_or_past_the_context_is_refused() {
    let shape = config("llama", json!({"max_position_embeddings": 20}));
    let mut model = load(&shape, &shape, BackendKind::Cpu).unwrap();
    let mut batch = ForwardBatch::new();
    let mut logits = vec![1.0];
    batch.push_sequence(&[1, 2], 0, &[0], 16, 1);
    let message = model.forward(&batch, &mut logits).unwrap_err().to_string();
    assert!(message.contains("allocate_kv_cache"), "{message}");

    model.allocate_kv_cache(4, 16).unwrap();
    model.forward(&batch, &mut logits).unwrap();
    assert_eq!(logits.len(), 96);
    batch.clear();
    batch.push_sequence(&[1], 20, &[0, 1], 16, 1);
    let message = model.forward(&batch, &mut logits).unwrap_err().to_string();
    assert!(message.contains("context of 21 tokens; at most 20"), "{message}");
    batch.clear();
    model.forward(&batch, &mut logits).unwrap();
    assert!(logits.is_empty(), "an empty pass has no logits");
}

#[test]
fn verify_finds_the_backends_equal_and_another_model_different() {
    let shape = config("qwen2", json!({}));
    let mut fast = load(&shape, &shape, BackendKind::Cpu).unwrap();
    let mut reference = load(&shape, &shape, BackendKind::Reference).unwrap();
    let prompt = random_tokens(3, 70, 96);
    let same = compare(fast.as_mut(), reference.as_mut(), &prompt, 9).unwrap();
    assert_eq!((same.num_positions, same.num_argmax_agreements), (79, 79));
    assert!(same.max_abs_diff < 1e-4 && same.max_abs_logit > 1.0, "{same:?}");
    assert_eq!(same.first_disagreement, None);

    let untied = config("qwen2", json!({"tie_word_embeddings": false}));
    let mut other = load(&untied, &untied, BackendKind::Reference).unwrap();
    let different = compare(fast.as_mut(), other.as_mut(), &prompt, 2).unwrap();
    assert!(different.max_abs_diff > 0.1 && different.first_disagreement.is_some(), "{different:?}");
    assert!(compare(fast.as_mut(), other.as_mut(), &[], 2).is_err());
}
