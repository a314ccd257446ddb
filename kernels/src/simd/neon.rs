//! NEON: four registers are sixteen lanes.
//!
//! Every 64-bit Arm processor has what the f32 kernels use. Dot products of bytes are one instruction with `dotprod`
//! (Armv8.4, and most cores since the Cortex-A75), and four widening ones without; which is the type's parameter.
//! Instructions whose intrinsics the oldest Rust that builds this crate does not have are written out.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Integers, Simd};

/// Four `float32x4_t` as [`Simd`], lanes in order. With `DOT`, [`Integers::dot`] needs `dotprod` as well.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const DOT: bool>([float32x4_t; 4]);

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
    unsafe { asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nomem, nostack, preserves_flags)) }
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

/// Adds to every lane its four `codes` times the first four bytes of `x`.
///
/// # Safety
/// The processor has `dotprod`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn sdot(mut sum: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's promise; registers only.
    unsafe {
        asm!("sdot {sum:v}.4s, {codes:v}.16b, {x:v}.4b[0]",
            sum = inout(vreg) sum, codes = in(vreg) codes, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// As [`sdot`], with `x` in every lane.
///
/// # Safety
/// The processor has NEON.
#[inline(always)]
unsafe fn widening_dot(sum: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's promise.
    unsafe {
        // Pairs of products fit 16 bits: no code is beyond -128 to 127, no `x` beyond -127 to 127.
        let low = vmull_s8(vget_low_s8(codes), vget_low_s8(x));
        let high = vmull_high_s8(codes, x);
        vpadalq_s16(sum, vpaddq_s16(low, high))
    }
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

// SAFETY of every block: the trait's contract gives the instruction set and valid pointers; accesses to a part
// copy `len` elements to or from sixteen of the stack.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one argument for all, stated above")]
impl<const DOT: bool> Simd for Neon<DOT> {
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
        const BITS: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128];
        unsafe {
            let equal = both(self.0, other.0, |a, b| vreinterpretq_s32_u32(vceqq_f32(a, b)));
            let bits = vandq_u8(vreinterpretq_u8_s8(narrow(equal)), vld1q_u8(BITS.as_ptr()));
            u32::from(vaddv_u8(vget_low_u8(bits))) | u32::from(vaddv_u8(vget_high_u8(bits))) << 8
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

// SAFETY of every block: the trait's contract gives the instruction set, of which `dotprod` is a part where `DOT` is
// set, and valid pointers.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one argument for all, stated above")]
impl<const DOT: bool> Integers for Neon<DOT> {
    type Bytes = [uint8x16_t; 4];
    /// In every lane, or with `DOT` in the first, from where the instruction takes it.
    type Quad = int8x16_t;
    type Ints = [int32x4_t; 4];

    #[inline(always)]
    unsafe fn zero_bytes() -> Self::Bytes {
        unsafe { [vdupq_n_u8(0); 4] }
    }
    #[inline(always)]
    unsafe fn splat_bytes(from: *const i8) -> int8x16_t {
        unsafe {
            let four = from.cast::<i32>().read_unaligned();
            let quad = if DOT { vsetq_lane_s32::<0>(four, vdupq_n_s32(0)) } else { vdupq_n_s32(four) };
            vreinterpretq_s8_s32(quad)
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::Bytes {
        unsafe { each([0, 16, 32, 48], |i| vld1q_u8(from.add(i))) }
    }
    #[inline(always)]
    unsafe fn store_bytes(bytes: Self::Bytes, to: *mut u8) {
        unsafe {
            both([0, 16, 32, 48], bytes, |i, bytes| vst1q_u8(to.add(i), bytes));
        }
    }
    #[inline(always)]
    unsafe fn low_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        unsafe { each(bytes, |bytes| vandq_u8(bytes, vdupq_n_u8(0xf))) }
    }
    #[inline(always)]
    unsafe fn high_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        unsafe { each(bytes, |bytes| vshrq_n_u8::<4>(bytes)) }
    }
    #[inline(always)]
    unsafe fn or_bits(to: Self::Bytes, from: Self::Bytes, shift: i32, mask: u8) -> Self::Bytes {
        unsafe {
            let (shift, mask) = (vdupq_n_s8(shift as i8), vdupq_n_u8(mask));
            both(to, from, |to, from| vorrq_u8(to, vandq_u8(vshlq_u8(from, shift), mask)))
        }
    }
    #[inline(always)]
    unsafe fn look_up(nibbles: Self::Bytes, table: &[u8; 16]) -> Self::Bytes {
        unsafe {
            let table = vld1q_u8(table.as_ptr());
            each(nibbles, |nibbles| vqtbl1q_u8(table, nibbles))
        }
    }

    #[inline(always)]
    unsafe fn zero() -> Self::Ints {
        unsafe { [vdupq_n_s32(0); 4] }
    }
    #[inline(always)]
    unsafe fn splat_int(from: *const i32) -> Self::Ints {
        unsafe { [vdupq_n_s32(*from); 4] }
    }
    #[inline(always)]
    unsafe fn start(neg_sum: *const i32, offset_bits: u32) -> Self::Ints {
        unsafe { if offset_bits == 7 { Self::zero() } else { [vdupq_n_s32(*neg_sum << offset_bits); 4] } }
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::Ints, codes: Self::Bytes, x: int8x16_t, offset_bits: u32) -> Self::Ints {
        unsafe {
            // Flipping the highest bit takes 128 off; without it codes are below 128, signed or not.
            let flip = vdupq_n_u8(if offset_bits == 7 { 0x80 } else { 0 });
            let codes = each(codes, |codes| vreinterpretq_s8_u8(veorq_u8(codes, flip)));
            if !DOT {
                return both(sum, codes, |sum, codes| widening_dot(sum, codes, x));
            }
            // No closure: it would be compiled without the instruction set.
            let [a, b, c, d] = codes;
            [sdot(sum[0], a, x), sdot(sum[1], b, x), sdot(sum[2], c, x), sdot(sum[3], d, x)]
        }
    }
    #[inline(always)]
    unsafe fn to_f32(ints: Self::Ints) -> Self {
        unsafe { Neon(each(ints, |ints| vcvtq_f32_s32(ints))) }
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::Ints {
        unsafe {
            let sixteen = vld1q_u8(from);
            let (low, high) = (vmovl_u8(vget_low_u8(sixteen)), vmovl_high_u8(sixteen));
            let ints = [
                vmovl_u16(vget_low_u16(low)),
                vmovl_high_u16(low),
                vmovl_u16(vget_low_u16(high)),
                vmovl_high_u16(high),
            ];
            each(ints, |ints| vreinterpretq_s32_u32(ints))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::Ints {
        unsafe {
            let sixteen = vreinterpretq_s8_u8(vld1q_u8(from));
            let (low, high) = (vmovl_s8(vget_low_s8(sixteen)), vmovl_high_s8(sixteen));
            [
                vmovl_s16(vget_low_s16(low)),
                vmovl_high_s16(low),
                vmovl_s16(vget_low_s16(high)),
                vmovl_high_s16(high),
            ]
        }
    }
    #[inline(always)]
    unsafe fn bits(ints: Self::Ints, shift: i32, mask: i32) -> Self::Ints {
        unsafe {
            let (shift, mask) = (vdupq_n_s32(-shift), vdupq_n_u32(mask as u32));
            let bits = |ints| vandq_u32(vshlq_u32(vreinterpretq_u32_s32(ints), shift), mask);
            each(ints, |ints| vreinterpretq_s32_u32(bits(ints)))
        }
    }
    #[inline(always)]
    unsafe fn or(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        unsafe { both(a, b, |a, b| vorrq_s32(a, b)) }
    }

    #[inline(always)]
    unsafe fn load_bf16s(from: *const u8) -> Self {
        unsafe {
            let first = vreinterpretq_u16_u8(vld1q_u8(from));
            let second = vreinterpretq_u16_u8(vld1q_u8(from.add(16)));
            let bits = [
                vshll_n_u16::<16>(vget_low_u16(first)),
                vshll_high_n_u16::<16>(first),
                vshll_n_u16::<16>(vget_low_u16(second)),
                vshll_high_n_u16::<16>(second),
            ];
            Neon(each(bits, |bits| vreinterpretq_f32_u32(bits)))
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8) {
        unsafe { vst1q_s8(to, narrow(each(self.0, |x| vcvtnq_s32_f32(x)))) }
    }
    #[inline(always)]
    unsafe fn amplitudes(x: [Self; 4]) -> Self {
        unsafe {
            let [a, b, c, d] = each(x, |x| {
                let [a, b, c, d] = each(x.0, |x| magnitude(x));
                vmaxq_u32(vmaxq_u32(a, b), vmaxq_u32(c, d))
            });
            let largest = |a, b| vreinterpretq_f32_u32(vdupq_n_u32(vmaxvq_u32(vmaxq_u32(a, b))));
            let (first, second) = (largest(a, b), largest(c, d));
            Neon([first, first, second, second])
        }
    }
    #[inline(always)]
    unsafe fn pack_i8(x: [Self; 4]) -> Self::Bytes {
        unsafe {
            let pack = |x: Self| narrow(each(x.0, |x| vcvtnq_s32_f32(x)));
            each(x, |x| vreinterpretq_u8_s8(pack(x)))
        }
    }
    #[inline(always)]
    unsafe fn sums_of_16(bytes: Self::Bytes) -> Self::Ints {
        unsafe { each(bytes, |bytes| vdupq_n_s32(i32::from(vaddlvq_s8(vreinterpretq_s8_u8(bytes))))) }
    }
    #[inline(always)]
    unsafe fn store_ints(ints: Self::Ints, to: *mut i32) {
        unsafe {
            both([0, 4, 8, 12], ints, |i, four| vst1q_s32(to.add(i), four));
        }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        prefetch(at);
    }
}
