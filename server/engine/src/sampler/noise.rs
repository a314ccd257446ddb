//! Common random numbers: the noise of a token is a function of (seed, position, token id) and of
//! nothing else, so target and draft see the same noise and any answer can be computed again.
//!
//! The generator is SplitMix64 (Steele, Lea, Flood 2014) used as a counter: the row's key is mixed
//! from seed and position, and token `id` takes the `id`-th output of the stream that starts there.

const GOLDEN_GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// SplitMix64's output function, a bijection on 64 bits.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The noise of one position.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NoiseRow {
    key: u64,
}

impl NoiseRow {
    /// `position` is the token's absolute place in its sequence, prompt included.
    pub(crate) fn new(seed: u64, position: u64) -> Self {
        NoiseRow {
            key: mix(mix(seed.wrapping_add(GOLDEN_GAMMA)).wrapping_add(position.wrapping_mul(GOLDEN_GAMMA))),
        }
    }

    /// `1 - u` for the token's uniform number `u`; strictly between 0 and 1.
    #[inline]
    pub(crate) fn complement(self, id: u32) -> f64 {
        let bits = mix(self.key.wrapping_add((u64::from(id) + 1).wrapping_mul(GOLDEN_GAMMA)));
        ((bits >> 12) as f64 + 0.5) * (1.0 / (1u64 << 52) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published SplitMix64 stream for seed 1234567.
    #[test]
    fn mix_is_splitmix64() {
        let stream: Vec<u64> =
            (1..=3u64).map(|i| mix(1_234_567u64.wrapping_add(i.wrapping_mul(GOLDEN_GAMMA)))).collect();
        assert_eq!(stream, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
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
        assert!(buckets(&mut (0..32_000).map(|id| NoiseRow::new(7, 11).complement(id))) < limit);
        assert!(buckets(&mut (0..32_000).map(|p| NoiseRow::new(7, p).complement(5))) < limit);
        assert!(buckets(&mut (0..32_000).map(|s| NoiseRow::new(s, 3).complement(5))) < limit);
    }
}
