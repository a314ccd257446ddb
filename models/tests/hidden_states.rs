//! Last hidden states, which embeddings are made of: those that transformers computes (`golden/make_hidden.py`
//! wrote their means), and the same bits whatever else is in the pass and however it is cut.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use tandem_kernels::ThreadPool;
use tandem_models::backend::BackendKind;
use tandem_models::{Checkpoint, ForwardBatch, Model};

/// As that of the logits in golden.rs: f32 against f32, summed in another order.
const TOLERANCE: f64 = 1e-4;
const BLOCK_SIZE: usize = 4;
const NUM_BLOCKS: usize = 16;
/// The script's NUM_PROMPT_TOKENS.
const NUM_TOKENS: usize = 13;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn cases() -> BTreeMap<String, Vec<f64>> {
    let text = std::fs::read_to_string(folder().join("hidden.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn load(case: &str, kind: BackendKind) -> (Box<dyn Model>, Vec<u32>) {
    let bytes = std::fs::read(folder().join(case).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tokens = file.tensor("tokens").unwrap();
    let tokens = tokens.data().as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let checkpoint = Checkpoint::open(&folder().join(case)).unwrap();
    let mut model = tandem_models::load(&checkpoint, kind, Arc::new(ThreadPool::new(2))).unwrap();
    model.allocate_kv_cache(NUM_BLOCKS, BLOCK_SIZE).unwrap();
    (model, tokens)
}

/// Hidden states and logits of a pass.
fn pass(model: &mut dyn Model, batch: &ForwardBatch) -> (Vec<f32>, Vec<f32>) {
    let mut hidden = Vec::new();
    model.begin(batch).unwrap();
    while model.advance().unwrap() {}
    if !batch.hidden_rows.is_empty() {
        model.hidden_states(&mut hidden).unwrap();
    }
    let logits = model.finish().unwrap().logits.to_vec();
    (hidden, logits)
}

fn hidden_alone(model: &mut dyn Model, tokens: &[u32], chunk: usize) -> Vec<f32> {
    let table: Vec<u32> = (0..8).collect();
    let mut all = Vec::new();
    for (index, part) in tokens.chunks(chunk).enumerate() {
        let mut batch = ForwardBatch::new();
        batch.push_sequence(part, index * chunk, &table, BLOCK_SIZE, 0);
        batch.want_hidden_states();
        let (hidden, logits) = pass(model, &batch);
        assert!(logits.is_empty());
        all.extend(hidden);
    }
    all
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn hidden_states_are_those_of_transformers() {
    let cases = cases();
    assert!(cases.len() >= 23, "there are {}", cases.len());
    for (case, wanted) in cases {
        for kind in [BackendKind::Cpu, BackendKind::Reference] {
            let (mut model, tokens) = load(&case, kind);
            let hidden = hidden_alone(model.as_mut(), &tokens[..NUM_TOKENS], NUM_TOKENS);
            assert_eq!(hidden.len(), NUM_TOKENS * wanted.len());
            for (channel, wanted) in wanted.iter().enumerate() {
                let of_rows =
                    hidden.chunks_exact(hidden.len() / NUM_TOKENS).map(|row| f64::from(row[channel]));
                let mean = of_rows.sum::<f64>() / NUM_TOKENS as f64;
                assert!(
                    (mean - wanted).abs() <= TOLERANCE,
                    "{case}, {kind:?}, {channel}: {mean} is not {wanted}"
                );
            }
        }
    }
}

#[test]
fn neither_chunks_nor_company_show_in_hidden_states_or_logits() {
    for case in cases().into_keys() {
        let (mut model, tokens) = load(&case, BackendKind::Cpu);
        let other: Vec<u32> = tokens.iter().rev().copied().collect();
        let whole = hidden_alone(model.as_mut(), &tokens, tokens.len());
        for chunk in [1, 5] {
            let cut = hidden_alone(model.as_mut(), &tokens, chunk);
            assert!(bits(&cut) == bits(&whole), "{case}: chunks of {chunk}");
        }
        let table: Vec<u32> = (8..16).collect();
        let mut batch = ForwardBatch::new();
        batch.push_sequence(&other, 0, &table, BLOCK_SIZE, 2);
        let (_, logits) = pass(model.as_mut(), &batch);
        // A sequence that wants logits, one that wants hidden states, and one that wants neither.
        let mut batch = ForwardBatch::new();
        batch.push_sequence(&other, 0, &table, BLOCK_SIZE, 2);
        batch.push_sequence(&tokens, 0, &[0, 1, 2, 3, 4], BLOCK_SIZE, 0);
        batch.want_hidden_states();
        batch.push_sequence(&other[..3], 0, &[5], BLOCK_SIZE, 0);
        let (hidden, beside) = pass(model.as_mut(), &batch);
        assert!(bits(&hidden) == bits(&whole), "{case}: in company");
        assert!(bits(&beside) == bits(&logits), "{case}: logits beside hidden states");
    }
}
