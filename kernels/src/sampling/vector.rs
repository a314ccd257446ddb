//! The sampler's kernels over 16 lanes.

use super::choice::{Best, Mass, Race};
use crate::LANES;
use crate::simd::{Simd, exp};

/// Values looked at before the winner is located: small enough to be still in the nearest cache.
const BLOCK: usize = 128 * LANES;

/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn argmax<V: Simd>(values: &[f32]) -> usize {
    let mut best = (0, f32::NEG_INFINITY);
    for (index, block) in values.chunks(BLOCK).enumerate() {
        // SAFETY: whole vectors at multiples of 16 below the block's length.
        unsafe {
            let (vectors, tail) = block.as_chunks::<LANES>();
            let mut largest = [V::splat(f32::NEG_INFINITY); 4];
            for (i, vector) in vectors.iter().enumerate() {
                largest[i % 4] = V::load(vector.as_ptr()).max(largest[i % 4]);
            }
            let [a, b, c, d] = largest;
            let mut max = a.max(b).max(c.max(d)).largest();
            for &value in tail {
                max = if value > max { value } else { max };
            }
            if max > best.1 {
                best = (index * BLOCK + position::<V>(block, max), max);
            }
        }
    }
    best.0
}

/// The first index of `value`, which is in `block`.
///
/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
unsafe fn position<V: Simd>(block: &[f32], value: f32) -> usize {
    let (vectors, tail) = block.as_chunks::<LANES>();
    for (i, vector) in vectors.iter().enumerate() {
        // SAFETY: the vector has 16 elements.
        let equal = unsafe { V::load(vector.as_ptr()).equal(V::splat(value)) };
        if equal != 0 {
            return i * LANES + equal.trailing_zeros() as usize;
        }
    }
    vectors.len() * LANES + tail.iter().position(|&x| x == value).unwrap_or(0)
}

/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn all_finite<V: Simd>(values: &[f32]) -> bool {
    for chunk in values.chunks(LANES) {
        // SAFETY: as many elements as the chunk has.
        if !unsafe { V::load_part(chunk.as_ptr(), chunk.len()).is_finite() } {
            return false;
        }
    }
    true
}

/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn greatest<V: Simd>(logits: &[f32], first: u32, best: &mut Best) {
    for (index, block) in logits.chunks(BLOCK).enumerate() {
        // SAFETY: whole vectors at multiples of 16 below the block's length.
        unsafe {
            let (vectors, tail) = block.as_chunks::<LANES>();
            let mut largest = [V::splat(f32::NEG_INFINITY); 4];
            // Zero times anything but a NaN or an infinity adds nothing.
            let mut zeros = [V::splat(0.0); 4];
            for (i, vector) in vectors.iter().enumerate() {
                let vector = V::load(vector.as_ptr());
                largest[i % 4] = vector.max(largest[i % 4]);
                zeros[i % 4] = vector.fma(V::splat(0.0), zeros[i % 4]);
            }
            let ([a, b, c, d], [e, f, g, h]) = (largest, zeros);
            let mut max = a.max(b).max(c.max(d)).largest();
            best.is_finite &= e.add(f).add(g.add(h)).is_finite();
            for &value in tail {
                max = if value > max { value } else { max };
                best.is_finite &= value.is_finite();
            }
            if f64::from(max) > best.score {
                let at = position::<V>(block, max);
                // (Not `max`, which may be a zero of the other sign.)
                let (id, logit) = (first + (index * BLOCK + at) as u32, block[at]);
                *best = Best { id, logit, score: f64::from(logit), is_finite: best.is_finite };
            }
        }
    }
}

/// What it takes to beat the best of a race so far: `log2` of a token's noise below
/// `(logit - best's) * scale + bound`.
#[derive(Clone, Copy)]
struct Hurdle<V> {
    scale: V,
    logit: V,
    bound: V,
}

impl<V: Simd> Hurdle<V> {
    /// # Safety
    /// The processor has `V`'s instruction set.
    #[inline(always)]
    unsafe fn of(race: &Race, best: &Best) -> Self {
        /// More than the roundings of both sides: a hurdle too low costs a logarithm, one too high a winner.
        const SLACK: f64 = 0.01;
        use std::f64::consts::LOG2_E;
        let gumbel = best.score - f64::from(best.logit) * race.inverse_temperature;
        let bound = if best.score == f64::NEG_INFINITY { 0.0 } else { SLACK - gumbel * LOG2_E };
        // SAFETY: the caller's promise.
        unsafe {
            Hurdle {
                scale: V::splat((race.inverse_temperature * LOG2_E) as f32),
                logit: V::splat(best.logit),
                bound: V::splat(bound as f32),
            }
        }
    }

    /// # Safety
    /// The processor has `V`'s instruction set.
    #[inline(always)]
    unsafe fn height(&self, logits: V) -> V {
        // SAFETY: the caller's promise.
        unsafe { logits.sub(self.logit).fma(self.scale, self.bound) }
    }
}

/// Tokens whose noise cannot take the hurdle are passed over; the others run as in the specification.
///
/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn race<V: Simd>(logits: &[f32], first: u32, race: &Race, best: &mut Best) {
    /// Below `log2` of any noise.
    const OUT_OF_REACH: f32 = -54.0;
    /// A bit for each lane.
    const ALL: u32 = (1 << LANES) - 1;
    // SAFETY: as many elements as the chunks have.
    unsafe {
        let mut hurdle = Hurdle::<V>::of(race, best);
        let mut zeros = V::splat(0.0);
        for (ids, chunk) in (first..).step_by(LANES).zip(logits.chunks(LANES)) {
            let vector = V::load_part(chunk.as_ptr(), chunk.len());
            zeros = vector.fma(V::splat(0.0), zeros);
            let height = hurdle.height(vector);
            if V::splat(OUT_OF_REACH).at_least(height) == ALL {
                continue;
            }
            let noise = V::noise_log2(race.noise.counter(ids));
            let mut runners = !noise.at_least(height) & (ALL >> (LANES - chunk.len()));
            if runners == 0 {
                continue;
            }
            let score = best.score;
            while runners != 0 {
                let lane = runners.trailing_zeros();
                race.offer(best, ids + lane, chunk[lane as usize]);
                runners &= runners - 1;
            }
            if best.score > score {
                hurdle = Hurdle::of(race, best);
            }
        }
        best.is_finite &= zeros.is_finite();
    }
}

/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
unsafe fn exp_of<V: Simd>(logits: V, max: f32, factor: f32) -> V {
    // SAFETY: the caller's promise.
    unsafe { exp(logits.sub(V::splat(max)).mul(V::splat(factor))) }
}

/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn mass<V: Simd>(logits: &[f32], factor: f32) -> Mass {
    let (vectors, tail) = logits.as_chunks::<LANES>();
    // SAFETY: whole vectors, and as many elements as the tail has.
    unsafe {
        let mut largest = V::splat(f32::NEG_INFINITY);
        for vector in vectors {
            largest = V::load(vector.as_ptr()).max(largest);
        }
        let mut max = largest.largest();
        for &value in tail {
            max = if value > max { value } else { max };
        }
        let mut sums = V::splat(0.0);
        for vector in vectors {
            sums = sums.add(exp_of(V::load(vector.as_ptr()), max, factor));
        }
        let mut last = [0.0; LANES];
        exp_of(V::load_part(tail.as_ptr(), tail.len()), max, factor)
            .store_part(last.as_mut_ptr(), tail.len());
        Mass { max, sum: sums.add(V::load(last.as_ptr())).sum() }
    }
}

/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn collect<V: Simd>(logits: &[f32], first: u32, least: f32, out: &mut Vec<(u32, f32)>) {
    for (first, chunk) in (first..).step_by(LANES).zip(logits.chunks(LANES)) {
        // SAFETY: as many elements as the chunk has.
        let found = unsafe { V::load_part(chunk.as_ptr(), chunk.len()).at_least(V::splat(least)) };
        let mut found = found & ((1 << chunk.len()) - 1);
        while found != 0 {
            let lane = found.trailing_zeros();
            out.push((first + lane, chunk[lane as usize]));
            found &= found - 1;
        }
    }
}
