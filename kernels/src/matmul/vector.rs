//! The matrix product over 16 lanes.
//!
//! A block keeps `R` rows by `P` panels of outputs in registers while it walks the inputs: each line of
//! weights is loaded and widened once for all `R` rows, each activation is broadcast once for all `P`
//! panels. One row takes many panels, because it needs eight or more independent chains to hide the
//! latency of a multiply-add; more rows take fewer panels, to stay within the registers.

#![allow(
    clippy::needless_range_loop,
    reason = "indices name rows, panels and tiles of several arrays at once"
)]

use super::Tile;
use crate::LANES;
use crate::pack::WeightType;
use crate::simd::Simd;

/// How lines of a panel become weights.
pub(crate) trait Format {
    /// Inputs of a line.
    const INPUTS: usize;
    /// The weights of a line's inputs; the second is unused where a line has one.
    ///
    /// # Safety
    /// The processor has `V`'s instruction set; `line` points to 64 bytes.
    unsafe fn load<V: Simd>(line: *const u8) -> (V, V);
}

pub(crate) struct F32;
pub(crate) struct Bf16;
pub(crate) struct F16;

impl Format for F32 {
    const INPUTS: usize = 1;
    #[inline(always)]
    unsafe fn load<V: Simd>(line: *const u8) -> (V, V) {
        // SAFETY: the caller's promise.
        unsafe {
            let weights = V::load(line.cast());
            (weights, weights)
        }
    }
}

impl Format for Bf16 {
    const INPUTS: usize = 2;
    #[inline(always)]
    unsafe fn load<V: Simd>(line: *const u8) -> (V, V) {
        // SAFETY: the caller's promise.
        unsafe { V::load_bf16(line) }
    }
}

impl Format for F16 {
    const INPUTS: usize = 2;
    #[inline(always)]
    unsafe fn load<V: Simd>(line: *const u8) -> (V, V) {
        // SAFETY: the caller's promise; the second half of the line is the second input.
        unsafe { (V::load_f16(line), V::load_f16(line.add(32))) }
    }
}

/// `R` rows by `P` panels.
pub(crate) struct Block {
    /// First row of the block, and elements from row to row.
    x: *const f32,
    inputs: usize,
    /// First panel of the block, and bytes from panel to panel.
    panel: *const u8,
    panel_bytes: usize,
    /// First output of the block, and elements from row to row.
    out: *mut f32,
    out_stride: usize,
    /// First output's bias, if there is one.
    bias: Option<*const f32>,
    /// Outputs from the block's first to the part's last; those past it are padding.
    outputs: usize,
}

/// An instruction set's compiled blocks, and the shapes that fit its registers.
pub(crate) trait Target {
    /// Rows of the largest block.
    const MAX_ROWS: usize;
    /// The lanes, for what they say of the registers.
    type Lanes: Simd;
    /// [`block`] in a function that enables the instruction set.
    ///
    /// # Safety
    /// As for [`block`].
    unsafe fn block<W: Format, const R: usize, const P: usize>(block: &Block);
}

/// # Safety
/// The processor has the target's instruction set; the tile's lengths are checked and no other task
/// holds its outputs.
pub(crate) unsafe fn matmul<T: Target>(tile: &Tile<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match tile.part.weight_type {
            WeightType::F32 => rows::<T, F32>(tile),
            WeightType::Bf16 => rows::<T, Bf16>(tile),
            WeightType::F16 => rows::<T, F16>(tile),
            WeightType::Quantized(_) => unreachable!("a quantised part in a dense product: this is a bug"),
        }
    }
}

/// # Safety
/// As for [`matmul`].
unsafe fn rows<T: Target, W: Format>(tile: &Tile<'_>) {
    // SAFETY: the caller's promise. Row counts passed on are those of the const argument.
    unsafe {
        if T::Lanes::WIDE {
            match tile.rows.len() {
                1..=2 => panels::<T, W, 8>(tile),
                3..=6 => panels::<T, W, 4>(tile),
                _ => panels::<T, W, 2>(tile),
            }
        } else {
            match tile.rows.len() {
                1 => panels::<T, W, 4>(tile),
                2 => panels::<T, W, 2>(tile),
                _ => panels::<T, W, 1>(tile),
            }
        }
    }
}

/// Panels `P` at a time, all rows of the tile for each; what is left of the panels in smaller groups.
///
/// # Safety
/// As for [`matmul`].
unsafe fn panels<T: Target, W: Format, const P: usize>(tile: &Tile<'_>) {
    let mut panel = tile.panels.start;
    // SAFETY: the caller's promise; `panel + P` never passes the tile's end.
    unsafe {
        while panel + P <= tile.panels.end {
            row_blocks::<T, W, P>(tile, panel);
            panel += P;
        }
        while panel + 4 <= tile.panels.end && P > 4 {
            row_blocks::<T, W, 4>(tile, panel);
            panel += 4;
        }
        while panel + 2 <= tile.panels.end && P > 2 {
            row_blocks::<T, W, 2>(tile, panel);
            panel += 2;
        }
        while panel < tile.panels.end {
            row_blocks::<T, W, 1>(tile, panel);
            panel += 1;
        }
    }
}

/// The tile's rows in blocks of nearly equal height, against `P` panels.
///
/// # Safety
/// As for [`matmul`]; panels `panel..panel + P` are the tile's.
unsafe fn row_blocks<T: Target, W: Format, const P: usize>(tile: &Tile<'_>, panel: usize) {
    let inputs = tile.weights.in_features();
    let first_output = tile.part.first_output + panel * LANES;
    let num_rows = tile.rows.len();
    let num_blocks = num_rows.div_ceil(T::MAX_ROWS);
    for i in 0..num_blocks {
        let begin = tile.rows.start + i * num_rows / num_blocks;
        let end = tile.rows.start + (i + 1) * num_rows / num_blocks;
        // SAFETY: rows and panels are within the slices that the wrapper has checked, and the outputs
        // are this task's.
        unsafe {
            let block = Block {
                x: tile.input.x.as_ptr().add(begin * inputs),
                inputs,
                panel: tile.weights.panels(tile.part).add(panel * tile.part.panel_bytes()),
                panel_bytes: tile.part.panel_bytes(),
                out: tile.out.to.start().add(tile.out.at(begin, first_output)),
                out_stride: tile.out.stride,
                bias: tile.bias.map(|bias| bias.as_ptr().add(first_output)),
                outputs: tile.part.outputs - panel * LANES,
            };
            match end - begin {
                1 => T::block::<W, 1, P>(&block),
                2 => T::block::<W, 2, P>(&block),
                3 => T::block::<W, 3, P>(&block),
                4 => T::block::<W, 4, P>(&block),
                5 => T::block::<W, 5, P>(&block),
                6 => T::block::<W, 6, P>(&block),
                7 => T::block::<W, 7, P>(&block),
                _ => T::block::<W, 8, P>(&block),
            }
        }
    }
}

/// Computes and stores `R` rows by `P` panels.
///
/// # Safety
/// The processor has `V`'s instruction set; the block's pointers are valid for `R` rows and `P` panels
/// (the bias and each row of the output for `outputs` elements at most), and no other thread holds
/// its outputs.
#[inline(always)]
pub(crate) unsafe fn block<V: Simd, W: Format, const R: usize, const P: usize>(block: &Block) {
    // SAFETY: the caller's promise; lines, inputs and outputs are counted below.
    unsafe {
        let mut sums = [[V::splat(0.0); P]; R];
        let lines = block.inputs / W::INPUTS;
        for line in 0..lines {
            let x = block.x.add(line * W::INPUTS);
            if V::WIDE && R <= 2 {
                // Few rows, many panels: the broadcasts stay in registers, the weights pass through.
                let mut xs = [(V::splat(0.0), V::splat(0.0)); R];
                for r in 0..R {
                    let x = x.add(r * block.inputs);
                    xs[r] = (V::splat(*x), V::splat(*x.add(W::INPUTS - 1)));
                }
                for p in 0..P {
                    let weights = W::load::<V>(block.panel.add(p * block.panel_bytes + line * 64));
                    for r in 0..R {
                        sums[r][p] = xs[r].0.fma(weights.0, sums[r][p]);
                        if W::INPUTS == 2 {
                            sums[r][p] = xs[r].1.fma(weights.1, sums[r][p]);
                        }
                    }
                }
                continue;
            }
            let mut weights = [(V::splat(0.0), V::splat(0.0)); P];
            for p in 0..P {
                weights[p] = W::load(block.panel.add(p * block.panel_bytes + line * 64));
            }
            for i in 0..W::INPUTS {
                for r in 0..R {
                    let x = V::splat(*x.add(r * block.inputs + i));
                    for p in 0..P {
                        let weights = if i == 0 { weights[p].0 } else { weights[p].1 };
                        sums[r][p] = x.fma(weights, sums[r][p]);
                    }
                }
            }
        }
        if lines * W::INPUTS < block.inputs {
            for p in 0..P {
                let (weights, _) = W::load::<V>(block.panel.add(p * block.panel_bytes + lines * 64));
                for r in 0..R {
                    let x = V::splat(*block.x.add(r * block.inputs + block.inputs - 1));
                    sums[r][p] = x.fma(weights, sums[r][p]);
                }
            }
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
