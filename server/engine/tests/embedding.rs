//! Embeddings: the same bits alone, batched, chunked and preempted; beside work that generates, which does
//! not change either; cancelled, refused and failed as other work is.

mod common;

use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use common::{
    Answer, FaultKind, HIDDEN_SIZE, HashModel, Recipe, STOP, clock, config, hash_pair, hidden_state, request,
};
use proptest::prelude::*;
use tandem_engine::{
    DraftTokens, EmbedRequest, Engine, EngineConfig, EngineError, EngineHandle, Event, FinishReason, Lane,
    Models, Priority, SamplingParams, SequenceId, TokenId,
};

/// What the test's model makes of a text.
fn expected(text: &[TokenId]) -> Vec<f32> {
    let mut sum = [0f64; HIDDEN_SIZE];
    let mut state = 0;
    for &token in text {
        state = Recipe::extend(state, token);
        sum.iter_mut().zip(hidden_state(state)).for_each(|(sum, value)| *sum += f64::from(value));
    }
    sum.map(|sum| (sum / text.len() as f64) as f32).to_vec()
}

fn embed(id: u64, lane: Lane, text: &[TokenId]) -> (EmbedRequest, Receiver<Event>) {
    let (sender, receiver) = sync_channel(1);
    let events = Box::new(sender);
    let priority = Priority::Batch;
    (EmbedRequest { id: SequenceId(id), lane, tokens: text.into(), priority, events }, receiver)
}

fn run_to_end(engine: &mut Engine, clock: &dyn Fn() -> Duration, each: &mut dyn FnMut()) {
    for _ in 0..100_000 {
        engine.step(clock).expect("the account is whole");
        each();
        if engine.is_idle() && engine.is_delivered() {
            let stats = engine.stats();
            assert_eq!(
                stats.num_free_blocks + stats.num_cached_blocks,
                stats.num_total_blocks,
                "blocks leaked"
            );
            return;
        }
    }
    panic!("the engine did not finish");
}

fn text(seed: u32, length: usize) -> Vec<TokenId> {
    (0..length as u32).map(|i| 8 + (seed * 31 + i * i * 7 + i) % 40).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn neither_company_nor_chunks_nor_preemption_show(
        lengths in prop::collection::vec(1usize..60, 1..7),
        prompts in prop::collection::vec((1usize..30, any::<bool>()), 0..5),
        chunk in 3usize..40,
        num_blocks in 24usize..48,
        has_draft in any::<bool>(),
        isolated in any::<bool>(),
    ) {
        let config = EngineConfig {
            num_blocks,
            max_num_seqs: 4,
            max_num_batched_tokens: chunk,
            lane_isolation: isolated,
            ..config(DraftTokens::Fixed(2))
        };
        let models = match has_draft {
            true => hash_pair(1.0),
            false => Models { target: HashModel::boxed(0.0), draft: None },
        };
        let mut engine = Engine::new(&config, models).expect("the engine starts");
        let clock = clock();
        let params = SamplingParams { max_tokens: 9, stop_token_ids: vec![STOP], ..SamplingParams::default() };
        let generates: Vec<(Lane, Vec<TokenId>)> = prompts
            .iter()
            .enumerate()
            .map(|(i, &(length, deep))| {
                (if deep || !has_draft { Lane::Deep } else { Lane::Fast }, text(100 + i as u32, length))
            })
            .collect();
        let embeds: Vec<Vec<TokenId>> =
            lengths.iter().enumerate().map(|(i, &length)| text(i as u32, length)).collect();
        let mut receivers = Vec::new();
        for (i, text) in embeds.iter().enumerate() {
            let lane = if has_draft { Lane::Fast } else { Lane::Deep };
            let (request, receiver) = embed(i as u64, lane, text);
            engine.embed(request, clock());
            receivers.push((receiver, Answer::default()));
        }
        for (i, (lane, prompt)) in generates.iter().enumerate() {
            let (request, receiver) = request(1000 + i as u64, *lane, prompt, params.clone(), 4);
            engine.submit(request, clock());
            receivers.push((receiver, Answer::default()));
        }
        run_to_end(&mut engine, &clock, &mut || {
            for (receiver, answer) in &mut receivers {
                receiver.try_iter().for_each(|event| answer.take(event));
            }
        });
        let stats = engine.stats();
        prop_assert_eq!(stats.num_embeddings, embeds.len() as u64);
        prop_assert_eq!(stats.num_embedding_tokens, lengths.iter().sum::<usize>() as u64);
        let (embedded, generated) = receivers.split_at(embeds.len());
        for (text, (_, answer)) in embeds.iter().zip(embedded) {
            prop_assert_eq!(answer.embedding.as_ref(), Some(&expected(text)));
            prop_assert_eq!(answer.finished.map(|finished| finished.reason), Some(FinishReason::Length));
        }
        for ((lane, prompt), (_, answer)) in generates.into_iter().zip(generated) {
            let alone = common::run(&common::config(DraftTokens::Fixed(0)), hash_pair(1.0), &[(lane, prompt, params.clone())]);
            prop_assert_eq!(&answer.tokens, &alone[0].tokens);
        }
    }
}

#[test]
fn nothing_is_taken_from_the_prefix_cache_and_nothing_left_there() {
    let mut engine = Engine::new(&config(DraftTokens::Fixed(0)), hash_pair(0.0)).expect("the engine starts");
    let clock = clock();
    let words = text(1, 40);
    let params = SamplingParams { max_tokens: 1, ..SamplingParams::default() };
    let (submit, _answer) = request(1, Lane::Fast, &words, params, 4);
    engine.submit(submit, clock());
    run_to_end(&mut engine, &clock, &mut || {});
    let cached = engine.stats().num_cached_blocks;
    assert!(cached > 0);
    for id in 2..4 {
        let (request, events) = embed(id, Lane::Fast, &words);
        engine.embed(request, clock());
        let mut answer = Answer::default();
        run_to_end(&mut engine, &clock, &mut || events.try_iter().for_each(|event| answer.take(event)));
        assert_eq!(answer.embedding, Some(expected(&words)));
    }
    assert_eq!(engine.stats().num_cached_blocks, cached);
    assert_eq!(engine.stats().num_cached_tokens, 0);
}

#[test]
fn one_that_nobody_waits_for_any_more_gives_its_blocks_back() {
    let config = EngineConfig { max_num_batched_tokens: 8, ..config(DraftTokens::Fixed(0)) };
    let mut engine = Engine::new(&config, hash_pair(0.0)).expect("the engine starts");
    let clock = clock();
    let (request, _events) = embed(1, Lane::Fast, &text(1, 1000));
    engine.embed(request, clock());
    engine.step(&clock).expect("the account is whole");
    assert!(!engine.is_idle() && engine.stats().num_free_blocks < engine.stats().num_total_blocks);
    engine.abort(SequenceId(1));
    assert!(engine.is_idle());
    assert_eq!(engine.stats().num_free_blocks, engine.stats().num_total_blocks);
}

#[test]
fn a_text_that_breaks_the_model_fails_alone() {
    let models = Models { target: None, draft: HashModel::faulty(0.0, 47, FaultKind::Error(1)) };
    let mut engine = Engine::new(&config(DraftTokens::Fixed(0)), models).expect("the engine starts");
    let clock = clock();
    let (bad, bad_events) = embed(1, Lane::Fast, &[8, 47, 9]);
    let (good, good_events) = embed(2, Lane::Fast, &[8, 9, 10]);
    engine.embed(bad, clock());
    engine.embed(good, clock());
    let (mut bad, mut good) = (Answer::default(), Answer::default());
    run_to_end(&mut engine, &clock, &mut || {
        bad_events.try_iter().for_each(|event| bad.take(event));
        good_events.try_iter().for_each(|event| good.take(event));
    });
    assert!(matches!(bad.failed, Some(EngineError::Forward(_))), "{bad:?}");
    assert_eq!(good.embedding, Some(expected(&[8, 9, 10])));
}

#[test]
fn what_cannot_be_embedded_is_refused_before_it_is_queued() {
    let models = Models { target: None, draft: HashModel::boxed(0.0) };
    let (engine, thread) = EngineHandle::spawn(config(DraftTokens::Fixed(0)), models).expect("it starts");
    let refused = |lane, text: &[TokenId]| engine.embed(embed(1, lane, text).0).expect_err("it is refused");
    assert_eq!(refused(Lane::Fast, &[]), EngineError::EmptyPrompt);
    assert_eq!(refused(Lane::Deep, &[8]), EngineError::LaneUnavailable(Lane::Deep));
    assert!(matches!(refused(Lane::Fast, &[48]), EngineError::TokenOutOfRange { id: 48, .. }));
    assert!(matches!(refused(Lane::Fast, &text(0, 1025)), EngineError::PromptTooLong { .. }));
    let (request, events) = embed(2, Lane::Fast, &text(0, 1024));
    engine.embed(request).expect("all of the context may be used: there is no output");
    let mut answer = Answer::default();
    events.iter().for_each(|event| answer.take(event));
    assert_eq!(answer.embedding, Some(expected(&text(0, 1024))));
    engine.shutdown();
    thread.join().expect("it ends");
}
