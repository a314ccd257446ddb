//! The parts of a block: raw codes, and the scale and minimum of every 16 or 32 of them.

#![allow(
    clippy::needless_range_loop,
    reason = "plain loops over several arrays, which the compiler sees through"
)]

use super::BlockFormat;
use crate::math::f16_to_f32;

/// Elements of the largest block.
pub(crate) const MAX_BLOCK_LEN: usize = 256;

/// What a block's bytes say, code by code and scale by scale: value `i` is
/// `scales[i / scale_len] * value(codes[i]) + mins[i / scale_len]`.
pub(crate) struct Block {
    /// Codes as they are stored, unsigned.
    pub(crate) codes: [u8; MAX_BLOCK_LEN],
    pub(crate) scales: [f32; MAX_BLOCK_LEN / 16],
    /// Zeros in a format without minimum.
    pub(crate) mins: [f32; MAX_BLOCK_LEN / 16],
}

impl Block {
    /// Reads the block in `bytes`, which has the size that its format says.
    pub(crate) fn read(format: BlockFormat, bytes: &[u8]) -> Self {
        let mut block = Block { codes: [0; MAX_BLOCK_LEN], scales: [0.0; 16], mins: [0.0; 16] };
        codes(format, bytes, &mut block.codes);
        let num_scales = format.block_len() / format.scale_len();
        for i in 0..num_scales {
            (block.scales[i], block.mins[i]) = scale_min(format, bytes, i);
        }
        block
    }
}

/// The f16 bits at `at`.
#[inline(always)]
pub(crate) fn half_bits(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16_to_f32(half_bits(bytes, at))
}

/// Half of 2 to the power of `exponent - 127`; the table of values holds their doubles.
#[inline(always)]
pub(crate) fn e8m0_half(exponent: u8) -> f32 {
    match exponent {
        // Below the normal numbers.
        0 | 1 => f32::from_bits(0x0020_0000 << exponent),
        _ => f32::from_bits(u32::from(exponent - 1) << 23),
    }
}

/// Where a block keeps its f16 scale and, if it has one, its f16 minimum.
#[inline(always)]
pub(crate) fn half_offsets(format: BlockFormat) -> (usize, Option<usize>) {
    match format {
        BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4K | BlockFormat::Q5K => (0, Some(2)),
        BlockFormat::Q2K => (80, Some(82)),
        BlockFormat::Q3K => (108, None),
        BlockFormat::Q6K => (208, None),
        _ => (0, None),
    }
}

/// The whole numbers that scale and minimum `i` are in units of the block's f16: those of formats of
/// 256. A minimum counts down from zero.
#[inline(always)]
pub(crate) fn sub_scale(format: BlockFormat, bytes: &[u8], i: usize) -> (i8, u8) {
    match format {
        BlockFormat::Q2K => ((bytes[i] & 0xf) as i8, bytes[i] >> 4),
        BlockFormat::Q3K => (q3_k_scale(&bytes[96..108], i), 0),
        BlockFormat::Q4K | BlockFormat::Q5K => k_scale_min(&bytes[4..16], i),
        BlockFormat::Q6K => (bytes[192 + i] as i8, 0),
        BlockFormat::Iq4Xs => (iq4_xs_scale(half_bits(bytes, 2), &bytes[4..8], i), 0),
        _ => (1, 0),
    }
}

fn scale_min(format: BlockFormat, bytes: &[u8], i: usize) -> (f32, f32) {
    if format == BlockFormat::Mxfp4 {
        return (e8m0_half(bytes[0]), 0.0);
    }
    let (d, min) = half_offsets(format);
    let (d, min) = (half(bytes, d), min.map(|min| half(bytes, min)));
    if format.block_len() == 32 {
        return (d, min.unwrap_or(0.0));
    }
    let (scale, sub_min) = sub_scale(format, bytes, i);
    (d * f32::from(scale), min.map_or(0.0, |min| -(min * f32::from(sub_min))))
}

/// Scale `i` of 16 in 12 bytes: four low bits in the first eight, two high bits in the last four.
#[inline(always)]
fn q3_k_scale(scales: &[u8], i: usize) -> i8 {
    let low = scales[i % 8] >> (i / 8 * 4) & 0xf;
    let high = scales[8 + i % 4] >> (i / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

/// Scale and minimum `i` of 8 in the 12 bytes of Q4_K and Q5_K: the first four whole in the low six bits
/// of a byte each, the others' low four bits in the last bytes and their high two atop the first.
#[inline(always)]
fn k_scale_min(scales: &[u8], i: usize) -> (i8, u8) {
    if i < 4 {
        return ((scales[i] & 63) as i8, scales[i + 4] & 63);
    }
    let low = scales[i + 4];
    ((low & 0xf | scales[i - 4] >> 6 << 4) as i8, low >> 4 | scales[i] >> 6 << 4)
}

/// Scale `i` of 8: four low bits in `low`, two high bits in `high`.
#[inline(always)]
fn iq4_xs_scale(high: u16, low: &[u8], i: usize) -> i8 {
    let low = low[i / 2] >> (i % 2 * 4) & 0xf;
    let high = (high >> (2 * i) & 3) as u8;
    (low | high << 4) as i8 - 32
}

/// The codes of a block, as they are stored, in the first `block_len` elements of `out`; a signed byte
/// with its sign bit flipped, so that all count up from the smallest value.
#[inline(always)]
pub(crate) fn codes(format: BlockFormat, bytes: &[u8], out: &mut [u8; MAX_BLOCK_LEN]) {
    match format {
        BlockFormat::Q4_0 | BlockFormat::Iq4Nl => nibbles(array(bytes, 2), out, 0),
        BlockFormat::Q4_1 => nibbles(array(bytes, 4), out, 0),
        BlockFormat::Mxfp4 => nibbles(array(bytes, 1), out, 0),
        BlockFormat::Q5_0 => {
            nibbles(array(bytes, 6), out, 0);
            fifth_bits(array(bytes, 2), out);
        }
        BlockFormat::Q5_1 => {
            nibbles(array(bytes, 8), out, 0);
            fifth_bits(array(bytes, 4), out);
        }
        BlockFormat::Q8_0 => {
            let bytes: &[u8; 32] = array(bytes, 2);
            for i in 0..32 {
                out[i] = bytes[i] ^ 0x80;
            }
        }
        BlockFormat::Q2K => crumbs(array(bytes, 16), 0, out),
        BlockFormat::Q3K => {
            crumbs(array(bytes, 32), 0, out);
            bit_planes(array(bytes, 0), 2, out);
        }
        BlockFormat::Q4K => quarter_nibbles(array(bytes, 16), out),
        BlockFormat::Q5K => {
            quarter_nibbles(array(bytes, 48), out);
            bit_planes(array(bytes, 16), 4, out);
        }
        BlockFormat::Q6K => {
            // Each half has 64 bytes: low nibbles of its first 64 codes, high ones of its last.
            for half in 0..2 {
                let bytes: &[u8; 64] = array(bytes, 64 * half);
                for i in 0..64 {
                    out[128 * half + i] = bytes[i] & 0xf;
                    out[128 * half + 64 + i] = bytes[i] >> 4;
                }
            }
            crumbs(array(bytes, 128), 4, out);
        }
        BlockFormat::Iq4Xs => {
            for i in 0..8 {
                nibbles(array(bytes, 8 + 16 * i), out, 32 * i);
            }
        }
    }
}

/// `N` bytes from `at`.
#[inline(always)]
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    bytes[at..].first_chunk().expect("a block has the bytes of its format: this is a bug")
}

/// 32 codes in 16 bytes, from `to` on: the low nibbles, then the high ones.
#[inline(always)]
fn nibbles(bytes: &[u8; 16], out: &mut [u8; MAX_BLOCK_LEN], to: usize) {
    for i in 0..16 {
        out[to + i] = bytes[i] & 0xf;
        out[to + 16 + i] = bytes[i] >> 4;
    }
}

/// Bit `i` of four bytes to the fifth bit of code `i`.
#[inline(always)]
fn fifth_bits(bits: &[u8; 4], out: &mut [u8; MAX_BLOCK_LEN]) {
    let bits = u32::from_le_bytes(*bits);
    for i in 0..32 {
        out[i] |= ((bits >> i & 1) as u8) << 4;
    }
}

/// 256 codes in 128 bytes: each 32 bytes the low nibbles of 32, then the high ones of the next 32.
#[inline(always)]
fn quarter_nibbles(bytes: &[u8; 128], out: &mut [u8; MAX_BLOCK_LEN]) {
    for quarter in 0..4 {
        for i in 0..32 {
            let byte = bytes[32 * quarter + i];
            out[64 * quarter + i] = byte & 0xf;
            out[64 * quarter + 32 + i] = byte >> 4;
        }
    }
}

/// Two bits for each of 256 codes in 64 bytes, to bit `to` of the codes, those below kept: each half has
/// 32 bytes, and its four quarters the four fields of each.
#[inline(always)]
fn crumbs(bytes: &[u8; 64], to: u32, out: &mut [u8; MAX_BLOCK_LEN]) {
    for half in 0..2 {
        for quarter in 0..4 {
            for i in 0..32 {
                let at = 128 * half + 32 * quarter + i;
                let below = if to == 0 { 0 } else { out[at] };
                out[at] = below | (bytes[32 * half + i] >> (2 * quarter) & 3) << to;
            }
        }
    }
}

/// A bit for each of 256 codes in 32 bytes, to bit `to` of the codes: bit `j` of byte `i` is code
/// `32 j + i`'s.
#[inline(always)]
fn bit_planes(bytes: &[u8; 32], to: u32, out: &mut [u8; MAX_BLOCK_LEN]) {
    for plane in 0..8 {
        for i in 0..32 {
            out[32 * plane + i] |= (bytes[i] >> plane & 1) << to;
        }
    }
}
