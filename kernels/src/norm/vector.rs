//! RMS normalisation over 16 lanes. Four accumulators hide the latency of the additions.

use crate::LANES;
use crate::simd::Simd;

/// # Safety
/// The processor has `V`'s instruction set; the slices are of one length.
#[inline(always)]
pub(crate) unsafe fn rms_norm<V: Simd>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let len = x.len();
    // SAFETY: every access is of `count` elements at `i < len`, with `i + count <= len`.
    unsafe {
        let mut sums = [V::splat(0.0); 4];
        let mut i = 0;
        while i + 4 * LANES <= len {
            for (j, sum) in sums.iter_mut().enumerate() {
                let x = V::load(x.as_ptr().add(i + j * LANES));
                *sum = x.fma(x, *sum);
            }
            i += 4 * LANES;
        }
        for sum in &mut sums {
            if i < len {
                let count = LANES.min(len - i);
                let x = V::load_part(x.as_ptr().add(i), count);
                *sum = x.fma(x, *sum);
                i += count;
            }
        }
        let sum = sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum();
        let scale = V::splat(1.0 / (sum / len as f32 + eps).sqrt());
        let mut i = 0;
        while i + LANES <= len {
            let scaled = V::load(x.as_ptr().add(i)).mul(scale);
            scaled.mul(V::load(weight.as_ptr().add(i))).store(out.as_mut_ptr().add(i));
            i += LANES;
        }
        if i < len {
            let scaled = V::load_part(x.as_ptr().add(i), len - i).mul(scale);
            let weight = V::load_part(weight.as_ptr().add(i), len - i);
            scaled.mul(weight).store_part(out.as_mut_ptr().add(i), len - i);
        }
    }
}

/// # Safety
/// The processor has `V`'s instruction set; the slices are of one length.
#[inline(always)]
pub(crate) unsafe fn add<V: Simd>(sum: &mut [f32], x: &[f32]) {
    let len = sum.len();
    let mut i = 0;
    // SAFETY: every access is of at most `len - i` elements at `i`.
    unsafe {
        while i + LANES <= len {
            V::load(sum.as_ptr().add(i)).add(V::load(x.as_ptr().add(i))).store(sum.as_mut_ptr().add(i));
            i += LANES;
        }
        if i < len {
            let total =
                V::load_part(sum.as_ptr().add(i), len - i).add(V::load_part(x.as_ptr().add(i), len - i));
            total.store_part(sum.as_mut_ptr().add(i), len - i);
        }
    }
}
