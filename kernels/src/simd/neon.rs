//! NEON: four registers are sixteen lanes.
//!
//! Every 64-bit Arm processor has what the f32 kernels use. How products of bytes are added up ([`integers`]) depends
//! on more, which is the type's parameter: [`WIDENING`], [`DOTS`] or [`TILES`]. Instructions whose intrinsics the
//! oldest Rust that builds this crate does not have are written out.

mod integers;

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Integers, Simd};
use crate::sampling::noise::{BITS_TO_LOG2, FACTORS, GAMMA, LOG2_OF_ZERO, SHIFTS};

/// Products of bytes by four widening instructions, which every processor has.
pub(crate) const WIDENING: u8 = 0;
/// By dot products: needs `dotprod` (Armv8.4, and most cores since the Cortex-A75).
pub(crate) const DOTS: u8 = 1;
/// By tiles of two rows and two outputs: needs `i8mm` (Armv8.6, and most server cores since the Neoverse V1).
pub(crate) const TILES: u8 = 2;

/// Four `float32x4_t` as [`Simd`], lanes in order; `PRODUCTS` is one of the constants above.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const PRODUCTS: u8>([float32x4_t; 4]);

/// Applies `op` to every register.
#[inline(always)]
fn each<A: Copy, B>(a: [A; 4], op: impl Fn(A) -> B) -> [B; 4] {
    [op(a[0]), op(a[1]), op(a[2]), op(a[3])]
}

/// Applies `op` register by register.
#[inline(always)]
fn both<A: Copy, B: Copy, C>(a: [A; 4], b: [B; 4], op: impl Fn(A, B) -> C) -> [C; 4] {
    [op(a[0], b[0]), op(a[1], b[1]), op(a[2], b[2]), op(a[3], b[3])]
}

/// Asks for the line at `at`, which may be any address.
#[inline(always)]
pub(crate) fn prefetch(at: *const u8) {
    // SAFETY: every processor has the instruction; it is a hint, and faults on no address.
    unsafe {
        asm!("prfm pldl1keep, [{at}]", at = in(reg) at.addr(), options(nomem, nostack, preserves_flags))
    }
}

/// Four f16.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn widen_f16(halves: uint16x4_t) -> float32x4_t {
    let floats: float32x4_t;
    // SAFETY: the caller's promise; registers only.
    unsafe {
        asm!("fcvtl {to:v}.4s, {from:v}.4h", to = lateout(vreg) floats, from = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags));
    }
    floats
}

/// The upper four of eight f16.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn widen_high_f16(halves: uint16x8_t) -> float32x4_t {
    let floats: float32x4_t;
    // SAFETY: the caller's promise; registers only.
    unsafe {
        asm!("fcvtl2 {to:v}.4s, {from:v}.8h", to = lateout(vreg) floats, from = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags));
    }
    floats
}

/// The bits of magnitudes; they are in the order of the magnitudes, and those of a NaN above all.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn magnitude(x: float32x4_t) -> uint32x4_t {
    // SAFETY: the caller's promise.
    unsafe { vreinterpretq_u32_f32(vabsq_f32(x)) }
}

/// [`Simd::scale`] of four lanes.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn scale(x: float32x4_t, n: float32x4_t) -> float32x4_t {
    // SAFETY: the caller's promise.
    unsafe {
        let n = vcvtnq_s32_f32(n);
        let half = vshrq_n_s32::<1>(n);
        let power = |n| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))));
        vmulq_f32(vmulq_f32(x, power(half)), power(vsubq_s32(n, half)))
    }
}

/// Sixteen bytes, given as sixteen words that fit them.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn narrow(words: [int32x4_t; 4]) -> int8x16_t {
    // SAFETY: the caller's promise.
    unsafe {
        let low = vqmovn_high_s32(vqmovn_s32(words[0]), words[1]);
        let high = vqmovn_high_s32(vqmovn_s32(words[2]), words[3]);
        vqmovn_high_s16(vqmovn_s16(low), high)
    }
}

/// A bit for every lane whose mask is all ones, not all zeros.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn lane_bits(masks: [uint32x4_t; 4]) -> u32 {
    const BITS: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
    // SAFETY: the caller's promise; sixteen bytes are there.
    unsafe {
        let bytes = vreinterpretq_u8_s8(narrow(each(masks, |mask| vreinterpretq_s32_u32(mask))));
        let bits = vandq_u8(bytes, vld1q_u8(BITS.as_ptr()));
        u32::from(vaddv_u8(vget_low_u8(bits))) | u32::from(vaddv_u8(vget_high_u8(bits))) << 8
    }
}

/// The low 64 bits of the products of two lanes with `factor`.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn mul_u64(x: uint64x2_t, factor: u64) -> uint64x2_t {
    // SAFETY: the caller's promise.
    unsafe {
        // The lower half of each lane with the factor's upper half, and the other way round.
        let swapped = vreinterpretq_u32_u64(vdupq_n_u64(factor.rotate_left(32)));
        let crossed = vpaddlq_u32(vmulq_u32(vreinterpretq_u32_u64(x), swapped));
        vmlal_u32(vshlq_n_u64::<32>(crossed), vmovn_u64(x), vdup_n_u32(factor as u32))
    }
}

/// The upper 31 bits of two lanes of noise.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn noise_bits(counter: u64) -> uint64x2_t {
    const STEPS: [u64; 2] = [0, GAMMA];
    // SAFETY: the caller's promise; two steps are there.
    unsafe {
        let z = vaddq_u64(vdupq_n_u64(counter), vld1q_u64(STEPS.as_ptr()));
        let z = veorq_u64(z, vshrq_n_u64::<{ SHIFTS[0] as i32 }>(z));
        let z = mul_u64(z, FACTORS[0]);
        let z = veorq_u64(z, vshrq_n_u64::<{ SHIFTS[1] as i32 }>(z));
        // The last step of the generator leaves the upper 31 bits as they are.
        vshrq_n_u64::<33>(mul_u64(z, FACTORS[1]))
    }
}

/// Four lanes of [`Simd::noise_log2`].
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn noise_log2(counter: u64) -> float32x4_t {
    // SAFETY: the caller's promise.
    unsafe {
        let low = vreinterpretq_u32_u64(noise_bits(counter));
        let high = vreinterpretq_u32_u64(noise_bits(counter.wrapping_add(GAMMA.wrapping_mul(2))));
        let uniform = vcvtq_f32_u32(vuzp1q_u32(low, high));
        let log2 = vcvtq_f32_u32(vreinterpretq_u32_f32(uniform));
        vfmaq_f32(vdupq_n_f32(LOG2_OF_ZERO), log2, vdupq_n_f32(BITS_TO_LOG2))
    }
}

// SAFETY of every block: the trait's contract gives the instruction set and valid pointers; accesses to a part
// copy `len` elements to or from sixteen of the stack.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one argument for all, stated above")]
impl<const PRODUCTS: u8> Simd for Neon<PRODUCTS> {
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Neon([vdupq_n_f32(value); 4]) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Neon(each([0, 4, 8, 12], |i| vld1q_f32(from.add(i)))) }
    }
    #[inline(always)]
    unsafe fn load_part(from: *const f32, len: usize) -> Self {
        unsafe {
            if len == 16 {
                return Self::load(from);
            }
            let mut copy = [0.0f32; 16];
            std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), len);
            Self::load(copy.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            both([0, 4, 8, 12], self.0, |i, four| vst1q_f32(to.add(i), four));
        }
    }
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, len: usize) {
        unsafe {
            if len == 16 {
                return self.store(to);
            }
            let mut copy = [0.0f32; 16];
            self.store(copy.as_mut_ptr());
            std::ptr::copy_nonoverlapping(copy.as_ptr(), to, len);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> (Self, Self) {
        unsafe {
            let line = each([0, 16, 32, 48], |i| vreinterpretq_u32_u8(vld1q_u8(from.add(i))));
            let even = each(line, |pairs| vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)));
            let odd = each(line, |pairs| vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000))));
            (Neon(even), Neon(odd))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self {
        unsafe {
            let first = vreinterpretq_u16_u8(vld1q_u8(from));
            let second = vreinterpretq_u16_u8(vld1q_u8(from.add(16)));
            let low = |eight| widen_f16(vget_low_u16(eight));
            Neon([low(first), widen_high_f16(first), low(second), widen_high_f16(second)])
        }
    }
    #[inline(always)]
    unsafe fn load_i8_as_f32(from: *const u8) -> Self {
        unsafe { Self::to_f32(<Self as Integers>::load_i8(from)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Neon(both(self.0, other.0, |a, b| vaddq_f32(a, b))) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        unsafe { Neon(both(self.0, other.0, |a, b| vsubq_f32(a, b))) }
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        unsafe { Neon(both(self.0, other.0, |a, b| vmulq_f32(a, b))) }
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        unsafe { Neon(both(self.0, other.0, |a, b| vdivq_f32(a, b))) }
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        let (a, b, c) = (self.0, factor.0, addend.0);
        unsafe { Neon(each([0, 1, 2, 3], |i| vfmaq_f32(c[i], a[i], b[i]))) }
    }
    #[inline(always)]
    unsafe fn fms(self, factor: Self, subtrahend: Self) -> Self {
        unsafe { self.fma(factor, subtrahend.neg()) }
    }
    #[inline(always)]
    unsafe fn neg(self) -> Self {
        unsafe { Neon(each(self.0, |x| vnegq_f32(x))) }
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // The instruction gives NaN if either is one.
        unsafe { Neon(both(self.0, other.0, |a, b| vbslq_f32(vcgtq_f32(a, b), a, b))) }
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        unsafe { Neon(each(self.0, |x| vrndnq_f32(x))) }
    }
    #[inline(always)]
    unsafe fn scale(self, n: Self) -> Self {
        unsafe { Neon(both(self.0, n.0, |x, n| scale(x, n))) }
    }
    #[inline(always)]
    unsafe fn if_less(self, limit: Self, value: Self, other: Self) -> Self {
        unsafe {
            let less = both(self.0, limit.0, |a, b| vcltq_f32(a, b));
            Neon(each([0, 1, 2, 3], |i| vbslq_f32(less[i], value.0[i], other.0[i])))
        }
    }
    #[inline(always)]
    unsafe fn equal(self, other: Self) -> u32 {
        unsafe { lane_bits(both(self.0, other.0, |a, b| vceqq_f32(a, b))) }
    }
    #[inline(always)]
    unsafe fn at_least(self, other: Self) -> u32 {
        unsafe { lane_bits(both(self.0, other.0, |a, b| vcgeq_f32(a, b))) }
    }
    #[inline(always)]
    unsafe fn noise_log2(counter: u64) -> Self {
        unsafe {
            Neon(each([0, 4, 8, 12], |lane| noise_log2(counter.wrapping_add(GAMMA.wrapping_mul(lane)))))
        }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe {
            let [a, b, c, d] = self.0;
            let four = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        unsafe {
            let [a, b, c, d] = self.0;
            vmaxvq_f32(vmaxq_f32(vmaxq_f32(a, c), vmaxq_f32(b, d)))
        }
    }
    #[inline(always)]
    unsafe fn is_finite(self) -> bool {
        unsafe {
            let [a, b, c, d] = each(self.0, |x| magnitude(x));
            vmaxvq_u32(vmaxq_u32(vmaxq_u32(a, b), vmaxq_u32(c, d))) < f32::INFINITY.to_bits()
        }
    }
}
