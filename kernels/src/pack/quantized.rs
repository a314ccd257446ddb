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
use crate::quant::block::{self, MAX_BLOCK_LEN, array, e8m0_half, half_bits, half_offsets, sub_scale};

/// Inputs of a whole group.
pub(crate) const GROUP: usize = 256;
/// Inputs of a chunk.
pub(crate) const CHUNK: usize = 32;
/// Quads of a chunk.
pub(super) const QUADS: usize = CHUNK / 4;

/// Bits of a code beyond a nibble that lie in planes of their own; `None` for whole bytes.
#[inline(always)]
pub(crate) const fn plane_bits(format: BlockFormat) -> Option<u32> {
    match format {
        BlockFormat::Q8_0 => None,
        BlockFormat::Q5_0 | BlockFormat::Q5_1 | BlockFormat::Q5K => Some(1),
        BlockFormat::Q6K => Some(2),
        _ => Some(0),
    }
}

/// Lines of a chunk.
#[inline(always)]
pub(crate) const fn chunk_lines(format: BlockFormat) -> usize {
    match plane_bits(format) {
        None => QUADS,
        Some(bits) => QUADS / 2 + bits as usize,
    }
}

/// Lines of a group's scales.
#[inline(always)]
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

/// The most that [`scale_lines`] says.
pub(super) const MAX_SCALE_LINES: usize = 8;

/// Lines of a panel with `inp` inputs, a multiple of the format's block.
pub(crate) const fn panel_lines(format: BlockFormat, inp: usize) -> usize {
    inp.div_ceil(GROUP) * scale_lines(format) + inp / CHUNK * chunk_lines(format)
}

/// Fills a panel of zeros with the blocks of at most 16 rows, plainly: the specification of
/// [`words::pack`](super::words::pack), and what packs a panel that is not full.
pub(super) fn pack(format: BlockFormat, rows: &[&[u8]], panel: &mut [Line]) {
    type Packer = fn(&[&[u8]], &mut [Line]);
    /// Each format has a function of its own, in which all that depends on it is known.
    const PACKERS: [Packer; BlockFormat::ALL.len()] = [
        pack_as::<0>,
        pack_as::<1>,
        pack_as::<2>,
        pack_as::<3>,
        pack_as::<4>,
        pack_as::<5>,
        pack_as::<6>,
        pack_as::<7>,
        pack_as::<8>,
        pack_as::<9>,
        pack_as::<10>,
        pack_as::<11>,
        pack_as::<12>,
    ];
    let index = BlockFormat::ALL.iter().position(|&known| known == format);
    PACKERS[index.expect("ALL has every format: this is a bug")](rows, panel);
}

/// As [`pack`], for the format at `INDEX` of [`BlockFormat::ALL`]: group by group and row by row, so that a
/// group's lines stay in the cache until they are whole. Plain loops, which the compiler sees through.
fn pack_as<const INDEX: usize>(rows: &[&[u8]], panel: &mut [Line]) {
    let format = const { BlockFormat::ALL[INDEX] };
    let (scale_lines, chunk_lines) = (scale_lines(format), chunk_lines(format));
    let (block_len, block_bytes) = (format.block_len(), format.block_bytes());
    let row_bytes = rows.first().map_or(0, |row| row.len());
    let group_bytes = GROUP / block_len * block_bytes;
    let mut codes = [0; MAX_BLOCK_LEN];
    let mut line = 0;
    for begin in (0..row_bytes).step_by(group_bytes) {
        let blocks = group_bytes.min(row_bytes - begin) / block_bytes;
        let chunks = &mut panel[line + scale_lines..][..blocks * (block_len / CHUNK) * chunk_lines];
        // Put together elsewhere: a fresh page that is read before it is written costs two faults.
        let mut scales = [0; MAX_SCALE_LINES * LINE_BYTES];
        for (lane, row) in rows.iter().enumerate() {
            for block in 0..blocks {
                let bytes = &row[begin + block * block_bytes..][..block_bytes];
                put_scales(format, &mut scales, lane, block, bytes);
                block::codes(format, bytes, &mut codes);
                for i in 0..block_len / CHUNK {
                    let first = (block * (block_len / CHUNK) + i) * chunk_lines;
                    let chunk = &mut chunks[first..][..chunk_lines];
                    put_codes(plane_bits(format), chunk, lane, array(&codes, i * CHUNK));
                }
            }
        }
        let num_lines = scale_lines + chunks.len();
        super::memory::bytes_mut(&mut panel[line..][..scale_lines])
            .copy_from_slice(&scales[..scale_lines * LINE_BYTES]);
        line += num_lines;
    }
}

/// Writes the f16 (or bf16) number `at` of a lane.
#[inline(always)]
pub(super) fn put_half(scales: &mut [u8; MAX_SCALE_LINES * LINE_BYTES], at: usize, lane: usize, bits: u16) {
    scales.as_chunks_mut::<2>().0[at * LANES + lane] = bits.to_le_bytes();
}

/// Writes a block's scales to a group's; `index` is the block's place in the group.
#[inline(always)]
fn put_scales(
    format: BlockFormat,
    scales: &mut [u8; MAX_SCALE_LINES * LINE_BYTES],
    lane: usize,
    index: usize,
    bytes: &[u8],
) {
    if format == BlockFormat::Mxfp4 {
        return put_half(scales, index, lane, (e8m0_half(bytes[0]).to_bits() >> 16) as u16);
    }
    let (d, min) = half_offsets(format);
    if format.block_len() == 32 {
        put_half(scales, index, lane, half_bits(bytes, d));
        if let Some(min) = min {
            put_half(scales, GROUP / 32 + index, lane, half_bits(bytes, min));
        }
        return;
    }
    put_half(scales, 0, lane, half_bits(bytes, d));
    if let Some(min) = min {
        put_half(scales, 1, lane, half_bits(bytes, min));
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
#[inline(always)]
fn words(codes: &[u8; CHUNK]) -> [u32; QUADS] {
    let mut words = [0; QUADS];
    for (quad, word) in words.iter_mut().enumerate() {
        *word = u32::from_le_bytes(*array(codes, quad * 4));
    }
    words
}

/// Writes a word of a lane.
#[inline(always)]
fn put(lines: &mut [Line], line: usize, lane: usize, word: u32) {
    lines[line].0.as_chunks_mut::<4>().0[lane] = word.to_le_bytes();
}

/// Every byte of a word.
#[inline(always)]
pub(super) const fn each(byte: u8) -> u32 {
    u32::from_le_bytes([byte; 4])
}

/// Writes a row's codes of a chunk.
#[inline(always)]
fn put_codes(plane_bits: Option<u32>, chunk: &mut [Line], lane: usize, codes: &[u8; CHUNK]) {
    let quads = words(codes);
    let Some(plane_bits) = plane_bits else {
        for (quad, word) in quads.into_iter().enumerate() {
            put(chunk, quad, lane, word);
        }
        return;
    };
    for line in 0..QUADS / 2 {
        put(chunk, line, lane, quads[2 * line] & each(0xf) | (quads[2 * line + 1] & each(0xf)) << 4);
    }
    for line in QUADS / 2..QUADS / 2 + plane_bits as usize {
        let mut word = 0;
        for (quad, codes) in quads.into_iter().enumerate() {
            if let Some(plane) = Plane::of(plane_bits, quad)
                && plane.line == line
            {
                word |= (codes >> 4 & each(plane.mask)) << plane.shift;
            }
        }
        put(chunk, line, lane, word);
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
