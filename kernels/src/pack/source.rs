//! Weights as a file has them, and the rows of a matrix among them.

use super::memory::{Line, bytes_of};
use super::{Part, WeightType, dense, quantized};
use crate::LANES;
use crate::dispatch::Kernels;
use crate::quant::BlockFormat;

// Elements are taken from files, which are little-endian, as they are.
const _: () = assert!(cfg!(target_endian = "little"), "packed weights are little-endian");

/// Row-major weights as the bytes that a file has, which need not be aligned.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    weight_type: WeightType,
    bytes: &'a [u8],
}

impl<'a> Weights<'a> {
    /// The weights whose little-endian elements, or whose blocks, are `bytes`.
    ///
    /// # Panics
    /// If they are not a whole number of elements or blocks.
    pub fn new(weight_type: WeightType, bytes: &'a [u8]) -> Self {
        let (_, unit_bytes) = weight_type.unit();
        assert!(
            bytes.len().is_multiple_of(unit_bytes),
            "{} bytes are not whole {weight_type} elements or blocks of {unit_bytes}",
            bytes.len()
        );
        Weights { weight_type, bytes }
    }

    /// Blocks of a quantised format.
    ///
    /// # Panics
    /// If they are not whole.
    pub fn quantized(format: BlockFormat, blocks: &'a [u8]) -> Self {
        Self::new(WeightType::Quantized(format), blocks)
    }

    /// f32.
    pub fn f32(elements: &'a [f32]) -> Self {
        Self::new(WeightType::F32, bytes_of(elements))
    }

    /// bf16 bits.
    pub fn bf16(bits: &'a [u16]) -> Self {
        Self::new(WeightType::Bf16, bytes_of(bits))
    }

    /// f16 bits.
    pub fn f16(bits: &'a [u16]) -> Self {
        Self::new(WeightType::F16, bytes_of(bits))
    }

    /// Elements.
    pub fn len(&self) -> usize {
        let (elements, bytes) = self.weight_type.unit();
        self.bytes.len() / bytes * elements
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The element type.
    pub fn weight_type(&self) -> WeightType {
        self.weight_type
    }
}

/// Where the rows of a matrix come from.
pub(super) struct Sources<'a> {
    parts: &'a [Weights<'a>],
    /// The first output of each.
    first_outputs: Vec<usize>,
    inp: usize,
}

impl<'a> Sources<'a> {
    pub(super) fn new(parts: &'a [Weights<'a>], first_outputs: Vec<usize>, inp: usize) -> Self {
        Sources { parts, first_outputs, inp }
    }

    /// The bytes of an output's weights.
    fn row(&self, output: usize) -> &[u8] {
        let part = self.first_outputs.partition_point(|&first| first <= output) - 1;
        let (unit, unit_bytes) = self.parts[part].weight_type.unit();
        let row_bytes = self.inp / unit * unit_bytes;
        &self.parts[part].bytes[(output - self.first_outputs[part]) * row_bytes..][..row_bytes]
    }

    /// Fills panel `panel` of `part`, which is zeros.
    pub(super) fn pack(&self, kernels: &Kernels, part: &Part, panel: usize, to: &mut [Line]) {
        let outputs = panel * LANES..part.outputs.min((panel + 1) * LANES);
        let mut rows: [&[u8]; LANES] = [&[]; LANES];
        for (row, output) in rows.iter_mut().zip(outputs.clone()) {
            *row = self.row(part.first_output + output);
        }
        match part.weight_type {
            // SAFETY: the table is one that this processor has, and a panel has the lines of its rows.
            WeightType::Quantized(format) if outputs.len() == LANES => unsafe {
                (kernels.pack)(format, &rows, to);
            },
            WeightType::Quantized(format) => quantized::pack(format, &rows[..outputs.len()], to),
            dense => dense::pack(dense, &rows[..outputs.len()], to),
        }
    }
}
