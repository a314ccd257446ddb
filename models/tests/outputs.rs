//! What `Model::finish` gives of a row of which one token is wanted is what would be chosen of the whole row: for
//! any mix of rows in a pass, of whole and short heads and of one with a vocabulary of its own, on the CPU backend and
//! the reference backend.

mod oracle_support;

use std::path::Path;
use std::sync::Arc;

use oracle_support::{config, random_tokens, write_checkpoint};
use safetensors::Dtype;
use serde_json::json;
use tandem_kernels::ThreadPool;
use tandem_models::backend::BackendKind;
use tandem_models::outputs::{Choice, Chosen, Keep, Noise, Race, RowRoom, choose_in};
use tandem_models::{Checkpoint, ForwardBatch, Head, KvType, Model, Wanted};

/// Several chunks of the head, the last of them short.
const VOCAB_SIZE: usize = 1307;
/// Rows beyond are padding.
const NUM_TOKEN_IDS: usize = 1290;
const LEN: usize = 19;

fn model(kind: BackendKind) -> Box<dyn Model> {
    let changes = json!({"vocab_size": VOCAB_SIZE, "hidden_size": 96, "intermediate_size": 272});
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &config("qwen2", changes), Dtype::BF16, 11);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let mut model = tandem_models::load(&checkpoint, kind, Arc::new(ThreadPool::new(2))).unwrap();
    model.allocate_kv_cache(2, 16).unwrap();
    model
}

fn wanted(row: usize) -> Wanted {
    let race = Race { noise: Noise::new(3, row as u64), inverse_temperature: 1.25 };
    let drawn = || Choice { race: Some(race), ..Choice::default() };
    let mask = || Some(Arc::new((0..50u32).map(|word| word.wrapping_mul(0x9e37_79b9)).collect::<Vec<_>>()));
    Wanted::Token(match row % 7 {
        0 => Choice { share: true, ..Choice::default() },
        1 => return Wanted::Whole,
        2 => Choice { share: true, ..drawn() },
        3 => drawn(),
        4 => Choice { keep: Keep { top_k: 20, top_p: 0.8, ..Keep::ALL }, report: Some(3), ..drawn() },
        5 => Choice { keep: Keep { top_p: 0.9, min_p: 0.01, ..Keep::ALL }, share: true, ..drawn() },
        _ => Choice { mask: mask(), report: Some(2), ..Choice::default() },
    })
}

/// Whole rows, tokens of the others, and what those report.
type Given = (Vec<f32>, Vec<Chosen>, Vec<(u32, f32)>);

/// A pass over the tokens, of which all rows are wanted.
fn outputs(model: &mut dyn Model, batch: &ForwardBatch) -> Given {
    model.begin(batch).unwrap();
    while model.advance().unwrap() {}
    let outputs = model.finish().unwrap();
    (outputs.logits.to_vec(), outputs.chosen.to_vec(), outputs.top.to_vec())
}

/// What the batch wants of whole rows of `width`.
fn expected(whole: &[f32], width: usize, batch: &ForwardBatch) -> Given {
    let (mut logits, mut chosen, mut top) = (Vec::new(), Vec::new(), Vec::new());
    let mut room = RowRoom::default();
    for (row, wanted) in whole.chunks_exact(width).zip(&batch.wanted) {
        match wanted {
            Wanted::Whole => logits.extend_from_slice(row),
            Wanted::Token(choice) => {
                chosen.push(choose_in(&row[..width.min(batch.num_token_ids)], choice, &mut room));
                top.extend_from_slice(room.top());
            }
        }
    }
    (logits, chosen, top)
}

#[test]
fn a_token_of_a_row_is_the_one_of_the_whole_row() {
    for kind in [BackendKind::Cpu, BackendKind::Reference] {
        let mut model = model(kind);
        let short = 600;
        assert!(model.set_short_head(short).unwrap());
        for (width, is_short) in [(VOCAB_SIZE, false), (short, true)] {
            let mut batch = ForwardBatch::new();
            batch.push_sequence(&random_tokens(5, LEN, NUM_TOKEN_IDS), 0, &[0, 1], 16, LEN);
            batch.short_head = is_short;
            batch.num_token_ids = NUM_TOKEN_IDS;
            let (whole, none, _) = outputs(&mut *model, &batch);
            assert!(none.is_empty() && whole.len() == LEN * width);
            batch.want((0..LEN).map(wanted));
            let expected = expected(&whole, width, &batch);
            assert_eq!(outputs(&mut *model, &batch), expected, "{kind:?}, short head: {is_short}");
            // Some rows alone, all of which give a token.
            batch.clear();
            batch.push_sequence(&random_tokens(5, LEN, NUM_TOKEN_IDS), 0, &[0, 1], 16, 3);
            batch.short_head = is_short;
            batch.want([0, 4, 5].map(wanted).into_iter());
            let expected = self::expected(&whole[(LEN - 3) * width..], width, &batch);
            assert_eq!(outputs(&mut *model, &batch), expected, "{kind:?}, short head: {is_short}");
        }
    }
}

/// Of an EAGLE-3 head whose outputs are some of its target's tokens.
#[test]
fn a_token_of_a_head_with_its_own_vocabulary_is_the_one_of_the_row_in_its_targets() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/heads");
    let target = Checkpoint::open(&folder.join("llama")).unwrap();
    let head = Head::open(&folder.join("eagle3"), &target, None).unwrap();
    let vocab_size = target.config.vocab_size;
    let num_token_ids = vocab_size - 7;
    let ids = head.to_target.as_deref().expect("the head has a vocabulary of its own");
    assert!(ids.len() < vocab_size && ids.iter().any(|&id| id as usize >= ids.len()));
    for kind in [BackendKind::Cpu, BackendKind::Reference] {
        let pool = Arc::new(ThreadPool::new(2));
        let mut model = tandem_models::load_with_head(&target, &head, kind, KvType::F32, pool).unwrap();
        model.allocate_kv_cache(2, 16).unwrap();
        // The head's guesses replace what it read, so the target has to leave that anew before each of its passes.
        let mut outputs_of_head = |batch: &ForwardBatch| {
            outputs(&mut *model, batch);
            outputs(model.drafting_head().expect("it was loaded with one"), batch)
        };
        let mut batch = ForwardBatch::new();
        batch.push_sequence(&random_tokens(5, LEN, num_token_ids), 0, &[0, 1], 16, LEN);
        batch.num_token_ids = num_token_ids;
        let (whole, none, _) = outputs_of_head(&batch);
        assert!(none.is_empty() && whole.len() == LEN * vocab_size);
        batch.want((0..LEN).map(wanted));
        let (logits, chosen, top) = outputs_of_head(&batch);
        assert!(chosen.iter().all(|chosen| chosen.is_finite && ids.contains(&chosen.token)), "{kind:?}");
        assert_eq!((logits, chosen, top), expected(&whole, vocab_size, &batch), "{kind:?}");
    }
}
