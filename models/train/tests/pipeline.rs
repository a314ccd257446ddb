//! From a folder of source files to a pair the server opens: loss falls, runs repeat and resume bit
//! for bit, bad input is refused by name.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use tandem_models::Checkpoint;
use tandem_train::{
    Budget, CorpusOptions, DistillOptions, ModelShape, OptimizerKind, RunOptions, SampleMix, TrainError,
    TrainOptions, WeightDtype, distill, train,
};

/// Sixty small Python files, similar enough to be learned in a few dozen steps.
fn write_corpus(dir: &Path) {
    let nouns = ["order", "user", "price", "file", "node", "token", "index", "record", "table", "event"];
    let verbs = ["load", "store", "check", "count", "merge", "split"];
    for noun in nouns {
        for verb in verbs {
            let text = format!(
                "import os\n\n\ndef {verb}_{noun}(items, limit=10):\n    \"\"\"Return the {noun} items that \
                 {verb} finds first.\"\"\"\n    result = []\n    for item in items:\n        if len(result) >= \
                 limit:\n            break\n        result.append(item.{noun})\n    return result\n\n\nclass \
                 {noun}Store:\n    def __init__(self):\n        self.items = []\n\n    def {verb}(self, value):\n        \
                 self.items.append(value)\n        return len(self.items)\n"
            );
            fs::write(dir.join(format!("{verb}_{noun}.py")), text).expect("write corpus");
        }
    }
}

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::create_dir(dir.path().join("corpus")).expect("mkdir");
        write_corpus(&dir.path().join("corpus"));
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn corpus(&self) -> CorpusOptions {
        CorpusOptions { dir: self.path("corpus"), held_out: 0.1, ..Default::default() }
    }

    fn train_options(&self, out: &str, steps: u64) -> TrainOptions {
        TrainOptions {
            corpus: self.corpus(),
            out: self.path(out),
            tokenizer: None,
            shape: ModelShape {
                vocab_size: 384,
                hidden: 32,
                layers: 2,
                heads: 2,
                kv_heads: 1,
                head_dim: 16,
                ffn: 64,
                max_position_embeddings: 128,
                ..ModelShape::small_target()
            },
            mix: SampleMix::default(),
            run: RunOptions {
                seq_len: 64,
                batch: 4,
                budget: Budget::Steps(steps),
                warmup_steps: 4,
                checkpoint_interval: 0,
                eval_interval: 0,
                eval_tokens: 512,
                progress: false,
                dtype: WeightDtype::F32,
                command_line: "tandem train --corpus corpus --out out".into(),
                ..Default::default()
            },
        }
    }

    fn distill_options(&self, target: &str, out: &str, steps: u64) -> DistillOptions {
        let TrainOptions { shape, run, .. } = self.train_options(out, steps);
        DistillOptions {
            corpus: self.corpus(),
            target: self.path(target),
            out: self.path(out),
            shape: ModelShape { hidden: 16, layers: 1, ffn: 32, ..shape },
            run,
            from_outputs: 0.3,
            ..Default::default()
        }
    }

    fn weights(&self, out: &str) -> Vec<u8> {
        fs::read(self.path(out).join("model.safetensors")).expect("weights")
    }

    fn report(&self, out: &str) -> Value {
        let text = fs::read_to_string(self.path(out).join("report.json")).expect("report");
        serde_json::from_str(&text).expect("report is JSON")
    }
}

#[test]
fn a_pair_from_a_folder() {
    let bench = Bench::new();
    let start = train(&bench.train_options("short", 1)).expect("one step");
    let trained = train(&bench.train_options("target", 150)).expect("train");
    let (before, after) =
        (start.held_out_bits_per_byte.expect("bits"), trained.held_out_bits_per_byte.expect("bits"));
    assert!(after < before * 0.6, "held-out bits per byte went from {before} to {after}");
    assert!(trained.final_loss < start.final_loss);
    assert_eq!(trained.tokens, 150 * 4 * 64);

    let distilled = distill(&bench.distill_options("target", "draft", 150)).expect("distill");
    let pair = distilled.held_out.expect("held-out files");
    assert!((pair.target_bits_per_byte - after).abs() < 1e-6);
    assert!(pair.greedy_agreement > 0.1 && pair.mean_accepted_length >= 1.0, "{pair:?}");
    assert_eq!(bench.report("draft")["held_out"]["positions"], pair.positions);

    for (name, wanted) in [("target", (32, 2)), ("draft", (16, 1))] {
        let checkpoint = Checkpoint::open(&bench.path(name)).expect("open");
        assert_eq!((checkpoint.config.hidden_size, checkpoint.config.num_layers), wanted);
        assert_eq!(checkpoint.config.vocab_size, 384);
        assert!(checkpoint.config.tie_word_embeddings);
        let ids = &checkpoint.generation.eos_token_ids;
        assert_eq!(ids, &[375, 383], "end of text and end of an answer");
        assert!(!bench.path(name).join("state.safetensors").exists());
        let card = fs::read_to_string(bench.path(name).join("README.md")).expect("card");
        assert!(card.contains("bits per byte") && card.contains("tandem train --corpus"), "{card}");
    }
    let tokenizer = |name: &str| fs::read(bench.path(name).join("tokenizer.json")).expect("tokenizer");
    assert_eq!(tokenizer("target"), tokenizer("draft"));
}

#[test]
fn equal_seeds_give_equal_bits_and_others_do_not() {
    let bench = Bench::new();
    let mut options = bench.train_options("a", 4);
    train(&options).expect("a");
    options.out = bench.path("b");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("pool");
    pool.install(|| train(&options)).expect("b");
    assert_eq!(bench.weights("a"), bench.weights("b"), "one thread or many");
    options.out = bench.path("c");
    options.run.seed = 1;
    train(&options).expect("c");
    assert_ne!(bench.weights("a"), bench.weights("c"));
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() {
    let bench = Bench::new();
    for optimizer in [OptimizerKind::Muon, OptimizerKind::AdamW] {
        let mut options = bench.train_options(&format!("whole-{optimizer:?}"), 5);
        options.run.optimizer = optimizer;
        train(&options).expect("whole");
        let whole = fs::read(options.out.join("model.safetensors")).expect("weights");

        // The flag is set from the start, so every call does one step and stops.
        options.out = bench.path(&format!("cut-{optimizer:?}"));
        options.run.stop = Some(Arc::new(AtomicBool::new(true)));
        assert!(matches!(train(&options), Err(TrainError::Interrupted { step: 1, .. })));
        assert!(matches!(train(&options), Err(TrainError::OutputExists { .. })));
        options.run.resume = true;
        assert!(matches!(train(&options), Err(TrainError::Interrupted { step: 2, .. })));
        let other = TrainOptions { run: RunOptions { lr: 0.1, ..options.run.clone() }, ..options.clone() };
        let message = train(&other).expect_err("other options").to_string();
        assert!(message.contains("lr = 0.003") && message.contains("0.1"), "{message}");
        options.run.stop.as_ref().expect("flag").store(false, Ordering::Relaxed);
        train(&options).expect("rest");
        assert_eq!(fs::read(options.out.join("model.safetensors")).expect("weights"), whole, "{optimizer:?}");
    }
}

#[test]
fn distillation_on_outputs_resumes_inside_a_pool() {
    let bench = Bench::new();
    train(&bench.train_options("target", 2)).expect("target");
    let mut options = bench.distill_options("target", "whole", 4);
    distill(&options).expect("whole");
    options.out = bench.path("cut");
    options.run.stop = Some(Arc::new(AtomicBool::new(true)));
    assert!(matches!(distill(&options), Err(TrainError::Interrupted { step: 1, .. })));
    options.run.stop = None;
    options.run.resume = true;
    distill(&options).expect("rest");
    assert_eq!(bench.weights("whole"), bench.weights("cut"));
}

#[test]
fn divergence_stops_and_keeps_the_checkpoint() {
    let bench = Bench::new();
    let mut options = bench.train_options("wild", 30);
    options.run = RunOptions {
        lr: 1e30,
        muon_lr: 1e30,
        clip_norm: 0.0,
        warmup_steps: 0,
        checkpoint_interval: 1,
        ..options.run
    };
    let error = train(&options).expect_err("learning rate of 1e30");
    assert!(matches!(error, TrainError::Diverged { .. }), "{error}");
    assert!(error.to_string().contains("last good checkpoint (after step"), "{error}");
    assert!(options.out.join("state.safetensors").is_file());
    assert!(!options.out.join("model.safetensors").exists());
}

#[test]
fn bad_input_is_refused_by_name() {
    let bench = Bench::new();
    let mut options = bench.train_options("out", 1);
    options.shape.vocab_size = 60_000;
    assert!(matches!(train(&options), Err(TrainError::SmallCorpus { wanted: 60_000, .. })));
    options = bench.train_options("out2", 1);
    options.run.seq_len = 256;
    assert!(train(&options).expect_err("long rows").to_string().contains("seq_len"));
    options = bench.train_options("out3", 1);
    options.corpus.extensions = vec!["zig".into()];
    assert!(matches!(train(&options), Err(TrainError::EmptyCorpus { looked_at: 60, .. })));
    options = bench.train_options("corpus", 1);
    assert!(matches!(train(&options), Err(TrainError::ForeignOutput { .. })));
    let missing = distill(&bench.distill_options("nowhere", "draft", 1)).expect_err("no target").to_string();
    assert!(missing.contains("nowhere"), "{missing}");
}
