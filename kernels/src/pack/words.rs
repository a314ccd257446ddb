//! A whole panel of blocks at a time: what [`super::quantized::pack`] makes code by code, made for all 16
//! outputs at once.
//!
//! Four codes of an output are one word of a line. So blocks are turned, until a vector has the same four
//! bytes of every row, and the rest is shifts and masks of whole lines, whatever the format. Arrays of
//! 16 words that the compiler makes vectors of, compiled for each instruction set (`dispatch.rs`): no bit
//! of the result depends on which.
//!
//! A byte of the file is read once and one of the panel written once. Turning costs a load and a store for
//! every four bytes, which is most of the work.

use std::array::from_fn;
use std::ops::{BitAnd, BitOr, BitXor, Shl, Shr};

use super::memory::{LINE_BYTES, Line};
use super::quantized::{
    CHUNK, GROUP, MAX_SCALE_LINES, Plane, QUADS, chunk_lines, each, plane_bits, put_half, scale_lines,
};
use crate::LANES;
use crate::quant::BlockFormat;
use crate::quant::block::{e8m0_half, half_bits, half_offsets};

/// The rows of a panel.
pub(crate) type Rows<'a> = [&'a [u8]; LANES];

/// The lines of a group's scales.
type Scales = [u8; MAX_SCALE_LINES * LINE_BYTES];

/// Four bytes of each of 16 rows. Shifts and masks are those of [`u32`]; what a shift brings over from a
/// neighbouring byte is for a mask to take off.
#[derive(Clone, Copy)]
struct Words([u32; LANES]);

impl Words {
    #[inline(always)]
    fn map(self, f: impl Fn(u32) -> u32) -> Self {
        Words(from_fn(|lane| f(self.0[lane])))
    }
}

impl BitAnd<u8> for Words {
    type Output = Self;

    /// Every byte's bits that `mask` has.
    #[inline(always)]
    fn bitand(self, mask: u8) -> Self {
        self.map(|word| word & each(mask))
    }
}

impl BitXor<u8> for Words {
    type Output = Self;

    /// Every byte with the bits of `mask` flipped.
    #[inline(always)]
    fn bitxor(self, mask: u8) -> Self {
        self.map(|word| word ^ each(mask))
    }
}

impl BitOr for Words {
    type Output = Self;

    #[inline(always)]
    fn bitor(self, other: Self) -> Self {
        Words(from_fn(|lane| self.0[lane] | other.0[lane]))
    }
}

impl Shr<usize> for Words {
    type Output = Self;

    #[inline(always)]
    fn shr(self, bits: usize) -> Self {
        self.map(|word| word >> bits)
    }
}

impl Shl<usize> for Words {
    type Output = Self;

    #[inline(always)]
    fn shl(self, bits: usize) -> Self {
        self.map(|word| word << bits)
    }
}

/// Fills a panel of zeros with the blocks of 16 rows, which are equally many and whole.
#[inline(always)]
pub(crate) fn pack(format: BlockFormat, rows: &Rows<'_>, panel: &mut [Line]) {
    // Each format in code of its own, in which all that depends on it is known.
    match format {
        BlockFormat::Q4_0 => pack_as::<4>(BlockFormat::Q4_0, rows, panel),
        BlockFormat::Q4_1 => pack_as::<5>(BlockFormat::Q4_1, rows, panel),
        BlockFormat::Q5_0 => pack_as::<5>(BlockFormat::Q5_0, rows, panel),
        BlockFormat::Q5_1 => pack_as::<6>(BlockFormat::Q5_1, rows, panel),
        BlockFormat::Q8_0 => pack_as::<8>(BlockFormat::Q8_0, rows, panel),
        BlockFormat::Q2K => pack_as::<21>(BlockFormat::Q2K, rows, panel),
        BlockFormat::Q3K => pack_as::<27>(BlockFormat::Q3K, rows, panel),
        BlockFormat::Q4K => pack_as::<36>(BlockFormat::Q4K, rows, panel),
        BlockFormat::Q5K => pack_as::<44>(BlockFormat::Q5K, rows, panel),
        BlockFormat::Q6K => pack_as::<52>(BlockFormat::Q6K, rows, panel),
        BlockFormat::Iq4Nl => pack_as::<4>(BlockFormat::Iq4Nl, rows, panel),
        BlockFormat::Iq4Xs => pack_as::<34>(BlockFormat::Iq4Xs, rows, panel),
        BlockFormat::Mxfp4 => pack_as::<4>(BlockFormat::Mxfp4, rows, panel),
    }
}

/// The byte of a block from which on it is read in words.
const fn first_word(format: BlockFormat) -> usize {
    match format {
        BlockFormat::Q4_0 | BlockFormat::Q5_0 | BlockFormat::Q8_0 | BlockFormat::Iq4Nl => 2,
        BlockFormat::Mxfp4 => 1,
        _ => 0,
    }
}

/// As [`pack`], for a format whose blocks have `W` whole words from the first on.
#[inline(always)]
fn pack_as<const W: usize>(format: BlockFormat, rows: &Rows<'_>, panel: &mut [Line]) {
    let (scale_lines, chunk_lines) = (scale_lines(format), chunk_lines(format));
    let (block_len, block_bytes) = (format.block_len(), format.block_bytes());
    debug_assert!((block_bytes - first_word(format)) / 4 == W, "the words of a block of {format}");
    let num_blocks = rows[0].len() / block_bytes;
    let blocks_of_group = GROUP / block_len;
    let groups = panel.chunks_mut(scale_lines + GROUP / CHUNK * chunk_lines);
    for (group, lines) in groups.enumerate() {
        let (scale_lines, chunks) = lines.split_at_mut(scale_lines);
        let mut chunks = chunks.chunks_exact_mut(chunk_lines);
        // Put together elsewhere: a fresh page that is read before it is written costs two faults.
        let mut scales = [0; MAX_SCALE_LINES * LINE_BYTES];
        let first = group * blocks_of_group;
        for block in first..num_blocks.min(first + blocks_of_group) {
            let at = block * block_bytes;
            let words = turn::<W>(rows, at + first_word(format));
            put_scales(format, &mut scales, block - first, rows, at, &words);
            for (chunk, lines) in chunks.by_ref().take(block_len / CHUNK).enumerate() {
                put_chunk(format, &words, chunk, lines);
            }
        }
        let scale_lines = super::memory::bytes_mut(scale_lines);
        scale_lines.copy_from_slice(&scales[..scale_lines.len()]);
    }
}

/// `W` words of every row, from byte `at` on.
#[inline(always)]
fn turn<const W: usize>(rows: &Rows<'_>, at: usize) -> [Words; W] {
    let mut words = [Words([0; LANES]); W];
    for (lane, row) in rows.iter().enumerate() {
        let bytes = row[at..].as_chunks::<4>().0.first_chunk::<W>();
        let bytes = bytes.expect("a block has the bytes of its format: this is a bug");
        for (words, &bytes) in words.iter_mut().zip(bytes) {
            words.0[lane] = u32::from_le_bytes(bytes);
        }
    }
    words
}

/// Writes the codes of chunk `chunk` of a block.
#[inline(always)]
fn put_chunk<const W: usize>(format: BlockFormat, words: &[Words; W], chunk: usize, lines: &mut [Line]) {
    let Some(plane_bits) = plane_bits(format) else {
        for (quad, line) in lines.iter_mut().enumerate() {
            put(line, low(format, words, chunk, quad));
        }
        return;
    };
    let (nibbles, planes) = lines.split_at_mut(QUADS / 2);
    for (pair, line) in nibbles.iter_mut().enumerate() {
        let (even, odd) = (low(format, words, chunk, 2 * pair), low(format, words, chunk, 2 * pair + 1));
        put(line, even | odd << 4);
    }
    for (plane, line) in planes.iter_mut().enumerate() {
        let mut bits = Words([0; LANES]);
        for quad in 0..QUADS {
            if let Some(place) = Plane::of(plane_bits, quad)
                && place.line == QUADS / 2 + plane
            {
                bits = bits | high(format, words, chunk, quad) << place.shift;
            }
        }
        put(line, bits);
    }
}

#[inline(always)]
fn put(line: &mut Line, words: Words) {
    for (to, word) in line.0.as_chunks_mut::<4>().0.iter_mut().zip(words.0) {
        *to = word.to_le_bytes();
    }
}

/// The low nibbles of a quad's codes; the codes themselves where they are bytes.
#[inline(always)]
fn low<const W: usize>(format: BlockFormat, words: &[Words; W], chunk: usize, quad: usize) -> Words {
    // 16 bytes from word `first` on: the nibbles of 16 codes, then of 16 more.
    let halves = |first: usize| words[first + quad % 4] >> (quad / 4 * 4) & 0xf;
    match format {
        BlockFormat::Q4_0 | BlockFormat::Iq4Nl | BlockFormat::Mxfp4 => halves(0),
        BlockFormat::Q4_1 | BlockFormat::Q5_0 => halves(1),
        BlockFormat::Q5_1 => halves(2),
        BlockFormat::Iq4Xs => halves(2 + 4 * chunk),
        BlockFormat::Q8_0 => words[quad] ^ 0x80,
        BlockFormat::Q4K => words[4 + chunk / 2 * QUADS + quad] >> (chunk % 2 * 4) & 0xf,
        BlockFormat::Q5K => words[12 + chunk / 2 * QUADS + quad] >> (chunk % 2 * 4) & 0xf,
        BlockFormat::Q6K => words[chunk / 4 * 16 + chunk % 2 * QUADS + quad] >> (chunk % 4 / 2 * 4) & 0xf,
        BlockFormat::Q2K => crumbs(words, 4, chunk, quad),
        BlockFormat::Q3K => crumbs(words, 8, chunk, quad) | bits(words, 0, chunk, quad) << 2,
    }
}

/// What a quad's codes have above a nibble, of those formats that have it.
#[inline(always)]
fn high<const W: usize>(format: BlockFormat, words: &[Words; W], chunk: usize, quad: usize) -> Words {
    // Bit `i` of a word belongs to code `i`: four of them to the lowest bits of four bytes.
    let fifths = |word: Words| word.map(|bits| ((bits >> (quad * 4) & 0xf) * 0x0020_4081) & each(1));
    match format {
        BlockFormat::Q5_0 => fifths(words[0]),
        BlockFormat::Q5_1 => fifths(words[1]),
        BlockFormat::Q5K => bits(words, 4, chunk, quad),
        _ => crumbs(words, 32, chunk, quad),
    }
}

/// Two bits a code: each half of a block has 32 bytes from word `first` on, and each of its chunks two bits
/// of every one.
#[inline(always)]
fn crumbs<const W: usize>(words: &[Words; W], first: usize, chunk: usize, quad: usize) -> Words {
    words[first + chunk / 4 * QUADS + quad] >> (chunk % 4 * 2) & 3
}

/// A bit a code: each chunk of a block has one of every byte of the 32 from word `first` on.
#[inline(always)]
fn bits<const W: usize>(words: &[Words; W], first: usize, chunk: usize, quad: usize) -> Words {
    words[first + quad] >> chunk & 1
}

/// Writes the scales of a block, which begins at byte `at` of the rows and is number `block` of its group.
#[inline(always)]
fn put_scales<const W: usize>(
    format: BlockFormat,
    scales: &mut Scales,
    block: usize,
    rows: &Rows<'_>,
    at: usize,
    words: &[Words; W],
) {
    let (d, min) = half_offsets(format);
    let of_min = if format.block_len() == 32 { GROUP / 32 + block } else { 1 };
    for (lane, row) in rows.iter().enumerate() {
        if format == BlockFormat::Mxfp4 {
            put_half(scales, block, lane, (e8m0_half(row[at]).to_bits() >> 16) as u16);
            continue;
        }
        // Formats of 256 have one block a group.
        put_half(scales, block, lane, half_bits(row, at + d));
        if let Some(min) = min {
            put_half(scales, of_min, lane, half_bits(row, at + min));
        }
    }
    match format {
        BlockFormat::Q2K => (0..4).for_each(|i| put_bytes(scales, i, words[i])),
        BlockFormat::Q6K => (0..4).for_each(|i| put_bytes(scales, i, words[48 + i])),
        BlockFormat::Q3K => {
            let (even, odd, high) = (words[24], words[25], words[26]);
            for i in 0..4 {
                let low = if i % 2 == 0 { even } else { odd };
                put_bytes(scales, i, less_32(low >> (i / 2 * 4) & 0xf | (high >> (i * 2) & 3) << 4));
            }
        }
        BlockFormat::Q4K | BlockFormat::Q5K => {
            let (scale, min, rest) = (words[1], words[2], words[3]);
            let later_min = rest >> 4 & 0xf | (min >> 6 & 3) << 4;
            put_bytes(scales, 0, scale & 63 | (later_min & 3) << 6);
            put_bytes(scales, 1, min & 63 | (later_min >> 2 & 3) << 6);
            put_bytes(scales, 2, rest & 0xf | (scale >> 6 & 3) << 4 | (later_min >> 4 & 3) << 6);
        }
        BlockFormat::Iq4Xs => {
            for i in 0..2 {
                put_bytes(scales, i, less_32(iq4_xs_scales(words[0], words[1], i)));
            }
        }
        _ => {}
    }
}

/// Bytes of at most 63, less 32, as signed ones.
#[inline(always)]
fn less_32(bytes: Words) -> Words {
    let flipped = bytes ^ 32;
    let sign = flipped & 32;
    flipped | sign << 1 | sign << 2
}

/// Scales `4 i` to `4 i + 3` of IQ4_XS: their low nibbles are those of `low`, and their high two bits
/// those of `high`'s upper half.
#[inline(always)]
fn iq4_xs_scales(high: Words, low: Words, i: usize) -> Words {
    Words(from_fn(|lane| {
        let (high, low) = (high.0[lane] >> (16 + 8 * i), low.0[lane] >> (16 * i));
        let scale = |j: usize| (low >> (4 * j) & 0xf | (high >> (2 * j) & 3) << 4) << (8 * j);
        scale(0) | scale(1) | scale(2) | scale(3)
    }))
}

/// Writes the bytes of words to the `i`th line after the first: the lowest of all lanes, then the next.
#[inline(always)]
fn put_bytes(scales: &mut Scales, i: usize, words: Words) {
    for (byte, to) in scales[(1 + i) * LINE_BYTES..][..LINE_BYTES].chunks_exact_mut(LANES).enumerate() {
        for (to, word) in to.iter_mut().zip(words.0) {
            *to = (word >> (8 * byte)) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::quantized;
    use super::*;
    use crate::dispatch;
    use crate::isa::Isa;

    proptest! {
        /// Any bytes are blocks, and a panel of full groups and of a short one.
        #[test]
        fn panels_are_those_of_the_plain_packer(
            index in 0..BlockFormat::ALL.len(),
            num_blocks in 1usize..19,
            seed in any::<u64>(),
        ) {
            let format = BlockFormat::ALL[index];
            let row_bytes = num_blocks * format.block_bytes();
            let mut state = seed | 1;
            let bytes: Vec<u8> = (0..LANES * row_bytes)
                .map(|_| {
                    state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                    (state >> 56) as u8
                })
                .collect();
            let rows: Rows<'_> = from_fn(|lane| &bytes[lane * row_bytes..][..row_bytes]);
            let len = quantized::panel_lines(format, num_blocks * format.block_len());
            let mut plain = vec![Line([0; LINE_BYTES]); len];
            quantized::pack(format, &rows, &mut plain);
            for isa in Isa::available() {
                let mut panel = vec![Line([0; LINE_BYTES]); len];
                // SAFETY: the instruction set is there, and the panel has the lines of its rows.
                unsafe { (dispatch::kernels(isa).pack)(format, &rows, &mut panel) };
                let same = panel.iter().zip(&plain).all(|(a, b)| a.0 == b.0);
                prop_assert!(same, "{format} {isa}");
            }
        }
    }
}
