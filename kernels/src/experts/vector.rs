//! A weighted addition over 16 lanes.

use crate::LANES;
use crate::simd::Simd;

/// # Safety
/// The processor has `V`'s instruction set; the slices are of one length.
#[inline(always)]
pub(crate) unsafe fn add_scaled<V: Simd>(sum: &mut [f32], x: &[f32], factor: f32) {
    let len = sum.len();
    let mut i = 0;
    // SAFETY: every access is of at most `len - i` elements at `i`.
    unsafe {
        let factor = V::splat(factor);
        while i < len {
            let count = LANES.min(len - i);
            let at = sum.as_mut_ptr().add(i);
            let total = V::load_part(x.as_ptr().add(i), count).fma(factor, V::load_part(at, count));
            total.store_part(at, count);
            i += count;
        }
    }
}
