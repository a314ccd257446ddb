//! An answer's tokens do not depend on what else is asked of their rows: the model's head chooses as it computes, with
//! log-probabilities or margins beside it or without, whatever the tokens are drawn with. Both lanes of the shipped
//! pair, greedy and sampled, alone and together, plain and drafted for.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Answer, Ask, Server};
use tandem_engine::{DraftTokens, EngineConfig, FinishReason, Lane, Models, SamplingParams};
use tandem_kernels::ThreadPool;
use tandem_models::{BackendKind, Checkpoint, Model};

fn load(name: &str) -> Option<Box<dyn Model>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo").join(name);
    let checkpoint = Checkpoint::open(&dir).expect("the demo pair is in the repository");
    let pool = Arc::new(ThreadPool::new(2));
    Some(tandem_models::load(&checkpoint, BackendKind::Cpu, pool).expect("it loads"))
}

fn server(draft_tokens: DraftTokens) -> Server {
    let config = EngineConfig {
        block_size: 16,
        num_blocks: 256,
        max_model_len: 512,
        num_token_ids: 4096,
        ..common::config(draft_tokens)
    };
    Server::new(&config, Models { target: load("target"), draft: load("draft") })
}

/// What the request draws with, beside its temperature: everything in turn.
fn drawn_with(i: u32) -> SamplingParams {
    let plain = SamplingParams::default();
    match i {
        1 => SamplingParams { top_k: 20, top_p: 0.8, ..plain },
        2 => SamplingParams { top_p: 0.95, repetition_penalty: 1.1, ..plain },
        3 => SamplingParams { presence_penalty: 0.5, logit_bias: vec![(300, 4.0), (7, -100.0)], ..plain },
        4 => SamplingParams { min_p: 0.05, ..plain },
        _ => plain,
    }
}

/// Six requests, some of which report log-probabilities or margins, all or none.
fn asks(reports: impl Fn(usize) -> bool) -> Vec<Ask> {
    (0..6u32)
        .map(|i| {
            let params = SamplingParams {
                temperature: [0.0, 0.8, 0.3][i as usize % 3],
                seed: u64::from(i),
                max_tokens: 24,
                logprobs: (reports(i as usize) && i != 4).then_some(0),
                num_margins: if reports(i as usize) && i == 4 { 7 } else { 0 },
                ..drawn_with(i)
            };
            let lane = if i % 2 == 0 { Lane::Deep } else { Lane::Fast };
            let prompt: Vec<u32> = (0..20).map(|j| 300 + (i * 97 + j * 31) % 3000).collect();
            Ask::new(lane, &prompt, &params)
        })
        .collect()
}

fn tokens(answers: Vec<Answer>) -> Vec<Vec<u32>> {
    assert!(answers.iter().all(|answer| answer.failed.is_none() && !answer.tokens.is_empty()));
    answers.into_iter().map(|answer| answer.tokens).collect()
}

#[test]
fn reporting_logits_changes_no_token() {
    for draft_tokens in [DraftTokens::Fixed(0), DraftTokens::Fixed(3), DraftTokens::Auto] {
        let unseen = tokens(server(draft_tokens).serve(&asks(|_| false)));
        let seen = tokens(server(draft_tokens).serve(&asks(|_| true)));
        assert_eq!(unseen, seen, "{draft_tokens:?}");
        let mixed = tokens(server(draft_tokens).serve(&asks(|i| i % 3 == 1)));
        assert_eq!(unseen, mixed, "{draft_tokens:?}, some of them");
        let mut server = server(draft_tokens);
        let alone: Vec<_> =
            asks(|_| false).iter().flat_map(|ask| tokens(server.serve(std::slice::from_ref(ask)))).collect();
        assert_eq!(unseen, alone, "{draft_tokens:?}, one by one");
    }
}

/// [`asks`] whose answers end at an even id, but not before two tokens (the first) to seven (the last): until then
/// stop tokens are struck out.
fn asks_that_stop(reports: impl Fn(usize) -> bool) -> Vec<Ask> {
    let mut asks = asks(reports);
    for (ask, min_tokens) in asks.iter_mut().zip(2..) {
        ask.params.stop_token_ids = (0..4096).step_by(2).collect();
        ask.params.min_tokens = min_tokens;
    }
    asks
}

fn outcomes(draft_tokens: DraftTokens, reports: bool) -> Vec<(Vec<u32>, FinishReason)> {
    let answers = server(draft_tokens).serve(&asks_that_stop(|_| reports));
    let outcome = |answer: Answer| (answer.tokens, answer.finished.expect("it ends").reason);
    answers.into_iter().map(outcome).collect()
}

/// Three tokens are drafted after the first one; among the rows that verify them stop tokens come to be allowed.
#[test]
fn min_tokens_may_end_in_the_middle_of_a_draft() {
    let plain = outcomes(DraftTokens::Fixed(0), true);
    for (index, (tokens, _)) in plain.iter().enumerate() {
        assert!(tokens.len() >= 2 + index && tokens.iter().all(|id| id % 2 == 1), "{index}: {tokens:?}");
    }
    assert!(plain.iter().any(|(_, reason)| matches!(reason, FinishReason::Stop(_))), "{plain:?}");
    for draft_tokens in [DraftTokens::Fixed(0), DraftTokens::Fixed(3), DraftTokens::Auto] {
        assert_eq!(plain, outcomes(draft_tokens, false), "{draft_tokens:?}");
        assert_eq!(plain, outcomes(draft_tokens, true), "{draft_tokens:?}, with log-probabilities");
    }
}
