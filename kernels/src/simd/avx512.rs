//! AVX-512: one register is sixteen lanes.

use std::arch::x86_64::*;

use super::{Integers, Simd};
use crate::sampling::noise::{BITS_TO_LOG2, FACTORS, GAMMA, LOG2_OF_ZERO, SHIFTS};

/// `__m512` as [`Simd`]; needs AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

#[inline(always)]
fn mask(len: usize) -> __mmask16 {
    ((1u32 << len) - 1) as __mmask16
}

/// The upper 31 bits of eight lanes of noise; not a closure, which would be too large to be compiled into functions
/// that enable the instruction set.
///
/// # Safety
/// The processor has AVX-512 F and DQ.
#[inline(always)]
unsafe fn noise_bits(counter: u64) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
        let steps = _mm512_mullo_epi64(lanes, _mm512_set1_epi64(GAMMA as i64));
        let z = _mm512_add_epi64(_mm512_set1_epi64(counter as i64), steps);
        let z = _mm512_xor_si512(z, _mm512_srli_epi64::<{ SHIFTS[0] }>(z));
        let z = _mm512_mullo_epi64(z, _mm512_set1_epi64(FACTORS[0] as i64));
        let z = _mm512_xor_si512(z, _mm512_srli_epi64::<{ SHIFTS[1] }>(z));
        let z = _mm512_mullo_epi64(z, _mm512_set1_epi64(FACTORS[1] as i64));
        // The last step of the generator leaves the upper 31 bits as they are.
        _mm512_cvtepi64_epi32(_mm512_srli_epi64::<33>(z))
    }
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
    unsafe fn load_i8_as_f32(from: *const u8) -> Self {
        unsafe { Avx512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())))) }
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
        // Rounds once, as the two steps do: the first of them is exact.
        unsafe { Avx512(_mm512_scalef_ps(self.0, n.0)) }
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
    unsafe fn at_least(self, other: Self) -> u32 {
        unsafe { u32::from(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(self.0, other.0)) }
    }
    #[inline(always)]
    unsafe fn noise_log2(counter: u64) -> Self {
        unsafe {
            let low = noise_bits(counter);
            let high = noise_bits(counter.wrapping_add(GAMMA.wrapping_mul(8)));
            let uniform = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            let bits = _mm512_castps_si512(_mm512_cvtepi32_ps(uniform));
            let log2 = Avx512(_mm512_cvtepi32_ps(bits));
            log2.fma(Self::splat(BITS_TO_LOG2), Self::splat(LOG2_OF_ZERO))
        }
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

// SAFETY of every block: as above; [`Integers::dot`] needs AVX-512 VNNI as well, which the tables that use
// it ask for.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one argument for all, stated above")]
impl Integers for Avx512 {
    type Bytes = __m512i;
    type Quad = __m512i;
    type Ints = __m512i;

    #[inline(always)]
    unsafe fn zero_bytes() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn splat_bytes(from: *const i8) -> __m512i {
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store_bytes(bytes: __m512i, to: *mut u8) {
        unsafe { _mm512_storeu_si512(to.cast(), bytes) }
    }
    #[inline(always)]
    unsafe fn low_nibbles(bytes: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(bytes, _mm512_set1_epi8(0xf)) }
    }
    #[inline(always)]
    unsafe fn high_nibbles(bytes: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), _mm512_set1_epi8(0xf)) }
    }
    #[inline(always)]
    unsafe fn or_bits(to: __m512i, from: __m512i, shift: i32, mask: u8) -> __m512i {
        /// `a | b & c`
        const OR_AND: i32 = 0xf8;
        unsafe {
            let count = _mm_cvtsi32_si128(shift.abs());
            let from = if shift > 0 { _mm512_sll_epi16(from, count) } else { _mm512_srl_epi16(from, count) };
            _mm512_ternarylogic_epi32::<OR_AND>(to, from, _mm512_set1_epi8(mask as i8))
        }
    }
    #[inline(always)]
    unsafe fn look_up(nibbles: __m512i, table: &[u8; 16]) -> __m512i {
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, nibbles)
        }
    }

    #[inline(always)]
    unsafe fn zero() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn splat_int(from: *const i32) -> __m512i {
        unsafe { _mm512_set1_epi32(*from) }
    }
    #[inline(always)]
    unsafe fn start(neg_sum: *const i32, offset_bits: u32) -> __m512i {
        unsafe { _mm512_sll_epi32(_mm512_set1_epi32(*neg_sum), _mm_cvtsi32_si128(offset_bits as i32)) }
    }
    #[inline(always)]
    unsafe fn dot(sum: __m512i, codes: __m512i, x: __m512i, _offset_bits: u32) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, codes, x) }
    }
    #[inline(always)]
    unsafe fn to_f32(ints: __m512i) -> Self {
        unsafe { Avx512(_mm512_cvtepi32_ps(ints)) }
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> __m512i {
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> __m512i {
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn bits(ints: __m512i, shift: i32, mask: i32) -> __m512i {
        unsafe {
            let shifted = _mm512_srl_epi32(ints, _mm_cvtsi32_si128(shift));
            _mm512_and_si512(shifted, _mm512_set1_epi32(mask))
        }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    unsafe fn load_bf16s(from: *const u8) -> Self {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8) {
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(self.0))) }
    }
    #[inline(always)]
    unsafe fn amplitudes(x: [Self; 4]) -> Self {
        unsafe {
            // The bits of magnitudes are in the order of the magnitudes, and those of a NaN above all.
            let magnitude = |x: Self| _mm512_and_si512(_mm512_castps_si512(x.0), _mm512_set1_epi32(i32::MAX));
            let first = _mm512_max_epu32(magnitude(x[0]), magnitude(x[1]));
            let second = _mm512_max_epu32(magnitude(x[2]), magnitude(x[3]));
            // Quarters 0 and 1 of each, then quarters 2 and 3, side by side.
            let low = _mm512_shuffle_i32x4::<0b01_00_01_00>(first, second);
            let high = _mm512_shuffle_i32x4::<0b11_10_11_10>(first, second);
            let eight = _mm512_max_epu32(low, high);
            let four = _mm512_max_epu32(eight, _mm512_shuffle_i32x4::<0b10_11_00_01>(eight, eight));
            let two = _mm512_max_epu32(four, _mm512_shuffle_epi32::<0b01_00_11_10>(four));
            let one = _mm512_max_epu32(two, _mm512_shuffle_epi32::<0b10_11_00_01>(two));
            Avx512(_mm512_castsi512_ps(one))
        }
    }
    #[inline(always)]
    unsafe fn pack_i8(x: [Self; 4]) -> __m512i {
        unsafe {
            let first = _mm512_packs_epi32(_mm512_cvtps_epi32(x[0].0), _mm512_cvtps_epi32(x[1].0));
            let second = _mm512_packs_epi32(_mm512_cvtps_epi32(x[2].0), _mm512_cvtps_epi32(x[3].0));
            let bytes = _mm512_packs_epi16(first, second);
            // Packing works within 128-bit quarters: word `w` of the result is in word `4 (w % 4) + w / 4`.
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            _mm512_permutexvar_epi32(order, bytes)
        }
    }
    #[inline(always)]
    unsafe fn sums_of_16(bytes: __m512i) -> __m512i {
        unsafe {
            let pairs = _mm512_maddubs_epi16(_mm512_set1_epi8(1), bytes);
            let fours = _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
            let eights = _mm512_add_epi32(fours, _mm512_shuffle_epi32::<0b01_00_11_10>(fours));
            _mm512_add_epi32(eights, _mm512_shuffle_epi32::<0b10_11_00_01>(eights))
        }
    }
    #[inline(always)]
    unsafe fn store_ints(ints: __m512i, to: *mut i32) {
        unsafe { _mm512_storeu_si512(to.cast(), ints) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
