//! Weights rearranged for the matrix product.
//!
//! A `[out_features, in_features]` matrix becomes panels of 16 outputs, one after the other, so that one
//! vector load brings the weights of 16 outputs for one input, every weight byte is read once per pass
//! whatever the number of rows, and a thread's share is one stretch of memory. Within a panel
//! (`k` = input, `o` = output):
//!
//! | type | order | line of 64 bytes |
//! |---|---|---|
//! | f32 | `[k][o]` | 1 input |
//! | bf16 | `[k / 2][o][k % 2]`: a shift or a mask of a line gives the f32 of an even or odd input | 2 inputs |
//! | f16 | `[k][o]` | 2 inputs |
//! | GGUF's block formats | see `pack/quantized.rs` | 4 or 8 inputs |
//!
//! Outputs are filled up to a multiple of 16 with zeros and each panel to a whole line. Weights keep
//! their type: packing loses nothing, and [`PackedMatrix::row`] gives back what went in. A matrix may be
//! stacked of parts of different types, each with panels of its own; neighbours of one type share them.

mod dense;
pub(crate) mod memory;
pub(crate) mod quantized;

use std::fmt;
use std::sync::Arc;

use crate::LANES;
use crate::quant::BlockFormat;
use memory::{LINE_BYTES, Line, Lines};

/// Element type of a weight matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// IEEE single.
    F32,
    /// The upper half of a single.
    Bf16,
    /// IEEE half.
    F16,
    /// Blocks of one of GGUF's formats.
    Quantized(BlockFormat),
}

impl WeightType {
    /// Lines of a panel with `inp` inputs.
    fn panel_lines(self, inp: usize) -> usize {
        match self {
            WeightType::Quantized(format) => quantized::panel_lines(format, inp),
            _ => inp.div_ceil(dense::inputs_per_line(self)),
        }
    }

    /// Inputs that a row has a multiple of.
    fn row_unit(self) -> usize {
        match self {
            WeightType::Quantized(format) => format.block_len(),
            _ => 1,
        }
    }
}

impl fmt::Display for WeightType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WeightType::F32 => "f32",
            WeightType::Bf16 => "bf16",
            WeightType::F16 => "f16",
            WeightType::Quantized(format) => format.name(),
        })
    }
}

/// Row-major weights as they come from a file; 16-bit types as their bits.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bf16 bits.
    Bf16(&'a [u16]),
    /// f16 bits.
    F16(&'a [u16]),
    /// Whole blocks, a row after the other.
    Quantized {
        /// What the blocks are.
        format: BlockFormat,
        /// Their bytes.
        blocks: &'a [u8],
    },
}

impl Weights<'_> {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Weights::F32(data) => data.len(),
            Weights::Bf16(bits) | Weights::F16(bits) => bits.len(),
            Weights::Quantized { format, blocks } => blocks.len() / format.block_bytes() * format.block_len(),
        }
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element type.
    pub fn weight_type(&self) -> WeightType {
        match self {
            Weights::F32(_) => WeightType::F32,
            Weights::Bf16(_) => WeightType::Bf16,
            Weights::F16(_) => WeightType::F16,
            Weights::Quantized { format, .. } => WeightType::Quantized(*format),
        }
    }
}

const _: () = assert!(LANES * size_of::<f32>() == LINE_BYTES);

/// A weight matrix in panels; see the module's text for the order.
pub struct PackedMatrix {
    /// Never written once it is shared.
    lines: Arc<Lines>,
    parts: Vec<Part>,
    out_features: usize,
    in_features: usize,
}

/// A run of outputs of one type.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    pub(crate) weight_type: WeightType,
    pub(crate) first_output: usize,
    pub(crate) outputs: usize,
    first_line: usize,
    pub(crate) panel_lines: usize,
}

impl Part {
    /// Panels of 16 outputs; the last may be part filled.
    pub(crate) fn num_panels(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    /// Bytes from one panel to the next.
    pub(crate) fn panel_bytes(&self) -> usize {
        self.panel_lines * LINE_BYTES
    }
}

impl fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PackedMatrix(")?;
        for part in &self.parts {
            write!(f, "{} ", part.weight_type)?;
        }
        write!(f, "[{}, {}])", self.out_features, self.in_features)
    }
}

impl PackedMatrix {
    /// Packs a `[out, inp]` matrix of f32.
    ///
    /// # Panics
    /// If `data` does not have `out * inp` elements.
    pub fn from_f32(data: &[f32], out: usize, inp: usize) -> Self {
        assert_size(data.len(), out, inp);
        Self::stack(&[Weights::F32(data)], inp)
    }

    /// Packs a `[out, inp]` matrix of bf16 bits.
    ///
    /// # Panics
    /// If `bits` does not have `out * inp` elements.
    pub fn from_bf16(bits: &[u16], out: usize, inp: usize) -> Self {
        assert_size(bits.len(), out, inp);
        Self::stack(&[Weights::Bf16(bits)], inp)
    }

    /// Packs a `[out, inp]` matrix of f16 bits.
    ///
    /// # Panics
    /// If `bits` does not have `out * inp` elements.
    pub fn from_f16(bits: &[u16], out: usize, inp: usize) -> Self {
        assert_size(bits.len(), out, inp);
        Self::stack(&[Weights::F16(bits)], inp)
    }

    /// Packs several matrices of the same input as one, their outputs one after the other: query, key
    /// and value, or gate and up, in one product. They may be of different types.
    ///
    /// # Panics
    /// If there is no part, or one is not a whole number of rows of `inp`, each of whole blocks.
    pub fn stack(parts: &[Weights<'_>], inp: usize) -> Self {
        assert!(inp > 0, "a weight matrix has at least one input");
        assert!(!parts.is_empty(), "at least one part to pack");
        let mut packed = PackedMatrix {
            lines: Arc::new(Lines::zeroed(0)),
            parts: Vec::with_capacity(parts.len()),
            out_features: 0,
            in_features: inp,
        };
        for part in parts {
            packed.lay_out(part);
        }
        let last = packed.parts[packed.parts.len() - 1];
        packed.lines = Arc::new(Lines::zeroed(last.first_line + last.num_panels() * last.panel_lines));
        let mut first_output = 0;
        for part in parts {
            packed.fill(first_output, part);
            first_output += part.len() / inp;
        }
        packed
    }

    /// Adds room for the outputs of `weights`: to the last part if it is of the same type.
    fn lay_out(&mut self, weights: &Weights<'_>) {
        let (weight_type, inp) = (weights.weight_type(), self.in_features);
        assert!(
            inp.is_multiple_of(weight_type.row_unit()),
            "a row of {inp} inputs is not whole {weight_type} blocks of {}",
            weight_type.row_unit()
        );
        assert!(weights.len().is_multiple_of(inp), "{} weights are not whole rows of {inp}", weights.len());
        if let Weights::Quantized { format, blocks } = weights {
            assert!(
                blocks.len().is_multiple_of(format.block_bytes()),
                "{} bytes are not whole {format} blocks of {}",
                blocks.len(),
                format.block_bytes()
            );
        }
        let outputs = weights.len() / inp;
        match self.parts.last_mut() {
            Some(last) if last.weight_type == weight_type => last.outputs += outputs,
            last => {
                let first_line =
                    last.map_or(0, |last| last.first_line + last.num_panels() * last.panel_lines);
                self.parts.push(Part {
                    weight_type,
                    first_output: self.out_features,
                    outputs,
                    first_line,
                    panel_lines: weight_type.panel_lines(inp),
                });
            }
        }
        self.out_features += outputs;
    }

    /// Writes `weights` as the outputs from `first_output` on.
    fn fill(&mut self, first_output: usize, weights: &Weights<'_>) {
        let inp = self.in_features;
        match *weights {
            Weights::F32(data) => {
                for (i, row) in data.chunks_exact(inp).enumerate() {
                    let (part, panel, lane) = self.panel_mut(first_output + i);
                    dense::put_row(part.weight_type, panel, lane, row, f32::to_ne_bytes);
                }
            }
            Weights::Bf16(bits) | Weights::F16(bits) => {
                for (i, row) in bits.chunks_exact(inp).enumerate() {
                    let (part, panel, lane) = self.panel_mut(first_output + i);
                    dense::put_row(part.weight_type, panel, lane, row, u16::to_ne_bytes);
                }
            }
            Weights::Quantized { format, blocks } => {
                let row_bytes = inp / format.block_len() * format.block_bytes();
                for (i, row) in blocks.chunks_exact(row_bytes).enumerate() {
                    let (_, panel, lane) = self.panel_mut(first_output + i);
                    quantized::put_row(format, panel, lane, row);
                }
            }
        }
    }

    /// The matrix of the first `num_outputs` outputs. It shares this one's memory.
    ///
    /// # Panics
    /// If there are not so many, or none is asked for.
    pub fn first_outputs(&self, num_outputs: usize) -> Self {
        assert!(
            (1..=self.out_features).contains(&num_outputs),
            "the first {num_outputs} outputs of a matrix of {}",
            self.out_features
        );
        let within = self.parts.iter().filter(|part| part.first_output < num_outputs);
        let parts =
            within.map(|part| Part { outputs: part.outputs.min(num_outputs - part.first_output), ..*part });
        PackedMatrix {
            lines: Arc::clone(&self.lines),
            parts: parts.collect(),
            out_features: num_outputs,
            in_features: self.in_features,
        }
    }

    /// Outputs.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Inputs.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// The element types of its parts, from the first output on.
    pub fn weight_types(&self) -> impl Iterator<Item = WeightType> + '_ {
        self.parts.iter().map(|part| part.weight_type)
    }

    /// Bytes that a pass reads, padding included.
    pub fn size_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.num_panels() * part.panel_bytes()).sum()
    }

    /// The parts, from the first output on.
    pub(crate) fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// First byte of a part's panels; aligned to a line.
    pub(crate) fn panels(&self, part: &Part) -> *const u8 {
        self.lines[part.first_line..].as_ptr().cast()
    }

    /// Part, first line and lane of an output.
    fn locate(&self, output: usize) -> (Part, usize, usize) {
        let part = self.parts.partition_point(|part| part.first_output <= output) - 1;
        let part = self.parts[part];
        let (panel, lane) = ((output - part.first_output) / LANES, (output - part.first_output) % LANES);
        (part, part.first_line + panel * part.panel_lines, lane)
    }

    /// Part, panel and lane of an output.
    pub(crate) fn panel(&self, output: usize) -> (Part, &[Line], usize) {
        let (part, first_line, lane) = self.locate(output);
        (part, &self.lines[first_line..][..part.panel_lines], lane)
    }

    fn panel_mut(&mut self, output: usize) -> (Part, &mut [Line], usize) {
        let (part, first_line, lane) = self.locate(output);
        let lines = Arc::get_mut(&mut self.lines).expect("not shared before it is filled: this is a bug");
        (part, &mut lines[first_line..][..part.panel_lines], lane)
    }

    /// Row `index` of the matrix as f32: the embedding of a token when the head is tied to it.
    ///
    /// # Panics
    /// If `index` is not a row, or `out` does not have `in_features` elements.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.out_features, "row {index} of a matrix of {} rows", self.out_features);
        assert!(
            out.len() == self.in_features,
            "a row has {} elements, the output {}",
            self.in_features,
            out.len()
        );
        let (part, panel, lane) = self.panel(index);
        match part.weight_type {
            WeightType::Quantized(format) => quantized::unpack(format, panel, lane, out),
            dense => dense::unpack(dense, panel, lane, out),
        }
    }
}

fn assert_size(len: usize, out: usize, inp: usize) {
    assert!(Some(len) == out.checked_mul(inp), "{len} weights for a matrix of shape [{out}, {inp}]");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::{bf16_to_f32, f16_to_f32};
    use crate::quant::dequantize;

    /// Random blocks, their f16 scales finite.
    fn blocks(format: BlockFormat, elements: usize) -> Vec<u8> {
        let len = format.bytes_for(elements).unwrap();
        // Bit 6 of the upper byte clear: an exponent below 16.
        (0..len).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8 & 0xbf).collect()
    }

    #[test]
    fn quantised_rows_are_those_that_dequantising_gives() {
        for format in BlockFormat::ALL {
            for (out, inp) in [(1, 1), (17, 2), (40, 9)] {
                let inp = inp * format.block_len();
                let blocks = blocks(format, out * inp);
                let mut expected = vec![0.0; out * inp];
                dequantize(format, &blocks, &mut expected);
                let matrix = PackedMatrix::stack(&[Weights::Quantized { format, blocks: &blocks }], inp);
                let mut row = vec![0.0; inp];
                for (index, expected) in expected.chunks(inp).enumerate() {
                    matrix.row(index, &mut row);
                    let same = row.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{matrix:?} row {index}");
                }
            }
        }
    }

    #[test]
    fn a_stack_of_several_types_has_the_rows_of_each() {
        let (format, inp) = (BlockFormat::Q6K, 256);
        let (first, last) = (blocks(BlockFormat::Q4K, 20 * inp), blocks(format, 3 * inp));
        let floats: Vec<f32> = (0..5 * inp).map(|i| i as f32).collect();
        let parts = [
            Weights::Quantized { format: BlockFormat::Q4K, blocks: &first },
            Weights::F32(&floats),
            Weights::Quantized { format, blocks: &last[..2 * 210] },
            Weights::Quantized { format, blocks: &last[2 * 210..] },
        ];
        let matrix = PackedMatrix::stack(&parts, inp);
        assert_eq!(matrix.out_features(), 28);
        assert_eq!(matrix.weight_types().count(), 3);
        let (mut row, mut expected) = (vec![0.0; inp], vec![0.0; inp]);
        matrix.row(19, &mut row);
        dequantize(BlockFormat::Q4K, &first[19 * 144..], &mut expected);
        assert_eq!(row, expected);
        matrix.row(21, &mut row);
        assert_eq!(row, floats[inp..2 * inp]);
        matrix.row(27, &mut row);
        dequantize(format, &last[2 * 210..], &mut expected);
        assert_eq!(row, expected);
    }

    #[test]
    #[should_panic(expected = "a row of 896 inputs is not whole Q4_K blocks of 256")]
    fn a_row_of_broken_blocks_names_the_block() {
        PackedMatrix::stack(&[Weights::Quantized { format: BlockFormat::Q4K, blocks: &[0; 144 * 7] }], 896);
    }

    #[test]
    fn rows_come_back_bit_for_bit_in_every_type_and_odd_shape() {
        for (out, inp) in [(1, 1), (3, 2), (16, 7), (17, 33), (40, 64)] {
            let bits: Vec<u16> = (0..out * inp).map(|i| ((i * 2654435761) >> 7) as u16 & 0x7bff).collect();
            let floats: Vec<f32> = bits.iter().map(|&b| bf16_to_f32(b) * 1.25).collect();
            let cases: [(PackedMatrix, Vec<f32>); 3] = [
                (PackedMatrix::from_f32(&floats, out, inp), floats.clone()),
                (PackedMatrix::from_bf16(&bits, out, inp), bits.iter().map(|&b| bf16_to_f32(b)).collect()),
                (PackedMatrix::from_f16(&bits, out, inp), bits.iter().map(|&b| f16_to_f32(b)).collect()),
            ];
            for (matrix, expected) in &cases {
                let mut row = vec![0.0; inp];
                for index in 0..out {
                    matrix.row(index, &mut row);
                    assert_eq!(row, expected[index * inp..(index + 1) * inp], "{matrix:?} row {index}");
                }
            }
        }
    }

    #[test]
    fn a_stack_is_the_rows_of_its_parts_in_order() {
        let a: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let b: Vec<f32> = (6..51).map(|i| i as f32).collect();
        let stacked = PackedMatrix::stack(&[Weights::F32(&a), Weights::F32(&b)], 3);
        assert_eq!(stacked.out_features(), 17);
        let mut row = [0.0; 3];
        stacked.row(16, &mut row);
        assert_eq!(row, [48.0, 49.0, 50.0]);
    }

    #[test]
    #[should_panic(expected = "5 weights for a matrix of shape [2, 3]")]
    fn a_wrong_size_names_the_shape() {
        PackedMatrix::from_f32(&[0.0; 5], 2, 3);
    }
}
