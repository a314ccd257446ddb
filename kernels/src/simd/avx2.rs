//! AVX2 with FMA and F16C: two registers are sixteen lanes.

use std::arch::x86_64::*;

use super::{Integers, Simd};
use crate::sampling::noise::{BITS_TO_LOG2, FACTORS, GAMMA, LOG2_OF_ZERO, SHIFTS};

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

/// The low 64 bits of the products of four lanes with `factor`.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn mul_u64(x: __m256i, factor: u64) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm256_set1_epi64x((factor & 0xffff_ffff) as i64);
        let high = _mm256_set1_epi64x((factor >> 32) as i64);
        let crossed =
            _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64::<32>(x), low), _mm256_mul_epu32(x, high));
        _mm256_add_epi64(_mm256_mul_epu32(x, low), _mm256_slli_epi64::<32>(crossed))
    }
}

/// The upper 31 bits of four lanes of noise; not a closure, which would be too large to be compiled into functions that
/// enable the instruction set.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn noise_bits(counter: u64) -> __m256i {
    const STEPS: [i64; 3] = [GAMMA as i64, GAMMA.wrapping_mul(2) as i64, GAMMA.wrapping_mul(3) as i64];
    // SAFETY: the caller's promise.
    unsafe {
        let steps = _mm256_setr_epi64x(0, STEPS[0], STEPS[1], STEPS[2]);
        let z = _mm256_add_epi64(_mm256_set1_epi64x(counter as i64), steps);
        let z = _mm256_xor_si256(z, _mm256_srli_epi64::<{ SHIFTS[0] as i32 }>(z));
        let z = mul_u64(z, FACTORS[0]);
        let z = _mm256_xor_si256(z, _mm256_srli_epi64::<{ SHIFTS[1] as i32 }>(z));
        // The last step of the generator leaves the upper 31 bits as they are.
        _mm256_srli_epi64::<33>(mul_u64(z, FACTORS[1]))
    }
}

/// Eight lanes of [`Simd::noise_log2`].
///
/// # Safety
/// The processor has AVX2 and FMA.
#[inline(always)]
unsafe fn noise_log2(counter: u64) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm256_castsi256_ps(noise_bits(counter));
        let high = _mm256_castsi256_ps(noise_bits(counter.wrapping_add(GAMMA.wrapping_mul(4))));
        // The lower halves of all lanes; shuffling works within 128 bits.
        let halves = _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(low, high));
        let uniform = _mm256_permute4x64_epi64::<0b11_01_10_00>(halves);
        let log2 = _mm256_cvtepi32_ps(_mm256_castps_si256(_mm256_cvtepi32_ps(uniform)));
        _mm256_fmadd_ps(log2, _mm256_set1_ps(BITS_TO_LOG2), _mm256_set1_ps(LOG2_OF_ZERO))
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
    unsafe fn load_i8_as_f32(from: *const u8) -> Self {
        unsafe {
            let sixteen = _mm_loadu_si128(from.cast());
            let first = _mm256_cvtepi8_epi32(sixteen);
            let second = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(sixteen, sixteen));
            Avx2(_mm256_cvtepi32_ps(first), _mm256_cvtepi32_ps(second))
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
    unsafe fn at_least(self, other: Self) -> u32 {
        unsafe {
            let first = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(self.0, other.0));
            let second = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(self.1, other.1));
            (first | second << 8) as u32
        }
    }
    #[inline(always)]
    unsafe fn noise_log2(counter: u64) -> Self {
        unsafe { Avx2(noise_log2(counter), noise_log2(counter.wrapping_add(GAMMA.wrapping_mul(8)))) }
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

/// Applies `op` to both halves.
#[inline(always)]
fn both<A: Copy, B>(pair: (A, A), op: impl Fn(A) -> B) -> (B, B) {
    (op(pair.0), op(pair.1))
}

/// [`Integers::dot`] of eight lanes, the activations broadcast.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn dot(sum: __m256i, codes: __m256i, x: __m256i, offset_bits: u32) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        // Pairs of products fit 16 bits: codes below 128 times 127, or magnitudes up to 128 times 127.
        let pairs = if offset_bits == 7 {
            let weights = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
            _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights))
        } else {
            _mm256_maddubs_epi16(codes, x)
        };
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

// SAFETY of every block: the trait's contract gives the instruction set and valid pointers.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one argument for all, stated above")]
impl Integers for Avx2 {
    type Bytes = (__m256i, __m256i);
    type Quad = __m256i;
    type Ints = (__m256i, __m256i);

    #[inline(always)]
    unsafe fn zero_bytes() -> Self::Bytes {
        unsafe { (_mm256_setzero_si256(), _mm256_setzero_si256()) }
    }
    #[inline(always)]
    unsafe fn splat_bytes(from: *const i8) -> __m256i {
        unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::Bytes {
        unsafe { (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())) }
    }
    #[inline(always)]
    unsafe fn store_bytes(bytes: Self::Bytes, to: *mut u8) {
        unsafe {
            _mm256_storeu_si256(to.cast(), bytes.0);
            _mm256_storeu_si256(to.add(32).cast(), bytes.1);
        }
    }
    #[inline(always)]
    unsafe fn low_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        unsafe { both(bytes, |bytes| _mm256_and_si256(bytes, _mm256_set1_epi8(0xf))) }
    }
    #[inline(always)]
    unsafe fn high_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        unsafe { both(bytes, |bytes| _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), _mm256_set1_epi8(0xf))) }
    }
    #[inline(always)]
    unsafe fn or_bits(to: Self::Bytes, from: Self::Bytes, shift: i32, mask: u8) -> Self::Bytes {
        unsafe {
            let count = _mm_cvtsi32_si128(shift.abs());
            let bits = both(from, |from| {
                let from =
                    if shift > 0 { _mm256_sll_epi16(from, count) } else { _mm256_srl_epi16(from, count) };
                _mm256_and_si256(from, _mm256_set1_epi8(mask as i8))
            });
            (_mm256_or_si256(to.0, bits.0), _mm256_or_si256(to.1, bits.1))
        }
    }
    #[inline(always)]
    unsafe fn look_up(nibbles: Self::Bytes, table: &[u8; 16]) -> Self::Bytes {
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            both(nibbles, |nibbles| _mm256_shuffle_epi8(table, nibbles))
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::Ints {
        unsafe { (_mm256_setzero_si256(), _mm256_setzero_si256()) }
    }
    #[inline(always)]
    unsafe fn splat_int(from: *const i32) -> Self::Ints {
        unsafe { both((*from, *from), |value| _mm256_set1_epi32(value)) }
    }
    #[inline(always)]
    unsafe fn start(neg_sum: *const i32, offset_bits: u32) -> Self::Ints {
        unsafe {
            if offset_bits == 7 {
                return Self::zero();
            }
            let start = _mm256_set1_epi32(*neg_sum << offset_bits);
            (start, start)
        }
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::Ints, codes: Self::Bytes, x: __m256i, offset_bits: u32) -> Self::Ints {
        unsafe { (dot(sum.0, codes.0, x, offset_bits), dot(sum.1, codes.1, x, offset_bits)) }
    }
    #[inline(always)]
    unsafe fn to_f32(ints: Self::Ints) -> Self {
        unsafe { Avx2(_mm256_cvtepi32_ps(ints.0), _mm256_cvtepi32_ps(ints.1)) }
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::Ints {
        unsafe {
            let sixteen = _mm_loadu_si128(from.cast());
            (_mm256_cvtepu8_epi32(sixteen), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(sixteen)))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::Ints {
        unsafe {
            let sixteen = _mm_loadu_si128(from.cast());
            (_mm256_cvtepi8_epi32(sixteen), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(sixteen)))
        }
    }
    #[inline(always)]
    unsafe fn bits(ints: Self::Ints, shift: i32, mask: i32) -> Self::Ints {
        unsafe {
            let count = _mm_cvtsi32_si128(shift);
            both(ints, |ints| _mm256_and_si256(_mm256_srl_epi32(ints, count), _mm256_set1_epi32(mask)))
        }
    }
    #[inline(always)]
    unsafe fn or(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        unsafe { (_mm256_or_si256(a.0, b.0), _mm256_or_si256(a.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn load_bf16s(from: *const u8) -> Self {
        unsafe {
            let widen = |bits| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)));
            Avx2(widen(_mm_loadu_si128(from.cast())), widen(_mm_loadu_si128(from.add(16).cast())))
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8) {
        unsafe {
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1));
            // Packing works within 128-bit halves: put the quarters back in order.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(to.cast(), bytes);
        }
    }
    #[inline(always)]
    unsafe fn amplitudes(x: [Self; 4]) -> Self {
        unsafe {
            // As in AVX-512; signed comparisons will do where the sign is off.
            let magnitude = |x| _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(i32::MAX));
            let magnitude = |x: Self| _mm256_max_epi32(magnitude(x.0), magnitude(x.1));
            let largest = |eight| {
                let four = _mm256_max_epi32(eight, _mm256_permute2x128_si256::<1>(eight, eight));
                let two = _mm256_max_epi32(four, _mm256_shuffle_epi32::<0b01_00_11_10>(four));
                let one = _mm256_max_epi32(two, _mm256_shuffle_epi32::<0b10_11_00_01>(two));
                _mm256_castsi256_ps(one)
            };
            let first = _mm256_max_epi32(magnitude(x[0]), magnitude(x[1]));
            let second = _mm256_max_epi32(magnitude(x[2]), magnitude(x[3]));
            Avx2(largest(first), largest(second))
        }
    }
    #[inline(always)]
    unsafe fn pack_i8(x: [Self; 4]) -> Self::Bytes {
        unsafe {
            let words = |x: Self| _mm256_packs_epi32(_mm256_cvtps_epi32(x.0), _mm256_cvtps_epi32(x.1));
            // Packing works within 128-bit halves: put the words back in order.
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let pack = |a, b| _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order);
            (pack(words(x[0]), words(x[1])), pack(words(x[2]), words(x[3])))
        }
    }
    #[inline(always)]
    unsafe fn sums_of_16(bytes: Self::Bytes) -> Self::Ints {
        unsafe {
            both(bytes, |bytes| {
                let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
                let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                let eights = _mm256_add_epi32(fours, _mm256_shuffle_epi32::<0b01_00_11_10>(fours));
                _mm256_add_epi32(eights, _mm256_shuffle_epi32::<0b10_11_00_01>(eights))
            })
        }
    }
    #[inline(always)]
    unsafe fn store_ints(ints: Self::Ints, to: *mut i32) {
        unsafe {
            _mm256_storeu_si256(to.cast(), ints.0);
            _mm256_storeu_si256(to.add(8).cast(), ints.1);
        }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
