//! What a sampler does to a row of logits that lies in memory: one row, one thread. See [`choice`] for how a token is
//! chosen; rows that nobody has to see are never in memory, but chosen from in [`crate::matmul::head`].

pub mod choice;
pub mod noise;
pub(crate) mod scalar;
pub(crate) mod vector;

use std::sync::OnceLock;

use crate::dispatch::{self, Kernels};
use crate::isa;
use crate::math::double;
use choice::{Best, Choice, Chosen, Mass, Race, SHARE_CHUNK};

/// Values of which [`maxima`] gives one.
pub const MAXIMUM_OF: usize = 64;

/// [`collect`] on an instruction set.
pub(crate) type Collect = unsafe fn(logits: &[f32], least: f32, out: &mut Vec<(u32, f32)>);

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

/// True if no value is NaN or infinite.
pub fn all_finite(values: &[f32]) -> bool {
    // SAFETY: the table is of an available instruction set; any length will do.
    unsafe { (active().all_finite)(values) }
}

/// Room for [`choose_in`]; a buffer that is used again and again.
#[derive(Clone, Debug, Default)]
pub struct ShareRoom {
    /// `[chunks]`
    masses: Vec<Mass>,
}

/// As [`choose_in`], with room of its own: allocates if the share is wanted.
pub fn choose(logits: &[f32], choice: Choice) -> Chosen {
    choose_in(logits, choice, &mut ShareRoom::default())
}

/// Chooses a token of a whole row, as the output head does of rows that are never whole: the same bits.
pub fn choose_in(logits: &[f32], choice: Choice, room: &mut ShareRoom) -> Chosen {
    let ShareRoom { masses } = room;
    masses.clear();
    if choice.share {
        masses.extend(logits.chunks(SHARE_CHUNK).map(|chunk| mass(active(), chunk, 1.0)));
    }
    let mut best = Best::NONE;
    look_at(active(), logits, 0, choice.race.as_ref(), &mut best);
    best.chosen(masses)
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

/// The sum of `exp((x - max) * factor)`, `max` being the greatest of `x` and `factor` positive, in a fixed order. 0
/// for an empty row.
pub fn sum_exp(x: &[f32], factor: f32) -> f64 {
    if x.is_empty() {
        return 0.0;
    }
    let max = x[argmax(x)];
    let masses = x.chunks(SHARE_CHUNK).map(|chunk| mass(active(), chunk, factor));
    masses.filter(|mass| mass.max > f32::NEG_INFINITY).map(|mass| mass.relative_to(max, factor)).sum()
}

/// Appends the greatest of every [`MAXIMUM_OF`] values, negative infinity where none is a number.
pub fn maxima(values: &[f32], out: &mut Vec<f32>) {
    // SAFETY: the table is of an available instruction set; any length will do.
    unsafe { (active().maxima)(values, out) }
}

/// Appends all values that are at least `least`, with their indices, in order.
pub fn collect(values: &[f32], least: f32, out: &mut Vec<(u32, f32)>) {
    // SAFETY: the table is of an available instruction set; any length will do.
    unsafe { (active().collect)(values, least, out) }
}

/// `out = exp(x - max)`, element by element, with [`crate::math::exp`].
///
/// # Panics
/// If the lengths differ.
pub fn exp_sub(x: &[f32], max: f32, out: &mut [f32]) {
    assert!(x.len() == out.len(), "exp_sub: x has {} elements, out {}", x.len(), out.len());
    // SAFETY: the table is of an available instruction set; lengths are equal.
    unsafe { (active().exp_sub)(x, max, out) }
}

/// `ln(sum of exp(x))`, summed in f64 in a fixed order: `logits[i] - log_sum_exp(logits)` is the log
/// probability of token `i`. Negative infinity for an empty row.
pub fn log_sum_exp(x: &[f32]) -> f64 {
    if x.is_empty() {
        return f64::NEG_INFINITY;
    }
    let max = x[argmax(x)];
    if max == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    const CHUNK: usize = 512;
    let mut exps = [0.0; CHUNK];
    let mut sums = [0.0f64; 8];
    for chunk in x.chunks(CHUNK) {
        let exps = &mut exps[..chunk.len()];
        exp_sub(chunk, max, exps);
        let (eights, rest) = exps.as_chunks::<8>();
        for eight in eights {
            for (sum, &exp) in sums.iter_mut().zip(eight) {
                *sum += f64::from(exp);
            }
        }
        for (sum, &exp) in sums.iter_mut().zip(rest) {
            *sum += f64::from(exp);
        }
    }
    let sum: f64 = sums.iter().sum();
    f64::from(max) + double::ln(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
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
                let mut exps = vec![0.0; row.len()];
                let mut expected = exps.clone();
                scalar::exp_sub(&row, 3.5, &mut expected);
                // SAFETY: the instruction set is available; lengths are equal.
                unsafe {
                    assert_eq!((kernels.argmax)(&row), scalar::argmax(&row), "{isa}");
                    assert_eq!((kernels.all_finite)(&row), scalar::all_finite(&row), "{isa}");
                    (kernels.exp_sub)(&row, 3.5, &mut exps);
                }
                for (got, expected) in exps.iter().zip(&expected) {
                    assert!(got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan());
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
                let (mut got, mut expected) = (Vec::new(), Vec::new());
                scalar::maxima(&row, &mut expected);
                // SAFETY: the instruction set is available.
                unsafe { (kernels.maxima)(&row, &mut got) };
                assert_eq!(got, expected, "{isa} row {i}");
                for least in [f32::NEG_INFINITY, -3.0, 0.0, 41.0] {
                    let (mut got, mut expected) = (Vec::new(), Vec::new());
                    scalar::collect(&row, least, &mut expected);
                    // SAFETY: the instruction set is available.
                    unsafe { (kernels.collect)(&row, least, &mut got) };
                    assert_eq!(got, expected, "{isa} row {i}");
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
                assert_eq!(race.winner(candidates), plain.1);
                assert_eq!(choose(&row, Choice { race: Some(race), share: false }).token, plain.1);
            }
        }
    }

    #[test]
    fn a_share_is_a_probability_at_temperature_one() {
        let row: Vec<f32> = (0..5000).map(|i| (i * 37 % 101) as f32 / 9.0).collect();
        for race in [None, races().nth(4)] {
            let chosen = choose(&row, Choice { race, share: true });
            let expected = (f64::from(row[chosen.token as usize]) - log_sum_exp(&row)).exp();
            assert!((f64::from(chosen.share) / expected - 1.0).abs() < 1e-5, "{chosen:?}, not {expected}");
        }
        assert!(!choose(&[0.0, f32::NAN], Choice { race: None, share: true }).is_finite);
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
        assert!(!all_finite(&row));
    }

    #[test]
    fn log_sum_exp_of_a_known_row() {
        let row: Vec<f32> = (1..=4).map(|i| (i as f32).ln() + 50.0).collect();
        assert!((log_sum_exp(&row) - 50.0 - 10f64.ln()).abs() < 1e-5);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY; 3]), f64::NEG_INFINITY);
        let row: Vec<f32> = (0..3000).map(|i| (i % 700) as f32 / 50.0).collect();
        let exact: f64 = row.iter().map(|&x| ((f64::from(x) - 699.0 / 50.0) * 1.25).exp()).sum();
        assert!((sum_exp(&row, 1.25) / exact - 1.0).abs() < 1e-5);
        assert_eq!((sum_exp(&[], 1.0), sum_exp(&[f32::NEG_INFINITY, 3.0], 2.0)), (0.0, 1.0));
    }
}
