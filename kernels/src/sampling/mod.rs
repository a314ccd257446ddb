//! What a sampler does to a row of logits. See [`choice`] for how a token is chosen, `part` for how that is done piece
//! by piece. This file's functions take a row that lies in memory, on one thread; rows that nobody has to see never lie
//! there, and are chosen from in [`crate::matmul::head`].

pub(crate) mod candidates;
pub mod choice;
pub mod noise;
pub(crate) mod part;
pub(crate) mod scalar;
pub(crate) mod vector;

use std::sync::OnceLock;

use crate::dispatch::{self, Kernels};
use crate::isa;
use choice::{Best, Choice, Chosen, Mass, Race, SHARE_CHUNK};
use part::{Joined, Masses, Part};

/// [`scalar::collect`] on an instruction set.
pub(crate) type Collect = unsafe fn(logits: &[f32], first: u32, least: f32, out: &mut Vec<(u32, f32)>);

fn active() -> &'static Kernels {
    static ACTIVE: OnceLock<&'static Kernels> = OnceLock::new();
    ACTIVE.get_or_init(|| dispatch::kernels(isa::active()))
}

/// The index of the largest value, the first of equals; NaN never wins. 0 if nothing is larger than
/// negative infinity.
///
/// # Panics
/// If `values` is empty.
pub fn argmax(values: &[f32]) -> usize {
    assert!(!values.is_empty(), "argmax of nothing");
    // SAFETY: the table is of an available instruction set; any length will do.
    unsafe { (active().argmax)(values) }
}

/// Room for [`choose_in`]; buffers that are used again and again.
#[derive(Clone, Debug, Default)]
pub struct RowRoom {
    part: Part,
    joined: Joined,
    /// `[chunks]`
    masses: Vec<Masses>,
    /// `[SHARE_CHUNK]`
    scratch: Vec<f32>,
    chosen: Chosen,
}

impl RowRoom {
    /// The likeliest tokens of the last row and their bare logits, likeliest first, if they were to be reported.
    pub fn top(&self) -> &[(u32, f32)] {
        self.joined.top(&self.chosen)
    }
}

/// As [`choose_in`], with room of its own.
pub fn choose(logits: &[f32], choice: &Choice) -> Chosen {
    choose_in(logits, choice, &mut RowRoom::default())
}

/// Chooses a token of a whole row, as the output head does of rows that are never whole: the same bits.
pub fn choose_in(logits: &[f32], choice: &Choice, room: &mut RowRoom) -> Chosen {
    choose_with(active(), logits, choice, room)
}

fn choose_with(kernels: &Kernels, logits: &[f32], choice: &Choice, room: &mut RowRoom) -> Chosen {
    let RowRoom { part, joined, masses, scratch, chosen } = room;
    part.clear();
    masses.clear();
    for (first, chunk) in (0..).step_by(SHARE_CHUNK).zip(logits.chunks(SHARE_CHUNK)) {
        scratch.clear();
        scratch.extend_from_slice(chunk);
        let sums = part.look(kernels, choice, (first, logits.len()), scratch);
        if choice.sums() {
            masses.push(sums);
        }
    }
    *chosen = Part::choose(std::slice::from_ref(part), choice, masses, logits.len(), joined);
    *chosen
}

/// Lets the tokens from `first` on, with these logits, run against the best of those before them.
pub(crate) fn look_at(kernels: &Kernels, logits: &[f32], first: u32, race: Option<&Race>, best: &mut Best) {
    // SAFETY: a table is of an available instruction set; any length will do.
    unsafe {
        match race {
            None => (kernels.greatest)(logits, first, best),
            Some(race) => (kernels.race)(logits, first, race, best),
        }
    }
}

/// The exponentials of a chunk, its logits multiplied by `factor`.
pub(crate) fn mass(kernels: &Kernels, logits: &[f32], factor: f32) -> Mass {
    // SAFETY: a table is of an available instruction set; any length will do.
    unsafe { (kernels.mass)(logits, factor) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::isa::Isa;
    use choice::{Change, Keep};
    use noise::Noise;

    /// Deterministic, with ties, both zeros, NaN and infinities.
    fn rows() -> impl Iterator<Item = Vec<f32>> {
        (0..400usize).map(|seed| {
            let len = [1, 2, 15, 16, 17, 33, 65, 300, 2048, 2049, 4500][seed % 11];
            let value = |i: usize| match (i + 1).wrapping_mul(2654435761 + 97 * seed) >> 9 & 63 {
                0 if seed % 3 == 0 => f32::NAN,
                1 if seed % 5 == 0 => f32::INFINITY,
                2 if seed % 2 == 0 => f32::NEG_INFINITY,
                3 => -0.0,
                4 => 0.0,
                bits => bits as f32 - if seed % 7 == 0 { 64.0 } else { 20.0 },
            };
            (0..len).map(value).collect()
        })
    }

    #[test]
    fn every_instruction_set_agrees_with_the_specification() {
        for isa in Isa::available() {
            let kernels = dispatch::kernels(isa);
            for row in rows() {
                // SAFETY: the instruction set is available.
                unsafe {
                    assert_eq!((kernels.argmax)(&row), scalar::argmax(&row), "{isa}");
                    assert_eq!((kernels.all_finite)(&row), scalar::all_finite(&row), "{isa}");
                }
            }
        }
    }

    /// Races at temperatures from nearly none to hot; the inverse of the last is no f32.
    fn races() -> impl Iterator<Item = Race> {
        let temperatures = [1e-38, 0.01, 0.2, 0.8, 1.0, 3.0, 100.0, 1e-40];
        temperatures.into_iter().zip(1..).map(|(temperature, seed)| Race {
            noise: Noise::new(seed, 40 + seed),
            inverse_temperature: 1.0 / temperature,
        })
    }

    #[test]
    fn every_instruction_set_chooses_what_the_specification_does() {
        for isa in Isa::available() {
            let kernels = dispatch::kernels(isa);
            for (i, row) in rows().enumerate() {
                let same = |got: Best, expected: Best| {
                    let key =
                        |best: Best| (best.id, best.score.to_bits(), best.logit.to_bits(), best.is_finite);
                    assert_eq!(key(got), key(expected), "{isa} row {i}");
                };
                // From nothing, and from a token that was before.
                let before = Best { id: 3, logit: 12.0, score: 12.0, is_finite: i % 2 == 0 };
                for start in [Best::NONE, before] {
                    let (mut got, mut expected) = (start, start);
                    scalar::greatest(&row, 100, &mut expected);
                    look_at(kernels, &row, 100, None, &mut got);
                    same(got, expected);
                }
                for race in races() {
                    let before = Best { score: race.score(3, 12.0), ..before };
                    for start in [Best::NONE, before] {
                        let (mut got, mut expected) = (start, start);
                        scalar::race(&row, 100, &race, &mut expected);
                        look_at(kernels, &row, 100, Some(&race), &mut got);
                        same(got, expected);
                    }
                }
                for factor in [1.0, 1.25, 1e38] {
                    let (got, expected) = (mass(kernels, &row, factor), scalar::mass(&row, factor));
                    assert!(got == expected || got.sum.is_nan() && expected.sum.is_nan(), "{isa} row {i}");
                }
                for least in [f32::NEG_INFINITY, -3.0, 0.0, 41.0] {
                    let (mut got, mut expected) = (Vec::new(), Vec::new());
                    scalar::collect(&row, 100, least, &mut expected);
                    // SAFETY: the instruction set is available.
                    unsafe { (kernels.collect)(&row, 100, least, &mut got) };
                    assert_eq!(got, expected, "{isa} row {i}");
                }
                let words = [0, u32::MAX, 0x8000_0001, 0xdead_beef, 0, 7];
                for words in [&words[..], &words[..3], &[]] {
                    let (mut got, mut expected) = (row.clone(), row.clone());
                    for (id, logit) in expected.iter_mut().enumerate() {
                        if words.get(id / 32).is_none_or(|word| word >> (id % 32) & 1 == 0) {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                    // SAFETY: the instruction set is available.
                    unsafe { (kernels.mask)(&mut got, words) };
                    assert!(
                        got.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{isa} row {i}"
                    );
                }
            }
        }
    }

    /// Passing tokens over unseen never changes the winner, wherever the row is cut.
    #[test]
    fn the_winner_of_a_race_has_the_greatest_score() {
        let mut state = 9u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        for round in 0..60 {
            let spread = [0.0, 0.5, 6.0, 60.0][round % 4];
            let row: Vec<f32> = (0..[40_000, 700, 33][round % 3])
                .map(|_| spread * (uniform() + uniform() - uniform()))
                .collect();
            for race in races().map(|race| Race { noise: Noise::new(1, round as u64), ..race }) {
                let scores = row.iter().zip(0..).map(|(&logit, id)| (race.score(id, logit), id));
                let plain =
                    scores.fold((f64::NEG_INFINITY, 0), |best, own| if own.0 > best.0 { own } else { best });
                for isa in Isa::available() {
                    let kernels = dispatch::kernels(isa);
                    let cut = row.len() / 3 + round;
                    let (mut first, mut second) = (Best::NONE, Best::NONE);
                    look_at(kernels, &row[..cut.min(row.len())], 0, Some(&race), &mut first);
                    look_at(kernels, &row[cut.min(row.len())..], cut as u32, Some(&race), &mut second);
                    assert_eq!((second.or(first).score, second.or(first).id), plain, "{isa} round {round}");
                }
                let candidates = row.iter().zip(0..).map(|(&logit, id)| (id, logit));
                assert_eq!(race.winner(candidates).id, plain.1);
                let choice = Choice { race: Some(race), ..Choice::default() };
                assert_eq!(choose(&row, &choice).token, plain.1);
            }
        }
    }

    /// The logarithm of the sum of all exponentials, to the last bit that an f64 gives it.
    fn log_sum_exp(row: &[f32]) -> f64 {
        row.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln()
    }

    #[test]
    fn a_share_is_a_probability_at_temperature_one() {
        let row: Vec<f32> = (0..5000).map(|i| (i * 37 % 101) as f32 / 9.0).collect();
        for race in [None, races().nth(4)] {
            let chosen = choose(&row, &Choice { race, share: true, ..Choice::default() });
            let expected = (f64::from(row[chosen.token as usize]) - log_sum_exp(&row)).exp();
            assert!((f64::from(chosen.share) / expected - 1.0).abs() < 1e-5, "{chosen:?}, not {expected}");
        }
        assert!(!choose(&[0.0, f32::NAN], &Choice { share: true, ..Choice::default() }).is_finite);
    }

    #[test]
    fn a_report_is_of_bare_logits() {
        let row: Vec<f32> = (0..3000).map(|i| (i % 700) as f32 / 50.0).collect();
        let changes =
            vec![Change { bias: -3.0, ..Change::none(699) }, Change { bias: 4.0, ..Change::none(1398) }];
        let mask = (0..3000u32 / 32).map(|word| if word < 10 { 0 } else { u32::MAX }).collect::<Vec<_>>();
        let choice = Choice {
            report: Some(3),
            changes: Some(Arc::new(changes)),
            mask: Some(Arc::new(mask)),
            ..Choice::default()
        };
        let mut room = RowRoom::default();
        let chosen = choose_in(&row, &choice, &mut room);
        assert!(chosen.is_finite && chosen.token == 1398);
        let report = chosen.report.unwrap();
        assert_eq!((report.logit, report.num_top), (row[1398], 3));
        assert!((report.log_sum - log_sum_exp(&row)).abs() < 1e-5);
        assert_eq!(room.top(), [(699, 13.98), (1399, 13.98), (2099, 13.98)]);
        // Of a short row all, and of one that is not finite nothing.
        let choice = Choice { report: Some(3), ..Choice::default() };
        assert_eq!(choose_in(&[2.0, 3.0], &choice, &mut room).report.unwrap().num_top, 2);
        assert_eq!(room.top(), [(1, 3.0), (0, 2.0)]);
        assert_eq!(choose_in(&[2.0, f32::NAN], &choice, &mut room).report, None);
        assert_eq!(room.top(), []);
    }

    /// Greedy, truncated and reported, the first of equals comes first, and zeros are equal.
    #[test]
    fn both_zeros_are_one_logit() {
        for row in [[-0.0, 0.0], [0.0, -0.0]] {
            let report = Some(2);
            let mut room = RowRoom::default();
            let chosen = choose_in(&row, &Choice { report, ..Choice::default() }, &mut room);
            assert_eq!(chosen.token, 0);
            assert_eq!(room.top().iter().map(|token| token.0).collect::<Vec<_>>(), [0, 1]);
            for race in races().map(Some) {
                let keep = Keep { top_k: 1, ..Keep::ALL };
                assert_eq!(choose(&row, &Choice { race, keep, ..Choice::default() }).token, 0);
            }
        }
    }

    #[test]
    fn of_equal_scores_the_lowest_id_wins_in_any_order() {
        // So cold that no noise is left of a score.
        let race = Race { noise: Noise::new(1, 2), inverse_temperature: 1e38 };
        let candidates = [(7, 1.0), (3, 1.0), (5, 1.0), (2, 0.5)];
        assert_eq!(race.winner(candidates.into_iter()).id, 3);
        assert_eq!(race.winner(candidates.into_iter().rev()).id, 3);
    }

    #[test]
    fn nobody_wins_where_all_is_masked() {
        let mask = Some(Arc::new(vec![0; 200]));
        for keep in [Keep::ALL, Keep { top_k: 3, ..Keep::ALL }, Keep { top_p: 0.9, ..Keep::ALL }] {
            for race in [None, races().next()] {
                let choice = Choice { race, keep, mask: mask.clone(), report: Some(1), ..Choice::default() };
                let chosen = choose(&[1.0; 5000], &choice);
                assert!(chosen.is_finite && chosen.token == 0);
                assert_eq!(chosen.report.unwrap().logit, f32::NEG_INFINITY);
            }
        }
    }

    #[test]
    fn argmax_takes_the_first_of_equals_and_never_a_nan() {
        assert_eq!(argmax(&[f32::NAN, 1.0, 3.0, 3.0, f32::NAN]), 2);
        assert_eq!(argmax(&[f32::NAN; 40]), 0);
        assert_eq!(argmax(&[f32::NEG_INFINITY; 40]), 0);
        let mut row = vec![0.0; 5000];
        row[4999] = 1e-30;
        assert_eq!(argmax(&row), 4999);
        row[4998] = f32::INFINITY;
        assert_eq!(argmax(&row), 4998);
    }
}
