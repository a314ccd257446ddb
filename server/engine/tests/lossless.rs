//! Whatever is drafted, batched or chunked: the same tokens and log-probabilities, bit for bit.

mod common;

use common::{Answer, HashModel, STOP, VOCAB_SIZE, config, hash_pair, run};
use proptest::prelude::*;
use tandem_engine::{DraftTokens, Lane, Models, SamplingParams, TokenId};

fn plain(lane: Lane, prompt: &[TokenId], params: &SamplingParams) -> Answer {
    run(&config(DraftTokens::Fixed(0)), hash_pair(0.0), &[(lane, prompt.to_vec(), params.clone())]).remove(0)
}

fn params() -> impl Strategy<Value = SamplingParams> {
    let shape = (
        prop_oneof![Just(0.0f32), Just(0.8), Just(1.5)],
        prop_oneof![Just(0u32), 1u32..10],
        prop_oneof![Just(1.0f32), 0.3f32..1.0],
        prop_oneof![Just(0.0f32), 0.0f32..0.3],
        prop_oneof![Just(1.0f32), Just(1.2)],
        prop_oneof![Just(0.0f32), Just(0.5)],
    );
    let rest = (
        any::<u64>(),
        prop_oneof![Just(None), Just(Some(3u8))],
        any::<bool>(),
        0u32..6,
        1u32..40,
        any::<bool>(),
    );
    (shape, rest).prop_map(
        |(
            (temperature, top_k, top_p, min_p, repetition_penalty, penalty),
            (seed, logprobs, stops, min_tokens, max_tokens, score),
        )| {
            SamplingParams {
                temperature,
                top_k,
                top_p,
                min_p,
                repetition_penalty,
                presence_penalty: penalty,
                frequency_penalty: penalty / 2.0,
                logit_bias: if penalty > 0.0 { vec![(3, 1.5), (9, -50.0)] } else { Vec::new() },
                seed,
                logprobs,
                prompt_logprobs: if score { logprobs } else { None },
                stop_token_ids: if stops { vec![STOP, 11] } else { Vec::new() },
                min_tokens,
                max_tokens,
            }
        },
    )
}

fn requests() -> impl Strategy<Value = Vec<(Lane, Vec<TokenId>, SamplingParams)>> {
    let lane = prop_oneof![2 => Just(Lane::Deep), 1 => Just(Lane::Fast)];
    let prompt = prop::collection::vec(0..VOCAB_SIZE as TokenId, 1..90);
    prop::collection::vec((lane, prompt, params()), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn any_mix_equals_each_sequence_alone_without_speculation(
        requests in requests(),
        draft_tokens in prop_oneof![Just(DraftTokens::Auto), (0u8..=8).prop_map(DraftTokens::Fixed)],
        stray in prop_oneof![Just(0.0f32), Just(1.0), Just(3.0), Just(100.0)],
        max_num_seqs in 1usize..10,
        budget in 1usize..200,
        num_blocks in 40usize..200,
        block_size in 1usize..20,
    ) {
        let mut config = config(draft_tokens);
        config.max_num_seqs = max_num_seqs;
        config.max_num_batched_tokens = budget;
        config.block_size = block_size;
        config.num_blocks = num_blocks.max(140usize.div_ceil(block_size));
        let together = run(&config, hash_pair(stray), &requests);
        for (answer, (lane, prompt, params)) in together.iter().zip(&requests) {
            // The fast lane is answered by the (straying) draft itself.
            let alone = match lane {
                Lane::Deep => plain(*lane, prompt, params),
                Lane::Fast => run(
                    &common::config(DraftTokens::Fixed(0)), hash_pair(stray),
                    &[(*lane, prompt.clone(), params.clone())],
                ).remove(0),
            };
            prop_assert_eq!(answer.invariant(), alone.invariant());
            let finished = answer.finished.expect("finished");
            prop_assert_eq!(finished.usage.num_output_tokens as usize, answer.tokens.len());
            prop_assert_eq!(finished.usage.num_prompt_tokens as usize, prompt.len());
            prop_assert!(answer.drafted <= finished.usage.num_accepted_tokens as usize);
        }
    }
}

#[test]
fn a_perfect_draft_is_accepted_whole() {
    let params = SamplingParams { temperature: 0.8, seed: 5, max_tokens: 100, ..SamplingParams::default() };
    let answer =
        run(&config(DraftTokens::Fixed(4)), hash_pair(0.0), &[(Lane::Deep, vec![1, 2, 3], params)]).remove(0);
    let usage = answer.finished.expect("finished").usage;
    assert_eq!(usage.num_accepted_tokens, usage.num_draft_tokens);
    // The prompt's pass yields one token, every further one five.
    assert_eq!(usage.num_decode_steps, 99u32.div_ceil(5));
}

#[test]
fn a_useless_draft_costs_passes_and_changes_nothing() {
    let params = SamplingParams { max_tokens: 60, logprobs: Some(2), ..SamplingParams::default() };
    let request = [(Lane::Deep, vec![5; 20], params.clone())];
    let answer = run(&config(DraftTokens::Fixed(4)), hash_pair(100.0), &request).remove(0);
    assert_eq!(answer.invariant(), plain(Lane::Deep, &[5; 20], &params).invariant());
    let usage = answer.finished.expect("finished").usage;
    assert!(usage.num_accepted_tokens * 5 < usage.num_draft_tokens, "{usage:?}");
}

#[test]
fn agreeing_drafts_are_accepted_more_often_with_common_noise_than_by_chance() {
    let params = SamplingParams { temperature: 1.0, seed: 11, max_tokens: 300, ..SamplingParams::default() };
    let answer =
        run(&config(DraftTokens::Fixed(2)), hash_pair(0.5), &[(Lane::Deep, vec![1], params)]).remove(0);
    let usage = answer.finished.expect("finished").usage;
    assert!(usage.num_accepted_tokens * 2 > usage.num_draft_tokens, "{usage:?}");
}

#[test]
fn padding_of_the_embedding_is_never_sampled_and_may_differ_within_a_pair() {
    let request = |temperature| {
        let params =
            SamplingParams { temperature, max_tokens: 50, logprobs: Some(5), ..SamplingParams::default() };
        [(Lane::Deep, vec![1, 2, 3], params)]
    };
    for temperature in [0.0, 1.0, 100.0] {
        let models = Models { target: HashModel::padded(0.0, 16), draft: HashModel::padded(0.5, 3) };
        let answer = run(&config(DraftTokens::Fixed(3)), models, &request(temperature)).remove(0);
        let plain = run(&config(DraftTokens::Fixed(0)), hash_pair(0.0), &request(temperature)).remove(0);
        assert_eq!(answer.invariant(), plain.invariant());
    }
}
