//! Aborts, slow readers, overload, bad requests and failures: nothing dies, nothing leaks.

mod common;

use std::sync::mpsc::Receiver;
use std::time::Duration;

use common::{Answer, FaultKind, HashModel, STOP, VOCAB_SIZE, clock, config, hash_pair, request, run};
use tandem_engine::{
    DraftTokens, Engine, EngineError, EngineHandle, EngineStats, Event, FinishReason, Lane, Models,
    SamplingParams, SequenceId,
};

fn long(max_tokens: u32) -> SamplingParams {
    SamplingParams { max_tokens, temperature: 0.7, ..SamplingParams::default() }
}

fn collect(receiver: &Receiver<Event>) -> Answer {
    let mut answer = Answer::default();
    while answer.finished.is_none() && answer.failed.is_none() {
        answer.take(receiver.recv_timeout(Duration::from_secs(20)).expect("an event"));
    }
    answer
}

fn num_unused(stats: &EngineStats) -> u64 {
    stats.num_free_blocks + stats.num_cached_blocks
}

#[test]
fn an_abort_frees_the_blocks_at_once() {
    let clock = clock();
    let mut engine = Engine::new(&config(DraftTokens::Fixed(3)), hash_pair(1.0)).expect("starts");
    let (submit, receiver) = request(1, Lane::Deep, &[1, 2, 3], long(500), 1000);
    engine.submit(submit, clock());
    while engine.stats().num_deep_tokens == 0 {
        engine.step(&clock).expect("the account is whole");
    }
    // And in the middle of a pass too.
    engine.step(&clock).expect("the account is whole");
    assert!(num_unused(&engine.stats()) < engine.stats().num_total_blocks);
    engine.abort(SequenceId(1));
    assert_eq!(num_unused(&engine.stats()), engine.stats().num_total_blocks);
    assert!(engine.is_idle());
    assert_eq!(engine.stats().num_aborted, 1);
    let finished = collect(&receiver).finished.expect("an account");
    assert_eq!(finished.reason, FinishReason::Aborted);
    assert!(finished.usage.num_output_tokens > 0);
}

#[test]
fn a_closed_receiver_is_an_abort_within_one_pass() {
    let clock = clock();
    let mut engine = Engine::new(&config(DraftTokens::Fixed(3)), hash_pair(1.0)).expect("starts");
    for lane in [Lane::Deep, Lane::Fast] {
        let (submit, receiver) = request(1, lane, &[1, 2, 3], long(500), 1000);
        engine.submit(submit, clock());
        engine.step(&clock).expect("the account is whole");
        drop(receiver);
        let num_passes = |engine: &Engine| engine.stats().num_target_passes + engine.stats().num_draft_passes;
        let before = num_passes(&engine);
        while !engine.is_idle() {
            engine.step(&clock).expect("the account is whole");
        }
        assert!(num_passes(&engine) <= before + 8, "a round of drafts and its verification");
        assert!(engine.is_delivered());
        assert_eq!(num_unused(&engine.stats()), engine.stats().num_total_blocks);
    }
    assert_eq!(engine.stats().num_aborted, 2);
}

#[test]
fn a_slow_reader_gets_everything_and_holds_nobody_up() {
    let clock = clock();
    let mut engine = Engine::new(&config(DraftTokens::Fixed(4)), hash_pair(0.5)).expect("starts");
    let (submit, slow) = request(1, Lane::Deep, &[1, 2, 3], long(50), 1);
    engine.submit(submit, clock());
    let (submit, quick) = request(2, Lane::Deep, &[1, 2, 3], long(50), 100);
    engine.submit(submit, clock());
    while !engine.is_idle() {
        engine.step(&clock).expect("the account is whole");
    }
    assert!(!engine.is_delivered());
    assert_eq!(num_unused(&engine.stats()), engine.stats().num_total_blocks);
    let mut answer = Answer::default();
    while !engine.is_delivered() {
        slow.try_iter().for_each(|event| answer.take(event));
        engine.deliver();
    }
    slow.try_iter().for_each(|event| answer.take(event));
    assert_eq!(answer.invariant(), collect(&quick).invariant());
    assert_eq!(answer.tokens.len(), 50);
}

#[test]
fn more_sequences_than_room_all_finish_in_turn() {
    let mut config = config(DraftTokens::Fixed(2));
    config.num_blocks = 12;
    config.max_num_seqs = 3;
    let requests: Vec<_> = (0..20).map(|i| (Lane::Deep, vec![i as u32 + 1; 5], long(10))).collect();
    for answer in run(&config, hash_pair(1.0), &requests) {
        assert_eq!(answer.finished.expect("finished").reason, FinishReason::Length);
    }
}

#[test]
fn a_stop_token_ends_the_sequence_and_is_not_output() {
    let params = SamplingParams { stop_token_ids: (0..40).collect(), ..long(400) };
    let answer =
        run(&config(DraftTokens::Fixed(4)), hash_pair(0.0), &[(Lane::Deep, vec![9], params)]).remove(0);
    let Some(FinishReason::Stop(id)) = answer.finished.map(|f| f.reason) else { panic!("{answer:?}") };
    assert!(id < 40 && answer.tokens.iter().all(|&t| t >= 40));
}

#[test]
fn scoring_alone_yields_no_tokens() {
    let params = SamplingParams { max_tokens: 0, prompt_logprobs: Some(0), ..SamplingParams::default() };
    let answer =
        run(&config(DraftTokens::Fixed(4)), hash_pair(0.0), &[(Lane::Fast, vec![4; 130], params)]).remove(0);
    let logprobs = answer.prompt_logprobs.expect("scored");
    assert_eq!((answer.tokens.len(), logprobs.len()), (0, 130));
    assert!(logprobs[0].is_none() && logprobs[1..].iter().all(Option::is_some));
}

#[test]
fn margins_of_the_first_tokens_are_those_of_the_answering_model() {
    for (lane, drafts) in [(Lane::Fast, 0), (Lane::Deep, 0), (Lane::Deep, 4)] {
        let clock = clock();
        let mut engine = Engine::new(&config(DraftTokens::Fixed(drafts)), hash_pair(0.5)).expect("starts");
        let params = SamplingParams { num_margins: 5, logprobs: Some(2), ..long(12) };
        let (submit, receiver) = request(1, lane, &[1, 2, 3], params, 1000);
        engine.submit(submit, clock());
        while !engine.is_idle() {
            engine.step(&clock).expect("the account is whole");
        }
        let (mut margins, mut differences) = (Vec::new(), Vec::new());
        for event in receiver.try_iter() {
            if let Event::Tokens(chunk) = event {
                margins.extend(chunk.margins);
                differences.extend(chunk.logprobs.iter().map(|scores| scores.top[0].1 - scores.top[1].1));
            }
        }
        assert_eq!((margins.len(), differences.len()), (5, 12), "{lane:?} with {drafts} draft tokens");
        for (margin, difference) in margins.iter().zip(&differences) {
            // Log-probabilities are the logits less one number, rounded.
            assert!((margin - difference).abs() < 1e-4, "{margin} and {difference}");
        }
    }
}

#[test]
fn logits_that_are_not_numbers_fail_their_sequence_alone() {
    let models =
        Models { target: HashModel::faulty(0.0, STOP, FaultKind::Poison), draft: HashModel::boxed(0.5) };
    let requests = [
        (Lane::Deep, vec![1, STOP], long(5)),
        (Lane::Deep, vec![1, 2], SamplingParams { logit_bias: vec![(STOP, -100.0)], ..long(5) }),
    ];
    let answers = run(&config(DraftTokens::Fixed(3)), models, &requests);
    assert_eq!(answers[0].failed, Some(EngineError::NonFiniteLogits));
    assert_eq!(answers[1].tokens.len(), 5);
}

#[test]
fn a_draft_with_broken_logits_costs_speculation_only() {
    let models =
        Models { target: HashModel::boxed(0.0), draft: HashModel::faulty(0.0, 2, FaultKind::Poison) };
    let answer = run(&config(DraftTokens::Fixed(3)), models, &[(Lane::Deep, vec![1, 2], long(60))]).remove(0);
    let plain =
        run(&config(DraftTokens::Fixed(0)), hash_pair(0.0), &[(Lane::Deep, vec![1, 2], long(60))]).remove(0);
    assert_eq!(answer.invariant(), plain.invariant());
}

#[test]
fn bad_requests_are_refused_with_their_reason() {
    let mut config = config(DraftTokens::Fixed(2));
    config.num_blocks = 20;
    let models = Models { target: HashModel::boxed(0.0), draft: None };
    let (engine, thread) = EngineHandle::spawn(config, models).expect("starts");
    let submit = |lane, prompt: &[u32], params: SamplingParams| {
        engine.submit(request(engine.next_id().0, lane, prompt, params, 4).0)
    };
    let base = || long(4);
    assert_eq!(submit(Lane::Fast, &[1], base()), Err(EngineError::LaneUnavailable(Lane::Fast)));
    assert_eq!(submit(Lane::Deep, &[], base()), Err(EngineError::EmptyPrompt));
    let vocab_size = VOCAB_SIZE;
    assert_eq!(submit(Lane::Deep, &[48], base()), Err(EngineError::TokenOutOfRange { id: 48, vocab_size }));
    assert_eq!(
        submit(Lane::Deep, &[1; 1024], base()),
        Err(EngineError::PromptTooLong { num_prompt_tokens: 1024, max_model_len: 1024 })
    );
    assert_eq!(
        submit(Lane::Deep, &[1; 100], base()),
        Err(EngineError::KvCacheTooSmall { needed_blocks: 26, total_blocks: 20 })
    );
    for bad in [
        SamplingParams { temperature: f32::NAN, ..base() },
        SamplingParams { temperature: -1.0, ..base() },
        SamplingParams { top_p: 0.0, ..base() },
        SamplingParams { min_p: f32::NAN, ..base() },
        SamplingParams { repetition_penalty: 0.0, ..base() },
        SamplingParams { presence_penalty: 3.0, ..base() },
        SamplingParams { logit_bias: vec![(99, 1.0)], ..base() },
        SamplingParams { logprobs: Some(21), ..base() },
    ] {
        assert!(matches!(submit(Lane::Deep, &[1], bad), Err(EngineError::InvalidParameter { .. })));
    }
    engine.drain();
    thread.join().expect("the engine's thread ends well");
}

#[test]
fn the_handle_serves_drains_and_refuses_afterwards() {
    let (engine, thread) = EngineHandle::spawn(config(DraftTokens::Auto), hash_pair(0.5)).expect("starts");
    let mut receivers = Vec::new();
    for i in 0..32u32 {
        let lane = if i % 2 == 0 { Lane::Deep } else { Lane::Fast };
        let (submit, receiver) = request(engine.next_id().0, lane, &[i + 1], long(40), 4);
        engine.submit(submit).expect("accepted");
        receivers.push(receiver);
    }
    engine.drain();
    for receiver in &receivers {
        assert_eq!(collect(receiver).tokens.len(), 40);
    }
    thread.join().expect("the engine's thread ends well");
    assert_eq!(engine.stats().num_finished, 32);
    assert_eq!(num_unused(&engine.stats()), engine.stats().num_total_blocks);
    let late = engine.submit(request(99, Lane::Deep, &[1], long(4), 4).0);
    assert_eq!(late, Err(EngineError::ShuttingDown));
}

#[test]
fn a_full_queue_is_refused_and_a_shutdown_tells_everybody() {
    let mut config = config(DraftTokens::Fixed(0));
    config.max_waiting = 4;
    config.max_num_seqs = 1;
    config.max_model_len = 512;
    let (engine, thread) = EngineHandle::spawn(config, hash_pair(0.0)).expect("starts");
    let mut receivers = Vec::new();
    let refused = (0..64).find_map(|_| {
        let (submit, receiver) = request(engine.next_id().0, Lane::Deep, &[3], long(500), 1000);
        receivers.push(receiver);
        engine.submit(submit).err()
    });
    assert!(matches!(refused, Some(EngineError::QueueFull { .. })), "{refused:?}");
    receivers.pop();
    engine.shutdown();
    for receiver in &receivers {
        let reason = collect(receiver).finished.expect("finished").reason;
        assert!(matches!(reason, FinishReason::Aborted | FinishReason::Length));
    }
    thread.join().expect("the engine's thread ends well");
    assert_eq!(num_unused(&engine.stats()), engine.stats().num_total_blocks);
}
