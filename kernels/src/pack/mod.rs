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
//!
//! No copy of the panels is kept on disk for the next start. For a 7B's 4.4 GB in Q4_0, in the file cache and on
//! two threads of a Zen 4, the system clears the panels' pages in 0.3 s and packing takes 0.6 s, reading the
//! file included; to copy panels from a file takes 0.35 s and the same cleared pages, and to check them would take as
//! long again. Only a copy that is mapped where it lies would save the second, and what lies in a file lies in
//! small pages on most systems, which every pass would pay for.

mod dense;
pub(crate) mod memory;
pub(crate) mod quantized;
mod source;
pub(crate) mod words;

use std::fmt;
use std::sync::Arc;

use crate::LANES;
use crate::dispatch;
use crate::isa;
use crate::pool::ThreadPool;
use crate::quant::BlockFormat;
use crate::shared_out::SharedOut;
use memory::{LINE_BYTES, Line, Lines};
use source::Sources;
pub use source::Weights;

/// Bytes that a thread packs in a nanosecond, about.
const PACKED_BYTES_PER_NS: usize = 2;

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

    /// True of block formats, whose products take quantised activations.
    pub(crate) fn is_quantized(self) -> bool {
        matches!(self, WeightType::Quantized(_))
    }

    /// Elements that are stored together, of which a row has a whole number, and their bytes.
    pub(crate) fn unit(self) -> (usize, usize) {
        match self {
            WeightType::F32 => (1, 4),
            WeightType::Bf16 | WeightType::F16 => (1, 2),
            WeightType::Quantized(format) => (format.block_len(), format.block_bytes()),
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
        Self::stack(&[Weights::f32(data)], inp)
    }

    /// Packs a `[out, inp]` matrix of bf16 bits.
    ///
    /// # Panics
    /// If `bits` does not have `out * inp` elements.
    pub fn from_bf16(bits: &[u16], out: usize, inp: usize) -> Self {
        assert_size(bits.len(), out, inp);
        Self::stack(&[Weights::bf16(bits)], inp)
    }

    /// Packs a `[out, inp]` matrix of f16 bits.
    ///
    /// # Panics
    /// If `bits` does not have `out * inp` elements.
    pub fn from_f16(bits: &[u16], out: usize, inp: usize) -> Self {
        assert_size(bits.len(), out, inp);
        Self::stack(&[Weights::f16(bits)], inp)
    }

    /// Packs several matrices of the same input as one, their outputs one after the other: query, key
    /// and value, or gate and up, in one product. They may be of different types.
    ///
    /// # Panics
    /// If there is no part, or one is not a whole number of rows of `inp`, each of whole blocks.
    pub fn stack(parts: &[Weights<'_>], inp: usize) -> Self {
        let (mut packed, sources) = Self::lay_out(parts, inp);
        let lines = unshared(&mut packed.lines);
        let kernels = dispatch::kernels(isa::active());
        for part in &packed.parts {
            let panels = lines[part.first_line..].chunks_exact_mut(part.panel_lines);
            for (panel, to) in panels.take(part.num_panels()).enumerate() {
                sources.pack(kernels, part, panel, to);
            }
        }
        packed
    }

    /// As [`stack`](Self::stack), on all threads of a pool. A byte of the file is read once and one of the
    /// matrix written once, by the thread that has met its page first.
    ///
    /// # Panics
    /// As [`stack`](Self::stack).
    pub fn stack_on(pool: &ThreadPool, parts: &[Weights<'_>], inp: usize) -> Self {
        let (mut packed, sources) = Self::lay_out(parts, inp);
        let lines = SharedOut::new(unshared(&mut packed.lines));
        for part in &packed.parts {
            let panels = part.num_panels();
            let tasks = pool.num_tasks(panels, part.panel_bytes() / PACKED_BYTES_PER_NS);
            pool.run_waiting(tasks, &|i| {
                for panel in i * panels / tasks..(i + 1) * panels / tasks {
                    let first = part.first_line + panel * part.panel_lines;
                    // SAFETY: a panel belongs to one task.
                    sources.pack(pool.kernels(), part, panel, unsafe { lines.part(first, part.panel_lines) });
                }
            });
        }
        packed
    }

    /// A matrix of zeros with room for `parts`, and where its rows come from.
    fn lay_out<'a>(parts: &'a [Weights<'a>], inp: usize) -> (Self, Sources<'a>) {
        assert!(inp > 0, "a weight matrix has at least one input");
        assert!(!parts.is_empty(), "at least one part to pack");
        let mut packed = PackedMatrix {
            lines: Arc::new(Lines::zeroed(0)),
            parts: Vec::with_capacity(parts.len()),
            out_features: 0,
            in_features: inp,
        };
        let mut first_outputs = Vec::with_capacity(parts.len());
        for part in parts {
            first_outputs.push(packed.out_features);
            packed.add_part(part);
        }
        let last = packed.parts[packed.parts.len() - 1];
        packed.lines = Arc::new(Lines::zeroed(last.first_line + last.num_panels() * last.panel_lines));
        (packed, Sources::new(parts, first_outputs, inp))
    }

    /// Adds room for the outputs of `weights`: to the last part if it is of the same type.
    fn add_part(&mut self, weights: &Weights<'_>) {
        let (weight_type, inp) = (weights.weight_type(), self.in_features);
        let (unit, _) = weight_type.unit();
        assert!(
            inp.is_multiple_of(unit),
            "a row of {inp} inputs is not whole {weight_type} blocks of {unit}"
        );
        assert!(weights.len().is_multiple_of(inp), "{} weights are not whole rows of {inp}", weights.len());
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

/// The memory of a matrix that is being made.
fn unshared(lines: &mut Arc<Lines>) -> &mut Lines {
    Arc::get_mut(lines).expect("it is shared when it is filled: this is a bug")
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
                let matrix = PackedMatrix::stack(&[Weights::quantized(format, &blocks)], inp);
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
            Weights::quantized(BlockFormat::Q4K, &first),
            Weights::f32(&floats),
            Weights::quantized(format, &last[..2 * 210]),
            Weights::quantized(format, &last[2 * 210..]),
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
        PackedMatrix::stack(&[Weights::quantized(BlockFormat::Q4K, &[0; 144 * 7])], 896);
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
        let stacked = PackedMatrix::stack(&[Weights::f32(&a), Weights::f32(&b)], 3);
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
