//! Random numbers as a pure function of seed, purpose, step and row: nothing to save, and the order
//! in which threads draw cannot matter.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What a stream is for, so that no two uses share numbers.
#[derive(Clone, Copy)]
pub(crate) enum Purpose {
    /// Cutting training samples.
    Samples = 1,
    /// Which rows hold text of the target, and its prompts.
    Outputs = 2,
    /// Sampling from the target.
    Generation = 3,
}

/// The stream of one row of one step.
pub(crate) fn stream(seed: u64, purpose: Purpose, step: u64, row: usize) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&step.to_le_bytes());
    key[16..24].copy_from_slice(&(row as u64).to_le_bytes());
    key[24] = purpose as u8;
    ChaCha8Rng::from_seed(key)
}

/// `count` normal deviates (Box-Muller).
pub(crate) fn normal(rng: &mut ChaCha8Rng, count: usize, deviation: f32) -> Vec<f32> {
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        // 1 - u lies in (0, 1], where the logarithm is finite.
        let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * rng.random::<f64>()).sin_cos();
        values.push((radius * cos) as f32 * deviation);
        values.push((radius * sin) as f32 * deviation);
    }
    values.truncate(count);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_differ_and_normals_are_normal() {
        let first = |purpose, step, row| stream(7, purpose, step, row).random::<u64>();
        assert_eq!(first(Purpose::Samples, 1, 2), first(Purpose::Samples, 1, 2));
        assert_ne!(first(Purpose::Samples, 1, 2), first(Purpose::Samples, 2, 1));
        assert_ne!(first(Purpose::Samples, 1, 2), first(Purpose::Outputs, 1, 2));
        let values = normal(&mut stream(1, Purpose::Samples, 0, 0), 20_001, 2.0);
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let variance = values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32;
        assert!(mean.abs() < 0.06 && (variance - 4.0).abs() < 0.2, "{mean} {variance}");
    }
}
