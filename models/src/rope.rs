//! Cosines and sines of the rotary position embedding (Su et al., arXiv 2104.09864), computed once
//! when the KV cache is sized, in the half-split layout of the Hugging Face checkpoints.
//!
//! Frequencies and angles are rounded to f32 exactly where transformers rounds them: at position
//! 100,000 the last bit of a frequency is a hundredth of a radian, so a "better" table is a wrong one.

use std::f32::consts::PI;
use std::sync::{Mutex, PoisonError};
use std::thread;

use tandem_kernels::math::double;

use crate::config::{Rope, RopeScaling};

/// `cos(position * frequency)` and the sines, each `[num_positions, head_dim / 2]`. Channels past
/// [`Rope::dim`] have cosine 1 and sine 0: rotating by nothing is exact, so no kernel knows of them.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// The cosines.
    pub cos: Vec<f32>,
    /// The sines.
    pub sin: Vec<f32>,
    /// Positions in the table.
    pub num_positions: usize,
}

/// Positions for which a thread of their own is worth it: a millisecond or two. Those of a long context take
/// tenths of a second.
const LEAST_SHARE: usize = 1024;

impl RopeTable {
    /// The table for positions `0..num_positions` of heads of width `head_dim`.
    pub fn new(rope: &Rope, head_dim: usize, num_positions: usize) -> Self {
        let frequencies = frequencies(rope);
        let scale = attention_factor(&rope.scaling);
        let half = head_dim / 2;
        let (mut cos, mut sin) = (vec![1.0; num_positions * half], vec![0.0; num_positions * half]);
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let share = num_positions.div_ceil(threads).max(LEAST_SHARE);
        let chunk = (share * half).max(1);
        let shares = (0usize..).step_by(share).zip(cos.chunks_mut(chunk).zip(sin.chunks_mut(chunk)));
        let shares = Mutex::new(shares);
        let next = || shares.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || {
            while let Some((first, (cos, sin))) = next() {
                let rows = cos.chunks_exact_mut(half.max(1)).zip(sin.chunks_exact_mut(half.max(1)));
                for (position, (cos, sin)) in (first..).zip(rows) {
                    for ((cos, sin), &frequency) in cos.iter_mut().zip(sin).zip(&frequencies) {
                        // The product is rounded to f32; its cosine is as good as the nearest f32.
                        let angle = f64::from(position as f32 * frequency);
                        *cos = double::cos(angle) as f32 * scale;
                        *sin = double::sin(angle) as f32 * scale;
                    }
                }
            }
        };
        thread::scope(|scope| {
            for _ in 1..num_positions.div_ceil(share) {
                // A system that refuses a thread leaves its share to the others, of which the caller is one.
                if thread::Builder::new().spawn_scoped(scope, work).is_err() {
                    break;
                }
            }
            work();
        });
        RopeTable { cos, sin, num_positions }
    }
}

impl RopeTable {
    /// Channels of a head that the table is for.
    pub fn width(&self) -> usize {
        2 * self.cos.len() / self.num_positions.max(1)
    }
}

/// The order in which the rows of a head's projection must stand for the rotation, which turns row `i`
/// with row `i + head_dim / 2`: row `i` is row `order[i]` of the checkpoint. `None` if it is that order
/// already. A reordering of queries and keys alike leaves their products as they are.
pub(crate) fn row_order(rope: &Rope, head_dim: usize) -> Option<Vec<usize>> {
    if rope.dim == head_dim && !rope.interleaved {
        return None;
    }
    let (half, turning) = (head_dim / 2, rope.dim / 2);
    let source = |half_index: usize, i: usize| match (i < turning, rope.interleaved) {
        (true, true) => 2 * i + half_index,
        (true, false) => half_index * turning + i,
        // What does not turn follows in its own order, split over the two halves.
        (false, _) => rope.dim + half_index * (half - turning) + i - turning,
    };
    Some((0..2).flat_map(|half_index| (0..half).map(move |i| source(half_index, i))).collect())
}

/// YaRN's factor on cosines and sines, where the configuration has none; `mscale` are DeepSeek's gains
/// of numerator and denominator.
pub(crate) fn yarn_attention_factor(factor: f32, mscale: Option<(f32, f32)>) -> f32 {
    match mscale {
        Some((over, under)) if over != 0.0 && under != 0.0 => {
            (yarn_gain(factor, over) / yarn_gain(factor, under)) as f32
        }
        _ => yarn_gain(factor, 1.0) as f32,
    }
}

/// By how much YaRN sharpens attention, `mscale` being DeepSeek's share of it.
pub(crate) fn yarn_gain(factor: f32, mscale: f32) -> f64 {
    match f64::from(factor) {
        factor if factor <= 1.0 => 1.0,
        factor => 0.1 * f64::from(mscale) * double::ln(factor) + 1.0,
    }
}

/// LongRoPE's factor on cosines and sines, where the configuration has none.
pub(crate) fn longrope_attention_factor(factor: f32, original_max_position_embeddings: usize) -> f32 {
    if factor <= 1.0 {
        return 1.0;
    }
    (1.0 + double::ln(f64::from(factor)) / double::ln(original_max_position_embeddings as f64)).sqrt() as f32
}

fn attention_factor(scaling: &RopeScaling) -> f32 {
    match *scaling {
        RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
            attention_factor
        }
        _ => 1.0,
    }
}

/// `[dim / 2]`: radians per position of each pair of channels, scaling applied.
pub fn frequencies(rope: &Rope) -> Vec<f32> {
    let powers = |theta: f64| {
        (0..rope.dim).step_by(2).map(move |channel| {
            let exponent = channel as f32 / rope.dim as f32;
            double::pow(theta, f64::from(exponent)) as f32
        })
    };
    let theta = f64::from(rope.theta);
    let plain = powers(theta).map(|power| 1.0 / power);
    match rope.scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
        RopeScaling::DynamicNtk { factor } => {
            // The formula at its longest context, `factor` times the pretraining's.
            let (factor, dim) = (f64::from(factor), rope.dim as f64);
            let theta = theta * double::pow(factor * factor - (factor - 1.0), dim / (dim - 2.0));
            powers(theta).map(|power| 1.0 / power).collect()
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let original = original_max_position_embeddings as f32;
            let longest = original / low_freq_factor;
            let shortest = original / high_freq_factor;
            plain
                .map(|frequency| {
                    let wavelength = 2.0 * PI / frequency;
                    if wavelength < shortest {
                        frequency
                    } else if wavelength > longest {
                        frequency / factor
                    } else {
                        let smooth =
                            (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                })
                .collect()
        }
        RopeScaling::Yarn { factor, .. } => {
            let (low, high) = yarn_ramp(rope);
            powers(theta)
                .enumerate()
                .map(|(i, power)| {
                    let divided = ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
                    let kept = 1.0 - divided;
                    1.0 / (factor * power) * (1.0 - kept) + 1.0 / power * kept
                })
                .collect()
        }
        RopeScaling::LongRope { ref factors, .. } => {
            powers(theta).zip(factors).map(|(power, factor)| 1.0 / (factor * power)).collect()
        }
    }
}

/// Between which pairs of channels YaRN goes over from frequencies kept to frequencies divided.
fn yarn_ramp(rope: &Rope) -> (f32, f32) {
    let RopeScaling::Yarn { beta_fast, beta_slow, truncate, original_max_position_embeddings, .. } =
        rope.scaling
    else {
        unreachable!("only YaRN has a ramp: this is a bug")
    };
    let dim = rope.dim as f64;
    let pair_that_turns = |turns: f32| {
        let wavelength =
            original_max_position_embeddings as f64 / (f64::from(turns) * 2.0 * std::f64::consts::PI);
        dim * double::ln(wavelength) / (2.0 * double::ln(f64::from(rope.theta)))
    };
    let (mut low, mut high) = (pair_that_turns(beta_fast), pair_that_turns(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    (low as f32, high as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(dim: usize, theta: f32, scaling: RopeScaling) -> Rope {
        Rope { scaling, ..Rope::plain(dim, theta) }
    }

    /// Values printed by transformers 5 for the same settings (`LlamaRotaryEmbedding.inv_freq`).
    #[test]
    fn frequencies_are_those_of_transformers() {
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64,
        };
        let cases: [(usize, f32, RopeScaling, &[f32]); 3] = [
            (8, 10_000.0, RopeScaling::None, NONE),
            (8, 10_000.0, RopeScaling::Linear { factor: 4.0 }, LINEAR),
            (16, 500.0, llama3, LLAMA3),
        ];
        for (head_dim, theta, scaling, wanted) in cases {
            let found = frequencies(&rope(head_dim, theta, scaling.clone()));
            assert_eq!(found.len(), wanted.len());
            for (found, wanted) in found.iter().zip(wanted) {
                assert!((found - wanted).abs() <= wanted * f32::EPSILON, "{scaling:?}: {found} {wanted}");
            }
        }
    }

    #[test]
    fn position_zero_does_not_rotate() {
        let table = RopeTable::new(&Rope::plain(8, 10_000.0), 8, 3);
        assert_eq!(table.cos[..4], [1.0; 4]);
        assert_eq!(table.sin[..4], [0.0; 4]);
        assert_eq!((table.cos.len(), table.sin.len(), table.num_positions), (12, 12, 3));
        assert_eq!(table.cos[8], double::cos(2.0) as f32);
    }

    #[test]
    fn a_table_of_many_shares_has_no_seam() {
        let rope = Rope::plain(4, 10_000.0);
        let num_positions = 3 * LEAST_SHARE + 5;
        let table = RopeTable::new(&rope, 4, num_positions);
        assert_eq!((table.cos.len(), table.sin.len()), (2 * num_positions, 2 * num_positions));
        for (position, (cos, sin)) in table.cos.chunks_exact(2).zip(table.sin.chunks_exact(2)).enumerate() {
            for (channel, frequency) in frequencies(&rope).into_iter().enumerate() {
                let angle = f64::from(position as f32 * frequency);
                assert_eq!(
                    (cos[channel], sin[channel]),
                    (double::cos(angle) as f32, double::sin(angle) as f32)
                );
            }
        }
    }

    #[test]
    fn channels_that_do_not_turn_have_cosine_one() {
        let table = RopeTable::new(&Rope::plain(4, 10_000.0), 8, 3);
        assert_eq!(table.cos[4 + 2..8], [1.0; 2]);
        assert_eq!((table.sin[4 + 2..8].to_vec(), table.sin[4]), (vec![0.0; 2], double::sin(1.0) as f32));
    }

    #[test]
    fn rows_are_put_where_the_rotation_wants_them() {
        assert_eq!(row_order(&Rope::plain(8, 1e4), 8), None);
        assert_eq!(row_order(&Rope::plain(4, 1e4), 8).unwrap(), [0, 1, 4, 5, 2, 3, 6, 7]);
        let interleaved = Rope { interleaved: true, ..Rope::plain(4, 1e4) };
        assert_eq!(row_order(&interleaved, 8).unwrap(), [0, 2, 4, 5, 1, 3, 6, 7]);
        assert_eq!(row_order(&interleaved, 4).unwrap(), [0, 2, 1, 3]);
    }

    #[rustfmt::skip]
    const NONE: &[f32] = &[1.0, 0.1, 0.01, 0.001];
    #[rustfmt::skip]
    const LINEAR: &[f32] = &[0.25, 0.025, 0.0025, 0.00025];
    #[rustfmt::skip]
    const LLAMA3: &[f32] =
        &[1.0, 0.45986328, 0.09761663, 0.012156156, 0.00559017, 0.002570714, 0.001182177, 0.0005436398];
}
