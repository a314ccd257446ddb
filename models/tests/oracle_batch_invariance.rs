//! The bit rule of `Model`: a row's logits never depend on the other rows of the pass, on how the
//! prompt was cut, on block placement or on threads. The model alone, with its whole prompt in one
//! pass on one thread, is the oracle of itself; everything else must give the same bits.

mod oracle_support;

use std::sync::Arc;

use oracle_support::{config, random_tokens, write_checkpoint};
use safetensors::Dtype;
use serde_json::json;
use tandem_kernels::ThreadPool;
use tandem_models::backend::BackendKind;
use tandem_models::{Checkpoint, ForwardBatch, Model, Wanted};

const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 64;
/// Longer than attention's chunk of the context, and no multiple of anything.
const LEN: usize = 171;

/// A checkpoint large enough that the pool really splits its matrix products.
fn checkpoint(dtype: Dtype, seed: u64) -> (tempfile::TempDir, Checkpoint) {
    let changes = json!({"vocab_size": 307, "hidden_size": 96, "intermediate_size": 272});
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &config("qwen2", changes), dtype, seed);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

fn model(checkpoint: &Checkpoint, threads: usize) -> Box<dyn Model> {
    let pool = Arc::new(ThreadPool::new(threads));
    let mut model = tandem_models::load(checkpoint, BackendKind::Cpu, pool).unwrap();
    model.allocate_kv_cache(NUM_BLOCKS, BLOCK_SIZE).unwrap();
    model
}

/// The blocks of a sequence; `place` spreads and permutes them.
fn block_table(place: usize) -> Vec<u32> {
    let count = LEN.div_ceil(BLOCK_SIZE);
    (0..count).map(|block| ((place * 17 + block * (2 * place + 1)) % NUM_BLOCKS) as u32).collect()
}

/// Bits of the logits at every position, prompt cut into passes of `cuts` tokens (the last repeats).
fn alone(model: &mut dyn Model, tokens: &[u32], cuts: &[usize], place: usize) -> Vec<Vec<u32>> {
    let table = block_table(place);
    let (mut batch, mut logits, mut all) = (ForwardBatch::new(), Vec::new(), Vec::new());
    let mut cuts = cuts.iter().copied().chain(std::iter::repeat(*cuts.last().unwrap()));
    let mut start = 0;
    while start < tokens.len() {
        let end = tokens.len().min(start + cuts.next().unwrap());
        batch.clear();
        batch.push_sequence(&tokens[start..end], start, &table, BLOCK_SIZE, end - start);
        model.forward(&batch, &mut logits).unwrap();
        all.extend(rows(model, &logits));
        start = end;
    }
    all
}

fn rows(model: &dyn Model, logits: &[f32]) -> Vec<Vec<u32>> {
    let vocab_size = model.config().vocab_size;
    logits.chunks_exact(vocab_size).map(|row| row.iter().map(|logit| logit.to_bits()).collect()).collect()
}

#[test]
fn chunked_is_whole() {
    for (dtype, seed) in [(Dtype::F32, 1), (Dtype::BF16, 2), (Dtype::F16, 3)] {
        let (_dir, checkpoint) = checkpoint(dtype, seed);
        let mut model = model(&checkpoint, 1);
        let tokens = random_tokens(seed, LEN, 307);
        let whole = alone(model.as_mut(), &tokens, &[LEN], 0);
        for cuts in [&[100][..], &[64], &[128, 5], &[1, 2, 3, 4, 5, 6, 7, 8, 9], &[LEN - 1, 1], &[1]] {
            assert!(alone(model.as_mut(), &tokens, cuts, 0) == whole, "{dtype:?} in passes of {cuts:?}");
        }
    }
}

#[test]
fn threads_and_block_placement_do_not_matter() {
    for (dtype, seed) in [(Dtype::F32, 4), (Dtype::BF16, 5)] {
        let (_dir, checkpoint) = checkpoint(dtype, seed);
        let tokens = random_tokens(seed, LEN, 307);
        let wanted = alone(model(&checkpoint, 1).as_mut(), &tokens, &[LEN], 0);
        for threads in 1..=3 {
            let mut model = model(&checkpoint, threads);
            for (cuts, place) in [(&[LEN][..], 0), (&[LEN], 1), (&[150, 1], 2), (&[37], 3)] {
                let found = alone(model.as_mut(), &tokens, cuts, place);
                assert!(found == wanted, "{dtype:?}, {threads} threads, placement {place}");
            }
        }
    }
}

/// Prefill, decode and verification of several sequences in one pass.
#[test]
fn batched_is_alone() {
    for (dtype, seed) in [(Dtype::F32, 6), (Dtype::BF16, 7)] {
        let (_dir, checkpoint) = checkpoint(dtype, seed);
        let mut single = model(&checkpoint, 1);
        // Context before the pass, tokens in it, logits wanted.
        let shares = [(0, 40, 1), (33, 1, 1), (130, 5, 5), (1, 1, 1), (20, 9, 0), (97, 30, 2)];
        let prompts: Vec<Vec<u32>> =
            (0..shares.len()).map(|i| random_tokens(seed * 10 + i as u64, LEN, 307)).collect();
        let mut wanted = Vec::new();
        for (prompt, &(context, count, num_logits)) in prompts.iter().zip(&shares) {
            let all = alone(single.as_mut(), &prompt[..context + count], &[LEN], 0);
            wanted.extend_from_slice(&all[context + count - num_logits..]);
        }
        for threads in [1, 2, 3] {
            let mut model = model(&checkpoint, threads);
            let mut next_block = 0;
            let mut tables = Vec::new();
            for &(context, count, _) in &shares {
                let blocks = (context + count).div_ceil(BLOCK_SIZE) as u32;
                tables.push((next_block..next_block + blocks).rev().collect::<Vec<u32>>());
                next_block += blocks;
            }
            let (mut batch, mut logits) = (ForwardBatch::new(), Vec::new());
            for ((prompt, table), &(context, _, _)) in prompts.iter().zip(&tables).zip(&shares) {
                batch.push_sequence(&prompt[..context], 0, table, BLOCK_SIZE, 0);
            }
            model.forward(&batch, &mut logits).unwrap();
            assert!(logits.is_empty());
            batch.clear();
            for ((prompt, table), &(context, count, num_logits)) in prompts.iter().zip(&tables).zip(&shares) {
                let tokens = &prompt[context..context + count];
                batch.push_sequence(tokens, context, table, BLOCK_SIZE, num_logits);
            }
            model.forward(&batch, &mut logits).unwrap();
            assert!(rows(model.as_ref(), &logits) == wanted, "{dtype:?}, {threads} threads");
        }
    }
}

/// Only the last row's logits are asked for, so the last layer skips the others.
#[test]
fn unwanted_logits_do_not_change_wanted_ones() {
    let (_dir, checkpoint) = checkpoint(Dtype::BF16, 8);
    let mut model = model(&checkpoint, 2);
    let tokens = random_tokens(8, LEN, 307);
    let all = alone(model.as_mut(), &tokens, &[LEN], 0);
    let (mut batch, mut logits) = (ForwardBatch::new(), Vec::new());
    for wanted in [vec![LEN - 1], vec![0, 7, 170], vec![3], vec![]] {
        batch.clear();
        batch.push_sequence(&tokens, 0, &block_table(1), BLOCK_SIZE, 0);
        batch.logits_rows.extend(wanted.iter().map(|&row| row as u32));
        batch.wanted.resize(wanted.len(), Wanted::Whole);
        model.forward(&batch, &mut logits).unwrap();
        let wanted: Vec<_> = wanted.iter().map(|&row| all[row].clone()).collect();
        assert!(rows(model.as_ref(), &logits) == wanted);
    }
}
