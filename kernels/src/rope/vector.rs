//! Rotary embedding over 16 lanes.

use crate::LANES;
use crate::simd::Simd;

/// # Safety
/// The processor has `V`'s instruction set; `cos` and `sin` are half as long as `head`.
#[inline(always)]
pub(crate) unsafe fn rope<V: Simd>(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = head.len() / 2;
    let (first, second) = head.split_at_mut(half);
    let mut i = 0;
    // SAFETY: all four slices have `half` elements; every access is of at most `half - i` at `i`.
    unsafe {
        while i < half {
            let count = LANES.min(half - i);
            let (a_at, b_at) = (first.as_mut_ptr().add(i), second.as_mut_ptr().add(i));
            let (a, b) = (V::load_part(a_at, count), V::load_part(b_at, count));
            let cos = V::load_part(cos.as_ptr().add(i), count);
            let sin = V::load_part(sin.as_ptr().add(i), count);
            a.fms(cos, b.mul(sin)).store_part(a_at, count);
            b.fma(cos, a.mul(sin)).store_part(b_at, count);
            i += count;
        }
    }
}
