//! AVX2 with FMA and F16C: two registers are sixteen lanes.

use std::arch::x86_64::*;

use super::Simd;

/// Two `__m256` as [`Simd`]: lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

/// Eight lanes added, folded in halves.
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
pub(super) unsafe fn sum(eight: __m256) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

/// The largest of eight lanes.
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
pub(super) unsafe fn largest(eight: __m256) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }
}

/// The lanes below `len` of eight, as the mask of `maskload`.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn mask(len: usize) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(len as i32), lanes)
    }
}

/// [`Simd::scale`] of eight lanes.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn scale(x: __m256, n: __m256) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let n = _mm256_cvtps_epi32(n);
        let half = _mm256_srai_epi32::<1>(n);
        let bias = _mm256_set1_epi32(127);
        let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
        let second = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
        let scaled = _mm256_mul_ps(x, _mm256_castsi256_ps(first));
        _mm256_mul_ps(scaled, _mm256_castsi256_ps(second))
    }
}

/// The even and the odd of 16 bf16.
///
/// # Safety
/// The processor has AVX2; `from` points to 32 bytes.
#[inline(always)]
unsafe fn bf16(from: *const u8) -> (__m256, __m256) {
    // SAFETY: the caller's promise.
    unsafe {
        let line = _mm256_loadu_si256(from.cast());
        let odd = _mm256_and_si256(line, _mm256_set1_epi32(0xffff_0000u32 as i32));
        (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(line)), _mm256_castsi256_ps(odd))
    }
}

/// The lanes that are NaN or infinite.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn not_finite(x: __m256) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let exponent = _mm256_set1_epi32(0x7f80_0000);
        _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(x), exponent), exponent)
    }
}

// SAFETY of every block: the trait's contract gives the instruction set and valid pointers; masked
// accesses touch the selected lanes only, and the second half's pointer is used where it has lanes.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one argument for all, stated above")]
impl Simd for Avx2 {
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Avx2(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Avx2(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_part(from: *const f32, len: usize) -> Self {
        unsafe {
            let first = _mm256_maskload_ps(from, mask(len));
            let second = _mm256_maskload_ps(from.wrapping_add(8), mask(len.saturating_sub(8)));
            Avx2(first, second)
        }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, len: usize) {
        unsafe {
            _mm256_maskstore_ps(to, mask(len), self.0);
            _mm256_maskstore_ps(to.wrapping_add(8), mask(len.saturating_sub(8)), self.1);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> (Self, Self) {
        unsafe {
            let (first, second) = (bf16(from), bf16(from.add(32)));
            (Avx2(first.0, second.0), Avx2(first.1, second.1))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        unsafe {
            let (first, second) = (from.cast(), from.add(16).cast());
            Avx2(_mm256_cvtph_ps(_mm_loadu_si128(first)), _mm256_cvtph_ps(_mm_loadu_si128(second)))
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        unsafe {
            Avx2(_mm256_fmadd_ps(self.0, factor.0, addend.0), _mm256_fmadd_ps(self.1, factor.1, addend.1))
        }
    }
    #[inline(always)]
    unsafe fn fms(self, factor: Self, subtrahend: Self) -> Self {
        unsafe {
            Avx2(
                _mm256_fmsub_ps(self.0, factor.0, subtrahend.0),
                _mm256_fmsub_ps(self.1, factor.1, subtrahend.1),
            )
        }
    }
    #[inline(always)]
    unsafe fn neg(self) -> Self {
        unsafe {
            {
                let sign = _mm256_set1_ps(-0.0);
                Avx2(_mm256_xor_ps(self.0, sign), _mm256_xor_ps(self.1, sign))
            }
        }
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        const TIES_TO_EVEN: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        unsafe { Avx2(_mm256_round_ps::<TIES_TO_EVEN>(self.0), _mm256_round_ps::<TIES_TO_EVEN>(self.1)) }
    }
    #[inline(always)]
    unsafe fn scale(self, n: Self) -> Self {
        unsafe { Avx2(scale(self.0, n.0), scale(self.1, n.1)) }
    }
    #[inline(always)]
    unsafe fn if_less(self, limit: Self, value: Self, other: Self) -> Self {
        unsafe {
            let first = _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, limit.0);
            let second = _mm256_cmp_ps::<_CMP_LT_OQ>(self.1, limit.1);
            Avx2(_mm256_blendv_ps(other.0, value.0, first), _mm256_blendv_ps(other.1, value.1, second))
        }
    }
    #[inline(always)]
    unsafe fn equal(self, other: Self) -> u32 {
        unsafe {
            let first = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(self.0, other.0));
            let second = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(self.1, other.1));
            (first | second << 8) as u32
        }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe { sum(_mm256_add_ps(self.0, self.1)) }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        unsafe { largest(_mm256_max_ps(self.0, self.1)) }
    }
    #[inline(always)]
    unsafe fn is_finite(self) -> bool {
        unsafe {
            let any = _mm256_or_si256(not_finite(self.0), not_finite(self.1));
            _mm256_testz_si256(any, any) != 0
        }
    }
}
