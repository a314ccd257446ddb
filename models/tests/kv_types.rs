//! Keys and values of every type: each keeps the bit rule of `Model` by itself, none changes the logits by
//! more than its rounding, and each takes the memory that it says.

mod oracle_support;

use std::sync::Arc;

use oracle_support::{config, random_tokens, write_checkpoint};
use safetensors::Dtype;
use serde_json::json;
use tandem_kernels::ThreadPool;
use tandem_models::{BackendKind, Checkpoint, ForwardBatch, KvType, Model};

const BLOCK_SIZE: usize = 16;
const VOCAB_SIZE: usize = 307;
/// Longer than attention's chunk of the context, and no multiple of anything.
const LEN: usize = 171;

fn model(checkpoint: &Checkpoint, kv_type: KvType) -> Box<dyn Model> {
    let pool = Arc::new(ThreadPool::new(2));
    let mut model = tandem_models::load_with(checkpoint, BackendKind::Cpu, kv_type, pool).unwrap();
    model.allocate_kv_cache(2 * LEN.div_ceil(BLOCK_SIZE), BLOCK_SIZE).unwrap();
    model
}

/// Logits at every position, the prompt in passes of `cut` tokens; before each pass the slots that it
/// writes are written with other tokens first, as by a draft that was refused.
fn logits(model: &mut dyn Model, tokens: &[u32], cut: usize, refused: bool) -> Vec<f32> {
    let table: Vec<u32> = (0..LEN.div_ceil(BLOCK_SIZE) as u32).map(|block| 2 * block + 1).collect();
    let (mut batch, mut logits, mut all) = (ForwardBatch::new(), Vec::new(), Vec::new());
    for start in (0..tokens.len()).step_by(cut) {
        let end = tokens.len().min(start + cut);
        if refused {
            let wrong: Vec<u32> =
                tokens[start..end].iter().map(|token| VOCAB_SIZE as u32 - 1 - token).collect();
            batch.clear();
            batch.push_sequence(&wrong, start, &table, BLOCK_SIZE, 0);
            model.forward(&batch, &mut logits).unwrap();
        }
        batch.clear();
        batch.push_sequence(&tokens[start..end], start, &table, BLOCK_SIZE, end - start);
        model.forward(&batch, &mut logits).unwrap();
        all.extend_from_slice(&logits);
    }
    all
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

#[test]
fn every_type_keeps_the_bit_rule_and_is_close_to_f32() {
    let changes = json!({"vocab_size": VOCAB_SIZE, "hidden_size": 96, "intermediate_size": 272});
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &config("qwen2", changes), Dtype::F32, 21);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let tokens = random_tokens(21, LEN, VOCAB_SIZE);
    let exact = logits(model(&checkpoint, KvType::F32).as_mut(), &tokens, LEN, false);
    // Logits are some units in size. An f16 is off by 2^-12 of itself, a Q8 by 1/254 of the largest of its
    // head, and three layers of random weights carry that on.
    for (kv_type, tolerance) in [(KvType::F32, 0.0), (KvType::F16, 0.02), (KvType::Q8, 0.4)] {
        let mut model = model(&checkpoint, kv_type);
        let whole = logits(model.as_mut(), &tokens, LEN, false);
        let worst = whole.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= tolerance, "{kv_type:?}: {worst}");
        assert_eq!(worst > 0.0, kv_type != KvType::F32, "{kv_type:?} is stored as something else");
        for (cut, refused) in [(1, false), (5, true), (64, false), (128, true)] {
            let cut_logits = logits(model.as_mut(), &tokens, cut, refused);
            assert!(bits(&cut_logits) == bits(&whole), "{kv_type:?} in passes of {cut}");
        }
    }
}

/// Latents are keys and values at once, and stored once.
#[test]
fn latents_keep_the_bit_rule_in_every_type_and_are_close_to_f32() {
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let checkpoint = Checkpoint::open(&golden.join("deepseek_v3")).unwrap();
    let tokens = random_tokens(23, 64, 64);
    let exact = logits(model(&checkpoint, KvType::F32).as_mut(), &tokens, 64, false);
    // Logits are up to 15, and another expert for a token is another answer: only most of them are close.
    for (kv_type, tolerance) in [(KvType::F32, 0.0), (KvType::F16, 0.02), (KvType::Q8, 0.4)] {
        let mut model = model(&checkpoint, kv_type);
        let whole = logits(model.as_mut(), &tokens, 64, false);
        let mut distances: Vec<f32> = whole.iter().zip(&exact).map(|(a, b)| (a - b).abs()).collect();
        distances.sort_by(f32::total_cmp);
        let most = distances[distances.len() * 9 / 10];
        assert!(most <= tolerance, "{kv_type:?}: {most}");
        assert_eq!(most > 0.0, kv_type != KvType::F32, "{kv_type:?} is stored as something else");
        for cut in [1, 5, 33] {
            let cut_logits = logits(model.as_mut(), &tokens, cut, false);
            assert!(bits(&cut_logits) == bits(&whole), "{kv_type:?} in passes of {cut}");
        }
    }
    // Three layers of a latent of 20 and 8 channels that turn.
    let bytes = KvType::ALL.map(|kv_type| model(&checkpoint, kv_type).kv_bytes_per_token());
    assert_eq!(bytes, [3 * 28 * 4, 3 * 28 * 2, 3 * (28 + 4)]);
}

#[test]
fn a_token_costs_what_its_type_says() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &config("llama", json!({})), Dtype::F32, 22);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    // Three layers of two heads of 16, keys and values.
    let bytes = KvType::ALL.map(|kv_type| model(&checkpoint, kv_type).kv_bytes_per_token());
    assert_eq!(bytes, [3 * 2 * 2 * 64, 3 * 2 * 2 * 32, 3 * 2 * 2 * (16 + 4)]);
}
