//! Quantised products over 16 lanes.
//!
//! A block is `R` rows against `P` panels. Each line of codes is unpacked once for all its rows; one dot product
//! instruction takes a quad of all 16 outputs with four activations of a row. Sums start anew at every
//! block of inputs, so even a single row has enough independent work: the processor runs several blocks
//! at once, and one panel is one stream from memory. More rows than one block holds go by in several, against
//! two panels together, because then the activations' loads, one for two instructions, are what limits; a few rows
//! wait for memory, which gives two streams up to a sixth less than one ([`Shape::is_narrow`]). The offset of the
//! codes is folded into what a sum starts from. With few registers, where a block has one panel and three rows, some
//! formats do better as [`super::grouped`] has it.
//!
//! What bounds many rows is the two pipes that take dot products: they take multiplications and multiply-adds too,
//! while conversions, additions, masks and constant shifts go elsewhere (measured on Zen 5). Of 32 inputs, a row and
//! 16 outputs are eight dot products, a multiplication and a multiply-add, and one more multiply-add for a minimum,
//! or twice as many where two scales share 32 inputs: 80, 73 or 67 % of what dot products alone would reach. Operands
//! in the first level cache give 63 to 68 %, and hardly more without the multiplication, which scales that are
//! powers of two would save, at a price in precision (see [`super`]).

#![allow(
    clippy::needless_range_loop,
    reason = "indices name rows, quads and blocks of several arrays at once"
)]

use std::marker::PhantomData;

use super::RowMut;
use super::dots::{Activations, Quads, dots};
use super::formats::{self, Codes, Format, Scales, Shape};
use super::grouped::{self, Kind, Rows, Unpacked};
use super::scalar::{MAX_CODE, MIN_AMPLITUDE, scale_of};
use crate::LANES;
use crate::matmul::Tile;
use crate::pack::WeightType;
use crate::pack::quantized::{CHUNK, GROUP};
use crate::quant::BlockFormat;
use crate::simd::Integers;

/// How far ahead of use weights are asked for: what memory delivers in its own latency, about.
const PREFETCH_BYTES: usize = 4096;
/// The same where a line is followed by so much computation that the processor does not look far past it by itself.
const PREFETCH_BYTES_OF_ROWS: usize = 2 * PREFETCH_BYTES;

/// `R` rows by `P` panels.
pub(crate) struct Block {
    /// First row's codes, and elements from row to row.
    codes: *const i8,
    codes_stride: usize,
    /// First row's scales, `inputs / 32` a row; sums likewise.
    scales: *const f32,
    neg_sums16: *const i32,
    neg_sums32: *const i32,
    scaled_neg_sums: *const f32,
    inputs: usize,
    /// First panel, and bytes from panel to panel.
    panel: *const u8,
    panel_bytes: usize,
    ahead: Ahead,
    /// First output of the first panel, and elements from row to row.
    out: *mut f32,
    out_stride: usize,
    /// First output's bias, if there is one.
    bias: Option<*const f32>,
    /// Outputs from the block's first to the part's last; those past it are padding.
    outputs: usize,
}

/// What a block asks memory for while it computes.
#[derive(Clone, Copy)]
enum Ahead {
    /// What it will use itself so many bytes later.
    Soon(usize),
    /// A panel of those that come next, if there is one of this number: the rows of this block are not the
    /// only ones, and each block of rows brings a part.
    Next(usize),
}

/// An instruction set's compiled blocks.
pub(crate) trait Target {
    /// Rows of the largest block, 6 at most, but for a narrow one ([`Shape::is_narrow`]).
    const MAX_ROWS: usize;
    /// Rows of a block of two panels that leaves registers for the unpacking, for a product of many.
    const MANY_ROWS: usize;
    /// True if blocks of two panels fit its registers; then unpacking is so cheap that [`grouped`] has nothing
    /// to save.
    const TWO_PANELS: bool;
    /// [`block`] in a function that enables the instruction set.
    ///
    /// # Safety
    /// As for [`block`].
    unsafe fn block<F: Format, const R: usize, const P: usize>(block: &Block);
    /// [`grouped::unpack`], likewise.
    ///
    /// # Safety
    /// As for [`grouped::unpack`].
    unsafe fn unpack<F: Format, const P: usize>(
        at: *const u8,
        panel_bytes: usize,
        chunks: usize,
        to: *mut Unpacked<P>,
    );
    /// [`grouped::group`] of `num_rows` rows, likewise.
    ///
    /// # Safety
    /// As for [`grouped::group`], with at most `MAX_ROWS` rows.
    unsafe fn group<K: Kind, const P: usize>(rows: &Rows<'_, P>, num_rows: usize);
}

/// # Safety
/// The processor has the target's instruction set; the tile's lengths are checked, its part is quantised
/// and no other task holds its outputs.
pub(crate) unsafe fn matmul<T: Target>(tile: &Tile<'_>) {
    let WeightType::Quantized(format) = tile.part.weight_type else {
        unreachable!("a dense part in a quantised product: this is a bug")
    };
    // SAFETY: the caller's promise.
    unsafe {
        match format {
            BlockFormat::Q4_0 => panels::<T, formats::Q4_0>(tile),
            BlockFormat::Q4_1 => panels::<T, formats::Q4_1>(tile),
            BlockFormat::Q5_0 => panels::<T, formats::Q5_0>(tile),
            BlockFormat::Q5_1 => panels::<T, formats::Q5_1>(tile),
            BlockFormat::Q8_0 => panels::<T, formats::Q8_0>(tile),
            BlockFormat::Q2K => panels::<T, formats::Q2K>(tile),
            BlockFormat::Q3K => panels::<T, formats::Q3K>(tile),
            BlockFormat::Q4K => panels::<T, formats::Q4K>(tile),
            BlockFormat::Q5K => panels::<T, formats::Q5K>(tile),
            BlockFormat::Q6K => panels::<T, formats::Q6K>(tile),
            BlockFormat::Iq4Nl => panels::<T, formats::Iq4Nl>(tile),
            BlockFormat::Iq4Xs => panels::<T, formats::Iq4Xs>(tile),
            BlockFormat::Mxfp4 => panels::<T, formats::Mxfp4>(tile),
        }
    }
}

/// Panels two at a time, or one by one.
///
/// # Safety
/// As for [`matmul`].
unsafe fn panels<T: Target, F: Format>(tile: &Tile<'_>) {
    let mut panel = tile.panels.start;
    // SAFETY: the caller's promise; `panel + P` never passes the tile's end.
    unsafe {
        if T::TWO_PANELS && !Shape::<F>::is_narrow(tile.rows.len()) {
            while panel + 2 <= tile.panels.end {
                rows::<T, F, 2>(tile, panel);
                panel += 2;
            }
        }
        while panel < tile.panels.end {
            rows::<T, F, 1>(tile, panel);
            panel += 1;
        }
    }
}

/// The tile's rows against `P` panels.
///
/// # Safety
/// As for [`matmul`]; panels `panel..panel + P` are the tile's.
unsafe fn rows<T: Target, F: Format, const P: usize>(tile: &Tile<'_>, panel: usize) {
    let num_rows = tile.rows.len();
    let can_group = const { !T::TWO_PANELS && Shape::<F>::GROUPED_ROWS.is_some() };
    if can_group && Shape::<F>::GROUPED_ROWS.is_some_and(|least| num_rows >= least) {
        // SAFETY: the caller's promise.
        return unsafe { grouped::panels::<T, F, P>(tile, panel) };
    }
    let x = tile.input.quantized;
    let first_output = tile.part.first_output + panel * LANES;
    let is_narrow = T::TWO_PANELS && Shape::<F>::is_narrow(num_rows);
    // Bytes take no registers to unpack, and are so many that fewer blocks to read them pay.
    let many_rows = if F::Codes::IS_BYTES { T::MAX_ROWS } else { T::MANY_ROWS };
    let num_blocks = if num_rows <= T::MAX_ROWS || is_narrow { 1 } else { num_rows.div_ceil(many_rows) };
    let distance = if num_rows <= 2 { PREFETCH_BYTES } else { PREFETCH_BYTES_OF_ROWS };
    for i in 0..num_blocks {
        let begin = tile.rows.start + i * num_rows / num_blocks;
        let end = tile.rows.start + (i + 1) * num_rows / num_blocks;
        let row = x.row(begin);
        // SAFETY: rows and panels are within what the wrapper has checked, and the outputs are this
        // task's. Row counts passed on are those of the const argument.
        unsafe {
            let block = Block {
                codes: row.codes.as_ptr(),
                codes_stride: x.stride(),
                scales: row.scales.as_ptr(),
                neg_sums16: row.neg_sums16.as_ptr(),
                neg_sums32: row.neg_sums32.as_ptr(),
                scaled_neg_sums: row.scaled_neg_sums.as_ptr(),
                inputs: x.inputs(),
                panel: tile.weights.panels(tile.part).add(panel * tile.part.panel_bytes()),
                panel_bytes: tile.part.panel_bytes(),
                ahead: if num_blocks == 1 { Ahead::Soon(distance) } else { Ahead::Next(i) },
                out: tile.out.to.start().add(tile.out.at(begin, first_output)),
                out_stride: tile.out.stride,
                bias: tile.bias.map(|bias| bias.as_ptr().add(first_output)),
                outputs: tile.part.outputs - panel * LANES,
            };
            match end - begin {
                1 => T::block::<F, 1, P>(&block),
                2 => T::block::<F, 2, P>(&block),
                3 => T::block::<F, 3, P>(&block),
                4 => T::block::<F, 4, P>(&block),
                5 => T::block::<F, 5, P>(&block),
                6 => T::block::<F, 6, P>(&block),
                7 if const { T::TWO_PANELS && Shape::<F>::is_narrow(7) } => T::block::<F, 7, 1>(&block),
                8 if const { T::TWO_PANELS && Shape::<F>::is_narrow(8) } => T::block::<F, 8, 1>(&block),
                rows => unreachable!("{rows} rows in one block: this is a bug"),
            }
        }
    }
}

/// Computes and stores `R` rows by `P` panels.
///
/// # Safety
/// The processor has `V`'s instruction set; the block's pointers are valid for `R` rows of `inputs` and `P`
/// panels of the format, and no other thread holds its outputs.
#[inline(always)]
pub(crate) unsafe fn block<V: Integers, F: Format, const R: usize, const P: usize>(block: &Block) {
    let groups = block.inputs.div_ceil(GROUP);
    // SAFETY: the caller's promise; groups, chunks and blocks are counted from `inputs`.
    unsafe {
        let mut sums = [[V::splat(0.0); P]; R];
        let mut scales = block.panel;
        for group in 0..groups {
            let chunks = scales.add(Shape::<F>::SCALE_BYTES);
            let num_chunks = (GROUP / CHUNK).min(block.inputs / CHUNK - group * (GROUP / CHUNK));
            prefetch::<V, P>(block, scales, Shape::<F>::SCALE_BYTES);
            for i in 0..num_chunks {
                let chunk = chunks.add(i * Shape::<F>::CHUNK_BYTES);
                prefetch::<V, P>(block, chunk, Shape::<F>::CHUNK_BYTES);
                let mut place = Place { scales, chunk, input: group * GROUP + i * CHUNK, part: 0 };
                dot_block::<V, F, R, P>(block, &place, &mut sums);
                if Shape::<F>::BLOCK < CHUNK {
                    place.part = 1;
                    dot_block::<V, F, R, P>(block, &place, &mut sums);
                }
            }
            scales = chunks.add(num_chunks * Shape::<F>::CHUNK_BYTES);
        }
        for p in 0..P {
            let count = LANES.min(block.outputs - p * LANES);
            for r in 0..R {
                let mut sum = sums[r][p];
                if let Some(bias) = block.bias {
                    sum = sum.add(V::load_part(bias.add(p * LANES), count));
                }
                sum.store_part(block.out.add(r * block.out_stride + p * LANES), count);
            }
        }
    }
}

/// Where a block of inputs lies: in the first panel the group's scales and the chunk, the chunk's first
/// input, and which of the chunk's blocks it is.
struct Place {
    scales: *const u8,
    chunk: *const u8,
    input: usize,
    part: usize,
}

/// The quads of a block from quad `first` of a chunk on, in panels `panel_bytes` apart.
struct PackedQuads<C> {
    chunk: *const u8,
    panel_bytes: usize,
    first: usize,
    codes: PhantomData<C>,
}

impl<C: Codes, V: Integers, const P: usize> Quads<V, P> for PackedQuads<C> {
    const INTERLEAVED: bool = false;

    #[inline(always)]
    unsafe fn quad(&self, quad: usize) -> [V::Bytes; P] {
        // SAFETY: the caller's promise.
        unsafe {
            let mut codes = [V::zero_bytes(); P];
            for p in 0..P {
                codes[p] = C::quad::<V>(self.chunk.add(p * self.panel_bytes), self.first + quad);
            }
            codes
        }
    }
}

/// Adds the 16 or 32 inputs that share a scale to `sums`.
///
/// # Safety
/// As for [`block`].
#[inline(always)]
unsafe fn dot_block<V: Integers, F: Format, const R: usize, const P: usize>(
    block: &Block,
    place: &Place,
    sums: &mut [[V; P]; R],
) {
    let block_len = Shape::<F>::BLOCK;
    let quads = block_len / 4;
    let (neg_sums, sums_stride) = match block_len {
        16 => (block.neg_sums16, block.inputs / 16),
        _ => (block.neg_sums32, block.inputs / 32),
    };
    // SAFETY: the caller's promise.
    unsafe {
        let neg_sums = neg_sums.add(place.input / block_len + place.part);
        let first = place.part * quads;
        let x = Activations {
            codes: block.codes.add(place.input + first * 4),
            codes_stride: block.codes_stride,
            neg_sums,
            sums_stride,
        };
        let codes = PackedQuads::<F::Codes> {
            chunk: place.chunk,
            panel_bytes: block.panel_bytes,
            first,
            codes: PhantomData,
        };
        let dots = dots::<V, _, R, P>(&x, &codes, quads, F::Codes::OFFSET_BITS);
        let in_group = place.input % GROUP / block_len + place.part;
        let mut scales = [(V::splat(0.0), V::splat(0.0)); P];
        for p in 0..P {
            scales[p] = F::Scales::load::<V>(place.scales.add(p * block.panel_bytes), in_group);
        }
        let x_scales = block.scales.add(place.input / CHUNK);
        let scaled_neg_sums = block.scaled_neg_sums.add(place.input / CHUNK);
        for r in 0..R {
            let x_scale = V::splat(*x_scales.add(r * (block.inputs / CHUNK)));
            let neg_sum = match block_len {
                16 => V::to_f32(V::splat_int(neg_sums.add(r * sums_stride))).mul(x_scale),
                _ => V::splat(*scaled_neg_sums.add(r * (block.inputs / CHUNK))),
            };
            for p in 0..P {
                let (scale, neg_min) = scales[p];
                sums[r][p] = V::to_f32(dots[r][p]).fma(scale.mul(x_scale), sums[r][p]);
                if Shape::<F>::HAS_MIN {
                    sums[r][p] = neg_min.fma(neg_sum, sums[r][p]);
                }
            }
        }
    }
}

/// Asks for what will be used after the `bytes` bytes at `at` in the first panel, and in the others.
///
/// # Safety
/// The processor has `V`'s instruction set; `at` is in the first panel.
#[inline(always)]
unsafe fn prefetch<V: Integers, const P: usize>(block: &Block, at: *const u8, bytes: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match block.ahead {
            Ahead::Soon(distance) => {
                // Further on in the same panels, or at the beginning of those that follow all of them.
                let ahead = at.wrapping_add(distance);
                let is_past = ahead as usize - block.panel as usize >= block.panel_bytes;
                let ahead = ahead.wrapping_add(if is_past { (P - 1) * block.panel_bytes } else { 0 });
                prefetch_lines::<V, P>(ahead, block.panel_bytes, bytes / 64);
            }
            Ahead::Next(panel) if panel < P => {
                let ahead = at.wrapping_add((P + panel) * block.panel_bytes);
                prefetch_lines::<V, 1>(ahead, 0, bytes / 64);
            }
            Ahead::Next(_) => {}
        }
    }
}

/// Asks for `lines` lines at `at`, and as many of each of `P` panels.
///
/// # Safety
/// The processor has `V`'s instruction set. Any address will do.
#[inline(always)]
pub(super) unsafe fn prefetch_lines<V: Integers, const P: usize>(
    at: *const u8,
    panel_bytes: usize,
    lines: usize,
) {
    for p in 0..P {
        for line in 0..lines {
            // SAFETY: the caller's promise.
            unsafe { V::prefetch(at.wrapping_add(p * panel_bytes + line * 64)) };
        }
    }
}

/// Quantises part of a row, two blocks at a time.
///
/// # Safety
/// The processor has `V`'s instruction set; lengths are those of [`RowMut`], `x` a multiple of 32.
#[inline(always)]
pub(crate) unsafe fn quantize<V: Integers>(x: &[f32], mut to: RowMut<'_>) {
    let num_blocks = x.len() / CHUNK;
    for pair in 0..num_blocks / 2 {
        // SAFETY: the caller's promise; two blocks are four vectors, 64 codes and two scales.
        unsafe {
            let at = 2 * CHUNK * pair;
            let from = x.as_ptr().add(at);
            let mut x = [V::splat(0.0); 4];
            for i in 0..4 {
                x[i] = V::load(from.add(i * LANES));
            }
            let amplitudes = V::amplitudes(x);
            if !amplitudes.is_finite() {
                quantize_block::<V>(from, &mut to, 2 * pair);
                quantize_block::<V>(from.add(CHUNK), &mut to, 2 * pair + 1);
                continue;
            }
            // As `scale_of` does it.
            let (zero, max_code, least) = (V::splat(0.0), V::splat(MAX_CODE), V::splat(MIN_AMPLITUDE));
            let mut scales = [0.0f32; LANES];
            let mut inverses = [0.0f32; LANES];
            amplitudes.if_less(least, zero, amplitudes.div(max_code)).store(scales.as_mut_ptr());
            amplitudes.if_less(least, zero, max_code.div(amplitudes)).store(inverses.as_mut_ptr());
            for i in 0..4 {
                x[i] = x[i].mul(V::splat(inverses[i / 2 * (LANES / 2)]));
            }
            let codes = V::pack_i8(x);
            V::store_bytes(codes, to.codes.as_mut_ptr().add(at).cast());
            let mut sums = [0; LANES];
            V::store_ints(V::sums_of_16(codes), sums.as_mut_ptr());
            for block in 0..2 {
                let scale = scales[block * LANES / 2];
                let neg_sums = [-sums[block * LANES / 2], -sums[block * LANES / 2 + 4]];
                let i = 2 * pair + block;
                to.scales[i] = scale;
                to.neg_sums16[2 * i..2 * i + 2].copy_from_slice(&neg_sums);
                to.neg_sums32[i] = neg_sums[0] + neg_sums[1];
                to.scaled_neg_sums[i] = to.neg_sums32[i] as f32 * scale;
            }
        }
    }
    if !num_blocks.is_multiple_of(2) {
        // SAFETY: the caller's promise; the last block is there.
        unsafe { quantize_block::<V>(x.as_ptr().add((num_blocks - 1) * CHUNK), &mut to, num_blocks - 1) };
    }
}

/// Quantises block `block` of a row, whatever is in it.
///
/// # Safety
/// As for [`quantize`]; the block is there, and its inputs lie at `x`.
#[inline(always)]
unsafe fn quantize_block<V: Integers>(x: *const f32, to: &mut RowMut<'_>, block: usize) {
    // SAFETY: the caller's promise; a block is two vectors of `x` and of the codes.
    unsafe {
        let x = [V::load(x), V::load(x.add(LANES))];
        let finite = x[0].is_finite() && x[1].is_finite();
        let largest = x[0].max(x[0].neg()).max(x[1].max(x[1].neg())).largest();
        let (scale, inverse) = if finite { scale_of(largest) } else { (f32::NAN, 0.0) };
        for (half, x) in x.into_iter().enumerate() {
            // Where something is not finite, zeros: nothing of it may reach the conversion.
            let x = if finite { x } else { V::splat(0.0) };
            let codes = x.mul(V::splat(inverse)).round();
            codes.store_i8(to.codes.as_mut_ptr().add(block * CHUNK + half * LANES));
            // Exact in any order: whole numbers far below 2^24.
            to.neg_sums16[2 * block + half] = -(codes.sum() as i32);
        }
        to.scales[block] = scale;
        to.neg_sums32[block] = to.neg_sums16[2 * block] + to.neg_sums16[2 * block + 1];
        to.scaled_neg_sums[block] = to.neg_sums32[block] as f32 * scale;
    }
}
