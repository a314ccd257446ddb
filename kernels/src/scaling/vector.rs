//! Factors and soft caps over 16 lanes.

use crate::LANES;
use crate::simd::{Simd, tanh};

/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn scale<V: Simd>(x: &mut [f32], factor: f32) {
    let (len, at) = (x.len(), x.as_mut_ptr());
    let mut i = 0;
    // SAFETY: every access is of at most `len - i` elements at `i`.
    unsafe {
        let factor = V::splat(factor);
        while i < len {
            let count = LANES.min(len - i);
            V::load_part(at.add(i), count).mul(factor).store_part(at.add(i), count);
            i += count;
        }
    }
}

/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn soft_cap<V: Simd>(x: &mut [f32], cap: f32) {
    let (len, at) = (x.len(), x.as_mut_ptr());
    let mut i = 0;
    // SAFETY: every access is of at most `len - i` elements at `i`.
    unsafe {
        let cap = V::splat(cap);
        while i < len {
            let count = LANES.min(len - i);
            tanh(V::load_part(at.add(i), count).div(cap)).mul(cap).store_part(at.add(i), count);
            i += count;
        }
    }
}
