//! Sixteen f32 lanes, whatever the machine: one `__m512`, two `__m256`, or four `float32x4_t`. The vector versions of
//! the operations are written once over [`Simd`] and compiled once per implementation, inside functions
//! that enable its instruction set (see [`crate::dispatch`]); every method is `inline(always)`, so
//! nothing of the trait is left in the machine code.
//!
//! All arithmetic is IEEE and lane by lane; [`Simd::sum`] folds in halves (8, 4, 2, 1). That, and fused
//! multiply-adds, is why every implementation gives the bits of the scalar specification.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;

use crate::LANES;
use crate::math::{EXP_OVERFLOW, EXP_POLY, EXP_UNDERFLOW, LN2_HI, LN2_LO, LOG2_E, TANH_POLY, TANH_SMALL};
use crate::sampling::noise::{self, GAMMA};

/// Sixteen lanes of f32.
///
/// # Safety
/// Every method requires that the processor has the implementation's instruction set; those that take
/// a pointer also require that it is valid for the elements they name. Nothing needs alignment.
pub(crate) trait Simd: Copy {
    /// True with 32 registers of 16 lanes; false with 16 of 8 or 32 of 4.
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
    /// 16 signed bytes.
    unsafe fn load_i8_as_f32(from: *const u8) -> Self;

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
    /// A bit for every lane where `self >= other`; none where either is NaN.
    unsafe fn at_least(self, other: Self) -> u32 {
        let (mut these, mut others) = ([0.0f32; LANES], [0.0f32; LANES]);
        // SAFETY: the caller's promise; the arrays have 16 elements.
        unsafe {
            self.store(these.as_mut_ptr());
            other.store(others.as_mut_ptr());
        }
        (0..LANES).map(|lane| u32::from(these[lane] >= others[lane]) << lane).sum()
    }

    /// Bounds from below, good to 0.1, of `log2` of the numbers in (0, 1) that [`crate::sampling::noise`] makes of
    /// `counter + GAMMA * lane`: at least -158, which stands for 0.
    unsafe fn noise_log2(counter: u64) -> Self {
        let bounds: [f32; LANES] = std::array::from_fn(|lane| {
            noise::log2_bound(counter.wrapping_add(GAMMA.wrapping_mul(lane as u64)))
        });
        // SAFETY: the caller's promise; the array has 16 elements.
        unsafe { Self::load(bounds.as_ptr()) }
    }

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

/// [`crate::math::tanh`], the same operations lane by lane.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn tanh<V: Simd>(x: V) -> V {
    // SAFETY: the caller's promise covers every method.
    unsafe {
        let (one, two) = (V::splat(1.0), V::splat(2.0));
        let magnitude = x.max(x.neg());
        let square = x.mul(x);
        let mut p = V::splat(TANH_POLY[0]);
        for &coefficient in &TANH_POLY[1..] {
            p = p.fma(square, V::splat(coefficient));
        }
        let small = p.mul(square).fma(x, x);
        let large = one.sub(two.div(exp(magnitude.add(magnitude)).add(one)));
        let large = x.if_less(V::splat(0.0), large.neg(), large);
        magnitude.if_less(V::splat(TANH_SMALL), small, large)
    }
}

const NO_TILES: &str = "tiles of an instruction set without them: this is a bug";

/// What quantised products add: sixteen lanes of i32, and the 64 bytes that go with them, four a lane.
///
/// # Safety
/// As for [`Simd`].
pub(crate) trait Integers: Simd {
    /// 64 bytes: bytes `4 l..4 l + 4` belong to lane `l`.
    type Bytes: Copy;
    /// Four bytes, the same for every lane.
    type Quad: Copy;
    /// 16 lanes of i32.
    type Ints: Copy;

    /// 64 zeros.
    unsafe fn zero_bytes() -> Self::Bytes;
    /// Four bytes.
    unsafe fn splat_bytes(from: *const i8) -> Self::Quad;
    /// 64 bytes.
    unsafe fn load_bytes(from: *const u8) -> Self::Bytes;
    /// 64 bytes.
    unsafe fn store_bytes(bytes: Self::Bytes, to: *mut u8);
    /// The low four bits of every byte.
    unsafe fn low_nibbles(bytes: Self::Bytes) -> Self::Bytes;
    /// The high four bits of every byte, shifted down.
    unsafe fn high_nibbles(bytes: Self::Bytes) -> Self::Bytes;
    /// `to`, and the bits of `from` that are in `mask` once every byte is shifted up by `shift` (down if it
    /// is negative). The mask has no bit that came from a neighbouring byte.
    unsafe fn or_bits(to: Self::Bytes, from: Self::Bytes, shift: i32, mask: u8) -> Self::Bytes;
    /// `table[nibble]` for every byte.
    unsafe fn look_up(nibbles: Self::Bytes, table: &[u8; 16]) -> Self::Bytes;

    /// Zeros.
    unsafe fn zero() -> Self::Ints;
    /// One value in all lanes.
    unsafe fn splat_int(from: *const i32) -> Self::Ints;
    /// What a sum of [`dot`](Self::dot)s begins with, `neg_sum` being minus the sum of all `x`.
    unsafe fn start(neg_sum: *const i32, offset_bits: u32) -> Self::Ints;
    /// Adds to every lane its four bytes of `codes`, each less `2^offset_bits` (0 for 0 bits), times its
    /// four `x`, none of them -128. Codes are below 128 unless `offset_bits` is 7. The offset may be taken
    /// off here or at the [`start`](Self::start).
    unsafe fn dot(sum: Self::Ints, codes: Self::Bytes, x: Self::Quad, offset_bits: u32) -> Self::Ints;
    /// True if there are instructions that multiply tiles of two rows, which the next four methods are for: they are
    /// called only then.
    const TILES: bool = false;
    /// The codes of two quads, as [`tiles`](Self::tiles) takes them.
    unsafe fn interleave(_codes: [Self::Bytes; 2]) -> [Self::Bytes; 2] {
        unreachable!("{NO_TILES}")
    }
    /// As [`start`](Self::start), for two rows.
    unsafe fn start_tiles(_neg_sums: [*const i32; 2], _offset_bits: u32) -> [Self::Ints; 2] {
        unreachable!("{NO_TILES}")
    }
    /// Adds to the sums of `N` pairs of rows eight inputs: interleaved `codes` times eight bytes of each row.
    unsafe fn tiles<const N: usize>(
        _sums: &mut [[Self::Ints; 2]; N],
        _codes: [Self::Bytes; 2],
        _x: [[*const i8; 2]; N],
    ) {
        unreachable!("{NO_TILES}")
    }
    /// The sums of the first row and those of the second, lanes in order.
    unsafe fn rows_of_tiles(_sums: [Self::Ints; 2]) -> [Self::Ints; 2] {
        unreachable!("{NO_TILES}")
    }

    /// To f32, rounded to nearest.
    unsafe fn to_f32(ints: Self::Ints) -> Self;

    /// 16 bytes, widened.
    unsafe fn load_u8(from: *const u8) -> Self::Ints;
    /// 16 signed bytes, widened.
    unsafe fn load_i8(from: *const u8) -> Self::Ints;
    /// `ints >> shift & mask`
    unsafe fn bits(ints: Self::Ints, shift: i32, mask: i32) -> Self::Ints;
    /// `a | b`
    unsafe fn or(a: Self::Ints, b: Self::Ints) -> Self::Ints;

    /// 16 bf16, one after the other.
    unsafe fn load_bf16s(from: *const u8) -> Self;
    /// 16 whole numbers of -128 to 127 as bytes.
    unsafe fn store_i8(self, to: *mut i8);
    /// The largest magnitude of the first two in lanes 0 to 7, of the others in lanes 8 to 15; not finite if
    /// one of them is not.
    unsafe fn amplitudes(x: [Self; 4]) -> Self;
    /// 64 numbers of at most 127.5 as the nearest signed bytes, ties to even, in order.
    unsafe fn pack_i8(x: [Self; 4]) -> Self::Bytes;
    /// The sum of signed bytes `16 i..16 i + 16` in each of lanes `4 i..4 i + 4`.
    unsafe fn sums_of_16(bytes: Self::Bytes) -> Self::Ints;
    /// 16 elements.
    unsafe fn store_ints(ints: Self::Ints, to: *mut i32);
    /// Asks for the line at `at`, which may be any address.
    unsafe fn prefetch(at: *const u8);
}
