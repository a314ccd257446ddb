//! An answer's tokens do not depend on whether anybody sees their logits: with log-probabilities rows are taken whole
//! and drawn from by the engine, without them the model's head chooses as it computes. Both lanes of the shipped
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
                ..SamplingParams::default()
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
/// whoever asks gets whole rows, of which stop tokens are struck out.
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

/// Three tokens are drafted after the first one; a row goes from whole to token among those that verify them.
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
