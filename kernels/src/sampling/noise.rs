//! Common random numbers: the noise of a token is a function of (seed, position, token id) and of nothing else, so
//! target and draft see the same noise and any answer can be computed again.
//!
//! The generator is SplitMix64 (Steele, Lea, Flood 2014) used as a counter: a row's key is mixed from seed
//! and position, and token `id` takes the `id`-th output of the stream that starts there.

/// What the generator's counter grows by.
pub(crate) const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
/// Its output function: `z ^= z >> SHIFTS[0]; z *= FACTORS[0]`, and so on.
pub(crate) const FACTORS: [u64; 2] = [0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB];
/// See [`FACTORS`].
pub(crate) const SHIFTS: [u32; 3] = [30, 27, 31];

/// The bits of an f32, as a whole number, times this and less 127 are a bound of its binary logarithm from below.
pub(crate) const BITS_TO_LOG2: f32 = 1.0 / (1 << 23) as f32;
/// What that bound is for 0, of numbers that count units of `2^-31`.
pub(crate) const LOG2_OF_ZERO: f32 = -127.0 - 31.0;

/// SplitMix64's output function, a bijection on 64 bits.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> SHIFTS[0])).wrapping_mul(FACTORS[0]);
    z = (z ^ (z >> SHIFTS[1])).wrapping_mul(FACTORS[1]);
    z ^ (z >> SHIFTS[2])
}

/// A bound from below, good to 0.1, of `log2` of the number that is made of a counter, of its upper 31 bits alone.
pub(crate) fn log2_bound(counter: u64) -> f32 {
    let bits = ((mix(counter) >> 33) as f32).to_bits();
    (bits as f32).mul_add(BITS_TO_LOG2, LOG2_OF_ZERO)
}

/// The noise of one position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    key: u64,
}

impl Noise {
    /// `position` is the token's absolute place in its sequence, prompt included.
    pub fn new(seed: u64, position: u64) -> Self {
        Noise { key: mix(mix(seed.wrapping_add(GAMMA)).wrapping_add(position.wrapping_mul(GAMMA))) }
    }

    /// The generator's counter for a token.
    #[inline]
    pub(crate) fn counter(self, id: u32) -> u64 {
        self.key.wrapping_add((u64::from(id) + 1).wrapping_mul(GAMMA))
    }

    /// `1 - u` for the token's uniform number `u`; strictly between 0 and 1.
    #[inline]
    pub fn complement(self, id: u32) -> f64 {
        ((mix(self.counter(id)) >> 12) as f64 + 0.5) * (1.0 / (1u64 << 52) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published SplitMix64 stream for seed 1234567.
    #[test]
    fn mix_is_splitmix64() {
        let stream: Vec<u64> =
            (1..=3u64).map(|i| mix(1_234_567u64.wrapping_add(i.wrapping_mul(GAMMA)))).collect();
        assert_eq!(stream, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn the_bound_of_a_logarithm_is_below_it_and_near() {
        for id in 0..100_000 {
            let noise = Noise::new(3, 4);
            let (log2, bound) = (noise.complement(id).log2(), f64::from(log2_bound(noise.counter(id))));
            assert!(bound < log2 + 1e-4 && bound > log2 - 0.1, "token {id}: {bound} for {log2}");
        }
    }

    #[test]
    fn noise_is_uniform_over_ids_positions_and_seeds() {
        let buckets = |values: &mut dyn Iterator<Item = f64>| {
            let mut counts = [0u32; 16];
            for value in values {
                assert!(value > 0.0 && value < 1.0);
                counts[(value * 16.0) as usize] += 1;
            }
            let mean = f64::from(counts.iter().sum::<u32>()) / 16.0;
            counts.iter().map(|&c| (f64::from(c) - mean).powi(2) / mean).sum::<f64>()
        };
        // 99.9th percentile of chi-square with 15 degrees of freedom.
        let limit = 37.7;
        assert!(buckets(&mut (0..32_000).map(|id| Noise::new(7, 11).complement(id))) < limit);
        assert!(buckets(&mut (0..32_000).map(|p| Noise::new(7, p).complement(5))) < limit);
        assert!(buckets(&mut (0..32_000).map(|s| Noise::new(s, 3).complement(5))) < limit);
    }
}
