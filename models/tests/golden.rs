//! Logits against Hugging Face transformers: checkpoints and logits that `golden/make_golden.py` wrote.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use tandem_kernels::ThreadPool;
use tandem_models::backend::BackendKind;
use tandem_models::{Checkpoint, ForwardBatch, Model, RopeScaling};

const TOLERANCE: f32 = 1e-4;
const BLOCK_SIZE: usize = 4;
/// The script's NUM_PROMPT_TOKENS: tokens that transformers read in one pass.
const NUM_PROMPT_TOKENS: usize = 13;

const CASES: [&str; 6] =
    ["llama_plain", "llama_rope_llama3", "llama_biases", "llama_head_dim", "qwen2_tied", "qwen2_untied"];

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

/// Token ids, and the logits after each of them.
fn golden(case: &str) -> (Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(folder(case).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> { file.tensor(name).unwrap().data().as_chunks().0.to_vec() };
    (
        words("tokens").into_iter().map(u32::from_le_bytes).collect(),
        words("logits").into_iter().map(f32::from_le_bytes).collect(),
    )
}

fn logits_of(model: &mut dyn Model, tokens: &[u32]) -> Vec<f32> {
    let num_blocks = tokens.len().div_ceil(BLOCK_SIZE);
    model.allocate_kv_cache(num_blocks, BLOCK_SIZE).unwrap();
    // Any block will do for any stretch of the context.
    let block_table: Vec<u32> = (0..num_blocks as u32).rev().collect();
    let mut batch = ForwardBatch::new();
    let (mut all, mut logits) = (Vec::new(), Vec::new());
    let mut pass = |tokens: &[u32], start: usize| {
        batch.clear();
        batch.push_sequence(tokens, start, &block_table, BLOCK_SIZE, tokens.len());
        model.forward(&batch, &mut logits).unwrap();
        all.extend_from_slice(&logits);
    };
    pass(&tokens[..NUM_PROMPT_TOKENS], 0);
    for start in NUM_PROMPT_TOKENS..tokens.len() {
        pass(&tokens[start..=start], start);
    }
    all
}

#[test]
fn logits_are_those_of_transformers() {
    for case in CASES {
        let (tokens, wanted) = golden(case);
        let checkpoint = Checkpoint::open(&folder(case)).unwrap();
        assert_eq!(wanted.len(), tokens.len() * checkpoint.config.vocab_size);
        for kind in [BackendKind::Cpu, BackendKind::Reference] {
            let mut model = tandem_models::load(&checkpoint, kind, Arc::new(ThreadPool::new(2))).unwrap();
            let found = logits_of(model.as_mut(), &tokens);
            assert_eq!(found.len(), wanted.len());
            for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                let position = i / checkpoint.config.vocab_size;
                assert!(
                    (found - wanted).abs() <= TOLERANCE,
                    "{case}, {kind:?}, position {position}: {found} is not {wanted}"
                );
            }
        }
    }
}

#[test]
fn the_cases_are_as_different_as_their_names_say() {
    let config = |case: &str| Checkpoint::open(&folder(case)).unwrap().config;
    assert!(matches!(config("llama_rope_llama3").rope_scaling, RopeScaling::Llama3 { .. }));
    let biases = config("llama_biases");
    assert!(biases.qkv_bias && biases.o_bias && biases.mlp_bias && !biases.tie_word_embeddings);
    assert!(matches!(biases.rope_scaling, RopeScaling::Linear { .. }));
    let head_dim = config("llama_head_dim");
    assert_ne!(head_dim.head_dim * head_dim.num_heads, head_dim.hidden_size);
    let (tied, untied) = (config("qwen2_tied"), config("qwen2_untied"));
    assert!(tied.qkv_bias && !tied.o_bias && tied.tie_word_embeddings && !untied.tie_word_embeddings);
}
