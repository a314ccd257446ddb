//! Cosines and sines of the rotary position embedding (Su et al., arXiv 2104.09864), computed once
//! when the KV cache is sized, in the half-split layout of the Hugging Face checkpoints.
//!
//! Frequencies and angles are rounded to f32 exactly where transformers rounds them: at position
//! 100,000 the last bit of a frequency is a hundredth of a radian, so a "better" table is a wrong one.

use std::f32::consts::PI;

use crate::config::{DecoderConfig, RopeScaling};

/// `cos(position * frequency)` and the sines, each `[num_positions, head_dim / 2]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// The cosines.
    pub cos: Vec<f32>,
    /// The sines.
    pub sin: Vec<f32>,
    /// Positions in the table.
    pub num_positions: usize,
}

impl RopeTable {
    /// The table for positions `0..num_positions`.
    pub fn new(config: &DecoderConfig, num_positions: usize) -> Self {
        let frequencies = frequencies(config);
        let mut cos = Vec::with_capacity(num_positions * frequencies.len());
        let mut sin = Vec::with_capacity(num_positions * frequencies.len());
        for position in 0..num_positions {
            for &frequency in &frequencies {
                // The product is rounded to f32; its cosine is then the nearest f32, whatever the
                // system's maths library.
                let angle = f64::from(position as f32 * frequency);
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        RopeTable { cos, sin, num_positions }
    }
}

/// `[head_dim / 2]`: radians per position of each pair of channels, scaling applied.
pub fn frequencies(config: &DecoderConfig) -> Vec<f32> {
    let theta = f64::from(config.rope_theta);
    let plain = (0..config.head_dim).step_by(2).map(|channel| {
        let exponent = channel as f32 / config.head_dim as f32;
        1.0 / (theta.powf(f64::from(exponent)) as f32)
    });
    match config.rope_scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(head_dim: usize, rope_theta: f32, rope_scaling: RopeScaling) -> DecoderConfig {
        DecoderConfig {
            vocab_size: 8,
            hidden_size: head_dim,
            intermediate_size: 8,
            num_layers: 1,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim,
            rms_norm_eps: 1e-6,
            rope_theta,
            rope_scaling,
            max_position_embeddings: 4096,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            tie_word_embeddings: true,
        }
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
            let found = frequencies(&config(head_dim, theta, scaling));
            assert_eq!(found.len(), wanted.len());
            for (found, wanted) in found.iter().zip(wanted) {
                assert!((found - wanted).abs() <= wanted * f32::EPSILON, "{scaling:?}: {found} {wanted}");
            }
        }
    }

    #[test]
    fn position_zero_does_not_rotate() {
        let table = RopeTable::new(&config(8, 10_000.0, RopeScaling::None), 3);
        assert_eq!(table.cos[..4], [1.0; 4]);
        assert_eq!(table.sin[..4], [0.0; 4]);
        assert_eq!((table.cos.len(), table.sin.len(), table.num_positions), (12, 12, 3));
        assert_eq!(table.cos[8], (2.0f64).cos() as f32);
    }

    #[rustfmt::skip]
    const NONE: &[f32] = &[1.0, 0.1, 0.01, 0.001];
    #[rustfmt::skip]
    const LINEAR: &[f32] = &[0.25, 0.025, 0.0025, 0.00025];
    #[rustfmt::skip]
    const LLAMA3: &[f32] =
        &[1.0, 0.45986328, 0.09761663, 0.012156156, 0.00559017, 0.002570714, 0.001182177, 0.0005436398];
}
