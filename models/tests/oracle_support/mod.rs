//! Random tiny checkpoints for the oracle tests, written as a user's would be: a folder with
//! `config.json` and `model.safetensors`.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// A shape small enough to run in milliseconds; `changes` are laid over it.
pub(crate) fn config(model_type: &str, changes: Value) -> Value {
    let architecture = if model_type == "qwen2" { "Qwen2ForCausalLM" } else { "LlamaForCausalLM" };
    let mut config = json!({
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": true,
        "eos_token_id": 0,
    });
    let fields = config.as_object_mut().unwrap();
    fields.extend(changes.as_object().unwrap().clone());
    config
}

/// Writes a random checkpoint of shape `config` into `dir`.
pub(crate) fn write_checkpoint(dir: &Path, config: &Value, dtype: Dtype, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes(config)
        .into_iter()
        .map(|(name, shape)| {
            let bytes = random(&mut rng, &name, &shape, dtype);
            (name, shape, bytes)
        })
        .collect();
    let views: BTreeMap<&str, TensorView<'_>> = tensors
        .iter()
        .map(|(name, shape, bytes)| (name.as_str(), TensorView::new(dtype, shape.clone(), bytes).unwrap()))
        .collect();
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// Names and shapes of all tensors.
pub(crate) fn shapes(config: &Value) -> Vec<(String, Vec<usize>)> {
    let size = |key: &str| config[key].as_u64().unwrap() as usize;
    let flag = |key: &str| config[key].as_bool().unwrap_or(false);
    let (hidden, ffn, vocab) = (size("hidden_size"), size("intermediate_size"), size("vocab_size"));
    let head_dim = hidden / size("num_attention_heads");
    let kv = head_dim * size("num_key_value_heads");
    let qkv_bias = flag("attention_bias") || config["model_type"] == "qwen2";

    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if !flag("tie_word_embeddings") {
        shapes.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
    }
    for layer in 0..size("num_hidden_layers") {
        let mut add = |role: &str, out: usize, inp: usize, bias: bool| {
            let name = format!("model.layers.{layer}.{role}");
            shapes.push((format!("{name}.weight"), vec![out, inp]));
            if bias {
                shapes.push((format!("{name}.bias"), vec![out]));
            }
        };
        add("self_attn.q_proj", hidden, hidden, qkv_bias);
        add("self_attn.k_proj", kv, hidden, qkv_bias);
        add("self_attn.v_proj", kv, hidden, qkv_bias);
        add("self_attn.o_proj", hidden, hidden, flag("attention_bias"));
        add("mlp.gate_proj", ffn, hidden, flag("mlp_bias"));
        add("mlp.up_proj", ffn, hidden, flag("mlp_bias"));
        add("mlp.down_proj", hidden, ffn, flag("mlp_bias"));
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("model.layers.{layer}.{norm}.weight"), vec![hidden]));
        }
    }
    shapes
}

/// Random elements of a size that makes every tensor matter for the logits.
fn random(rng: &mut StdRng, name: &str, shape: &[usize], dtype: Dtype) -> Vec<u8> {
    let (mean, spread) = if name.ends_with("norm.weight") {
        (1.0, 0.3)
    } else if name.ends_with("bias") {
        (0.0, 0.5)
    } else if name.contains("embed_tokens") || name.contains("lm_head") {
        (0.0, 0.7)
    } else {
        (0.0, 2.0 / (shape[1] as f32).sqrt())
    };
    let elements = shape.iter().product::<usize>();
    let mut bytes = Vec::new();
    for _ in 0..elements {
        let value = mean + spread * rng.random_range(-1.0f32..1.0);
        match dtype {
            Dtype::F32 => bytes.extend(value.to_le_bytes()),
            Dtype::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
            Dtype::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
            other => panic!("no random tensors of type {other:?}"),
        }
    }
    bytes
}

/// `len` random tokens below `vocab_size`.
pub(crate) fn random_tokens(seed: u64, len: usize, vocab_size: usize) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(0..vocab_size as u32)).collect()
}
