//! The same equality on the shipped pair and the real forward pass.
//!
//! Every prompt is decoded plainly (speculation off, alone) and then with speculation, greedily and
//! sampled, for draft lengths 1..=8, batch sizes 1, 3 and 8, with the pair's draft and with one of
//! random weights. `cargo test` spreads the prompts over the settings; `TANDEM_LOSSLESS=full` runs
//! every prompt in every setting and `TANDEM_LOSSLESS_PROMPTS=FILE` takes the prompts from a file
//! of JSON lines with a `prompt` field (and perhaps a `suffix`).

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Answer, Ask, Server};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tandem_engine::{
    DraftSource, DraftSources, DraftTokens, EngineConfig, Lane, Models, Priority, SamplingParams,
    SpeculationParams, TokenId,
};
use tandem_kernels::pool::ThreadPool;
use tandem_models::{BackendKind, Checkpoint, FimTokens, Model, Tokenizer};

const FIXTURE: &str = include_str!("../../src/cli/bench/prompts.jsonl");
const MAX_TOKENS: u32 = 64;

/// The same with `TANDEM_LOSSLESS=full`.
const MAX_TOKENS_FULL: u32 = 128;

/// Every prompt in every setting: half an hour.
fn is_full() -> bool {
    std::env::var("TANDEM_LOSSLESS").is_ok_and(|value| value == "full")
}
const BATCH_SIZES: [usize; 3] = [1, 3, 8];

fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo").join(name)
}

fn load(dir: &Path) -> Box<dyn Model> {
    let checkpoint = Checkpoint::open(dir).expect("the demo pair is in the repository");
    tandem_models::load(&checkpoint, BackendKind::Cpu, Arc::new(ThreadPool::new(2))).expect("it loads")
}

/// The draft with every weight replaced by noise: right now and then by chance.
fn random_draft() -> Box<dyn Model> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for file in ["config.json", "generation_config.json", "tokenizer.json"] {
        std::fs::copy(demo("draft").join(file), dir.path().join(file)).expect("the demo pair is complete");
    }
    let bytes = std::fs::read(demo("draft").join("model.safetensors")).expect("the demo pair is complete");
    let real = SafeTensors::deserialize(&bytes).expect("the demo pair is sound");
    let mut state = 1u32;
    let mut noise = |len: usize| -> Vec<u8> {
        (0..len)
            .flat_map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                half::bf16::from_f32((state >> 8) as f32 / (1 << 24) as f32 - 0.5).to_le_bytes()
            })
            .collect()
    };
    let data: Vec<_> = real
        .tensors()
        .into_iter()
        .map(|(name, t)| (name, t.shape().to_vec(), noise(t.data().len() / 2)))
        .collect();
    let tensors = data.iter().map(|(name, shape, data)| {
        (name, TensorView::new(Dtype::BF16, shape.clone(), data).expect("sizes are the real ones"))
    });
    safetensors::serialize_to_file(tensors, None, &dir.path().join("model.safetensors"))
        .expect("it is written");
    load(dir.path())
}

fn prompts() -> Vec<Arc<[TokenId]>> {
    let tokenizer = Tokenizer::from_dir(&demo("target")).expect("the demo pair has a tokenizer");
    let fim = FimTokens::detect(&tokenizer).expect("the demo pair fills gaps");
    let text = match std::env::var("TANDEM_LOSSLESS_PROMPTS") {
        Ok(path) => std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}")),
        Err(_) => FIXTURE.to_owned(),
    };
    text.lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
            let prompt = value["prompt"].as_str().expect("a prompt");
            let text = match value["suffix"].as_str() {
                Some(suffix) => fim.psm(prompt, suffix).expect("the pair knows this order"),
                None => prompt.to_owned(),
            };
            tokenizer.encode(&text, false).expect("it encodes").into()
        })
        .collect()
}

fn params(temperature: f32, seed: u64) -> SamplingParams {
    SamplingParams {
        temperature,
        seed,
        max_tokens: if is_full() { MAX_TOKENS_FULL } else { MAX_TOKENS },
        ..SamplingParams::default()
    }
}

/// An engine with the pair, kept over many runs.
fn pair(draft: Option<Box<dyn Model>>, change: impl FnOnce(&mut EngineConfig)) -> Server {
    let mut config = EngineConfig {
        block_size: 16,
        num_blocks: 8 * 128,
        max_num_seqs: 64,
        max_num_batched_tokens: 512,
        max_model_len: 2048,
        num_token_ids: 4096,
        ..common::config(DraftTokens::Fixed(0))
    };
    change(&mut config);
    Server::new(&config, Models { target: Some(load(&demo("target"))), draft })
}

/// Requests for the deep lane, drafted for by the draft model; a prompt's index is its seed.
fn asks(prompts: &[(usize, Arc<[TokenId]>)], temperature: f32, draft_tokens: u8) -> Vec<Ask> {
    let speculation = SpeculationParams {
        max_draft_tokens: Some(draft_tokens),
        sources: DraftSources::NONE.with(DraftSource::Draft),
        ..SpeculationParams::default()
    };
    prompts
        .iter()
        .map(|(seed, prompt)| Ask {
            speculation: speculation.clone(),
            ..Ask::new(Lane::Deep, prompt, &params(temperature, *seed as u64))
        })
        .collect()
}

#[test]
fn the_deep_lane_answers_the_same_with_and_without_speculation() {
    let full = is_full();
    let prompts: Vec<(usize, Arc<[TokenId]>)> = prompts().into_iter().enumerate().collect();
    let mut pairs = [
        ("the pair's draft", pair(Some(load(&demo("draft"))), |_| {})),
        ("a random draft", pair(Some(random_draft()), |_| {})),
    ];
    let mut plain_pair = pair(None, |config| config.prefix_cache = false);
    let mut compared = 0;
    let (mut offered, mut accepted) = ([0u64; 2], [0u64; 2]);
    for temperature in [0.0, 0.8] {
        let plain: Vec<Answer> = prompts
            .iter()
            .map(|p| plain_pair.serve(&asks(std::slice::from_ref(p), temperature, 0)).remove(0))
            .collect();
        let mut setting = 0;
        for (which, (name, pair)) in pairs.iter_mut().enumerate() {
            for batch_size in BATCH_SIZES {
                for draft_tokens in 1..=8u8 {
                    setting += 1;
                    // Each setting gets its turn of the prompts, or all of them.
                    let turn: Vec<_> = if full {
                        prompts.clone()
                    } else {
                        let start = setting * batch_size * 7;
                        (0..batch_size).map(|i| prompts[(start + i) % prompts.len()].clone()).collect()
                    };
                    for batch in turn.chunks(batch_size) {
                        let answers = pair.serve(&asks(batch, temperature, draft_tokens));
                        for ((index, _), answer) in batch.iter().zip(&answers) {
                            assert_eq!(
                                answer.invariant(),
                                plain[*index].invariant(),
                                "prompt {index}, temperature {temperature}, {name}, {draft_tokens} drafted, batch of {batch_size}"
                            );
                            let usage = answer.finished.expect("finished").usage;
                            offered[which] += u64::from(usage.total_draft_tokens());
                            accepted[which] += u64::from(usage.total_accepted_tokens());
                            compared += 1;
                        }
                    }
                }
            }
        }
    }
    println!(
        "{compared} answers compared; accepted/offered: pair {accepted:?} of {offered:?} [pair, random]"
    );
    assert!(
        accepted[0] * 3 > offered[0],
        "the pair's draft is hardly ever right: {accepted:?} of {offered:?}"
    );
    assert!(
        accepted[1] * 10 < offered[1],
        "the random draft is right too often: {accepted:?} of {offered:?}"
    );
}

/// Requests of both lanes, greedy and sampled, with every source of drafts.
fn crowd(num: usize) -> Vec<Ask> {
    let prompts = prompts();
    (0..num)
        .map(|i| {
            let params = SamplingParams {
                temperature: if i % 3 == 0 { 0.8 } else { 0.0 },
                seed: i as u64,
                logprobs: Some(1),
                max_tokens: 24,
                ..SamplingParams::default()
            };
            let lane = if i % 4 == 3 { Lane::Fast } else { Lane::Deep };
            let prompt = &prompts[i % prompts.len()];
            let prediction = prompt[prompt.len() / 2..].into();
            Ask {
                priority: if i % 2 == 0 { Priority::Batch } else { Priority::Interactive },
                speculation: SpeculationParams {
                    max_draft_tokens: if i % 5 == 0 { None } else { Some(i as u8 % 9) },
                    sources: DraftSources::ALL,
                    prediction,
                },
                ..Ask::new(lane, prompt, &params)
            }
        })
        .collect()
}

fn assert_same(answers: &[Answer], wanted: &[Answer], when: &str) {
    for (index, (answer, wanted)) in answers.iter().zip(wanted).enumerate() {
        assert_eq!(answer.invariant(), wanted.invariant(), "request {index}, {when}");
    }
}

#[test]
fn a_batch_of_64_cached_and_preempted_answers_as_each_alone() {
    let crowd = crowd(64);
    let draft = || Some(load(&demo("draft")));
    let mut plain = pair(draft(), |config| config.prefix_cache = false);
    let wanted: Vec<Answer> = crowd
        .iter()
        .map(|ask| {
            let speculation = SpeculationParams { max_draft_tokens: Some(0), ..SpeculationParams::default() };
            plain.serve(&[Ask { speculation, ..ask.clone() }]).remove(0)
        })
        .collect();

    let mut roomy = pair(draft(), |config| config.draft_tokens = DraftTokens::Auto);
    assert_same(&roomy.serve(&crowd), &wanted, "64 together");
    assert_same(&roomy.serve(&crowd), &wanted, "64 together, cached");
    assert!(roomy.engine.stats().num_cached_tokens > 0);
    assert_eq!(roomy.engine.stats().num_preemptions, 0);

    let mut tight = pair(draft(), |config| config.num_blocks = 96);
    let mut late = crowd;
    for (i, ask) in late.iter_mut().enumerate() {
        ask.arrives = i;
    }
    assert_same(&tight.serve(&late), &wanted, "one after the other, with few blocks");
    assert!(tight.engine.stats().num_preemptions > 0);
}
