//! The SwiGLU gate over 16 lanes.

use crate::LANES;
use crate::simd::{Simd, exp};

/// # Safety
/// The processor has `V`'s instruction set; the slices are of one length.
#[inline(always)]
pub(crate) unsafe fn silu_mul<V: Simd>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let len = gate.len();
    let mut i = 0;
    // SAFETY: every access is of at most `len - i` elements at `i`.
    unsafe {
        while i < len {
            let count = LANES.min(len - i);
            let gate = V::load_part(gate.as_ptr().add(i), count);
            let up = V::load_part(up.as_ptr().add(i), count);
            let silu = gate.div(V::splat(1.0).add(exp(gate.neg())));
            silu.mul(up).store_part(out.as_mut_ptr().add(i), count);
            i += count;
        }
    }
}
