//! The sampler's kernels over 16 lanes.

use crate::LANES;
use crate::simd::{Simd, exp};

/// Values looked at before the winner is located: small enough to be still in the nearest cache.
const BLOCK: usize = 128 * LANES;

/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn argmax<V: Simd>(values: &[f32]) -> usize {
    let mut best = (0, f32::NEG_INFINITY);
    for (index, block) in values.chunks(BLOCK).enumerate() {
        // SAFETY: whole vectors at multiples of 16 below the block's length.
        unsafe {
            let (vectors, tail) = block.as_chunks::<LANES>();
            let mut largest = [V::splat(f32::NEG_INFINITY); 4];
            for (i, vector) in vectors.iter().enumerate() {
                largest[i % 4] = V::load(vector.as_ptr()).max(largest[i % 4]);
            }
            let [a, b, c, d] = largest;
            let mut max = a.max(b).max(c.max(d)).largest();
            for &value in tail {
                max = if value > max { value } else { max };
            }
            if max > best.1 {
                best = (index * BLOCK + position::<V>(block, max), max);
            }
        }
    }
    best.0
}

/// The first index of `value`, which is in `block`.
///
/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
unsafe fn position<V: Simd>(block: &[f32], value: f32) -> usize {
    let (vectors, tail) = block.as_chunks::<LANES>();
    for (i, vector) in vectors.iter().enumerate() {
        // SAFETY: the vector has 16 elements.
        let equal = unsafe { V::load(vector.as_ptr()).equal(V::splat(value)) };
        if equal != 0 {
            return i * LANES + equal.trailing_zeros() as usize;
        }
    }
    vectors.len() * LANES + tail.iter().position(|&x| x == value).unwrap_or(0)
}

/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn all_finite<V: Simd>(values: &[f32]) -> bool {
    for chunk in values.chunks(LANES) {
        // SAFETY: as many elements as the chunk has.
        if !unsafe { V::load_part(chunk.as_ptr(), chunk.len()).is_finite() } {
            return false;
        }
    }
    true
}

/// # Safety
/// The processor has `V`'s instruction set; the slices are of one length.
#[inline(always)]
pub(crate) unsafe fn exp_sub<V: Simd>(x: &[f32], max: f32, out: &mut [f32]) {
    for (x, out) in x.chunks(LANES).zip(out.chunks_mut(LANES)) {
        // SAFETY: as many elements as the chunks have.
        unsafe {
            let x = V::load_part(x.as_ptr(), x.len());
            exp(x.sub(V::splat(max))).store_part(out.as_mut_ptr(), out.len());
        }
    }
}
