//! Sixteen f32 lanes, whatever the machine: one `__m512`, or two `__m256`. The vector versions of the
//! operations are written once over [`Simd`] and compiled once per implementation, inside functions
//! that enable its instruction set (see [`crate::dispatch`]); every method is `inline(always)`, so
//! nothing of the trait is left in the machine code.
//!
//! All arithmetic is IEEE and lane by lane; [`Simd::sum`] folds in halves (8, 4, 2, 1). That, and fused
//! multiply-adds, is why every implementation gives the bits of the scalar specification.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;

use crate::math::{EXP_OVERFLOW, EXP_POLY, EXP_UNDERFLOW, LN2_HI, LN2_LO, LOG2_E};

/// Sixteen lanes of f32.
///
/// # Safety
/// Every method requires that the processor has the implementation's instruction set; those that take
/// a pointer also require that it is valid for the elements they name. Nothing needs alignment.
pub(crate) trait Simd: Copy {
    /// True with 32 registers of 16 lanes; false with 16 of 8.
    const WIDE: bool;

    unsafe fn splat(value: f32) -> Self;
    /// 16 elements.
    unsafe fn load(from: *const f32) -> Self;
    /// The first `len <= 16` elements, and zeros; touches no others.
    unsafe fn load_part(from: *const f32, len: usize) -> Self;
    /// 16 elements.
    unsafe fn store(self, to: *mut f32);
    /// The first `len <= 16` elements; touches no others.
    unsafe fn store_part(self, to: *mut f32, len: usize);
    /// A 64-byte line of 32 bf16: the even ones and the odd ones.
    unsafe fn load_bf16(from: *const u8) -> (Self, Self);
    /// 16 f16.
    unsafe fn load_f16(from: *const u8) -> Self;

    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `self * factor + addend`, rounded once.
    unsafe fn fma(self, factor: Self, addend: Self) -> Self;
    /// `self * factor - subtrahend`, rounded once.
    unsafe fn fms(self, factor: Self, subtrahend: Self) -> Self;
    /// The sign flipped.
    unsafe fn neg(self) -> Self;
    /// `self` where it is greater than `other`, else `other`: a NaN in `self` loses.
    unsafe fn max(self, other: Self) -> Self;
    /// To whole numbers, ties to even.
    unsafe fn round(self) -> Self;
    /// `self * 2^(n >> 1) * 2^(n - (n >> 1))` for whole numbers `n`.
    unsafe fn scale(self, n: Self) -> Self;
    /// `value` where `self < limit`, else `other`.
    unsafe fn if_less(self, limit: Self, value: Self, other: Self) -> Self;
    /// A bit for every lane where `self == other`.
    unsafe fn equal(self, other: Self) -> u32;

    /// All lanes added, folded in halves.
    unsafe fn sum(self) -> f32;
    /// The largest lane; the lanes are not NaN.
    unsafe fn largest(self) -> f32;
    /// True if no lane is NaN or infinite.
    unsafe fn is_finite(self) -> bool;
}

/// [`crate::math::exp`], the same operations lane by lane.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn exp<V: Simd>(x: V) -> V {
    // SAFETY: the caller's promise covers every method.
    unsafe {
        let n = x.mul(V::splat(LOG2_E)).round();
        let r = n.fma(V::splat(-LN2_LO), n.fma(V::splat(-LN2_HI), x));
        let mut p = V::splat(EXP_POLY[0]);
        for &coefficient in &EXP_POLY[1..] {
            p = p.fma(r, V::splat(coefficient));
        }
        let p = p.fma(r.mul(r), r).add(V::splat(1.0)).scale(n);
        let over = V::splat(EXP_OVERFLOW).if_less(x, V::splat(f32::INFINITY), p);
        x.if_less(V::splat(EXP_UNDERFLOW), V::splat(0.0), over)
    }
}
