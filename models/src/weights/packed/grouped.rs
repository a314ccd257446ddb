//! Whole numbers times scales, which is what every integer format comes to: element `(r, c)` is
//! `codes[r][c] * scale`, one scale for a stretch of a row. Where stretches are whole blocks and every scale is
//! a half, a block format holds that exactly:
//!
//! | codes | format | bits an element |
//! |---|---|---|
//! | -8 to 7: symmetric 4 bits | Q4_0 | 4.5 |
//! | -16 to 15: 4 bits less a zero point of 0 to 16 | Q5_0 | 5.5 |
//! | -128 to 127: symmetric 8 bits | Q8_0 | 8.5 |
//!
//! Else (scales that do not fit a half, inputs in another order, odd widths) elements become floats, each the
//! exact product rounded once, as the formats' own libraries compute them.

use half::f16;
use tandem_kernels::quant::BlockFormat;

use super::rows::{Grid, fill_rows};
use crate::weights::quantize::encode;
use crate::weights::{Dtype, Tensor};

/// Elements of the blocks used here.
const BLOCK_LEN: usize = 32;

/// A matrix of whole numbers with scales.
pub(super) struct Grouped {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// `[rows, columns]`, zero points taken off.
    pub(super) codes: Vec<i16>,
    /// `[grid]`
    pub(super) scales: Vec<f32>,
    pub(super) grid: Grid,
    /// `[columns]`: the grid's column that each belongs to, where they are in another order than the grid.
    pub(super) order: Option<Vec<u32>>,
}

impl Grouped {
    /// The matrix in the smallest block format that holds it, or as `dense`.
    pub(super) fn into_tensor(self, dense: Dtype) -> Tensor<'static> {
        let dtype = self.exact_format().map_or(dense, Dtype::Quantized);
        let row_bytes = dtype.bytes_for(self.columns).expect("the format fits the rows: this is a bug");
        let mut data = vec![0; self.rows * row_bytes];
        fill_rows(&mut data, row_bytes, |row, out| match dtype {
            Dtype::Quantized(format) => self.put_blocks(format, row, out),
            _ => self.put_floats(dtype, row, out),
        });
        Tensor { dtype, shape: vec![self.rows, self.columns], data: data.into() }
    }

    fn exact_format(&self) -> Option<BlockFormat> {
        let whole = self.order.is_none()
            && self.columns.is_multiple_of(BLOCK_LEN)
            && (self.grid.columns == 1 || self.grid.block[1].is_multiple_of(BLOCK_LEN));
        let halves = || self.scales.iter().all(|scale| f16::from_f32(*scale).to_f32() == *scale);
        if !whole || !halves() {
            return None;
        }
        let (least, most) = self.codes.iter().fold((0, 0), |(a, b), &code| (code.min(a), code.max(b)));
        match (least, most) {
            (-8.., ..=7) => Some(BlockFormat::Q4_0),
            (-16.., ..=15) => Some(BlockFormat::Q5_0),
            (-128.., ..=127) => Some(BlockFormat::Q8_0),
            _ => None,
        }
    }

    fn row_codes(&self, row: usize) -> &[i16] {
        &self.codes[row * self.columns..][..self.columns]
    }

    fn put_blocks(&self, format: BlockFormat, row: usize, out: &mut [u8]) {
        let scales = &self.scales[self.grid.row(row)];
        let blocks = self.row_codes(row).as_chunks::<BLOCK_LEN>().0;
        for (index, (codes, out)) in blocks.iter().zip(out.chunks_exact_mut(format.block_bytes())).enumerate()
        {
            let scale = scales[index * BLOCK_LEN / self.grid.block[1]];
            out[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            put_codes(format, codes, &mut out[2..]);
        }
    }

    fn put_floats(&self, dtype: Dtype, row: usize, out: &mut [u8]) {
        let scales = &self.scales[self.grid.row(row)];
        let group = |column: usize| match &self.order {
            Some(order) => order[column] as usize,
            None => column / self.grid.block[1],
        };
        let elements: Vec<f32> = self
            .row_codes(row)
            .iter()
            .enumerate()
            .map(|(column, &code)| f32::from(code) * scales[group(column)])
            .collect();
        let mut bytes = Vec::with_capacity(out.len());
        assert!(encode(dtype, &elements, &mut bytes), "floats are writable: this is a bug");
        out.copy_from_slice(&bytes);
    }
}

/// The codes of a block after its scale.
fn put_codes(format: BlockFormat, codes: &[i16; BLOCK_LEN], out: &mut [u8]) {
    let nibbles = |out: &mut [u8], above: i16| {
        for (i, out) in out.iter_mut().enumerate() {
            let (low, high) = ((codes[i] + above) as u8, (codes[i + 16] + above) as u8);
            *out = low & 15 | (high & 15) << 4;
        }
    };
    match format {
        BlockFormat::Q4_0 => nibbles(out, 8),
        BlockFormat::Q5_0 => {
            let fifths =
                codes.iter().enumerate().fold(0u32, |bits, (i, &code)| bits | u32::from(code >= 0) << i);
            out[..4].copy_from_slice(&fifths.to_le_bytes());
            nibbles(&mut out[4..], 16);
        }
        BlockFormat::Q8_0 => out.iter_mut().zip(codes).for_each(|(out, &code)| *out = code as i8 as u8),
        other => unreachable!("{other:?} is not chosen here: this is a bug"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grouped(codes: &[i16], columns: usize, scales: &[f32], group: usize) -> Grouped {
        let rows = codes.len() / columns;
        let grid = Grid::find([rows, columns], &[rows, columns / group], None).unwrap();
        Grouped { rows, columns, codes: codes.to_vec(), scales: scales.to_vec(), grid, order: None }
    }

    #[test]
    fn the_smallest_format_that_loses_nothing_is_taken() {
        for (least, most, format) in [
            (-8, 7, Some(BlockFormat::Q4_0)),
            (-15, 15, Some(BlockFormat::Q5_0)),
            (-16, 3, Some(BlockFormat::Q5_0)),
            (-1, 16, Some(BlockFormat::Q8_0)),
            (-128, 127, Some(BlockFormat::Q8_0)),
            (-255, 0, None),
        ] {
            let codes: Vec<i16> =
                (0..128).map(|i| least + i * 37 % (most - least + 1)).chain([least, most]).collect();
            let codes = &codes[2..];
            let scales = [0.5, -0.000_061_035_156, 3.0, 0.0];
            let matrix = grouped(codes, 64, &scales, 32);
            let expected: Vec<f32> =
                codes.iter().enumerate().map(|(i, &code)| f32::from(code) * scales[i / 32]).collect();
            let tensor = matrix.into_tensor(Dtype::F32);
            assert_eq!(tensor.dtype, format.map_or(Dtype::F32, Dtype::Quantized));
            assert_eq!(tensor.view().to_f32(), expected, "{format:?}");
        }
    }

    #[test]
    fn what_no_block_holds_becomes_floats() {
        let codes: Vec<i16> = (0..64).map(|i| i % 16 - 8).collect();
        // More digits than a half has; a stretch of half a block.
        assert_eq!(grouped(&codes, 32, &[0.1, 0.2], 32).into_tensor(Dtype::Bf16).dtype, Dtype::Bf16);
        assert_eq!(grouped(&codes, 32, &[0.5; 4], 16).into_tensor(Dtype::F16).dtype, Dtype::F16);
        let mut ordered = grouped(&codes, 64, &[0.5, 0.25], 32);
        ordered.order = Some((0..64).map(|i| i % 2).collect());
        let tensor = ordered.into_tensor(Dtype::F16);
        assert_eq!(tensor.view().to_f32()[..4], [-4.0, -1.75, -3.0, -1.25]);
    }
}
