//! Whatever is drafted, batched or chunked: the same tokens and log-probabilities, bit for bit.

mod common;

use common::{Answer, Ask, Grammar, HashModel, STOP, Server, VOCAB_SIZE, config, hash_pair, run};
use proptest::prelude::*;
use tandem_engine::{
    CacheSalt, DraftHead, DraftSource, DraftSources, DraftTokens, EngineConfig, Lane, Models, Priority,
    SamplingParams, SpeculationParams, TokenId,
};

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
                num_margins: 0,
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
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

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
            prop_assert!(answer.drafted <= finished.usage.total_accepted_tokens() as usize);
        }
    }
}

#[test]
fn a_perfect_draft_is_accepted_whole() {
    let params = SamplingParams { temperature: 0.8, seed: 5, max_tokens: 100, ..SamplingParams::default() };
    let answer =
        run(&config(DraftTokens::Fixed(4)), hash_pair(0.0), &[(Lane::Deep, vec![1, 2, 3], params)]).remove(0);
    let usage = answer.finished.expect("finished").usage;
    assert_eq!(usage.total_accepted_tokens(), usage.total_draft_tokens());
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
    assert!(usage.total_accepted_tokens() * 5 < usage.total_draft_tokens(), "{usage:?}");
}

#[test]
fn agreeing_drafts_are_accepted_more_often_with_common_noise_than_by_chance() {
    let params = SamplingParams { temperature: 1.0, seed: 11, max_tokens: 300, ..SamplingParams::default() };
    let answer =
        run(&config(DraftTokens::Fixed(2)), hash_pair(0.5), &[(Lane::Deep, vec![1], params)]).remove(0);
    let usage = answer.finished.expect("finished").usage;
    assert!(usage.total_accepted_tokens() * 2 > usage.total_draft_tokens(), "{usage:?}");
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

/// Stray of the draft in the tests below: often right, often wrong.
const STRAY: f32 = 1.0;

/// What each request gets alone: no speculation, nothing cached, room for everything.
fn alone(asks: &[Ask]) -> Vec<Answer> {
    let config = EngineConfig {
        prefix_cache: false,
        max_num_seqs: 1,
        lane_isolation: false,
        ..config(DraftTokens::Fixed(0))
    };
    let mut server = Server::new(&config, hash_pair(STRAY));
    asks.iter().map(|ask| server.serve(&[Ask { arrives: 0, ..ask.clone() }]).remove(0)).collect()
}

fn assert_same(answers: &[Answer], wanted: &[Answer], when: &str) {
    for (index, (answer, wanted)) in answers.iter().zip(wanted).enumerate() {
        assert_eq!(answer.invariant(), wanted.invariant(), "request {index}, {when}");
    }
}

/// Requests of all kinds whose prompts begin alike.
fn mixed(num: usize) -> Vec<Ask> {
    let common: Vec<TokenId> = (0..64).map(|i| i * i % 41).collect();
    (0..num)
        .map(|i| {
            let mut prompt = common[..common.len() - i % 5].to_vec();
            prompt.extend((0..1 + i as TokenId % 7).map(|j| (j + i as TokenId) % 48));
            let params = SamplingParams {
                temperature: [0.0, 0.9, 0.0][i % 3],
                seed: i as u64,
                repetition_penalty: if i % 4 == 0 { 1.2 } else { 1.0 },
                logprobs: (i % 5 != 2 || i % 2 == 0).then_some(2),
                prompt_logprobs: if i % 8 == 0 { Some(1) } else { None },
                max_tokens: 20 + i as u32 % 9,
                ..SamplingParams::default()
            };
            let grammar = (i % 5 == 2).then(|| Grammar::new(i as u64));
            Ask { grammar, ..Ask::new(if i % 3 == 1 { Lane::Fast } else { Lane::Deep }, &prompt, &params) }
        })
        .collect()
}

#[test]
fn alone_and_in_a_batch_of_any_size_up_to_64() {
    let wanted = alone(&mixed(64));
    for num in [2, 3, 7, 16, 33, 64] {
        let answers = Server::new(&config(DraftTokens::Auto), hash_pair(STRAY)).serve(&mixed(num));
        assert_same(&answers, &wanted, &format!("{num} together"));
    }
}

#[test]
fn any_prefill_chunking() {
    let asks = mixed(6);
    let wanted = alone(&asks);
    for budget in (1..=70).chain([100, 400]) {
        let config = EngineConfig {
            max_num_seqs: 1,
            max_num_batched_tokens: budget,
            prefix_cache: budget % 2 == 0,
            ..config(DraftTokens::Fixed(2))
        };
        let answers = Server::new(&config, hash_pair(STRAY)).serve(&asks);
        assert_same(&answers, &wanted, &format!("{budget} tokens a pass"));
    }
}

#[test]
fn cold_and_cached_prefix() {
    let asks = mixed(24);
    let wanted = alone(&asks);
    for (block_size, hash_bits) in [(1, 64), (4, 64), (7, 4), (16, 1)] {
        let config = EngineConfig {
            block_size,
            num_blocks: 4096 / block_size,
            hash_bits,
            ..config(DraftTokens::Auto)
        };
        let mut server = Server::new(&config, hash_pair(STRAY));
        assert_same(&server.serve(&asks), &wanted, "cold");
        // Both lanes together filled blocks of their own with the same tokens, and only one is kept:
        // the other model's part of it is filled the next time.
        assert_same(&server.serve(&asks), &wanted, "half cached");
        let warm = server.serve(&asks);
        assert_same(&warm, &wanted, "cached");
        for (ask, answer) in asks.iter().zip(&warm) {
            let cached = answer.finished.expect("finished").usage.num_cached_tokens as usize;
            let scored = ask.params.prompt_logprobs.is_some();
            let whole_blocks = (ask.prompt.len() - 1) / block_size * block_size;
            assert!(scored || cached >= whole_blocks, "{cached} tokens of {} cached", ask.prompt.len());
        }
        let others: Vec<Ask> = asks.iter().map(|ask| Ask { salt: CacheSalt(1), ..ask.clone() }).collect();
        let first = server.serve(&others[..1]).remove(0);
        assert_eq!(first.finished.expect("finished").usage.num_cached_tokens, 0, "another tenant's blocks");
        assert_same(&server.serve(&others), &wanted, "another tenant");
    }
}

#[test]
fn preempted_and_not() {
    let mut asks = mixed(32);
    for (i, ask) in asks.iter_mut().enumerate() {
        // Interactive work that comes later takes the blocks of batch work.
        ask.priority = if i % 2 == 0 { Priority::Batch } else { Priority::Interactive };
        ask.arrives = i * 3;
    }
    let wanted = alone(&asks);
    for prefix_cache in [true, false] {
        for num_blocks in [25, 40, 70] {
            let config = EngineConfig { num_blocks, prefix_cache, ..config(DraftTokens::Fixed(3)) };
            let mut server = Server::new(&config, hash_pair(STRAY));
            assert_same(&server.serve(&asks), &wanted, &format!("{num_blocks} blocks"));
            assert!(server.engine.stats().num_preemptions > 0, "nobody gave way with {num_blocks} blocks");
        }
    }
}

#[test]
fn whoever_drafts_and_however_much() {
    let asks = mixed(12);
    let wanted = alone(&asks);
    for source in [DraftSource::Draft, DraftSource::Ngram, DraftSource::Prediction] {
        let mut accepted = 0;
        for max_draft_tokens in [None, Some(0), Some(1), Some(2), Some(5), Some(16)] {
            let drafted: Vec<Ask> = asks
                .iter()
                .zip(&wanted)
                .map(|(ask, answer)| {
                    let mut prediction = answer.tokens.clone();
                    prediction[answer.tokens.len() / 2] += 1;
                    let sources = DraftSources::NONE.with(source);
                    let speculation =
                        SpeculationParams { max_draft_tokens, sources, prediction: prediction.into() };
                    Ask { speculation, ..ask.clone() }
                })
                .collect();
            let mut server = Server::new(&config(DraftTokens::Auto), hash_pair(STRAY));
            // The n-gram index knows the answers from the second time on.
            for _ in 0..2 {
                let answers = server.serve(&drafted);
                assert_same(&answers, &wanted, &format!("{max_draft_tokens:?} from {source:?}"));
            }
            accepted += server.engine.stats().num_accepted_tokens[source as usize];
        }
        assert!(accepted > 0, "{source:?} never found a token");
    }
}

#[test]
fn the_draft_chooses_among_all_tokens_or_the_first_ones() {
    let asks = mixed(12);
    let wanted = alone(&asks);
    for length in [1, 7, 16, 40, 47, 48] {
        for draft_tokens in [DraftTokens::Fixed(3), DraftTokens::Auto] {
            let config = EngineConfig { draft_head: DraftHead::First(length), ..config(draft_tokens) };
            let mut server = Server::new(&config, hash_pair(STRAY));
            assert_same(&server.serve(&asks), &wanted, &format!("{length} tokens to draft from"));
            let accepted = server.engine.stats().num_accepted_tokens[DraftSource::Draft as usize];
            assert!(
                accepted > 0 || length < 40 || draft_tokens == DraftTokens::Auto,
                "{length}: none stands"
            );
        }
    }
}

#[test]
fn any_interleaving_of_the_lanes() {
    for lane_isolation in [true, false] {
        for gap in [0, 1, 2, 5] {
            let mut asks = mixed(20);
            for (i, ask) in asks.iter_mut().enumerate() {
                ask.arrives = i * gap;
            }
            let config = EngineConfig { lane_isolation, max_num_seqs: 6, ..config(DraftTokens::Fixed(3)) };
            let answers = Server::new(&config, hash_pair(STRAY)).serve(&asks);
            assert_same(&answers, &alone(&asks), &format!("{gap} steps apart, isolated: {lane_isolation}"));
        }
    }
}
