//! AVX-512: one register is sixteen lanes.

use std::arch::x86_64::*;

use super::Simd;

/// `__m512` as [`Simd`]; needs AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

#[inline(always)]
fn mask(len: usize) -> __mmask16 {
    ((1u32 << len) - 1) as __mmask16
}

// SAFETY of every block: the trait's contract gives the instruction set and valid pointers; masked
// accesses touch the selected lanes only.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one argument for all, stated above")]
impl Simd for Avx512 {
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Avx512(_mm512_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Avx512(_mm512_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn load_part(from: *const f32, len: usize) -> Self {
        unsafe { Avx512(_mm512_maskz_loadu_ps(mask(len), from)) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, len: usize) {
        unsafe { _mm512_mask_storeu_ps(to, mask(len), self.0) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> (Self, Self) {
        unsafe {
            let line = _mm512_loadu_si512(from.cast());
            let even = _mm512_slli_epi32::<16>(line);
            let odd = _mm512_and_si512(line, _mm512_set1_epi32(0xffff_0000u32 as i32));
            (Avx512(_mm512_castsi512_ps(even)), Avx512(_mm512_castsi512_ps(odd)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        unsafe { Avx512(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_add_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_sub_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_mul_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_div_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        unsafe { Avx512(_mm512_fmadd_ps(self.0, factor.0, addend.0)) }
    }
    #[inline(always)]
    unsafe fn fms(self, factor: Self, subtrahend: Self) -> Self {
        unsafe { Avx512(_mm512_fmsub_ps(self.0, factor.0, subtrahend.0)) }
    }
    #[inline(always)]
    unsafe fn neg(self) -> Self {
        unsafe { Avx512(_mm512_xor_ps(self.0, _mm512_set1_ps(-0.0))) }
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_max_ps(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        unsafe { Avx512(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)) }
    }
    #[inline(always)]
    unsafe fn scale(self, n: Self) -> Self {
        unsafe {
            let n = _mm512_cvtps_epi32(n.0);
            let half = _mm512_srai_epi32::<1>(n);
            let bias = _mm512_set1_epi32(127);
            let first = _mm512_slli_epi32::<23>(_mm512_add_epi32(half, bias));
            let second = _mm512_slli_epi32::<23>(_mm512_add_epi32(_mm512_sub_epi32(n, half), bias));
            let scaled = _mm512_mul_ps(self.0, _mm512_castsi512_ps(first));
            Avx512(_mm512_mul_ps(scaled, _mm512_castsi512_ps(second)))
        }
    }
    #[inline(always)]
    unsafe fn if_less(self, limit: Self, value: Self, other: Self) -> Self {
        unsafe {
            let less = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, limit.0);
            Avx512(_mm512_mask_blend_ps(less, other.0, value.0))
        }
    }
    #[inline(always)]
    unsafe fn equal(self, other: Self) -> u32 {
        unsafe { u32::from(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            super::avx2::sum(eight)
        }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        unsafe {
            let eight = _mm256_max_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0));
            super::avx2::largest(eight)
        }
    }
    #[inline(always)]
    unsafe fn is_finite(self) -> bool {
        /// Quiet NaN, both infinities, signalling NaN.
        const NOT_FINITE: i32 = 0x01 | 0x08 | 0x10 | 0x80;
        unsafe { _mm512_fpclass_ps_mask::<NOT_FINITE>(self.0) == 0 }
    }
}
