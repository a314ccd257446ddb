//! Drafting heads in the engine, on tiny checkpoints whose heads are right by construction: each token of the
//! target's text follows from the one before by a permutation, embeddings are unit vectors, and a head turns
//! the features of one token into those of the next by that permutation's matrix. A head that is handed another
//! token's features, or its own guesses where it should have the target's, is wrong at once, and how many of
//! its tokens stand says so. With noise in the target's layers its text depends on everything before, and the
//! head is right most of the time.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Answer, Ask, Grammar, Server, VOCAB_SIZE};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use tandem_engine::{
    DraftHead, DraftSource, DraftSources, DraftTokens, EngineConfig, Lane, Models, Priority, SamplingParams,
    SpeculationParams, TokenId,
};
use tandem_kernels::pool::ThreadPool;
use tandem_models::{BackendKind, Checkpoint, Head, KvType, Model};

const LAYERS: usize = 3;
const HIDDEN: usize = VOCAB_SIZE;

/// The token that follows; every token comes before it comes again.
fn next(token: usize) -> usize {
    (13 * token + 5) % VOCAB_SIZE
}

/// `[rows, columns]`, row by row.
fn matrix(
    rows: usize,
    columns: usize,
    mut element: impl FnMut(usize, usize) -> f32,
) -> (Vec<usize>, Vec<f32>) {
    let elements = (0..rows * columns).map(|i| element(i / columns, i % columns)).collect();
    (vec![rows, columns], elements)
}

fn ones() -> (Vec<usize>, Vec<f32>) {
    (vec![HIDDEN], vec![1.0; HIDDEN])
}

/// What maps the unit vector of a token to that of the next.
fn permutation(row: usize, column: usize) -> f32 {
    f32::from(u8::from(row == next(column)))
}

fn identity(row: usize, column: usize) -> f32 {
    f32::from(u8::from(row == column))
}

/// Tensors of a checkpoint.
#[derive(Default)]
struct Tensors {
    all: Vec<(String, Vec<usize>, Vec<u8>)>,
    state: u32,
}

impl Tensors {
    fn put(&mut self, name: String, (shape, elements): (Vec<usize>, Vec<f32>)) {
        self.all.push((name, shape, elements.into_iter().flat_map(f32::to_le_bytes).collect()));
    }

    fn noise(&mut self, rows: usize, columns: usize, scale: f32) -> (Vec<usize>, Vec<f32>) {
        matrix(rows, columns, |_, _| {
            self.state = self.state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            scale * ((self.state >> 8) as f32 / (1 << 23) as f32 - 1.0)
        })
    }

    /// A layer that adds noise of this size to what goes through it; `norms` are all ones.
    fn layer(&mut self, prefix: &str, attn_width: usize, noise: f32, norms: &[&str]) {
        for name in norms {
            self.put(format!("{prefix}.{name}.weight"), ones());
        }
        for (name, rows) in [("q", HIDDEN), ("k", HIDDEN / 2), ("v", HIDDEN / 2)] {
            let weight = self.noise(rows, attn_width, 0.3);
            self.put(format!("{prefix}.self_attn.{name}_proj.weight"), weight);
        }
        for (name, scale) in [("self_attn.o", noise), ("mlp.gate", 0.3), ("mlp.up", 0.3), ("mlp.down", noise)]
        {
            let weight = self.noise(HIDDEN, HIDDEN, scale);
            self.put(format!("{prefix}.{name}_proj.weight"), weight);
        }
    }

    fn biases(&mut self, prefix: &str) {
        for (name, len) in [("q", HIDDEN), ("k", HIDDEN / 2), ("v", HIDDEN / 2)] {
            self.put(format!("{prefix}.self_attn.{name}_proj.bias"), (vec![len], vec![0.0; len]));
        }
    }

    fn replace(&mut self, name: &str, tensor: (Vec<usize>, Vec<f32>)) {
        self.all.retain(|(other, ..)| other != name);
        self.put(name.to_owned(), tensor);
    }

    fn write(self, dir: &Path, config: &serde_json::Value) {
        std::fs::create_dir_all(dir).expect("a folder");
        std::fs::write(dir.join("config.json"), config.to_string()).expect("written");
        let views = self.all.iter().map(|(name, shape, data)| {
            let dtype = if name == "d2t" { Dtype::I64 } else { Dtype::F32 };
            (name, TensorView::new(dtype, shape.clone(), data).expect("sizes fit"))
        });
        safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).expect("written");
    }
}

fn shape() -> serde_json::Value {
    json!({
        "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4
    })
}

fn with(mut base: serde_json::Value, keys: serde_json::Value) -> serde_json::Value {
    let (base_keys, more) = (base.as_object_mut().expect("an object"), keys);
    base_keys.extend(more.as_object().expect("an object").clone());
    base
}

/// Writes a target of MiMo's form, whose layers add noise of this size, with its own multi-token-prediction layer.
fn write_target(dir: &Path, noise: f32) {
    let mut tensors = Tensors { state: 1, ..Tensors::default() };
    tensors.put("model.embed_tokens.weight".to_owned(), matrix(VOCAB_SIZE, HIDDEN, identity));
    tensors.put("lm_head.weight".to_owned(), matrix(VOCAB_SIZE, HIDDEN, permutation));
    tensors.put("model.norm.weight".to_owned(), ones());
    for layer in 0..LAYERS {
        let prefix = format!("model.layers.{layer}");
        tensors.layer(&prefix, HIDDEN, noise, &["input_layernorm", "post_attention_layernorm"]);
        tensors.biases(&prefix);
    }
    let prefix = "model.mtp_layers.0";
    let norms = ["token_layernorm", "hidden_layernorm", "input_layernorm", "post_attention_layernorm"];
    tensors.layer(prefix, HIDDEN, 0.0, &norms);
    tensors.biases(prefix);
    tensors.put(format!("{prefix}.final_layernorm.weight"), ones());
    // Of features and embedding, in this order, the first is turned and the second left out.
    let input = matrix(HIDDEN, 2 * HIDDEN, |row, column| {
        if column < HIDDEN { permutation(row, column) / (HIDDEN as f32).sqrt() } else { 0.0 }
    });
    tensors.put(format!("{prefix}.input_proj.weight"), input);
    let config = json!({
        "architectures": ["MiMoForCausalLM"], "model_type": "mimo", "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": 1
    });
    tensors.write(dir, &with(shape(), config));
}

/// Writes an EAGLE-3 head for it, which knows the first `num_outputs` tokens.
fn write_eagle3(dir: &Path, num_outputs: usize) {
    let mut tensors = Tensors { state: 2, ..Tensors::default() };
    let norms = ["input_layernorm", "hidden_norm", "post_attention_layernorm"];
    tensors.layer("midlayer", 2 * HIDDEN, 0.0, &norms);
    tensors.put("fc.weight".to_owned(), matrix(HIDDEN, HIDDEN, identity));
    tensors.put("norm.weight".to_owned(), ones());
    tensors.put("lm_head.weight".to_owned(), matrix(num_outputs, HIDDEN, permutation));
    // The gate of a unit vector, normed, is one number; so the layer can take it away and put the next there.
    let unit = (HIDDEN as f32).sqrt();
    let gated = unit * unit / (1.0 + (-unit).exp());
    for name in ["gate", "up"] {
        tensors.replace(&format!("midlayer.mlp.{name}_proj.weight"), matrix(HIDDEN, HIDDEN, identity));
    }
    let turn = |row, column| (permutation(row, column) - identity(row, column)) / gated;
    tensors.replace("midlayer.mlp.down_proj.weight", matrix(HIDDEN, HIDDEN, turn));
    let offsets = vec![0; 8 * num_outputs];
    tensors.all.push(("d2t".to_owned(), vec![num_outputs], offsets));
    let config = json!({
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1,
        "draft_vocab_size": num_outputs, "eagle_aux_hidden_state_layer_ids": [LAYERS]
    });
    tensors.write(dir, &with(shape(), config));
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Eagle3,
    /// With half of the tokens.
    ShortEagle3,
    Mtp,
}

const KINDS: [Kind; 3] = [Kind::Eagle3, Kind::ShortEagle3, Kind::Mtp];

fn model(noise: f32, kind: Option<Kind>) -> Box<dyn Model> {
    let dir = tempfile::tempdir().expect("a folder");
    let (target_dir, head_dir) = (dir.path().join("target"), dir.path().join("head"));
    write_target(&target_dir, noise);
    let target = Checkpoint::open(&target_dir).expect("it opens");
    let pool = Arc::new(ThreadPool::new(1));
    let head = kind.map(|kind| match kind {
        Kind::Mtp => Head::of_target(&target),
        _ => {
            write_eagle3(&head_dir, if kind == Kind::Eagle3 { VOCAB_SIZE } else { VOCAB_SIZE / 2 });
            Head::open(&head_dir, &target, None)
        }
    });
    let (backend, kv_type) = (BackendKind::Cpu, KvType::F32);
    match head {
        None => tandem_models::load_with(&target, backend, kv_type, pool),
        Some(head) => {
            tandem_models::load_with_head(&target, &head.expect("its head"), backend, kv_type, pool)
        }
    }
    .expect("it loads")
}

fn server(noise: f32, kind: Option<Kind>, change: impl FnOnce(&mut EngineConfig)) -> Server {
    let mut config = EngineConfig {
        max_model_len: 512,
        draft_head: DraftHead::Whole,
        ..common::config(DraftTokens::Fixed(4))
    };
    change(&mut config);
    Server::new(&config, Models { target: Some(model(noise, kind)), draft: None })
}

/// Prompts of several lengths: the target's own text, from different tokens on.
fn prompt(index: usize) -> Arc<[TokenId]> {
    let text = std::iter::successors(Some(7 * index % VOCAB_SIZE), |&token| Some(next(token)));
    // Two tokens after the last whole block, so that cached and not begin with the same pass.
    text.map(|token| token as TokenId).take(8 * (index % 5) + 10).collect()
}

fn ask(index: usize, params: SamplingParams, sources: DraftSources) -> Ask {
    let speculation = SpeculationParams { sources, ..SpeculationParams::default() };
    Ask { speculation, ..Ask::new(Lane::Deep, &prompt(index), &params) }
}

fn by_head(index: usize) -> Ask {
    let params = SamplingParams { max_tokens: 41, ..SamplingParams::default() };
    ask(index, params, DraftSources::NONE.with(DraftSource::Draft))
}

/// Tokens drafted and accepted.
fn account(answers: &[Answer]) -> (u32, u32) {
    answers.iter().fold((0, 0), |(drafted, accepted), answer| {
        let usage = answer.finished.expect("finished").usage;
        (drafted + usage.total_draft_tokens(), accepted + usage.total_accepted_tokens())
    })
}

#[test]
fn a_head_that_is_right_is_always_right() {
    for kind in [Kind::Eagle3, Kind::Mtp] {
        let asks: Vec<Ask> = (0..12).map(by_head).collect();
        let all_stand = |server: &mut Server, asks: &[Ask], when: &str| {
            let answers = server.serve(asks);
            for (ask, answer) in asks.iter().zip(&answers) {
                let text =
                    std::iter::successors(ask.prompt.last().copied(), |&t| Some(next(t as usize) as TokenId));
                assert!(answer.tokens.iter().copied().eq(text.skip(1).take(41)), "{kind:?}, {when}");
            }
            let (drafted, accepted) = account(&answers);
            assert_eq!(drafted, accepted, "{kind:?}, {when}: some of its tokens fell");
            // A token comes with the prompt; of the other 40 four of five are drafted, where there is room.
            assert!(drafted >= 24 * asks.len() as u32, "{kind:?}, {when}: {drafted} drafted only");
        };
        let mut roomy = server(0.0, Some(kind), |_| {});
        all_stand(&mut roomy, &asks[..1], "alone");
        all_stand(&mut roomy, &asks, "together");
        all_stand(&mut roomy, &asks, "cached");
        assert!(roomy.engine.stats().num_cached_tokens > 0);
        let mut chunked = server(0.0, Some(kind), |config| {
            (config.max_num_seqs, config.max_num_batched_tokens) = (1, 5);
        });
        all_stand(&mut chunked, &asks, "in chunks");
        let mut tight = server(0.0, Some(kind), |config| config.num_blocks = 48);
        let mut late = asks;
        for (index, ask) in late.iter_mut().enumerate() {
            ask.priority = if index % 2 == 0 { Priority::Batch } else { Priority::Interactive };
            ask.arrives = index;
        }
        all_stand(&mut tight, &late, "with few blocks");
        assert!(tight.engine.stats().num_preemptions > 0);
    }
}

/// What of a head's tokens stands is a function of the text: its part of the cache is the same bits whether it
/// went along with the prompt, found it cached, or finds that the target alone has been there.
#[test]
fn a_heads_tokens_stand_as_often_behind_a_cached_prompt() {
    // So much noise that a head is wrong at times.
    for (kind, noise) in KINDS.into_iter().zip([0.015, 0.01, 0.05]) {
        let asks: Vec<Ask> = (0..12).map(by_head).collect();
        // Blocks as long as no answer of three tokens completes one.
        let new = || server(noise, Some(kind), |config| config.block_size = 8);
        let fresh = account(&new().serve(&asks));
        let (drafted, accepted) = fresh;
        assert!(accepted * 10 > drafted && accepted < drafted, "{kind:?}: {accepted} of {drafted}");
        for source in [DraftSource::Draft, DraftSource::Ngram] {
            let first: Vec<Ask> = (0..12)
                .map(|index| {
                    let params = SamplingParams { max_tokens: 3, ..SamplingParams::default() };
                    ask(index, params, DraftSources::NONE.with(source))
                })
                .collect();
            let mut server = new();
            server.serve(&first);
            assert_eq!(account(&server.serve(&asks)), fresh, "{kind:?}, after {source:?}");
            assert!(server.engine.stats().num_cached_tokens > 0);
            // Where the answer is cached too, the head finds the target's hidden states in it ahead of time.
            let (drafted, accepted) = account(&server.serve(&asks));
            assert!(
                accepted * fresh.0 >= fresh.1 * drafted,
                "{kind:?}: {accepted} of {drafted}, fresh {fresh:?}"
            );
        }
    }
}

/// Of every kind: greedy and sampled, with log-probabilities, forms, all sources, batched, cached, preempted.
fn mixed(num: usize) -> Vec<Ask> {
    (0..num)
        .map(|i| {
            let params = SamplingParams {
                temperature: [0.0, 0.8, 1.3][i % 3],
                seed: i as u64,
                logprobs: (i % 2 == 0).then_some(2),
                prompt_logprobs: (i % 7 == 3).then_some(1),
                max_tokens: 30,
                ..SamplingParams::default()
            };
            let sources =
                if i % 4 == 0 { DraftSources::ALL } else { DraftSources::NONE.with(DraftSource::Draft) };
            let grammar = (i % 5 == 2).then(|| Grammar::new(i as u64));
            let mut ask = Ask { grammar, ..ask(i, params, sources) };
            ask.speculation.max_draft_tokens = [None, Some(1), Some(5), Some(8)][i % 4];
            ask
        })
        .collect()
}

fn assert_same(answers: &[Answer], wanted: &[Answer], when: &str) {
    for (index, (answer, wanted)) in answers.iter().zip(wanted).enumerate() {
        assert_eq!(answer.invariant(), wanted.invariant(), "request {index}, {when}");
    }
}

#[test]
fn a_head_changes_no_answer() {
    let mut asks = mixed(24);
    let mut plain = server(0.02, None, |config| config.prefix_cache = false);
    let wanted: Vec<Answer> = asks
        .iter()
        .map(|ask| {
            let speculation = SpeculationParams { max_draft_tokens: Some(0), ..SpeculationParams::default() };
            plain.serve(&[Ask { speculation, ..ask.clone() }]).remove(0)
        })
        .collect();
    for kind in KINDS {
        for draft_tokens in [DraftTokens::Auto, DraftTokens::Fixed(1), DraftTokens::Fixed(7)] {
            let mut together = server(0.02, Some(kind), |config| config.draft_tokens = draft_tokens);
            let answers = together.serve(&asks);
            assert_same(&answers, &wanted, &format!("{kind:?}, {draft_tokens:?}"));
            let (drafted, accepted) = account(&answers);
            assert!(accepted > 0 && accepted < drafted, "{kind:?}: {accepted} of {drafted}");
            assert_same(&together.serve(&asks), &wanted, &format!("{kind:?}, cached"));
        }
    }
    for (i, ask) in asks.iter_mut().enumerate() {
        ask.priority = if i % 2 == 0 { Priority::Batch } else { Priority::Interactive };
        ask.arrives = 2 * i;
    }
    for kind in KINDS {
        let mut tight = server(0.02, Some(kind), |config| config.num_blocks = 40);
        assert_same(&tight.serve(&asks), &wanted, &format!("{kind:?}, with few blocks"));
        assert!(tight.engine.stats().num_preemptions > 0);
    }
}
