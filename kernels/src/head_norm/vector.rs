//! RMS normalisation in place over 16 lanes.

use crate::LANES;
use crate::simd::Simd;

/// # Safety
/// The processor has `V`'s instruction set; the slices are of one length.
#[inline(always)]
pub(crate) unsafe fn head_norm<V: Simd>(head: &mut [f32], weight: &[f32], eps: f32) {
    let (len, at) = (head.len(), head.as_mut_ptr());
    // SAFETY: every access is of `count` elements at `i < len`, with `i + count <= len`.
    unsafe {
        let mut sums = [V::splat(0.0); 4];
        let mut i = 0;
        while i < len {
            let count = LANES.min(len - i);
            let x = V::load_part(at.add(i), count);
            let sum = &mut sums[i / LANES % 4];
            *sum = x.fma(x, *sum);
            i += count;
        }
        let sum = sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum();
        let scale = V::splat(1.0 / (sum / len as f32 + eps).sqrt());
        let mut i = 0;
        while i < len {
            let count = LANES.min(len - i);
            let scaled = V::load_part(at.add(i), count).mul(scale);
            scaled.mul(V::load_part(weight.as_ptr().add(i), count)).store_part(at.add(i), count);
            i += count;
        }
    }
}
