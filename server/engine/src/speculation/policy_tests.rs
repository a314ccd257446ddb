use std::time::Duration;

use proptest::prelude::*;

use super::super::draft_rounds::{Drafting, MAX_MODEL_DRAFT_TOKENS};
use super::*;

fn costs(target: &[(usize, u64)], draft: &[(usize, u64)]) -> StepCosts {
    let micros =
        |costs: &[(usize, u64)]| costs.iter().map(|&(rows, m)| (rows, Duration::from_micros(m))).collect();
    StepCosts::from_measured(micros(target), micros(draft))
}

fn offers(draft: usize, ngram: (usize, usize), prediction: (usize, usize)) -> [Offer; 3] {
    [(draft, 0), ngram, prediction].map(|(num_tokens, agreement)| Offer { num_tokens, agreement })
}

fn candidate(acceptance: &Acceptance) -> Candidate {
    Candidate {
        acceptance: *acceptance,
        fixed: None,
        offers: offers(16, (0, 0), (0, 0)),
        catch_up: 0,
        remaining: 100,
    }
}

fn plan(policy: &mut DraftPolicy, candidates: &[Candidate]) -> Vec<Option<(DraftSource, usize)>> {
    let mut out = Vec::new();
    policy.plan(candidates, &StepLoad::default(), &mut out);
    out
}

fn draft_kind() -> ProposalKind {
    ProposalKind::new(DraftSource::Draft, Offer::default())
}

/// A sequence of which `accepted` of `offered` draft tokens stood, 50 times.
fn experienced(policy: &mut DraftPolicy, offered: usize, accepted: usize) -> Acceptance {
    let mut acceptance = Acceptance::default();
    for _ in 0..50 {
        policy.record(&mut acceptance, draft_kind(), offered, accepted);
    }
    acceptance
}

#[test]
fn greedy_experience_says_nothing_of_sampled_sequences() {
    let mut policy = DraftPolicy::new(DraftTokens::Auto, StepCosts::default());
    let unknown = policy.standing(&Acceptance::new(true), draft_kind());
    experienced(&mut policy, 16, 16);
    assert!(policy.standing(&Acceptance::new(false), draft_kind()).first > 0.95);
    assert_eq!(policy.standing(&Acceptance::new(true), draft_kind()), unknown);
}

const CHEAP_ROWS: [(usize, u64); 3] = [(1, 1_000), (16, 1_060), (64, 1_200)];
const CHEAP_DRAFT: [(usize, u64); 2] = [(1, 20), (64, 30)];

#[test]
fn a_good_draft_and_cheap_verification_draft_long() {
    let mut policy = DraftPolicy::new(DraftTokens::Auto, costs(&CHEAP_ROWS, &CHEAP_DRAFT));
    let good = experienced(&mut policy, 16, 16);
    assert_eq!(plan(&mut policy, &[candidate(&good)]), [Some((DraftSource::Draft, 16))]);
}

#[test]
fn prompts_in_the_pass_do_not_make_drafting_look_cheap() {
    let rows = [(1, 100), (64, 6_400)];
    let mut policy = DraftPolicy::new(DraftTokens::Auto, costs(&rows, &[(1, 20), (64, 200)]));
    let even = experienced(&mut policy, 2, 1);
    let load = StepLoad { num_prefill_rows: 80, ..StepLoad::default() };
    let mut out = Vec::new();
    policy.plan(&[candidate(&even)], &load, &mut out);
    assert_eq!(out, [None], "a row that costs as much as a pass of one token");
}

#[test]
fn a_useless_draft_is_not_used_but_probed() {
    let mut policy = DraftPolicy::new(DraftTokens::Auto, costs(&CHEAP_ROWS, &[(1, 400), (64, 800)]));
    let useless = experienced(&mut policy, 4, 0);
    let steps: Vec<_> = (0..1_000).map(|_| plan(&mut policy, &[candidate(&useless)])[0]).collect();
    assert_eq!(steps[0], None);
    let probes = steps.iter().flatten().count();
    assert!((2..20).contains(&probes), "{probes} probes in 1,000 steps");
}

#[test]
fn rows_that_cost_in_proportion_are_not_worth_a_middling_draft() {
    let mut policy = DraftPolicy::new(DraftTokens::Auto, costs(&[(1, 100), (64, 6_400)], &CHEAP_DRAFT));
    let middling = experienced(&mut policy, 4, 2);
    assert_eq!(plan(&mut policy, &[candidate(&middling); 16]), [None; 16]);
}

#[test]
fn a_fixed_length_is_kept_and_taken_from_the_first_source() {
    let mut policy = DraftPolicy::new(DraftTokens::Fixed(5), StepCosts::default());
    let useless = experienced(&mut policy, 4, 0);
    let plain = candidate(&useless);
    let text = Candidate { offers: offers(16, (9, 2), (3, 1)), ..plain };
    let guess = Candidate { offers: offers(16, (9, 2), (3, 0)), ..plain };
    let own = Candidate { fixed: Some(7), offers: offers(16, (9, 2), (0, 0)), ..plain };
    let none = Candidate { fixed: Some(0), ..plain };
    let ending = Candidate { remaining: 3, ..plain };
    assert_eq!(
        plan(&mut policy, &[plain, text, guess, own, none, ending]),
        [
            Some((DraftSource::Draft, 5)),
            Some((DraftSource::Prediction, 3)),
            Some((DraftSource::Draft, 5)),
            Some((DraftSource::Draft, 7)),
            None,
            Some((DraftSource::Draft, 2)),
        ]
    );
}

#[test]
fn a_prediction_in_step_is_preferred_to_the_draft() {
    let mut policy = DraftPolicy::new(DraftTokens::Auto, costs(&CHEAP_ROWS, &[(1, 200), (64, 400)]));
    let acceptance = Acceptance::default();
    let with = Candidate { offers: offers(16, (16, 2), (16, 20)), ..candidate(&acceptance) };
    assert_eq!(plan(&mut policy, &[with]), [Some((DraftSource::Prediction, 16))]);
}

#[test]
fn a_full_batch_spends_its_rows_where_they_gain_most() {
    let mut policy =
        DraftPolicy::new(DraftTokens::Auto, costs(&[(1, 1_000), (24, 1_000), (25, 3_000)], &CHEAP_DRAFT));
    let (poor, good) = (experienced(&mut policy, 4, 0), experienced(&mut policy, 4, 4));
    let mut batch = [candidate(&poor); 16];
    batch[5] = candidate(&good);
    let plan = plan(&mut policy, &batch);
    let lengths: Vec<usize> = plan.iter().map(|p| p.map_or(0, |p| p.1)).collect();
    assert!(lengths.iter().sum::<usize>() <= 8, "past the step in the costs: {lengths:?}");
    assert!(lengths[5] >= 4, "{lengths:?}");
}

#[test]
fn a_draft_far_behind_is_not_caught_up_for_a_few_tokens() {
    let mut policy = DraftPolicy::new(DraftTokens::Auto, costs(&CHEAP_ROWS, &[(1, 20), (64, 640)]));
    let good = experienced(&mut policy, 4, 4);
    let behind = Candidate { catch_up: 4_000, ..candidate(&good) };
    assert_eq!(plan(&mut policy, &[Candidate { remaining: 5, ..behind }]), [None]);
    assert!(plan(&mut policy, &[Candidate { remaining: 2_000, catch_up: 40, ..behind }])[0].is_some());
}

#[test]
fn an_unsure_draft_stops() {
    let mut policy = DraftPolicy::new(DraftTokens::Auto, costs(&[(1, 1_000), (64, 13_600)], &CHEAP_DRAFT));
    let good = experienced(&mut policy, 4, 3);
    plan(&mut policy, &[candidate(&good)]);
    let later = policy.later_standing(&good);
    let drafting = |standing| Drafting { standing, later, goes_on: false };
    assert!(policy.next_round(&mut [drafting(0.95)], 0, 2));
    assert!(!policy.next_round(&mut [drafting(0.2)], 0, 2));
    let mut both = [drafting(0.2), drafting(0.95)];
    assert!(policy.next_round(&mut both, 0, 3));
    assert_eq!(both.map(|d| d.goes_on), [false, true]);
    assert!(policy.is_worth_verifying(0.9, 2));
    let verified = (0..16).filter(|_| policy.is_worth_verifying(0.05, 2)).count();
    assert_eq!(verified, 1, "an unlikely token is verified now and then, to learn");
}

/// A server with modelled costs and chance: the same chances whatever is drafted.
struct Simulation<'a> {
    costs: &'a StepCosts,
    batch: usize,
    setting: DraftTokens,
    /// Of a sequence: how often its draft tokens stand.
    rate: &'a dyn Fn(u64) -> f64,
    /// Draft tokens differ: `rate` is only their mean, and the draft's confidence says which is which.
    confident: bool,
    /// How often n-gram tokens stand, where every step offers some.
    ngram: Option<f64>,
}

struct Seat {
    id: u64,
    acceptance: Acceptance,
    num_tokens: usize,
    draft_computed: usize,
}

const PROMPT: usize = 40;
const OUTPUT: usize = 128;

/// Uniform in 0..1, by SplitMix64's mixing.
fn uniform(a: u64, b: u64) -> f64 {
    let mut z = (a.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ b).wrapping_mul(0xD134_2543_DE82_EF95);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

impl Simulation<'_> {
    /// The chance of the token at `position` of a sequence to stand.
    fn chance(&self, id: u64, position: usize) -> f64 {
        let rate = (self.rate)(id);
        if !self.confident {
            return rate;
        }
        // Two kinds of tokens, sure and unsure, with the mean `rate`.
        if uniform(!id, position as u64) < rate { 0.5 + rate / 2.0 } else { rate / 2.0 }
    }

    /// Tokens per modelled second over some sequences, one after the other in each seat.
    fn run(&self) -> f64 {
        let mut policy = DraftPolicy::new(self.setting, self.costs.clone());
        let mut next_id = 0;
        let mut new_seat = || {
            next_id += 1;
            Seat { id: next_id, acceptance: Acceptance::default(), num_tokens: PROMPT + 1, draft_computed: 0 }
        };
        let mut seats: Vec<Seat> = (0..self.batch).map(|_| new_seat()).collect();
        let mut out = Vec::new();
        let (mut tokens, mut seconds) = (0, 0.0);
        while tokens < (24 + 4 * self.batch) * OUTPUT {
            let candidates: Vec<Candidate> = seats
                .iter()
                .map(|seat| Candidate {
                    catch_up: (seat.num_tokens - 1).saturating_sub(seat.draft_computed),
                    remaining: PROMPT + OUTPUT - seat.num_tokens,
                    offers: [
                        Offer { num_tokens: MAX_MODEL_DRAFT_TOKENS, agreement: 0 },
                        self.ngram_offer(),
                        Offer::default(),
                    ],
                    ..candidate(&seat.acceptance)
                })
                .collect();
            policy.plan(&candidates, &StepLoad::default(), &mut out);
            let planned = |from: DraftSource| {
                let length =
                    move |&p: &Option<(DraftSource, usize)>| p.filter(|p| p.0 == from).map_or(0, |p| p.1);
                out.iter().map(length).collect::<Vec<usize>>()
            };
            let (mut drafts, ngrams) = (planned(DraftSource::Draft), planned(DraftSource::Ngram));
            seconds += self.draft(&mut policy, &mut seats, &mut drafts);
            let rows: usize = drafts.iter().chain(&ngrams).sum();
            seconds += self.costs.target(self.batch + rows);
            for (seat, (&draft, &ngram)) in seats.iter_mut().zip(drafts.iter().zip(&ngrams)) {
                tokens += match ngram {
                    0 => self.verify(&mut policy, seat, DraftSource::Draft, draft),
                    _ => self.verify(&mut policy, seat, DraftSource::Ngram, ngram),
                };
                if seat.num_tokens >= PROMPT + OUTPUT {
                    *seat = new_seat();
                }
            }
        }
        tokens as f64 / seconds
    }

    /// The draft rounds: their seconds. Shortens `lengths` to what is worth verifying.
    fn draft(&self, policy: &mut DraftPolicy, seats: &mut [Seat], lengths: &mut [usize]) -> f64 {
        let adaptive = self.confident && self.setting == DraftTokens::Auto;
        let mut seconds = 0.0;
        let mut standing = vec![1.0; seats.len()];
        let mut drafting: Vec<usize> = (0..seats.len()).filter(|&i| lengths[i] > 0).collect();
        let mut target_rows = seats.len();
        let mut place = 0;
        while !drafting.is_empty() {
            let behind = |i: usize| (seats[i].num_tokens - 1).saturating_sub(seats[i].draft_computed);
            let catch_up: usize = if place == 0 { drafting.iter().map(|&i| behind(i)).sum() } else { 0 };
            seconds += self.costs.draft_beside(drafting.len() + catch_up, 0);
            place += 1;
            target_rows += drafting.len();
            let mut rounds: Vec<Drafting> = Vec::new();
            drafting.retain(|&i| {
                let seat = &mut seats[i];
                if !adaptive {
                    return place < lengths[i];
                }
                let chance = self.chance(seat.id, seat.num_tokens + place - 1);
                standing[i] *= policy.calibration(true).acceptance_given(chance as f32);
                lengths[i] = place;
                if !policy.is_worth_verifying(standing[i], target_rows - 1) {
                    lengths[i] -= 1;
                    target_rows -= 1;
                    if place == 1 {
                        policy.record_dropped(&mut seat.acceptance, standing[i]);
                        // The pass computed the last committed token all the same.
                        seat.draft_computed = seat.num_tokens;
                    }
                    return false;
                }
                let room = PROMPT + OUTPUT - seat.num_tokens - 1;
                let goes_on = place < room.min(MAX_MODEL_DRAFT_TOKENS);
                if goes_on {
                    let later = policy.later_standing(&seat.acceptance);
                    rounds.push(Drafting { standing: standing[i], later, goes_on });
                }
                goes_on
            });
            if adaptive {
                policy.next_round(&mut rounds, 0, target_rows);
                let mut rounds = rounds.iter();
                drafting.retain(|_| rounds.next().is_some_and(|round| round.goes_on));
            }
        }
        seconds
    }

    fn ngram_offer(&self) -> Offer {
        self.ngram.map_or(Offer::default(), |_| Offer { num_tokens: MAX_MODEL_DRAFT_TOKENS, agreement: 3 })
    }

    /// Commits what stands; the number of new tokens.
    fn verify(&self, policy: &mut DraftPolicy, seat: &mut Seat, source: DraftSource, length: usize) -> usize {
        let is_draft = source == DraftSource::Draft;
        let mut accepted = 0;
        while accepted < length {
            let position = seat.num_tokens + accepted;
            let chance = if is_draft { self.chance(seat.id, position) } else { self.ngram.unwrap_or(0.0) };
            let stands = uniform(seat.id, position as u64) < chance;
            if is_draft {
                policy.calibration(true).record(chance as f32, stands);
            }
            if !stands {
                break;
            }
            accepted += 1;
        }
        if is_draft && length > 0 {
            seat.draft_computed = seat.num_tokens + accepted.min(length - 1);
        }
        seat.num_tokens += accepted + 1;
        let offer = if is_draft { Offer::default() } else { self.ngram_offer() };
        policy.record(&mut seat.acceptance, ProposalKind::new(source, offer), length, accepted);
        accepted + 1
    }

    /// Tokens per second of the best fixed length, and that length.
    fn best_fixed(&self) -> (f64, u8) {
        [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16]
            .map(|length| (Simulation { setting: DraftTokens::Fixed(length), ..*self }.run(), length))
            .into_iter()
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .expect("there are lengths")
    }

    /// Tokens per second of the policy, as a share of the best fixed length's, and that length.
    fn against_best_fixed(&self) -> (f64, u8) {
        let (best, length) = self.best_fixed();
        (self.run() / best, length)
    }
}

/// Machines: rows free, rows that cost, rows in proportion, rows in steps, a dear draft.
fn machines() -> [(&'static str, StepCosts); 5] {
    let flat: [(usize, u64); 3] = [(1, 1_000), (64, 1_100), (272, 1_500)];
    let small_draft: [(usize, u64); 3] = [(1, 45), (9, 100), (64, 600)];
    [
        ("rows almost free", costs(&flat, &[(1, 150), (64, 160)])),
        ("two cores", costs(&[(1, 130), (2, 160), (5, 250), (9, 370), (16, 600), (64, 2_200)], &small_draft)),
        ("rows in proportion", costs(&[(1, 100), (64, 6_400)], &[(1, 10), (64, 640)])),
        (
            "rows in steps",
            costs(&[(1, 1_000), (8, 1_010), (9, 1_900), (16, 1_950), (32, 2_100), (64, 4_000)], &small_draft),
        ),
        ("a dear draft", costs(&flat, &[(1, 600), (64, 700)])),
    ]
}

#[test]
fn never_slower_than_the_best_fixed_length() {
    let mut failures = Vec::new();
    for (machine, costs) in &machines() {
        for batch in [1, 4, 16] {
            for rate in [0.0, 0.3, 0.6, 0.8, 0.95] {
                let simulation = Simulation {
                    costs,
                    batch,
                    setting: DraftTokens::Auto,
                    rate: &|_| rate,
                    confident: false,
                    ngram: None,
                };
                let (share, length) = simulation.against_best_fixed();
                println!("{machine}, batch {batch}, rate {rate}: {share:.3} of fixed {length}");
                if share < 0.97 {
                    failures.push(format!("{machine}, batch {batch}, rate {rate}: {share:.3} of {length}"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn the_better_of_two_sources_is_found() {
    let mut failures = Vec::new();
    for (machine, costs) in &machines() {
        for batch in [1, 4, 16] {
            for (rate, ngram) in [(0.8, 0.0), (0.8, 0.5), (0.0, 0.6), (0.0, 0.0), (0.5, 0.95)] {
                let with = Simulation {
                    costs,
                    batch,
                    setting: DraftTokens::Auto,
                    rate: &|_| rate,
                    confident: false,
                    ngram: Some(ngram),
                };
                // A fixed length takes n-grams where there are any: the best is the better of both worlds.
                let without = Simulation { ngram: None, ..with };
                let (a, b) = (with.best_fixed(), without.best_fixed());
                let (best, length) = if a.0 > b.0 { a } else { b };
                let share = with.run() / best;
                println!("{machine}, batch {batch}, rates {rate} and {ngram}: {share:.3} of fixed {length}");
                // To learn two sources costs twice, and where both nearly break even neither is learnt fast.
                if share < 0.95 {
                    failures.push(format!(
                        "{machine}, batch {batch}, {rate} and {ngram}: {share:.3} of {length}"
                    ));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn sequences_that_differ_are_treated_differently() {
    let mut failures = Vec::new();
    for (machine, costs) in &machines() {
        for batch in [1, 4, 16] {
            let rate = |id: u64| if id.is_multiple_of(2) { 0.9 } else { 0.05 };
            let simulation = Simulation {
                costs,
                batch,
                setting: DraftTokens::Auto,
                rate: &rate,
                confident: false,
                ngram: None,
            };
            let (share, length) = simulation.against_best_fixed();
            println!("{machine}, batch {batch}: {share:.3} of fixed {length}");
            if share < 0.97 {
                failures.push(format!("{machine}, batch {batch}: {share:.3} of {length}"));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn a_draft_that_knows_when_it_is_unsure_stops_in_time() {
    let mut failures = Vec::new();
    for (machine, costs) in &machines() {
        for batch in [1, 4, 16] {
            for rate in [0.0, 0.3, 0.55, 0.8] {
                let simulation = Simulation {
                    costs,
                    batch,
                    setting: DraftTokens::Auto,
                    rate: &|_| rate,
                    confident: true,
                    ngram: None,
                };
                let (share, length) = simulation.against_best_fixed();
                println!("{machine}, batch {batch}, mean {rate}: {share:.3} of fixed {length}");
                if share < 0.97 {
                    failures.push(format!("{machine}, batch {batch}, mean {rate}: {share:.3} of {length}"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

fn any_candidate() -> impl Strategy<Value = (Option<u8>, [Offer; 3], usize, usize, (usize, usize))> {
    let offer =
        || (0usize..20, 0usize..33).prop_map(|(num_tokens, agreement)| Offer { num_tokens, agreement });
    (
        proptest::option::weighted(0.2, 0u8..20),
        (offer(), offer(), offer()).prop_map(|(a, b, c)| [a, b, c]),
        0usize..5_000,
        0usize..40,
        (0usize..17, 0usize..17),
    )
}

proptest! {
    /// A plan never takes more than is offered or has room, and has one entry a candidate.
    #[test]
    fn a_plan_stays_within_offers_and_room(
        given in proptest::collection::vec(any_candidate(), 0..20),
        machine in 0usize..5,
        num_fast in 0usize..9,
        num_prefill_rows in 0usize..600,
    ) {
        let mut policy = DraftPolicy::new(DraftTokens::Auto, machines()[machine].1.clone());
        let mut records = vec![Acceptance::default(); given.len()];
        for (record, (_, offers, .., (offered, accepted))) in records.iter_mut().zip(&given) {
            let kind = ProposalKind::new(DraftSource::Ngram, offers[1]);
            policy.record(record, kind, *offered, (*accepted).min(*offered));
        }
        let candidates: Vec<Candidate> = given
            .iter()
            .zip(&records)
            .map(|(&(fixed, offers, catch_up, remaining, _), acceptance)| {
                Candidate { acceptance: *acceptance, fixed, offers, catch_up, remaining }
            })
            .collect();
        let mut out = vec![None; 3];
        for _ in 0..4 {
            policy.plan(&candidates, &StepLoad { num_fast, num_prefill_rows }, &mut out);
            prop_assert_eq!(out.len(), candidates.len());
            for (planned, candidate) in out.iter().zip(&candidates) {
                if let Some((source, length)) = *planned {
                    prop_assert!(length > 0 && length <= candidate.limit(source));
                    prop_assert!(length < candidate.remaining);
                    prop_assert!(candidate.fixed.is_none_or(|fixed| length <= usize::from(fixed)));
                }
            }
        }
    }
}
