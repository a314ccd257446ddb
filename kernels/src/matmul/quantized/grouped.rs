//! Quantised products of many rows, for the formats that gain by it ([`Shape::GROUPED_ROWS`]).
//!
//! The rows go by in tiles of [`TILE_ROWS`], and against a tile the panels group by group: the codes of a group
//! of 256 inputs are unpacked and its scales widened once, into a few kilobytes of the first level cache, and
//! then every block of rows of the tile is multiplied with them. What the rows have so far waits in the
//! cache from one group to the next. The operations on a sum, and their order, are those of [`super::vector`].

#![allow(
    clippy::needless_range_loop,
    reason = "indices name rows, quads and blocks of several arrays at once"
)]

use std::mem::MaybeUninit;

use super::QuantizedRows;
use super::dots::{Activations, Quads, dots};
use super::formats::{Codes, Format, Scales, Shape};
use super::vector::{Target, prefetch_lines};
use crate::LANES;
use crate::matmul::Tile;
use crate::pack::memory::LINE_BYTES;
use crate::pack::quantized::{CHUNK, GROUP};
use crate::simd::Integers;

/// Rows of a tile: their codes of a group, their sums and two unpacked panels fill half of a first level
/// cache.
const TILE_ROWS: usize = 48;

const QUADS: usize = GROUP / 4;

/// Blocks of a group, at most.
const MAX_BLOCKS: usize = GROUP / 16;

/// What a product needs to know of a format once its codes are unpacked.
pub(crate) trait Kind {
    /// Inputs that share a scale.
    const BLOCK: usize;
    /// As [`Codes::OFFSET_BITS`].
    const OFFSET_BITS: u32;
    const HAS_MIN: bool;
}

/// The [`Kind`]s by their values.
pub(crate) struct KindOf<const BLOCK: usize, const OFFSET_BITS: u32, const HAS_MIN: bool>;

impl<const BLOCK: usize, const OFFSET_BITS: u32, const HAS_MIN: bool> Kind
    for KindOf<BLOCK, OFFSET_BITS, HAS_MIN>
{
    const BLOCK: usize = BLOCK;
    const OFFSET_BITS: u32 = OFFSET_BITS;
    const HAS_MIN: bool = HAS_MIN;
}

/// A group of `P` panels.
#[repr(C, align(64))]
pub(crate) struct Unpacked<const P: usize> {
    /// Quad by quad; for tiles, each two interleaved.
    codes: [[[u8; LINE_BYTES]; QUADS]; P],
    scales: [[[f32; LANES]; MAX_BLOCKS]; P],
    neg_mins: [[[f32; LANES]; MAX_BLOCKS]; P],
    /// Where each panel's codes are: above, or in the panel itself if it has whole bytes and nothing is interleaved.
    at: [*const u8; P],
}

/// The sums of a tile.
#[repr(C, align(64))]
pub(crate) struct Sums<const P: usize>([[[f32; LANES]; P]; TILE_ROWS]);

/// Some rows against a group.
pub(crate) struct Rows<'a, const P: usize> {
    pub(crate) x: &'a QuantizedRows,
    /// Whole in what the chunks and the kind ask for.
    pub(crate) unpacked: *const Unpacked<P>,
    /// First row.
    pub(crate) row: usize,
    /// The group's first input, and its chunks.
    pub(crate) input: usize,
    pub(crate) chunks: usize,
    /// `[R]` times the sums of `P` panels; the first group begins them.
    pub(crate) sums: *mut [[f32; LANES]; P],
    /// What to ask for meanwhile: so many lines from here, and as many of each panel.
    pub(crate) ahead: *const u8,
    pub(crate) panel_bytes: usize,
    pub(crate) lines: usize,
}

/// All rows of `tile` against panels `panel..panel + P`.
///
/// # Safety
/// As for [`super::vector::matmul`]; the panels are the tile's, and of the format.
pub(crate) unsafe fn panels<T: Target, F: Format, const P: usize>(tile: &Tile<'_>, panel: usize) {
    for begin in tile.rows.clone().step_by(TILE_ROWS) {
        let end = tile.rows.end.min(begin + TILE_ROWS);
        // SAFETY: the caller's promise.
        unsafe { rows::<T, F, P>(tile, panel, begin, end - begin) };
    }
}

/// # Safety
/// As for [`panels`]; the rows are the tile's and at most [`TILE_ROWS`].
unsafe fn rows<T: Target, F: Format, const P: usize>(
    tile: &Tile<'_>,
    panel: usize,
    begin: usize,
    num_rows: usize,
) {
    let x = tile.input.quantized;
    let panel_bytes = tile.part.panel_bytes();
    let num_blocks = num_rows.div_ceil(T::MAX_ROWS);
    let mut unpacked = MaybeUninit::<Unpacked<P>>::uninit();
    let mut sums = MaybeUninit::<Sums<P>>::uninit();
    let sums = (&raw mut sums).cast::<[[f32; LANES]; P]>();
    // SAFETY: the caller's promise; groups and rows are counted from what the wrapper has checked.
    unsafe {
        let first = tile.weights.panels(tile.part).add(panel * panel_bytes);
        let mut at = first;
        for input in (0..x.inputs()).step_by(GROUP) {
            let chunks = (x.inputs() - input).min(GROUP) / CHUNK;
            let bytes = Shape::<F>::SCALE_BYTES + chunks * Shape::<F>::CHUNK_BYTES;
            T::unpack::<F, P>(at, panel_bytes, chunks, unpacked.as_mut_ptr());
            at = at.add(bytes);
            // The group after this one, or the first of the panels after these.
            let ahead = if at < first.add(panel_bytes) { at } else { first.wrapping_add(P * panel_bytes) };
            for i in 0..num_blocks {
                let (row, next) = (i * num_rows / num_blocks, (i + 1) * num_rows / num_blocks);
                let lines = bytes / LINE_BYTES;
                let (line, last_line) = (i * lines / num_blocks, (i + 1) * lines / num_blocks);
                let rows = Rows {
                    x,
                    unpacked: unpacked.as_ptr(),
                    row: begin + row,
                    input,
                    chunks,
                    sums: sums.add(row),
                    ahead: ahead.wrapping_add(line * LINE_BYTES),
                    panel_bytes,
                    lines: last_line - line,
                };
                T::group::<F::Kind, P>(&rows, next - row);
            }
        }
        let first_output = tile.part.first_output + panel * LANES;
        let count = (P * LANES).min(tile.part.outputs - panel * LANES);
        for r in 0..num_rows {
            let sums = &*sums.add(r);
            let out = tile.out.to.part(tile.out.at(begin + r, first_output), count);
            out.copy_from_slice(&sums.as_flattened()[..count]);
            if let Some(bias) = tile.bias {
                out.iter_mut().zip(&bias[first_output..]).for_each(|(out, bias)| *out += bias);
            }
        }
    }
}

/// Unpacks a group of `chunks` chunks of `P` panels.
///
/// # Safety
/// The processor has `V`'s instruction set; `at` points to the group in the first panel, and the panels are
/// `panel_bytes` apart; `to` may be written.
#[inline(always)]
pub(crate) unsafe fn unpack<V: Integers, F: Format, const P: usize>(
    at: *const u8,
    panel_bytes: usize,
    chunks: usize,
    to: *mut Unpacked<P>,
) {
    // SAFETY: the caller's promise; blocks and quads of a group fit the arrays.
    unsafe {
        for p in 0..P {
            let scales = at.add(p * panel_bytes);
            for block in 0..chunks * (CHUNK / Shape::<F>::BLOCK) {
                let (scale, neg_min) = F::Scales::load::<V>(scales, block);
                scale.store((&raw mut (*to).scales[p][block]).cast());
                if Shape::<F>::HAS_MIN {
                    neg_min.store((&raw mut (*to).neg_mins[p][block]).cast());
                }
            }
            let from = scales.add(Shape::<F>::SCALE_BYTES);
            if F::Codes::IS_BYTES && !V::TILES {
                (*to).at[p] = from;
                continue;
            }
            let codes = (&raw mut (*to).codes[p]).cast::<u8>();
            for chunk in 0..chunks {
                for quad in (0..CHUNK / 4).step_by(2) {
                    let chunk_at = from.add(chunk * Shape::<F>::CHUNK_BYTES);
                    let quads =
                        [F::Codes::quad::<V>(chunk_at, quad), F::Codes::quad::<V>(chunk_at, quad + 1)];
                    let lines = if V::TILES { V::interleave(quads) } else { quads };
                    let line = codes.add((chunk * (CHUNK / 4) + quad) * LINE_BYTES);
                    V::store_bytes(lines[0], line);
                    V::store_bytes(lines[1], line.add(LINE_BYTES));
                }
            }
            (*to).at[p] = codes;
        }
    }
}

/// Unpacked quads of panels, from `at` on.
struct Lines<const P: usize> {
    at: [*const u8; P],
}

impl<V: Integers, const P: usize> Quads<V, P> for Lines<P> {
    const INTERLEAVED: bool = V::TILES;

    #[inline(always)]
    unsafe fn quad(&self, quad: usize) -> [V::Bytes; P] {
        // SAFETY: the caller's promise.
        unsafe {
            let mut codes = [V::zero_bytes(); P];
            for p in 0..P {
                codes[p] = V::load_bytes(self.at[p].add(quad * LINE_BYTES));
            }
            codes
        }
    }
}

/// Adds a group's inputs to the sums of `R` rows and `P` panels.
///
/// # Safety
/// The processor has `V`'s instruction set; the group is unpacked from a format of this kind, `R` rows and
/// their sums are there, and no other thread holds the sums.
#[inline(always)]
pub(crate) unsafe fn group<V: Integers, K: Kind, const R: usize, const P: usize>(rows: &Rows<'_, P>) {
    let (x, unpacked) = (rows.x, rows.unpacked);
    let row = x.row(rows.row);
    let (codes_stride, scales_stride) = (x.stride(), x.inputs() / CHUNK);
    let (neg_sums, sums_stride) = match K::BLOCK {
        16 => (row.neg_sums16.as_ptr(), x.inputs() / 16),
        _ => (row.neg_sums32.as_ptr(), x.inputs() / 32),
    };
    let blocks_a_chunk = CHUNK / K::BLOCK;
    // SAFETY: the caller's promise; chunks, blocks and quads are the group's.
    unsafe {
        prefetch_lines::<V, P>(rows.ahead, rows.panel_bytes, rows.lines);
        let mut codes = row.codes.as_ptr().add(rows.input);
        let mut neg_sums = neg_sums.add(rows.input / K::BLOCK);
        let mut x_scales = row.scales.as_ptr().add(rows.input / CHUNK);
        let mut at = (*unpacked).at;
        let mut sums = [[V::splat(0.0); P]; R];
        if rows.input > 0 {
            for r in 0..R {
                for p in 0..P {
                    sums[r][p] = V::load((&raw const (*rows.sums.add(r))[p]).cast());
                }
            }
        }
        for block in 0..rows.chunks * blocks_a_chunk {
            let x = Activations { codes, codes_stride, neg_sums, sums_stride };
            let dots = dots::<V, _, R, P>(&x, &Lines { at }, K::BLOCK / 4, K::OFFSET_BITS);
            for r in 0..R {
                let x_scale = V::splat(*x_scales.add(r * scales_stride));
                for p in 0..P {
                    let scale = V::load((&raw const (*unpacked).scales[p][block]).cast()).mul(x_scale);
                    sums[r][p] = V::to_f32(dots[r][p]).fma(scale, sums[r][p]);
                }
                if K::HAS_MIN {
                    let neg_sum = V::to_f32(V::splat_int(neg_sums.add(r * sums_stride))).mul(x_scale);
                    for p in 0..P {
                        let neg_min = V::load((&raw const (*unpacked).neg_mins[p][block]).cast());
                        sums[r][p] = neg_min.fma(neg_sum, sums[r][p]);
                    }
                }
            }
            codes = codes.add(K::BLOCK);
            neg_sums = neg_sums.add(1);
            if (block + 1).is_multiple_of(blocks_a_chunk) {
                x_scales = x_scales.add(1);
            }
            for p in 0..P {
                at[p] = at[p].add(K::BLOCK / 4 * LINE_BYTES);
            }
        }
        for r in 0..R {
            for p in 0..P {
                sums[r][p].store((&raw mut (*rows.sums.add(r))[p]).cast());
            }
        }
    }
}
