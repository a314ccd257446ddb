//! Logits against candle-transformers' models of the families beyond Llama and Qwen2, on the weights of
//! the golden checkpoints. What candle's models do not have (windows as transformers has them, LongRoPE)
//! is switched off in `config.json` for both sides; the goldens hold those. Its Granite has none of the
//! factors that make a Granite, and its Gemma 3 fails in its own cache without flash attention.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{
    deepseek2, gemma2, glm4_new, mistral, olmo2, phi3, qwen3, qwen3_moe, starcoder2,
};
use serde_json::{Map, Value, json};
use tandem_kernels::ThreadPool;
use tandem_models::backend::BackendKind;
use tandem_models::{Checkpoint, ForwardBatch};

/// Both sides sum in f32, in different orders; logits are about 15 at most.
const TOLERANCE: f32 = 1e-4;
const BLOCK_SIZE: usize = 16;
const NUM_PROMPT_TOKENS: usize = 41;
const NUM_TOKENS: usize = 49;

type Forward = Box<dyn FnMut(&Tensor, usize) -> Result<Tensor>>;

/// The weights of golden checkpoint `case` under its `config.json` with `changes` laid over it; a null
/// takes a key away.
fn folder(case: &str, changes: Value) -> (tempfile::TempDir, Value) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case);
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(golden.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let text = std::fs::read_to_string(golden.join("config.json")).unwrap();
    let mut config: Map<String, Value> = serde_json::from_str(&text).unwrap();
    // Candle reads the older form.
    config.remove("rope_parameters");
    config.insert("rope_theta".to_owned(), json!(10_000.0));
    config.extend(changes.as_object().unwrap().clone());
    config.retain(|_, value| !value.is_null());
    let config = Value::Object(config);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    (dir, config)
}

fn compare(case: &str, changes: Value, oracle: fn(Value, VarBuilder<'static>) -> Result<Forward>) {
    let (dir, config) = folder(case, changes);
    let tensors = candle_core::safetensors::load(dir.path().join("model.safetensors"), &Device::Cpu).unwrap();
    let mut oracle = oracle(config, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let tokens: Vec<u32> = (0..NUM_TOKENS as u32).map(|i| (i * i * 7 + i * 3 + 1) % 64).collect();
    for (kind, threads) in [(BackendKind::Cpu, 2), (BackendKind::Reference, 1)] {
        let mut model = tandem_models::load(&checkpoint, kind, Arc::new(ThreadPool::new(threads))).unwrap();
        let num_blocks = NUM_TOKENS.div_ceil(BLOCK_SIZE);
        model.allocate_kv_cache(num_blocks, BLOCK_SIZE).unwrap();
        let block_table: Vec<u32> = (0..num_blocks as u32).collect();
        let (mut batch, mut found) = (ForwardBatch::new(), Vec::new());
        let steps = std::iter::once((0, NUM_PROMPT_TOKENS));
        for (start, end) in steps.chain((NUM_PROMPT_TOKENS..NUM_TOKENS).map(|at| (at, at + 1))) {
            batch.clear();
            batch.push_sequence(&tokens[start..end], start, &block_table, BLOCK_SIZE, 1);
            model.forward(&batch, &mut found).unwrap();
            let ids = Tensor::new(&tokens[start..end], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            // An offset of 0 makes candle forget what it has cached.
            let wanted: Vec<f32> = oracle(&ids, start).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(found.len(), wanted.len());
            let diff = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(diff <= TOLERANCE, "{case}, {kind:?}, tokens {start}..{end}: logits differ by {diff}");
            // The tolerance means something only if the logits are not all near zero.
            assert!(wanted.iter().any(|logit| logit.abs() > 1.0));
        }
    }
}

/// An oracle that is made of a configuration and weights and forgets its cache on request.
macro_rules! oracle {
    ($config:ty, $model:ident, $new:expr) => {
        |config, weights| {
            let config: $config = serde_json::from_value(config).unwrap();
            let mut $model = $new(&config, weights)?;
            Ok(Box::new(move |ids: &Tensor, start: usize| {
                if start == 0 {
                    $model.clear_kv_cache();
                }
                $model.forward(ids, start)
            }))
        }
    };
}

#[test]
fn qwen3_is_candles() {
    let changes = json!({"sliding_window": null, "max_window_layers": 2, "use_sliding_window": false});
    compare("qwen3", changes, oracle!(qwen3::Config, model, qwen3::ModelForCausalLM::new));
}

#[test]
fn qwen3_moe_is_candles() {
    let changes = json!({"num_experts": 6, "num_local_experts": null, "max_window_layers": 2,
                         "sliding_window": null, "use_sliding_window": false, "head_dim": 8});
    compare("qwen3_moe_shares", changes, oracle!(qwen3_moe::Config, model, qwen3_moe::ModelForCausalLM::new));
}

#[test]
fn mistral_is_candles() {
    let changes = json!({"sliding_window": null});
    compare("mistral_window", changes, oracle!(mistral::Config, model, mistral::Model::new));
}

#[test]
fn starcoder2_is_candles() {
    let changes = json!({"sliding_window": null});
    compare("starcoder2", changes, oracle!(starcoder2::Config, model, starcoder2::Model::new));
}

#[test]
fn phi3_is_candles() {
    let changes = json!({"sliding_window": null, "partial_rotary_factor": 0.5});
    compare("phi3_longrope", changes, oracle!(phi3::Config, model, phi3::Model::new));
}

#[test]
fn gemma2_is_candles() {
    // Candle scales scores by the width of a head.
    let changes = json!({"sliding_window": 64, "query_pre_attn_scalar": 12});
    compare("gemma2", changes, oracle!(gemma2::Config, model, |c, w| gemma2::Model::new(false, c, w)));
}

#[test]
fn olmo2_is_candles() {
    compare("olmo2", json!({}), oracle!(olmo2::Config, model, olmo2::Model::new));
}

#[test]
fn glm4_is_candles() {
    let changes = json!({"partial_rotary_factor": 0.5});
    compare("glm4", changes, oracle!(glm4_new::Config, model, glm4_new::ModelForCausalLM::new));
}

#[test]
fn deepseek_v2_lite_is_candles() {
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
                      "beta_slow": 1.0, "mscale": 0.9, "mscale_all_dim": 0.4});
    let changes = json!({"n_group": 1, "topk_group": 1, "rope_scaling": yarn});
    compare("deepseek_v2_lite", changes, deepseek_v2);
}

#[test]
fn deepseek_v2_is_candles() {
    // Candle's norms of latents have the epsilon of all, its feed-forward layers no biases, and its choice of
    // groups takes the numbers of experts for those of groups.
    let changes = json!({"rms_norm_eps": 1e-6, "mlp_bias": false, "topk_method": "greedy"});
    compare("deepseek_v2", changes, deepseek_v2);
}

fn deepseek_v2(config: Value, weights: VarBuilder<'static>) -> Result<Forward> {
    let config: deepseek2::DeepSeekV2Config = serde_json::from_value(config).unwrap();
    let mut model = deepseek2::DeepSeekV2::new(&config, weights)?;
    Ok(Box::new(move |ids: &Tensor, start: usize| {
        if start == 0 {
            model.clear_kv_cache();
        }
        model.forward(ids, start)
    }))
}
