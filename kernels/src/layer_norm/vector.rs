//! Layer normalisation over 16 lanes.

use crate::LANES;
use crate::simd::Simd;

/// # Safety
/// The processor has `V`'s instruction set; the slices are of one length.
#[inline(always)]
pub(crate) unsafe fn layer_norm<V: Simd>(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let len = x.len();
    // SAFETY: every access is of `count` elements at `i < len`, with `i + count <= len`. The lanes past
    // `count` are zeros in `x`: the mean is taken off only in lanes that are then added or stored.
    unsafe {
        let mut sums = [V::splat(0.0); 4];
        let mut i = 0;
        while i < len {
            let count = LANES.min(len - i);
            let sum = &mut sums[i / LANES % 4];
            *sum = sum.add(V::load_part(x.as_ptr().add(i), count));
            i += count;
        }
        let mean = sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum() / len as f32;
        let mut sums = [V::splat(0.0); 4];
        let means = V::splat(mean);
        // The mean itself in lanes without an element, so that their distance is 0.
        let mut tail = [mean; LANES];
        let mut i = 0;
        while i < len {
            let count = LANES.min(len - i);
            let elements = if count == LANES {
                V::load(x.as_ptr().add(i))
            } else {
                tail[..count].copy_from_slice(&x[i..]);
                V::load(tail.as_ptr())
            };
            let distance = elements.sub(means);
            let sum = &mut sums[i / LANES % 4];
            *sum = distance.fma(distance, *sum);
            i += count;
        }
        let variance = sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum() / len as f32;
        let scale = V::splat(1.0 / (variance + eps).sqrt());
        let mut i = 0;
        while i < len {
            let count = LANES.min(len - i);
            let distance = V::load_part(x.as_ptr().add(i), count).sub(means);
            let weight = V::load_part(weight.as_ptr().add(i), count);
            let bias = V::load_part(bias.as_ptr().add(i), count);
            distance.mul(scale).fma(weight, bias).store_part(out.as_mut_ptr().add(i), count);
            i += count;
        }
    }
}
