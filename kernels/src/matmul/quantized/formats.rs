//! How the vector version reads the panels of [`crate::pack::quantized`]: kinds of codes and kinds of
//! scales. A format is one of each.

use std::marker::PhantomData;

use super::grouped::{Kind, KindOf};
use crate::pack::memory::LINE_BYTES;
use crate::pack::quantized::{Plane, chunk_lines, scale_lines};
use crate::quant::{BlockFormat, IQ4_VALUES, MXFP4_VALUES};
use crate::simd::Integers;

/// A format, as the kernels are compiled for it.
pub(crate) trait Format {
    const FORMAT: BlockFormat;
    type Codes: Codes;
    type Scales: Scales;
    type Kind: Kind;
}

/// Codes of a chunk.
pub(crate) trait Codes {
    /// The dot product takes codes that count from zero; they are `2^OFFSET_BITS` above the weights they
    /// stand for, or the weights themselves if this is 0.
    const OFFSET_BITS: u32;
    /// True if a chunk is nothing but its quads, one after the other.
    const IS_BYTES: bool = false;
    /// The codes of quad `quad`.
    ///
    /// # Safety
    /// The processor has `V`'s instruction set; `chunk` points to a chunk.
    unsafe fn quad<V: Integers>(chunk: *const u8, quad: usize) -> V::Bytes;
}

/// Scales of a group.
pub(crate) trait Scales {
    /// Scale and minus the minimum of block `block`, for 16 outputs; without meaning if there is none.
    ///
    /// # Safety
    /// The processor has `V`'s instruction set; `scales` points to a group's scales.
    unsafe fn load<V: Integers>(scales: *const u8, block: usize) -> (V, V);
}

/// Codes in nibbles, with `PLANE_BITS` more in planes.
pub(crate) struct Nibbles<const PLANE_BITS: u32, const OFFSET_BITS: u32>;

impl<const PLANE_BITS: u32, const OFFSET_BITS: u32> Codes for Nibbles<PLANE_BITS, OFFSET_BITS> {
    const OFFSET_BITS: u32 = OFFSET_BITS;

    #[inline(always)]
    unsafe fn quad<V: Integers>(chunk: *const u8, quad: usize) -> V::Bytes {
        // SAFETY: the caller's promise; lines named are the chunk's.
        unsafe {
            let low = nibbles::<V>(chunk, quad);
            match Plane::of(PLANE_BITS, quad) {
                None => low,
                Some(plane) => {
                    let bits = V::load_bytes(chunk.add(plane.line * LINE_BYTES));
                    // Bits `shift..` of every byte to bits `4..`.
                    V::or_bits(low, bits, 4 - plane.shift as i32, plane.mask << 4)
                }
            }
        }
    }
}

/// # Safety
/// As for [`Codes::quad`].
#[inline(always)]
unsafe fn nibbles<V: Integers>(chunk: *const u8, quad: usize) -> V::Bytes {
    // SAFETY: the caller's promise.
    unsafe {
        let line = V::load_bytes(chunk.add(quad / 2 * LINE_BYTES));
        if quad.is_multiple_of(2) { V::low_nibbles(line) } else { V::high_nibbles(line) }
    }
}

/// Whole bytes.
pub(crate) struct Bytes;

impl Codes for Bytes {
    const OFFSET_BITS: u32 = 7;
    const IS_BYTES: bool = true;

    #[inline(always)]
    unsafe fn quad<V: Integers>(chunk: *const u8, quad: usize) -> V::Bytes {
        // SAFETY: the caller's promise.
        unsafe { V::load_bytes(chunk.add(quad * LINE_BYTES)) }
    }
}

/// Nibbles that name one of 16 values.
pub(crate) struct Table<T>(PhantomData<T>);

/// The values of [`Table`], and what is added to make them count from zero.
pub(crate) trait Values {
    const OFFSET_BITS: u32;
    const VALUES: [i8; 16];
}

pub(crate) struct Iq4;
pub(crate) struct Fp4;

impl Values for Iq4 {
    const OFFSET_BITS: u32 = 7;
    const VALUES: [i8; 16] = IQ4_VALUES;
}

impl Values for Fp4 {
    const OFFSET_BITS: u32 = 4;
    const VALUES: [i8; 16] = MXFP4_VALUES;
}

impl<T: Values> Codes for Table<T> {
    const OFFSET_BITS: u32 = T::OFFSET_BITS;

    #[inline(always)]
    unsafe fn quad<V: Integers>(chunk: *const u8, quad: usize) -> V::Bytes {
        let mut table = [0u8; 16];
        let mut i = 0;
        while i < 16 {
            table[i] = (T::VALUES[i] as i32 + (1 << T::OFFSET_BITS)) as u8;
            i += 1;
        }
        // SAFETY: the caller's promise.
        unsafe { V::look_up(nibbles::<V>(chunk, quad), &table) }
    }
}

/// One f16 for every 32 inputs.
pub(crate) struct Half;

impl Scales for Half {
    #[inline(always)]
    unsafe fn load<V: Integers>(scales: *const u8, block: usize) -> (V, V) {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = V::load_f16(scales.add(block * 32));
            (scale, scale)
        }
    }
}

/// One bf16 for every 32 inputs.
pub(crate) struct Brain;

impl Scales for Brain {
    #[inline(always)]
    unsafe fn load<V: Integers>(scales: *const u8, block: usize) -> (V, V) {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = V::load_bf16s(scales.add(block * 32));
            (scale, scale)
        }
    }
}

/// An f16 and an f16 minimum for every 32 inputs.
pub(crate) struct HalfMin;

impl Scales for HalfMin {
    #[inline(always)]
    unsafe fn load<V: Integers>(scales: *const u8, block: usize) -> (V, V) {
        // SAFETY: the caller's promise; minima follow the 8 blocks' scales.
        unsafe {
            let min = V::load_f16(scales.add((8 + block) * 32));
            (V::load_f16(scales.add(block * 32)), min.neg())
        }
    }
}

/// `whole * d`, exact.
///
/// # Safety
/// As for [`Scales::load`]; `d` points to 16 f16.
#[inline(always)]
unsafe fn scaled<V: Integers>(d: *const u8, whole: V::Ints) -> V {
    // SAFETY: the caller's promise.
    unsafe { V::load_f16(d).mul(V::to_f32(whole)) }
}

/// Scales and minima of six bits for every 32 inputs.
pub(crate) struct SixBits;

impl Scales for SixBits {
    #[inline(always)]
    unsafe fn load<V: Integers>(scales: *const u8, block: usize) -> (V, V) {
        // SAFETY: the caller's promise; the three lines after the first hold what the layout says.
        unsafe {
            let line =
                |line: usize| V::load_u8(scales.add((1 + line) * LINE_BYTES + block % 4 * crate::LANES));
            let (scale, min) = if block < 4 {
                (V::bits(line(0), 0, 63), V::bits(line(1), 0, 63))
            } else {
                let min = V::or(V::bits(line(0), 6, 3), V::bits(line(1), 4, 0xc));
                (V::bits(line(2), 0, 63), V::or(min, V::bits(line(2), 2, 0x30)))
            };
            (scaled(scales, scale), scaled(scales.add(32), min))
        }
    }
}

/// Scales and minima of four bits in a byte for every 16 inputs.
pub(crate) struct FourBits;

impl Scales for FourBits {
    #[inline(always)]
    unsafe fn load<V: Integers>(scales: *const u8, block: usize) -> (V, V) {
        // SAFETY: the caller's promise.
        unsafe {
            let both = V::load_u8(scales.add(LINE_BYTES + block * crate::LANES));
            (scaled(scales, V::bits(both, 0, 15)), scaled(scales.add(32), V::bits(both, 4, 15)))
        }
    }
}

/// Signed bytes.
pub(crate) struct SignedBytes;

impl Scales for SignedBytes {
    #[inline(always)]
    unsafe fn load<V: Integers>(scales: *const u8, block: usize) -> (V, V) {
        // SAFETY: the caller's promise.
        unsafe {
            let scale =
                scaled(scales, <V as Integers>::load_i8(scales.add(LINE_BYTES + block * crate::LANES)));
            (scale, scale)
        }
    }
}

/// Inputs that share a scale, lines of a group's scales and of a chunk, and whether there are minima.
pub(crate) struct Shape<F>(PhantomData<F>);

impl<F: Format> Shape<F> {
    pub(crate) const BLOCK: usize = F::FORMAT.scale_len();
    pub(crate) const SCALE_BYTES: usize = scale_lines(F::FORMAT) * LINE_BYTES;
    pub(crate) const CHUNK_BYTES: usize = chunk_lines(F::FORMAT) * LINE_BYTES;
    pub(crate) const HAS_MIN: bool = F::FORMAT.has_min();
    /// True if so many rows go by in one block, against one panel, where registers would hold two panels. Few rows
    /// wait for memory, and a panel is a stream: with one on each thread it gives up to a sixth more than with two,
    /// and up to a third more than where a second block of rows meets the panel again. Two panels need fewer loads of
    /// activations, which counts once arithmetic takes about as long: from five rows on where there are minima, from
    /// seven on unless a code has more than a nibble and a bit. Two scales for 32 inputs leave two panels no registers
    /// for more than four rows.
    pub(crate) const fn is_narrow(num_rows: usize) -> bool {
        match num_rows {
            0..=4 => true,
            5..=6 => Self::BLOCK == 16 || !Self::HAS_MIN,
            7..=8 => !Self::HAS_MIN && Self::CHUNK_BYTES >= 6 * LINE_BYTES,
            _ => false,
        }
    }

    /// From how many rows on groups are unpacked first ([`super::grouped`]), where registers hold no block of two
    /// panels: early where there are twice as many scales to widen, late where codes are bytes already, `None`
    /// where the few shifts and masks of a line cost no more than writing and reading what they give.
    pub(crate) const GROUPED_ROWS: Option<usize> = match F::FORMAT {
        BlockFormat::Q8_0 => Some(25),
        BlockFormat::Q2K | BlockFormat::Q3K | BlockFormat::Q6K => Some(4),
        _ => None,
    };
}

/// Names each format's kinds.
macro_rules! formats {
    ($($name:ident: $codes:ty, $scales:ty;)*) => {
        $(
            pub(crate) struct $name;

            impl Format for $name {
                const FORMAT: BlockFormat = BlockFormat::$name;
                type Codes = $codes;
                type Scales = $scales;
                type Kind = KindOf<
                    { BlockFormat::$name.scale_len() },
                    { <$codes as Codes>::OFFSET_BITS },
                    { BlockFormat::$name.has_min() },
                >;
            }
        )*
    };
}

formats! {
    Q4_0: Nibbles<0, 3>, Half;
    Q4_1: Nibbles<0, 0>, HalfMin;
    Q5_0: Nibbles<1, 4>, Half;
    Q5_1: Nibbles<1, 0>, HalfMin;
    Q8_0: Bytes, Half;
    Q2K: Nibbles<0, 0>, FourBits;
    Q3K: Nibbles<0, 2>, SignedBytes;
    Q4K: Nibbles<0, 0>, SixBits;
    Q5K: Nibbles<1, 0>, SixBits;
    Q6K: Nibbles<2, 5>, SignedBytes;
    Iq4Nl: Table<Iq4>, Half;
    Iq4Xs: Table<Iq4>, SignedBytes;
    Mxfp4: Table<Fp4>, Brain;
}
