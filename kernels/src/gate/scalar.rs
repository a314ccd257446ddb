//! Gates and GELU in plain Rust: the specification.

use super::{GELU_CUBE, GELU_INNER, Gate};
use crate::math::{exp, tanh};

fn gelu_of(x: f32) -> f32 {
    let inner = (GELU_CUBE * x * x).mul_add(x, x) * GELU_INNER;
    0.5 * x * (1.0 + tanh(inner))
}

pub(crate) fn gelu(x: &[f32], out: &mut [f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = gelu_of(x);
    }
}

pub(crate) fn gate(gate: Gate, gates: &[f32], ups: &[f32], out: &mut [f32]) {
    for ((out, &g), &up) in out.iter_mut().zip(gates).zip(ups) {
        *out = match gate {
            Gate::Silu => g / (1.0 + exp(-g)) * up,
            Gate::Gelu => gelu_of(g) * up,
            Gate::ClampedSwiglu { alpha, limit } => {
                let g = if limit < g { limit } else { g };
                let up = if limit < up { limit } else { up };
                let up = if up < -limit { -limit } else { up };
                g / (1.0 + exp(-(g * alpha))) * (up + 1.0)
            }
        };
    }
}
