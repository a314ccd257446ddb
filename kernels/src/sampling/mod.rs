//! What a sampler does to a row of logits. One row, one thread: rows are sampled in the engine's thread.

pub(crate) mod scalar;
pub(crate) mod vector;

use std::sync::OnceLock;

use crate::dispatch::{self, Kernels};
use crate::isa;

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
    f64::from(max) + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

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
    }
}
