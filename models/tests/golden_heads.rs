//! Drafting heads against their arithmetic in PyTorch: checkpoints and logits that `golden/make_heads.py` wrote.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use tandem_kernels::ThreadPool;
use tandem_models::heads::{Features, Input};
use tandem_models::{BackendKind, Checkpoint, ForwardBatch, Head, HeadKind, KvType, Model};

/// Sums in another order over 16 to 48 products of numbers around 1; as `golden.rs`.
const TOLERANCE: f32 = 1e-4;
const BLOCK_SIZE: usize = 4;
const NUM_BLOCKS: usize = 7;
const VOCAB_SIZE: usize = 64;

/// Head and target.
const CASES: [(&str, &str); 4] =
    [("eagle3", "llama"), ("speculators", "llama"), ("mimo", "mimo"), ("deepseek", "deepseek")];

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/heads").join(case)
}

struct Golden {
    tokens: Vec<u32>,
    /// `[tokens - 1, VOCAB_SIZE]`
    logits: Vec<f32>,
    drafted: Vec<u32>,
    /// `[drafted, VOCAB_SIZE]`
    chain: Vec<f32>,
}

fn golden(case: &str) -> Golden {
    let bytes = std::fs::read(folder(case).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> { file.tensor(name).unwrap().data().as_chunks().0.to_vec() };
    let ids = |name: &str| words(name).into_iter().map(u32::from_le_bytes).collect();
    let floats = |name: &str| words(name).into_iter().map(f32::from_le_bytes).collect();
    Golden {
        tokens: ids("tokens"),
        logits: floats("logits"),
        drafted: ids("drafted"),
        chain: floats("chain"),
    }
}

fn open(head: &str, target: &str) -> (Checkpoint, Head) {
    let is_own = head == target;
    let target = Checkpoint::open(&folder(target)).unwrap();
    assert_eq!(Head::is_in(&folder(head)), !is_own);
    let head = if is_own { Head::of_target(&target) } else { Head::open(&folder(head), &target, None) };
    let head = head.unwrap();
    (target, head)
}

fn load((target, head): &(Checkpoint, Head), kind: BackendKind, threads: usize) -> Box<dyn Model> {
    let pool = Arc::new(ThreadPool::new(threads));
    let mut model = tandem_models::load_with_head(target, head, kind, KvType::F32, pool).unwrap();
    model.allocate_kv_cache(NUM_BLOCKS, BLOCK_SIZE).unwrap();
    model
}

/// A pass over `tokens` from position `start` on, with the logits of the last `num_logits`.
fn pass(model: &mut dyn Model, tokens: &[u32], start: usize, num_logits: usize) -> Vec<f32> {
    // Any block will do for any stretch of the context.
    let table: Vec<u32> = (0..NUM_BLOCKS as u32).rev().collect();
    let (mut batch, mut logits) = (ForwardBatch::new(), Vec::new());
    batch.push_sequence(tokens, start, &table, BLOCK_SIZE, num_logits);
    model.forward(&batch, &mut logits).unwrap();
    logits
}

/// What `make_heads.py` wrote down: the rows of all tokens but the first, here from `cuts[1]` on, then a chain of
/// drafts. Passes are cut after `cuts[0]` tokens of the target and after `cuts[1]` of the head.
fn run(model: &mut dyn Model, golden: &Golden, cuts: [usize; 2]) -> (Vec<f32>, Vec<f32>) {
    // The target has not computed the last token yet, as when it has just been drawn.
    let end = golden.tokens.len();
    for (from, to) in [(0, cuts[0]), (cuts[0], end - 1)].into_iter().filter(|(from, to)| from < to) {
        pass(model, &golden.tokens[from..to], from, 0);
    }
    let head = model.drafting_head().expect("it was loaded with one");
    pass(head, &golden.tokens[..cuts[1]], 0, 0);
    let logits = pass(head, &golden.tokens[cuts[1]..], cuts[1], end - cuts[1].max(1));
    (logits, draft(head, golden))
}

fn draft(head: &mut dyn Model, golden: &Golden) -> Vec<f32> {
    let start = golden.tokens.len();
    let rows = golden.drafted.iter().enumerate();
    rows.flat_map(|(index, token)| pass(head, &[*token], start + index, 1)).collect()
}

fn assert_close(found: &[f32], wanted: &[f32], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let row = i / VOCAB_SIZE;
        assert!((found - wanted).abs() <= TOLERANCE, "{what}, row {row}: {found} is not {wanted}");
    }
}

#[test]
fn logits_and_drafts_are_those_of_the_reference() {
    for (case, target) in CASES {
        let (opened, golden) = (open(case, target), golden(case));
        for kind in [BackendKind::Cpu, BackendKind::Reference] {
            let mut model = load(&opened, kind, 2);
            let (logits, chain) = run(model.as_mut(), &golden, [11, 0]);
            assert_close(&logits, &golden.logits, &format!("{case}, {kind:?}"));
            assert_close(&chain, &golden.chain, &format!("{case}, {kind:?}, drafting"));
        }
    }
}

/// The bit rule: a row depends on the text before it alone, however passes were cut.
#[test]
fn a_heads_rows_are_the_same_bits_however_passes_are_cut() {
    let bits = |floats: &[f32]| floats.iter().map(|float| float.to_bits()).collect::<Vec<_>>();
    for (case, target) in CASES {
        let (opened, golden) = (open(case, target), golden(case));
        let whole = run(load(&opened, BackendKind::Cpu, 1).as_mut(), &golden, [0, 0]);
        for (threads, cuts) in [(2, [1, 0]), (1, [7, 5]), (3, [18, 17]), (2, [0, 12])] {
            let found = run(load(&opened, BackendKind::Cpu, threads).as_mut(), &golden, cuts);
            let rest = &whole.0[whole.0.len() - found.0.len()..];
            let is_same = bits(&found.0) == bits(rest) && bits(&found.1) == bits(&whole.1);
            assert!(is_same, "{case}: {threads} threads, cuts {cuts:?}");
        }
    }
}

/// A target's own rows are the same bits with a head as without.
#[test]
fn a_head_changes_no_row_of_its_target() {
    for (case, target) in CASES {
        let (opened, golden) = (open(case, target), golden(case));
        let pool = Arc::new(ThreadPool::new(1));
        let mut plain = tandem_models::load_with(&opened.0, BackendKind::Cpu, KvType::F32, pool).unwrap();
        plain.allocate_kv_cache(NUM_BLOCKS, BLOCK_SIZE).unwrap();
        assert!(plain.drafting_head().is_none());
        let mut with_head = load(&opened, BackendKind::Cpu, 1);
        assert!(with_head.kv_bytes_per_token() > plain.kv_bytes_per_token());
        for num_logits in [1, 0, 3, golden.tokens.len()] {
            let [found, wanted] =
                [&mut with_head, &mut plain].map(|model| pass(model.as_mut(), &golden.tokens, 0, num_logits));
            assert!(found == wanted, "{case}: {num_logits} rows of logits");
        }
    }
}

#[test]
fn the_cases_are_as_different_as_their_names_say() {
    let (_, eagle3) = open("eagle3", "llama");
    assert_eq!((eagle3.kind, eagle3.num_outputs()), (HeadKind::Eagle3, 24));
    assert_eq!(eagle3.features, Features::Layers(vec![2, 3, 4]));
    assert_eq!(eagle3.input, Input::Attention { normed_residual: false });
    assert!(eagle3.to_target.as_ref().is_some_and(|ids| ids[23] > 23));
    let (_, speculators) = open("speculators", "llama");
    assert_eq!(speculators.features, Features::Layers(vec![0, 3, 7]));
    assert_eq!(speculators.input, Input::Attention { normed_residual: true });
    let (_, mimo) = open("mimo", "mimo");
    assert_eq!((mimo.kind, mimo.num_outputs()), (HeadKind::Mtp, VOCAB_SIZE));
    assert_eq!(mimo.input, Input::Projection { hidden_first: true });
    let (target, deepseek) = open("deepseek", "deepseek");
    assert_eq!(deepseek.input, Input::Projection { hidden_first: false });
    assert!(target.config.layer(0).dense && !deepseek.checkpoint.config.layer(0).dense);
    assert!(deepseek.checkpoint.config.latent.is_some());
}
