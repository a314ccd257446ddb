//! Embeddings: the same bits alone, batched, chunked and preempted; beside work that generates, which does
//! not change either; cancelled, refused and failed as other work is.

mod common;

use std::cell::Cell;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use common::{Answer, FaultKind, HashModel, STOP, clock, config, hash_pair, mean_hidden_state, request};
use proptest::prelude::*;
use tandem_engine::{
    BATCH_PATIENCE, DraftTokens, EmbedRequest, Engine, EngineConfig, EngineError, EngineHandle, Event,
    FinishReason, Lane, Models, Priority, SamplingParams, SequenceId, TokenId,
};

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
            prop_assert_eq!(answer.embedding.as_ref(), Some(&mean_hidden_state(text)));
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
        assert_eq!(answer.embedding, Some(mean_hidden_state(&words)));
    }
    assert_eq!(engine.stats().num_cached_blocks, cached);
    assert_eq!(engine.stats().num_cached_tokens, 0);
}

/// Prompts may have a whole pass where there is no fast lane to wait for them; a text to embed, for which nobody is in
/// a hurry, may not.
#[test]
fn without_a_fast_lane_texts_come_in_chunks_and_prompts_do_not() {
    let models = Models { target: HashModel::boxed(0.0), draft: None };
    let mut engine = Engine::new(&config(DraftTokens::Fixed(0)), models).expect("the engine starts");
    let readings = Cell::new(0);
    // A pass takes a millisecond, whatever it computes.
    let clock = || Duration::from_millis(readings.replace(readings.get() + 1));
    engine.profile(DraftTokens::Fixed(0), &clock).expect("the model is sound");
    let mut num_passes = |embeds: bool| {
        let before = engine.stats().num_target_passes;
        let (events, params) = (embed(1, Lane::Deep, &text(1, 1000)), SamplingParams::default());
        let (request, answer) =
            request(2, Lane::Deep, &text(2, 1000), SamplingParams { max_tokens: 1, ..params }, 4);
        if embeds {
            engine.embed(events.0, clock())
        } else {
            engine.submit(request, clock())
        }
        run_to_end(&mut engine, &clock, &mut || {
            answer.try_iter().chain(events.1.try_iter()).for_each(drop);
        });
        engine.stats().num_target_passes - before
    };
    assert_eq!(num_passes(false), 1);
    assert!(num_passes(true) >= 4);
}

/// Whoever has waited long goes before others, but not by taking the seat of one that gives way to everybody:
/// that one has waited as long, and would take it back before either gets anywhere.
#[test]
fn texts_that_have_waited_long_do_not_take_turns_at_one_seat() {
    let config =
        EngineConfig { max_num_seqs: 1, max_num_batched_tokens: 16, ..config(DraftTokens::Fixed(0)) };
    let mut engine = Engine::new(&config, hash_pair(0.0)).expect("the engine starts");
    let texts = [text(1, 300), text(2, 200), text(3, 100)];
    let mut answers: Vec<_> = texts
        .iter()
        .enumerate()
        .map(|(id, text)| {
            let (request, events) = embed(id as u64, Lane::Deep, text);
            engine.embed(request, Duration::ZERO);
            (events, Answer::default())
        })
        .collect();
    let ticks = clock();
    let late = || 2 * BATCH_PATIENCE + ticks();
    run_to_end(&mut engine, &late, &mut || {
        for (events, answer) in &mut answers {
            events.try_iter().for_each(|event| answer.take(event));
        }
    });
    assert_eq!(engine.stats().num_preemptions, 0);
    for (text, (_, answer)) in texts.iter().zip(&answers) {
        assert_eq!(answer.embedding, Some(mean_hidden_state(text)));
    }
}

/// One that has waited long and is preempted for somebody who cannot start yet is the first to start again. It
/// must not be the first in the pass as well, or whoever runs gets nowhere and nobody ever makes room.
#[test]
fn a_text_that_starts_over_and_over_does_not_stop_who_runs() {
    let config = EngineConfig {
        block_size: 18,
        num_blocks: 5,
        max_num_batched_tokens: 1,
        max_model_len: 90,
        ..config(DraftTokens::Fixed(0))
    };
    let mut engine = Engine::new(&config, hash_pair(0.0)).expect("the engine starts");
    let ticks = clock();
    let late = || 2 * BATCH_PATIENCE + ticks();
    let params = SamplingParams { max_tokens: 10, ..SamplingParams::default() };
    let (running, running_events) = request(1, Lane::Deep, &text(1, 27), params.clone(), 16);
    engine.submit(running, late());
    engine.step(&late).expect("the account is whole");
    let (old, old_events) = embed(2, Lane::Deep, &text(2, 37));
    engine.embed(old, Duration::ZERO);
    let (waiting, waiting_events) = request(3, Lane::Deep, &text(3, 54), params, 16);
    engine.submit(waiting, late());
    let mut answers = [running_events, old_events, waiting_events].map(|events| (events, Answer::default()));
    run_to_end(&mut engine, &late, &mut || {
        for (events, answer) in &mut answers {
            events.try_iter().for_each(|event| answer.take(event));
        }
    });
    assert_eq!(
        answers.map(|(_, answer)| (answer.tokens.len(), answer.embedding.is_some())),
        [(10, false), (0, true), (10, false)]
    );
}

/// Nobody starves: a text that has waited long keeps the seat that it gets, though somebody who waits for a token
/// always stands before it.
#[test]
fn a_text_that_has_waited_long_is_computed_while_others_keep_coming() {
    let config =
        EngineConfig { max_num_seqs: 1, max_num_batched_tokens: 16, ..config(DraftTokens::Fixed(0)) };
    let mut engine = Engine::new(&config, hash_pair(0.0)).expect("the engine starts");
    let ticks = clock();
    let late = || 2 * BATCH_PATIENCE + ticks();
    let tokens = text(1, 100);
    let (old, old_events) = embed(1, Lane::Deep, &tokens);
    engine.embed(old, Duration::ZERO);
    let mut answer = Answer::default();
    let mut others = Vec::new();
    for id in 2..200 {
        let params = SamplingParams { max_tokens: 2, ..SamplingParams::default() };
        let (request, events) = request(id, Lane::Deep, &text(id as u32, 5), params, 16);
        engine.submit(request, late());
        others.push(events);
        engine.step(&late).expect("the account is whole");
        old_events.try_iter().for_each(|event| answer.take(event));
        others.iter().for_each(|events| events.try_iter().for_each(drop));
    }
    assert_eq!(answer.embedding, Some(mean_hidden_state(&tokens)));
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
    assert_eq!(good.embedding, Some(mean_hidden_state(&[8, 9, 10])));
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
    assert_eq!(answer.embedding, Some(mean_hidden_state(&text(0, 1024))));
    engine.shutdown();
    thread.join().expect("it ends");
}
