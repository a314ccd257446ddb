//! Products of bytes on NEON.
//!
//! A register of codes is four outputs by four inputs, which is what a dot product takes. A tile takes two outputs by
//! eight inputs, and multiplies them with two rows by eight inputs: pairs of words of two quads' registers, so that the
//! panels are those of every other instruction set. Tiles take twice as much as dot products at a time.

#![allow(clippy::needless_range_loop, reason = "indices name registers of several arrays at once")]

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Neon, TILES, WIDENING, both, each, magnitude, narrow, prefetch};
use crate::simd::Integers;

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

/// As [`sdot`], with codes that have no sign.
///
/// # Safety
/// The processor has `i8mm`.
#[inline]
#[target_feature(enable = "neon,i8mm")]
unsafe fn usdot(mut sum: int32x4_t, codes: uint8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's promise; registers only.
    unsafe {
        asm!("usdot {sum:v}.4s, {codes:v}.16b, {x:v}.4b[0]",
            sum = inout(vreg) sum, codes = in(vreg) codes, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Adds, in the order of the lanes: the first eight `codes` times the first eight of `x`, the first times the second,
/// the second times the first, the second times the second.
///
/// # Safety
/// The processor has `i8mm`.
#[inline]
#[target_feature(enable = "neon,i8mm")]
unsafe fn usmmla(mut sum: int32x4_t, codes: uint8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's promise; registers only.
    unsafe {
        asm!("usmmla {sum:v}.4s, {codes:v}.16b, {x:v}.16b",
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

// SAFETY of every block: the trait's contract gives the instruction set, of which `dotprod` is a part with `DOTS` and
// `i8mm` with `TILES`, and valid pointers.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one argument for all, stated above")]
impl<const PRODUCTS: u8> Integers for Neon<PRODUCTS> {
    const TILES: bool = PRODUCTS == TILES;

    type Bytes = [uint8x16_t; 4];
    /// In every lane with `WIDENING`; else in the first, from where the instructions take it.
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
            let quad = match PRODUCTS {
                WIDENING => vdupq_n_s32(four),
                _ => vsetq_lane_s32::<0>(four, vdupq_n_s32(0)),
            };
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
        unsafe {
            // Codes without a sign keep their offset; where they are signed, the product takes it off.
            let is_taken_off = PRODUCTS != TILES && offset_bits == 7;
            if is_taken_off { Self::zero() } else { [vdupq_n_s32(*neg_sum << offset_bits); 4] }
        }
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::Ints, codes: Self::Bytes, x: int8x16_t, offset_bits: u32) -> Self::Ints {
        unsafe {
            // No closures where the instruction set is more than NEON: they would be compiled without it.
            if PRODUCTS == TILES {
                let [a, b, c, d] = codes;
                return [usdot(sum[0], a, x), usdot(sum[1], b, x), usdot(sum[2], c, x), usdot(sum[3], d, x)];
            }
            // Flipping the highest bit takes 128 off; without it codes are below 128, signed or not.
            let flip = vdupq_n_u8(if offset_bits == 7 { 0x80 } else { 0 });
            let codes = each(codes, |codes| vreinterpretq_s8_u8(veorq_u8(codes, flip)));
            if PRODUCTS == WIDENING {
                return both(sum, codes, |sum, codes| widening_dot(sum, codes, x));
            }
            let [a, b, c, d] = codes;
            [sdot(sum[0], a, x), sdot(sum[1], b, x), sdot(sum[2], c, x), sdot(sum[3], d, x)]
        }
    }
    #[inline(always)]
    unsafe fn interleave(codes: [Self::Bytes; 2]) -> [Self::Bytes; 2] {
        unsafe {
            let words = |bytes: Self::Bytes| each(bytes, |bytes| vreinterpretq_u32_u8(bytes));
            let (first, second) = (words(codes[0]), words(codes[1]));
            [
                both(first, second, |a, b| vreinterpretq_u8_u32(vzip1q_u32(a, b))),
                both(first, second, |a, b| vreinterpretq_u8_u32(vzip2q_u32(a, b))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn start_tiles(neg_sums: [*const i32; 2], offset_bits: u32) -> [Self::Ints; 2] {
        unsafe {
            let [first, second] =
                [vdup_n_s32(*neg_sums[0] << offset_bits), vdup_n_s32(*neg_sums[1] << offset_bits)];
            let pairs = vzip1_s32(first, second);
            [[vcombine_s32(pairs, pairs); 4]; 2]
        }
    }
    #[inline(always)]
    unsafe fn tiles<const N: usize>(
        sums: &mut [[Self::Ints; 2]; N],
        codes: [Self::Bytes; 2],
        x: [[*const i8; 2]; N],
    ) {
        unsafe {
            let mut rows = [vdupq_n_s8(0); N];
            for n in 0..N {
                rows[n] = vcombine_s8(vld1_s8(x[n][0]), vld1_s8(x[n][1]));
            }
            // Codes change slowest, so that two registers of them are in use at a time.
            for i in 0..4 {
                for half in 0..2 {
                    for n in 0..N {
                        sums[n][half][i] = usmmla(sums[n][half][i], codes[half][i], rows[n]);
                    }
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn rows_of_tiles(sums: [Self::Ints; 2]) -> [Self::Ints; 2] {
        unsafe {
            [both(sums[0], sums[1], |a, b| vuzp1q_s32(a, b)), both(sums[0], sums[1], |a, b| vuzp2q_s32(a, b))]
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
