//! Gates and GELU over 16 lanes.

use super::{GELU_CUBE, GELU_INNER, Gate};
use crate::LANES;
use crate::simd::{Simd, exp, tanh};

/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
unsafe fn gelu_of<V: Simd>(x: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        let inner = V::splat(GELU_CUBE).mul(x).mul(x).fma(x, x).mul(V::splat(GELU_INNER));
        V::splat(0.5).mul(x).mul(V::splat(1.0).add(tanh(inner)))
    }
}

/// # Safety
/// The processor has `V`'s instruction set; the slices are of one length.
#[inline(always)]
pub(crate) unsafe fn gelu<V: Simd>(x: &[f32], out: &mut [f32]) {
    let len = x.len();
    let mut i = 0;
    // SAFETY: every access is of at most `len - i` elements at `i`.
    unsafe {
        while i < len {
            let count = LANES.min(len - i);
            gelu_of(V::load_part(x.as_ptr().add(i), count)).store_part(out.as_mut_ptr().add(i), count);
            i += count;
        }
    }
}

/// # Safety
/// The processor has `V`'s instruction set; the slices are of one length.
#[inline(always)]
pub(crate) unsafe fn gate<V: Simd>(gate: Gate, gates: &[f32], ups: &[f32], out: &mut [f32]) {
    let len = gates.len();
    let mut i = 0;
    // SAFETY: every access is of at most `len - i` elements at `i`.
    unsafe {
        while i < len {
            let count = LANES.min(len - i);
            let g = V::load_part(gates.as_ptr().add(i), count);
            let up = V::load_part(ups.as_ptr().add(i), count);
            let gated = match gate {
                Gate::Silu => g.div(V::splat(1.0).add(exp(g.neg()))).mul(up),
                Gate::Gelu => gelu_of(g).mul(up),
                Gate::ClampedSwiglu { alpha, limit } => {
                    let (alpha, most, least) = (V::splat(alpha), V::splat(limit), V::splat(-limit));
                    let g = most.if_less(g, most, g);
                    let up = most.if_less(up, most, up);
                    let up = up.if_less(least, least, up);
                    g.div(V::splat(1.0).add(exp(g.mul(alpha).neg()))).mul(up.add(V::splat(1.0)))
                }
            };
            gated.store_part(out.as_mut_ptr().add(i), count);
            i += count;
        }
    }
}
