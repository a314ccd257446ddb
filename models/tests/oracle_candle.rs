//! Logits against candle-transformers' own Llama and Qwen2, which share no code with ours: random
//! checkpoints, prompt in one pass, then token by token.

mod oracle_support;

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, qwen2};
use oracle_support::{config, random_tokens, write_checkpoint};
use serde_json::{Value, json};
use tandem_kernels::ThreadPool;
use tandem_models::backend::BackendKind;
use tandem_models::{Checkpoint, ForwardBatch, Model};

const TOLERANCE: f32 = 1e-4;
const BLOCK_SIZE: usize = 16;
const NUM_PROMPT_TOKENS: usize = 41;
const NUM_TOKENS: usize = 49;

/// Logits after the prompt and after each token that follows it.
type Oracle = fn(&Path, &Value, &[u32]) -> Vec<Vec<f32>>;

fn tensors(dir: &Path) -> VarBuilder<'static> {
    let tensors = candle_core::safetensors::load(dir.join("model.safetensors"), &Device::Cpu).unwrap();
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

fn steps(tokens: &[u32], mut forward: impl FnMut(&Tensor, usize) -> Tensor) -> Vec<Vec<f32>> {
    let mut step = |start: usize, end: usize| {
        let ids = Tensor::new(&tokens[start..end], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        forward(&ids, start).flatten_all().unwrap().to_vec1().unwrap()
    };
    let prompt = step(0, NUM_PROMPT_TOKENS);
    std::iter::once(prompt).chain((NUM_PROMPT_TOKENS..tokens.len()).map(|at| step(at, at + 1))).collect()
}

fn candle_llama(dir: &Path, config: &Value, tokens: &[u32]) -> Vec<Vec<f32>> {
    let config: llama::LlamaConfig = serde_json::from_value(config.clone()).unwrap();
    let config = config.into_config(false);
    let model = llama::Llama::load(tensors(dir), &config).unwrap();
    let mut cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
    steps(tokens, |ids, start| model.forward(ids, start, &mut cache).unwrap())
}

fn candle_qwen2(dir: &Path, config: &Value, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut config = config.clone();
    // Candle wants these keys; they switch off what we refuse to load.
    config["use_sliding_window"] = json!(false);
    config["sliding_window"] = json!(4096);
    config["max_window_layers"] = json!(0);
    let config: qwen2::Config = serde_json::from_value(config).unwrap();
    let mut model = qwen2::ModelForCausalLM::new(&config, tensors(dir)).unwrap();
    steps(tokens, |ids, start| model.forward(ids, start).unwrap())
}

fn ours(model: &mut dyn Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let num_blocks = tokens.len().div_ceil(BLOCK_SIZE);
    model.allocate_kv_cache(num_blocks, BLOCK_SIZE).unwrap();
    let block_table: Vec<u32> = (0..num_blocks as u32).collect();
    let mut batch = ForwardBatch::new();
    let mut step = |start: usize, end: usize| {
        batch.clear();
        batch.push_sequence(&tokens[start..end], start, &block_table, BLOCK_SIZE, 1);
        let mut logits = Vec::new();
        model.forward(&batch, &mut logits).unwrap();
        logits
    };
    let prompt = step(0, NUM_PROMPT_TOKENS);
    std::iter::once(prompt).chain((NUM_PROMPT_TOKENS..tokens.len()).map(|at| step(at, at + 1))).collect()
}

fn compare(oracle: Oracle, config: &Value) {
    for seed in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(dir.path(), config, safetensors::Dtype::F32, seed);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let tokens = random_tokens(seed + 100, NUM_TOKENS, checkpoint.config.vocab_size);
        let wanted = oracle(dir.path(), config, &tokens);
        for kind in [BackendKind::Cpu, BackendKind::Reference] {
            let mut model = tandem_models::load(&checkpoint, kind, Arc::new(ThreadPool::new(2))).unwrap();
            for (step, (found, wanted)) in ours(model.as_mut(), &tokens).iter().zip(&wanted).enumerate() {
                assert_eq!(found.len(), wanted.len());
                let diff = found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(diff <= TOLERANCE, "{kind:?}, seed {seed}, step {step}: logits differ by {diff}");
                // The tolerance means something only if the logits are not all near zero.
                assert!(wanted.iter().any(|logit| logit.abs() > 1.0));
            }
        }
    }
}

#[test]
fn llama_with_grouped_queries_and_tied_head() {
    compare(candle_llama, &config("llama", json!({})));
}

#[test]
fn llama_with_one_query_per_key_and_its_own_head() {
    let changes = json!({"num_key_value_heads": 4, "tie_word_embeddings": false, "rms_norm_eps": 1e-5});
    compare(candle_llama, &config("llama", changes));
}

#[test]
fn llama_with_stretched_rotary_frequencies() {
    let scaling = json!({
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    });
    compare(candle_llama, &config("llama", json!({"rope_scaling": scaling, "rope_theta": 500.0})));
}

#[test]
fn qwen2_with_tied_head() {
    compare(candle_qwen2, &config("qwen2", json!({})));
}

#[test]
fn qwen2_with_one_key_for_all_queries_and_its_own_head() {
    let changes = json!({"num_key_value_heads": 1, "tie_word_embeddings": false, "rope_theta": 1e6});
    compare(candle_qwen2, &config("qwen2", changes));
}
