//! An output of a form: every token allowed, the same whatever is drafted, batched or preempted, and a form
//! that fails costs its own sequence only.

mod common;

use std::sync::atomic::Ordering;

use common::{Answer, Ask, Grammar, STOP, Server, VOCAB_SIZE, config, hash_pair, request};
use proptest::prelude::*;
use tandem_engine::{
    DraftSource, DraftSources, DraftTokens, Ending, EngineConfig, EngineError, FinishReason, Lane, Priority,
    SamplingParams, SpeculationParams, TokenId,
};

/// How far the draft strays from the target: often right, often wrong.
const STRAY: f32 = 1.0;

fn alone(ask: &Ask) -> Answer {
    let config = EngineConfig {
        prefix_cache: false,
        max_num_seqs: 1,
        lane_isolation: false,
        ..config(DraftTokens::Fixed(0))
    };
    Server::new(&config, hash_pair(STRAY)).serve(&[Ask { arrives: 0, ..ask.clone() }]).remove(0)
}

fn check_form(ask: &Ask, answer: &Answer) {
    let ended = match answer.finished.expect("finished").reason {
        FinishReason::Stop(_) => Some(Ending::Allowed),
        FinishReason::Complete => Some(Ending::Forced),
        _ => None,
    };
    let grammar = ask.grammar.as_ref().expect("it has one");
    grammar.check(&answer.tokens, ended).unwrap_or_else(|wrong| panic!("{wrong} in {answer:?}"));
}

fn asks() -> impl Strategy<Value = Vec<Ask>> {
    let lane = prop_oneof![2 => Just(Lane::Deep), 1 => Just(Lane::Fast)];
    let sampling = (
        prop_oneof![Just(0.0f32), Just(0.9)],
        prop_oneof![Just(0u32), 1u32..6],
        prop_oneof![Just(1.0f32), Just(0.7)],
        prop_oneof![Just(1.0f32), Just(1.2)],
        prop_oneof![3 => Just(None), 1 => Just(Some(2u8))],
        (0u32..6, 1u32..40, any::<bool>(), any::<u64>()),
    );
    let drafting = (prop_oneof![Just(None), (0u8..8).prop_map(Some)], 0u8..8, any::<bool>());
    let form = (0u64..40, any::<bool>());
    let ask =
        (lane, prop::collection::vec(0..VOCAB_SIZE as TokenId, 1..40), sampling, drafting, form, 0usize..8);
    let ask = ask.prop_map(|(lane, prompt, sampling, (max_draft_tokens, sources, batch), form, arrives)| {
        let (temperature, top_k, top_p, repetition_penalty, logprobs, rest) = sampling;
        let (min_tokens, max_tokens, stops, seed) = rest;
        let params = SamplingParams {
            temperature,
            top_k,
            top_p,
            repetition_penalty,
            logprobs,
            seed,
            min_tokens,
            max_tokens,
            stop_token_ids: if stops { vec![STOP] } else { Vec::new() },
            ..SamplingParams::default()
        };
        let sources = DraftSource::ALL
            .into_iter()
            .filter(|&source| sources >> source as u8 & 1 == 1)
            .fold(DraftSources::NONE, DraftSources::with);
        Ask {
            grammar: Some(Grammar { forgets: form.1, ..Grammar::new(form.0) }),
            speculation: SpeculationParams { max_draft_tokens, sources, ..SpeculationParams::default() },
            priority: if batch { Priority::Batch } else { Priority::Interactive },
            arrives,
            ..Ask::new(lane, &prompt, &params)
        }
    });
    prop::collection::vec(ask, 1..10)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_form_is_kept_and_nothing_else_changes_the_output(
        mut asks in asks(),
        draft_tokens in prop_oneof![Just(DraftTokens::Auto), (0u8..=8).prop_map(DraftTokens::Fixed)],
        stray in prop_oneof![Just(0.0f32), Just(STRAY), Just(100.0)],
        (max_num_seqs, budget, block_size) in (1usize..8, 1usize..150, 1usize..12),
        blocks in 1usize..6,
    ) {
        asks.sort_by_key(|ask| ask.arrives);
        let plain: Vec<Answer> = asks.iter().map(|ask| {
            // The fast lane is answered by the (straying) draft itself.
            let config = EngineConfig { prefix_cache: false, ..config(DraftTokens::Fixed(0)) };
            Server::new(&config, hash_pair(stray)).serve(&[Ask { arrives: 0, ..ask.clone() }]).remove(0)
        }).collect();
        for (ask, answer) in asks.iter_mut().zip(&plain) {
            check_form(ask, answer);
            // What the client expects is nearly right.
            let mut prediction = answer.tokens.clone();
            if let Some(token) = prediction.last_mut() {
                *token = (*token + 1) % VOCAB_SIZE as TokenId;
            }
            ask.speculation.prediction = prediction.into();
        }
        let config = EngineConfig {
            max_num_seqs,
            max_num_batched_tokens: budget,
            block_size,
            // Room for little more than one: others are preempted.
            num_blocks: 90usize.div_ceil(block_size) * blocks,
            ..config(draft_tokens)
        };
        let together = Server::new(&config, hash_pair(stray)).serve(&asks);
        for (answer, wanted) in together.iter().zip(&plain) {
            prop_assert_eq!(answer.invariant(), wanted.invariant());
        }
    }
}

#[test]
fn a_draft_drawn_under_the_mask_is_accepted_as_often_as_a_free_one() {
    let params = SamplingParams { temperature: 0.8, seed: 5, max_tokens: 200, ..SamplingParams::default() };
    let mut num_drafted = 0;
    for seed in 0..20 {
        let ask = Ask { grammar: Some(Grammar::new(seed)), ..Ask::new(Lane::Deep, &[1, 2, 3], &params) };
        let answer = Server::new(&config(DraftTokens::Fixed(4)), hash_pair(0.0)).serve(&[ask]).remove(0);
        let usage = answer.finished.expect("finished").usage;
        assert_eq!(usage.total_accepted_tokens(), usage.total_draft_tokens(), "a perfect draft");
        num_drafted += usage.total_draft_tokens();
    }
    assert!(num_drafted > 50, "{num_drafted} tokens drafted");
}

#[test]
fn a_token_without_alternative_takes_no_pass_and_a_position_one_mask() {
    let params = SamplingParams { max_tokens: 100, seed: 1, ..SamplingParams::default() };
    let (mut num_tokens, mut num_steps) = (0, 0);
    for seed in 0..20 {
        let grammar = Grammar::new(seed);
        let mut server = Server::new(&config(DraftTokens::Fixed(3)), hash_pair(STRAY));
        let (constraint, num_masks) = grammar.start_counted();
        let (mut ask, receiver) = request(0, Lane::Deep, &[4, 5], params.clone(), 128);
        ask.constraint = Some(constraint);
        ask.speculation.max_draft_tokens = Some(0);
        server.engine.submit(ask, std::time::Duration::ZERO);
        let clock = common::clock();
        while !server.engine.is_idle() {
            server.engine.step(&clock).expect("the account is whole");
        }
        let mut answer = Answer::default();
        receiver.try_iter().for_each(|event| answer.take(event));
        let usage = answer.finished.expect("finished").usage;
        assert!(num_masks.load(Ordering::Relaxed) <= u64::from(usage.num_output_tokens) + 1);
        num_tokens += usage.num_output_tokens;
        num_steps += usage.num_decode_steps;
    }
    assert!(
        num_steps * 4 < num_tokens * 3,
        "{num_steps} steps for {num_tokens} tokens, of which a third is free"
    );
}

#[test]
fn a_form_that_fails_takes_its_own_sequence_only() {
    let params = SamplingParams { temperature: 1.0, max_tokens: 30, ..SamplingParams::default() };
    let mut num_failed = 0;
    for seed in 0..40 {
        let ask = |breaks_at| {
            let params = SamplingParams { seed, ..params.clone() };
            let grammar = Some(Grammar { breaks_at, ..Grammar::new(seed) });
            Ask { grammar, ..Ask::new(Lane::Deep, &[seed as TokenId], &params) }
        };
        let free = Ask { grammar: None, ..ask(None) };
        let asks = [ask(Some(5)), ask(None), free];
        let wanted: Vec<Answer> = asks.iter().map(alone).collect();
        let answers = Server::new(&config(DraftTokens::Fixed(4)), hash_pair(STRAY)).serve(&asks);
        assert_eq!(answers[1].invariant(), wanted[1].invariant());
        assert_eq!(answers[2].invariant(), wanted[2].invariant());
        // Not because of a state that was only drafted.
        assert_eq!(answers[0].failed, wanted[0].failed);
        if let Some(EngineError::Constraint(reason)) = &answers[0].failed {
            assert_eq!(reason, "state 5 is broken");
            num_failed += 1;
        } else {
            assert_eq!(answers[0].invariant(), wanted[0].invariant());
        }
    }
    assert!((5..40).contains(&num_failed), "{num_failed} of 40 failed");
}
