use super::*;
use proptest::prelude::*;

fn draw_at(logits: &[f32], params: &SamplingParams, position: usize) -> TokenId {
    let draw = Draw { params, counts: None, provisional: &[], position, num_output_tokens: 0, allowed: None };
    draw_of(logits, &draw).expect("finite logits")
}

fn draw_of(logits: &[f32], draw: &Draw<'_>) -> Result<TokenId, EngineError> {
    Sampler::default().draw(Row::Whole(logits), draw, Asked::default()).map(|drawn| drawn.id)
}

/// The tokens that a textbook top-k, then top-p, then min-p would keep, with their probabilities.
fn kept(logits: &[f32], params: &SamplingParams) -> Vec<(TokenId, f64)> {
    let mut all: Vec<(TokenId, f64)> = logits
        .iter()
        .enumerate()
        .map(|(id, &l)| (id as TokenId, (f64::from(l) / f64::from(params.temperature)).exp()))
        .collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if params.top_k > 0 {
        all.truncate(params.top_k as usize);
    }
    let total: f64 = all.iter().map(|t| t.1).sum();
    let mut sum = 0.0;
    let mut nucleus = Vec::new();
    for &(id, w) in &all {
        nucleus.push((id, w));
        sum += w;
        if sum >= f64::from(params.top_p) * total {
            break;
        }
    }
    let floor = f64::from(params.min_p) * nucleus[0].1;
    nucleus.retain(|t| t.1 >= floor);
    let total: f64 = nucleus.iter().map(|t| t.1).sum();
    nucleus.into_iter().map(|(id, w)| (id, w / total)).collect()
}

/// Chi-square of `draws` draws at successive positions against the exact probabilities.
fn chi_square(logits: &[f32], params: &SamplingParams, draws: usize) -> (f64, usize) {
    let expected = kept(logits, params);
    let mut counts = vec![0u32; logits.len()];
    for position in 0..draws {
        counts[draw_at(logits, params, position) as usize] += 1;
    }
    let inside: u32 = expected.iter().map(|&(id, _)| counts[id as usize]).sum();
    assert_eq!(inside as usize, draws, "a token outside the candidates was drawn");
    let statistic = expected
        .iter()
        .map(|&(id, p)| {
            let e = p * draws as f64;
            (f64::from(counts[id as usize]) - e).powi(2) / e
        })
        .sum();
    (statistic, expected.len() - 1)
}

#[test]
fn draws_follow_the_exact_probabilities() {
    let logits = [1.0, 0.2, -0.5, 2.0, 0.9, -1.5, 0.0, 1.9];
    let base = SamplingParams { temperature: 0.8, seed: 42, ..SamplingParams::default() };
    for params in [
        base.clone(),
        SamplingParams { temperature: 1.7, ..base.clone() },
        SamplingParams { top_k: 4, ..base.clone() },
        SamplingParams { top_p: 0.8, ..base.clone() },
        SamplingParams { min_p: 0.2, ..base.clone() },
        SamplingParams { top_k: 6, top_p: 0.95, min_p: 0.05, ..base },
    ] {
        let (statistic, degrees) = chi_square(&logits, &params, 40_000);
        // Above the 99.99th percentile for up to 7 degrees of freedom.
        assert!(statistic < 30.0, "chi-square {statistic} with {degrees} degrees of freedom for {params:?}");
    }
}

#[test]
fn noise_of_different_seeds_is_independent_of_the_position() {
    let logits = [0.0f32; 4];
    let mut counts = [0u32; 4];
    for seed in 0..8_000 {
        let params = SamplingParams { temperature: 1.0, seed, ..SamplingParams::default() };
        counts[draw_at(&logits, &params, 9) as usize] += 1;
    }
    assert!(counts.iter().all(|c| (1_800..2_200).contains(c)), "{counts:?}");
}

#[test]
fn temperature_zero_is_argmax_and_ties_go_to_the_first() {
    let params = SamplingParams::default();
    assert_eq!(draw_at(&[0.0, 3.0, 3.0, -1.0], &params, 5), 1);
}

#[test]
fn logits_that_are_not_numbers_are_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut logits = vec![0.0; 130];
        logits[129] = bad;
        let params = SamplingParams::default();
        let draw = Draw {
            params: &params,
            counts: None,
            provisional: &[],
            position: 0,
            num_output_tokens: 0,
            allowed: None,
        };
        assert_eq!(draw_of(&logits, &draw), Err(EngineError::NonFiniteLogits));
        let scored = Sampler::default().score(&logits, 3, 2).map(|scored| scored.logprob);
        assert_eq!(scored, Err(EngineError::NonFiniteLogits));
    }
}

#[test]
fn min_tokens_masks_stop_tokens() {
    let params = SamplingParams { min_tokens: 2, stop_token_ids: vec![1], ..SamplingParams::default() };
    for (num_output_tokens, expected) in [(0, 2), (1, 2), (2, 1)] {
        let draw = Draw {
            params: &params,
            counts: None,
            provisional: &[],
            position: 7,
            num_output_tokens,
            allowed: None,
        };
        assert_eq!(draw_of(&[0.0, 9.0, 3.0], &draw), Ok(expected));
    }
}

#[test]
fn what_is_said_of_a_token_is_of_the_bare_logits() {
    let logits = [0.5, 2.0, -1.0, 2.5, 0.0];
    let params = SamplingParams { logit_bias: vec![(2, 9.0), (2, -1.0)], ..SamplingParams::default() };
    let draw = Draw {
        params: &params,
        counts: None,
        provisional: &[],
        position: 0,
        num_output_tokens: 0,
        allowed: None,
    };
    let asked = Asked { share: false, num_top: Some(5) };
    let mut sampler = Sampler::default();
    let drawn = sampler.draw(Row::Whole(&logits), &draw, asked).expect("finite logits");
    assert_eq!((drawn.id, drawn.margin()), (2, 0.5));
    let scores = drawn.logprobs(5);
    assert_eq!(scores.top.iter().map(|top| top.0).collect::<Vec<_>>(), [3, 1, 0, 4, 2]);
    let sum: f64 = scores.top.iter().map(|top| f64::from(top.1).exp()).sum();
    assert!((sum - 1.0).abs() < 1e-6);
    assert_eq!(scores.logprob, scores.top[4].1);
    assert_eq!(drawn.logprobs(1).top, [scores.top[0]]);
    let scored = sampler.score(&logits, 4, 1).expect("finite logits");
    assert_eq!((scored.logprob, scored.top), (scores.top[3].1, vec![scores.top[0]]));
    // Between one token and none there is no margin.
    let drawn = sampler.draw(Row::Whole(&[3.0]), &draw, asked).expect("finite logits");
    assert_eq!(drawn.margin(), 0.0);
}

#[test]
fn changes_are_one_a_token_in_the_order_of_ids() {
    let params = SamplingParams {
        logit_bias: vec![(7, 1.0), (3, 2.0), (7, 0.5)],
        repetition_penalty: 1.5,
        presence_penalty: 0.25,
        frequency_penalty: 0.5,
        min_tokens: 9,
        stop_token_ids: vec![3],
        ..SamplingParams::default()
    };
    let mut counts = TokenCounts::for_sequence(&[7, 5], &params).expect("penalties are on");
    counts.push(5);
    let draw = Draw {
        params: &params,
        counts: Some(&counts),
        provisional: &[5, 9],
        position: 5,
        num_output_tokens: 3,
        allowed: None,
    };
    let change = |id, bias, repetition, less| Change { bias, repetition, less, ..Change::none(id) };
    let expected = [
        Change { is_forbidden: true, ..change(3, 2.0, 1.0, 0.0) },
        change(5, 0.0, 1.5, 1.25),
        change(7, 1.5, 1.5, 0.0),
        change(9, 0.0, 1.5, 0.75),
    ];
    assert_eq!(draw.choice(Asked::default()).changes.as_deref(), Some(&expected.to_vec()));
    let plain = SamplingParams { min_tokens: 0, ..SamplingParams::default() };
    assert_eq!(Draw { params: &plain, counts: None, ..draw }.choice(Asked::default()).changes, None);
}

/// What a draw makes of logits, by the definition: token by token, with the counts taken anew.
fn textbook_changes(prompt: &[TokenId], output: &[TokenId], params: &SamplingParams) -> Vec<Change> {
    let change = |id: TokenId| {
        let in_output = output.iter().filter(|&&other| other == id).count();
        let mut change = Change::none(id);
        if in_output > 0 {
            change.less = params.presence_penalty + params.frequency_penalty * in_output as f32;
        }
        if in_output > 0 || prompt.contains(&id) {
            change.repetition = params.repetition_penalty;
        }
        change.bias = params.logit_bias.iter().filter(|bias| bias.0 == id).map(|bias| bias.1).sum();
        let is_early = output.len() < params.min_tokens as usize;
        change.is_forbidden = is_early && params.stop_token_ids.contains(&id);
        change
    };
    (0..12).map(change).filter(|change| *change != Change::none(change.id)).collect()
}

#[test]
fn rows_without_provisional_tokens_share_their_changes() {
    let params = SamplingParams { repetition_penalty: 1.5, ..SamplingParams::default() };
    let mut counts = TokenCounts::for_sequence(&[7, 5], &params).expect("penalties are on");
    let shared = counts.changes_after(&[]);
    assert!(Arc::ptr_eq(&shared, &counts.changes_after(&[])));
    assert!(!Arc::ptr_eq(&shared, &counts.changes_after(&[9])));
    counts.push(3);
    let ids = |changes: &[Change]| changes.iter().map(|change| change.id).collect::<Vec<_>>();
    assert_eq!((ids(&shared), ids(&counts.changes_after(&[]))), (vec![5, 7], vec![3, 5, 7]));
}

proptest! {
    /// A mask leaves a draw among what it allows, as if the others were not there.
    #[test]
    fn a_masked_draw_is_one_among_the_allowed(
        logits in prop::collection::vec(-4.0f32..4.0, 40),
        allowed in prop::collection::btree_set(0u32..40, 1..40),
        temperature in prop_oneof![Just(0.0f32), Just(0.9f32)],
        top_k in prop_oneof![Just(0u32), 1u32..5], top_p in prop_oneof![Just(1.0f32), Just(0.7f32)],
        position in 0usize..100,
    ) {
        let params = SamplingParams { temperature, top_k, top_p, seed: 5, ..SamplingParams::default() };
        let mut mask = TokenMask::new(40);
        allowed.iter().for_each(|&id| mask.allow(id));
        let draw = Draw {
            params: &params, counts: None, provisional: &[], position, num_output_tokens: 0, allowed: Some(&mask),
        };
        let got = draw_of(&logits, &draw).expect("finite logits");
        prop_assert!(allowed.contains(&got));
        let mut others_unlikely = logits.clone();
        for id in (0..40).filter(|id| !allowed.contains(id)) {
            others_unlikely[id as usize] = -1e4;
        }
        prop_assert_eq!(got, draw_at(&others_unlikely, &params, position));
        let asked = Asked { share: true, num_top: None };
        let mut sampler = Sampler::default();
        let drawn = sampler.draw(Row::Whole(&logits), &draw, asked).expect("finite logits");
        let total: f32 = allowed.iter().map(|&id| (logits[id as usize] - logits[got as usize]).exp()).sum();
        prop_assert!((drawn.share * total - 1.0).abs() < 1e-4);
    }

    /// Drawing with draft tokens provisional equals drawing once they are committed.
    #[test]
    fn provisional_tokens_count_like_committed_ones(
        logits in prop::collection::vec(-4.0f32..4.0, 12),
        prompt in prop::collection::vec(0u32..12, 1..6),
        output in prop::collection::vec(0u32..12, 0..8),
        split in 0usize..8,
        temperature in prop_oneof![Just(0.0f32), Just(0.9f32)],
    ) {
        let params = SamplingParams {
            temperature, seed: 3, repetition_penalty: 1.3, presence_penalty: 0.4, frequency_penalty: 0.2,
            ..SamplingParams::default()
        };
        let split = split.min(output.len());
        let draw = |committed: &[TokenId], provisional: &[TokenId]| {
            let mut counts = TokenCounts::for_sequence(&prompt, &params).expect("penalties are on");
            committed.iter().for_each(|&id| counts.push(id));
            let draw = Draw {
                params: &params, counts: Some(&counts), provisional,
                position: prompt.len() + output.len(), num_output_tokens: output.len(), allowed: None,
            };
            draw_of(&logits, &draw).expect("finite logits")
        };
        prop_assert_eq!(draw(&output, &[]), draw(&output[..split], &output[split..]));
    }

    /// However output is split, changes are those of the definition.
    #[test]
    fn changes_are_the_textbooks(
        prompt in prop::collection::vec(0u32..12, 1..6),
        output in prop::collection::vec(0u32..12, 0..8),
        split in 0usize..8,
        repetition_penalty in prop_oneof![Just(1.0f32), Just(1.3f32)],
        // Of the first, two occurrences leave nothing.
        presence_penalty in prop_oneof![Just(0.5f32), Just(0.0f32), Just(0.375f32)],
        logit_bias in prop::collection::vec((0u32..12, prop_oneof![Just(1.5f32), Just(-2.25f32)]), 0..5),
        min_tokens in 0u32..5,
    ) {
        let params = SamplingParams {
            repetition_penalty, presence_penalty, frequency_penalty: -0.25, logit_bias, min_tokens,
            stop_token_ids: vec![4, 2], ..SamplingParams::default()
        };
        let (committed, provisional) = output.split_at(split.min(output.len()));
        let mut counts = TokenCounts::for_sequence(&prompt, &params).expect("penalties are on");
        committed.iter().for_each(|&id| counts.push(id));
        let draw = Draw {
            params: &params, counts: Some(&counts), provisional,
            position: prompt.len() + output.len(), num_output_tokens: output.len(), allowed: None,
        };
        let changes = draw.choice(Asked::default()).changes;
        let got = changes.as_deref().map_or(&[][..], |changes| &changes[..]);
        // A bias that was cancelled out changes nothing, and may be there or not.
        let got: Vec<Change> = got.iter().copied().filter(|change| *change != Change::none(change.id)).collect();
        prop_assert_eq!(got, textbook_changes(&prompt, &output, &params));
    }

    /// Passing tokens over unseen never changes the winner.
    #[test]
    fn the_race_equals_gumbel_max(
        logits in prop::collection::vec(-30.0f32..30.0, 1..300),
        seed in any::<u64>(), position in 0usize..10_000, temperature in 0.05f32..3.0,
    ) {
        let params = SamplingParams { temperature, seed, ..SamplingParams::default() };
        let noise = Noise::new(seed, position as u64);
        let score = |id: usize| {
            let gumbel = -(-(-noise.complement(id as u32)).ln_1p()).ln();
            f64::from(logits[id]) / f64::from(temperature) + gumbel
        };
        let expected = (0..logits.len()).max_by(|&a, &b| score(a).total_cmp(&score(b))).expect("not empty");
        let got = draw_at(&logits, &params, position) as usize;
        prop_assert!(got == expected || (score(got) - score(expected)).abs() < 1e-9);
    }

    /// Truncation never draws what the textbook would not keep.
    #[test]
    fn truncation_keeps_what_the_textbook_keeps(
        logits in prop::collection::vec(-5.0f32..5.0, 1..60),
        top_k in 0u32..20, top_p in 0.05f32..1.0, min_p in 0.0f32..0.5, position in 0usize..50,
    ) {
        let params = SamplingParams { temperature: 1.0, top_k, top_p, min_p, seed: 1, ..SamplingParams::default() };
        let got = draw_at(&logits, &params, position);
        prop_assert!(kept(&logits, &params).iter().any(|t| t.0 == got));
    }

    /// Whatever valid parameters and finite logits meet: a token, no panic.
    #[test]
    fn extreme_parameters_still_draw_a_token(
        logits in prop::collection::vec(prop_oneof![Just(f32::MAX), Just(f32::MIN), Just(0.0f32), -1e3f32..1e3], 1..20),
        temperature in prop_oneof![Just(1e-38f32), Just(100.0f32), Just(1.0f32)],
        repetition_penalty in prop_oneof![Just(0.01f32), Just(100.0f32)],
        top_p in prop_oneof![Just(1e-30f32), Just(0.9f32), Just(1.0f32)],
        min_p in prop_oneof![Just(0.0f32), Just(1.0f32)],
        top_k in 0u32..3,
        seed in any::<u64>(),
    ) {
        let params = SamplingParams {
            temperature, repetition_penalty, top_p, min_p, top_k, seed, presence_penalty: -2.0,
            ..SamplingParams::default()
        };
        prop_assert!(params.validate(logits.len()).is_ok());
        let mut counts = TokenCounts::for_sequence(&[0], &params).expect("penalties are on");
        counts.push(0);
        let draw = Draw {
            params: &params, counts: Some(&counts), provisional: &[0], position: 3, num_output_tokens: 1, allowed: None,
        };
        let id = draw_of(&logits, &draw).expect("finite logits");
        prop_assert!((id as usize) < logits.len());
    }
}
