//! Panels of quantised weights: the format's own codes and scales, in another order.
//!
//! A panel is its groups of 256 inputs, one after the other (the last may be shorter, in steps of 32).
//! A group is first the scales of its 16 outputs, then a chunk for every 32 inputs, all in whole lines.
//! `o` is an output of the panel, `b` a block of 16 or 32 inputs that share a scale:
//!
//! | formats | scales of a group |
//! |---|---|
//! | Q4_0, Q5_0, Q8_0, IQ4_NL | f16 `[b][o]`: 4 lines |
//! | MXFP4 | the same in bf16, which holds every power of two that it has |
//! | Q4_1, Q5_1 | f16 scales `[b][o]`, then f16 minima `[b][o]`: 8 lines |
//! | Q4_K, Q5_K | f16 `d[o]` and `dmin[o]`, 1 line; then 3 lines of `[b % 4][o]`: scales of blocks 0 to 3, minima of 0 to 3, scales of 4 to 7 in the low 6 bits; the two high bits, lowest line first, are the minima of 4 to 7 |
//! | Q2_K | f16 `d[o]` and `dmin[o]`, 1 line; then bytes `[b][o]`, minimum above scale: 5 lines in all |
//! | Q3_K, Q6_K | f16 `d[o]`, 1 line; then signed bytes `[b][o]`: 5 lines in all |
//! | IQ4_XS | the same with half as many blocks: 3 lines in all |
//!
//! A chunk's codes go by quads: the codes of all outputs for four inputs, `[o][4]`. A quad is what one dot
//! product instruction takes. Codes of 8 bits: one line a quad, 8 lines. Others: 4 lines, each the low
//! nibbles of two quads, the even one below; then a line with the fifth bit of each quad (quad 0 in
//! bit 0 of the bytes), or two lines with fifth and sixth bits (two bits a quad, four quads a line).
//! Formats with codes of 2 and 3 bits are held in nibbles.

use super::memory::{LINE_BYTES, Line};
use crate::LANES;
use crate::math::{bf16_to_f32, f16_to_f32};
use crate::quant::BlockFormat;
use crate::quant::block::{self, e8m0_half, half_bits, half_offsets, sub_scale};

/// Inputs of a whole group.
pub(crate) const GROUP: usize = 256;
/// Inputs of a chunk.
pub(crate) const CHUNK: usize = 32;
/// Quads of a chunk.
const QUADS: usize = CHUNK / 4;

/// Bits of a code beyond a nibble that lie in planes of their own; `None` for whole bytes.
pub(crate) const fn plane_bits(format: BlockFormat) -> Option<u32> {
    match format {
        BlockFormat::Q8_0 => None,
        BlockFormat::Q5_0 | BlockFormat::Q5_1 | BlockFormat::Q5K => Some(1),
        BlockFormat::Q6K => Some(2),
        _ => Some(0),
    }
}

/// Lines of a chunk.
pub(crate) const fn chunk_lines(format: BlockFormat) -> usize {
    match plane_bits(format) {
        None => QUADS,
        Some(bits) => QUADS / 2 + bits as usize,
    }
}

/// Lines of a group's scales.
pub(crate) const fn scale_lines(format: BlockFormat) -> usize {
    match format {
        BlockFormat::Q4_0
        | BlockFormat::Q5_0
        | BlockFormat::Q8_0
        | BlockFormat::Iq4Nl
        | BlockFormat::Mxfp4
        | BlockFormat::Q4K
        | BlockFormat::Q5K => 4,
        BlockFormat::Q4_1 | BlockFormat::Q5_1 => 8,
        BlockFormat::Q2K | BlockFormat::Q3K | BlockFormat::Q6K => 5,
        BlockFormat::Iq4Xs => 3,
    }
}

/// Lines of a panel with `inp` inputs, a multiple of the format's block.
pub(crate) const fn panel_lines(format: BlockFormat, inp: usize) -> usize {
    inp.div_ceil(GROUP) * scale_lines(format) + inp / CHUNK * chunk_lines(format)
}

/// Writes a row's blocks to lane `lane` of a zeroed panel.
pub(super) fn put_row(format: BlockFormat, panel: &mut [Line], lane: usize, row: &[u8]) {
    let group_lines = scale_lines(format) + GROUP / CHUNK * chunk_lines(format);
    let group_bytes = GROUP / format.block_len() * format.block_bytes();
    for (group, bytes) in panel.chunks_mut(group_lines).zip(row.chunks(group_bytes)) {
        let (scales, chunks) = group.split_at_mut(scale_lines(format));
        let scales = super::memory::bytes_mut(scales);
        let mut chunks = chunks.chunks_exact_mut(chunk_lines(format));
        for (i, bytes) in bytes.chunks_exact(format.block_bytes()).enumerate() {
            put_scales(format, scales, lane, i, bytes);
            let codes = block::codes(format, bytes);
            for codes in codes[..format.block_len()].as_chunks::<CHUNK>().0 {
                let chunk = chunks.next().expect("as many chunks as the row's codes fill");
                put_codes(plane_bits(format), chunk, lane, codes);
            }
        }
    }
}

/// Writes a block's scales to a group's; `index` is the block's place in the group.
fn put_scales(format: BlockFormat, scales: &mut [u8], lane: usize, index: usize, bytes: &[u8]) {
    let mut put_half = |at: usize, bits: u16| {
        scales[(at * LANES + lane) * 2..][..2].copy_from_slice(&bits.to_le_bytes());
    };
    if format == BlockFormat::Mxfp4 {
        return put_half(index, (e8m0_half(bytes[0]).to_bits() >> 16) as u16);
    }
    let (d, min) = half_offsets(format);
    if format.block_len() == 32 {
        put_half(index, half_bits(bytes, d));
        if let Some(min) = min {
            put_half(GROUP / 32 + index, half_bits(bytes, min));
        }
        return;
    }
    put_half(0, half_bits(bytes, d));
    if let Some(min) = min {
        put_half(1, half_bits(bytes, min));
    }
    let bytes_of = &mut scales[LINE_BYTES..];
    for block in 0..GROUP / format.scale_len() {
        let (scale, min) = sub_scale(format, bytes, block);
        match format {
            BlockFormat::Q4K | BlockFormat::Q5K => {
                let at = block % 4 * LANES + lane;
                if block < 4 {
                    bytes_of[at] |= scale as u8;
                    bytes_of[LINE_BYTES + at] |= min;
                } else {
                    bytes_of[2 * LINE_BYTES + at] |= scale as u8;
                    for line in 0..3 {
                        bytes_of[line * LINE_BYTES + at] |= (min >> (2 * line) & 3) << 6;
                    }
                }
            }
            _ => bytes_of[block * LANES + lane] = scale as u8 | min << 4,
        }
    }
}

/// Four codes as the bytes of a word, the first lowest.
fn words(codes: &[u8; CHUNK]) -> [u32; QUADS] {
    let quads = codes.as_chunks::<4>().0;
    std::array::from_fn(|quad| u32::from_le_bytes(quads[quad]))
}

/// Every byte of a word.
const fn each(byte: u8) -> u32 {
    u32::from_le_bytes([byte; 4])
}

fn put_codes(plane_bits: Option<u32>, chunk: &mut [Line], lane: usize, codes: &[u8; CHUNK]) {
    let quads = words(codes);
    let mut or = |line: usize, word: u32| {
        let to = &mut chunk[line].0.as_chunks_mut::<4>().0[lane];
        *to = (u32::from_le_bytes(*to) | word).to_le_bytes();
    };
    let Some(plane_bits) = plane_bits else {
        return quads.into_iter().enumerate().for_each(|(quad, word)| or(quad, word));
    };
    for (quad, word) in quads.into_iter().enumerate() {
        or(quad / 2, (word & each(0xf)) << (quad % 2 * 4));
        if let Some(plane) = Plane::of(plane_bits, quad) {
            or(plane.line, (word >> 4 & each(plane.mask)) << plane.shift);
        }
    }
}

/// Where the high bits of a quad lie.
pub(crate) struct Plane {
    /// The line of the chunk.
    pub(crate) line: usize,
    /// The lowest bit's place in a byte of it.
    pub(crate) shift: usize,
    /// The bits, shifted down.
    pub(crate) mask: u8,
}

impl Plane {
    #[inline(always)]
    pub(crate) const fn of(plane_bits: u32, quad: usize) -> Option<Plane> {
        match plane_bits {
            1 => Some(Plane { line: QUADS / 2, shift: quad, mask: 1 }),
            2 => Some(Plane { line: QUADS / 2 + quad / 4, shift: quad % 4 * 2, mask: 3 }),
            _ => None,
        }
    }
}

/// The codes of lane `lane` in a chunk.
pub(crate) fn codes(format: BlockFormat, chunk: &[Line], lane: usize) -> [u8; CHUNK] {
    let word = |line: usize| u32::from_le_bytes(chunk[line].0.as_chunks::<4>().0[lane]);
    let quad = |quad: usize| match plane_bits(format) {
        None => word(quad),
        Some(plane_bits) => {
            let low = word(quad / 2) >> (quad % 2 * 4) & each(0xf);
            let high = Plane::of(plane_bits, quad);
            high.map_or(low, |plane| low | (word(plane.line) >> plane.shift & each(plane.mask)) << 4)
        }
    };
    let mut codes = [0; CHUNK];
    for (i, codes) in codes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *codes = quad(i).to_le_bytes();
    }
    codes
}

/// Scale and minimum of block `block` of a group, for lane `lane`; the minimum is 0 in a format without.
pub(crate) fn scale_min(format: BlockFormat, scales: &[Line], lane: usize, block: usize) -> (f32, f32) {
    let half = |at: usize| {
        let at = (at * LANES + lane) * 2;
        half_bits(&scales[at / LINE_BYTES].0, at % LINE_BYTES)
    };
    if format == BlockFormat::Mxfp4 {
        return (bf16_to_f32(half(block)), 0.0);
    }
    if format.block_len() == 32 {
        let min = if format.has_min() { f16_to_f32(half(GROUP / 32 + block)) } else { 0.0 };
        return (f16_to_f32(half(block)), min);
    }
    let byte = |at: usize| scales[1 + at / LINE_BYTES].0[at % LINE_BYTES];
    let (scale, min) = match format {
        BlockFormat::Q4K | BlockFormat::Q5K => {
            let lines = [0, 1, 2].map(|line| byte(line * LINE_BYTES + block % 4 * LANES + lane));
            match block {
                0..4 => ((lines[0] & 63) as i8, lines[1] & 63),
                _ => ((lines[2] & 63) as i8, lines[0] >> 6 | lines[1] >> 6 << 2 | lines[2] >> 6 << 4),
            }
        }
        BlockFormat::Q2K => {
            let both = byte(block * LANES + lane);
            ((both & 0xf) as i8, both >> 4)
        }
        _ => (byte(block * LANES + lane) as i8, 0),
    };
    let min = if format.has_min() { -(f16_to_f32(half(1)) * f32::from(min)) } else { 0.0 };
    (f16_to_f32(half(0)) * f32::from(scale), min)
}

/// The groups of a panel: the lines of their scales and those of their chunks.
pub(crate) fn groups(format: BlockFormat, panel: &[Line]) -> impl Iterator<Item = (&[Line], &[Line])> {
    let group_lines = scale_lines(format) + GROUP / CHUNK * chunk_lines(format);
    panel.chunks(group_lines).map(move |group| group.split_at(scale_lines(format)))
}

/// Fills `out` with the weights of one output of a panel: what dequantising its row gives.
pub(super) fn unpack(format: BlockFormat, panel: &[Line], lane: usize, out: &mut [f32]) {
    for ((scales, chunks), out) in groups(format, panel).zip(out.chunks_mut(GROUP)) {
        let chunks = chunks.chunks_exact(chunk_lines(format));
        for (i, (chunk, out)) in chunks.zip(out.chunks_exact_mut(CHUNK)).enumerate() {
            let codes = codes(format, chunk, lane);
            let blocks = codes.chunks_exact(format.scale_len()).zip(out.chunks_exact_mut(format.scale_len()));
            for (j, (codes, out)) in blocks.enumerate() {
                let block = i * CHUNK / format.scale_len() + j;
                let (scale, min) = scale_min(format, scales, lane, block);
                for (out, &code) in out.iter_mut().zip(codes) {
                    *out = format.element(code, scale, min);
                }
            }
        }
    }
}
