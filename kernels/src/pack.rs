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
//!
//! Outputs are filled up to a multiple of 16 with zeros and each panel to a whole line. Weights keep
//! their type: packing loses nothing, and [`PackedMatrix::row`] gives back what went in.

use std::fmt;

use crate::LANES;
use crate::math::{bf16_to_f32, f16_to_f32};

/// Element type of a weight matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// IEEE single.
    F32,
    /// The upper half of a single.
    Bf16,
    /// IEEE half.
    F16,
}

impl WeightType {
    /// Bytes of an element.
    pub fn size_bytes(self) -> usize {
        match self {
            WeightType::F32 => 4,
            WeightType::Bf16 | WeightType::F16 => 2,
        }
    }

    /// Inputs that a line of a panel holds.
    fn inputs_per_line(self) -> usize {
        LINE_BYTES / (LANES * self.size_bytes())
    }

    /// Which element of a line is the weight of an output of the panel and an input of the line.
    #[inline(always)]
    fn element(self, lane: usize, input: usize) -> usize {
        match self {
            WeightType::F32 => lane,
            WeightType::Bf16 => lane * 2 + input,
            WeightType::F16 => input * LANES + lane,
        }
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
}

impl Weights<'_> {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Weights::F32(data) => data.len(),
            Weights::Bf16(bits) | Weights::F16(bits) => bits.len(),
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
        }
    }
}

const LINE_BYTES: usize = 64;

/// A cache line of packed weights.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE_BYTES]);

const _: () = assert!(size_of::<Line>() == LINE_BYTES && align_of::<Line>() == LINE_BYTES);
const _: () = assert!(LANES * size_of::<f32>() == LINE_BYTES);

/// A weight matrix in panels; see the module's text for the order.
pub struct PackedMatrix {
    lines: Vec<Line>,
    weight_type: WeightType,
    out_features: usize,
    in_features: usize,
}

impl fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedMatrix({:?} [{}, {}])", self.weight_type, self.out_features, self.in_features)
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
    /// and value, or gate and up, in one product.
    ///
    /// # Panics
    /// If there is no part, the parts differ in type, or one is not a whole number of rows of `inp`.
    pub fn stack(parts: &[Weights<'_>], inp: usize) -> Self {
        assert!(inp > 0, "a weight matrix has at least one input");
        let weight_type = parts.first().expect("at least one part to pack").weight_type();
        let mut out_features = 0;
        for part in parts {
            assert!(
                part.weight_type() == weight_type,
                "parts of one matrix are of one type, not {weight_type:?} and {:?}",
                part.weight_type()
            );
            assert!(part.len() % inp == 0, "{} weights are not whole rows of {inp}", part.len());
            out_features += part.len() / inp;
        }
        let lines_per_panel = inp.div_ceil(weight_type.inputs_per_line());
        let lines = vec![Line([0; LINE_BYTES]); out_features.div_ceil(LANES) * lines_per_panel];
        let mut packed = PackedMatrix { lines, weight_type, out_features, in_features: inp };
        let mut first = 0;
        for part in parts {
            match *part {
                Weights::F32(data) => packed.fill(first, data, f32::to_ne_bytes),
                Weights::Bf16(bits) | Weights::F16(bits) => packed.fill(first, bits, u16::to_ne_bytes),
            }
            first += part.len() / inp;
        }
        packed
    }

    fn fill<T: Copy, const N: usize>(&mut self, first: usize, data: &[T], to_bytes: fn(T) -> [u8; N]) {
        let (weight_type, lines_per_panel) = (self.weight_type, self.lines_per_panel());
        for (row, weights) in data.chunks_exact(self.in_features).enumerate() {
            let output = first + row;
            let lines = &mut self.lines[output / LANES * lines_per_panel..];
            for (line, weights) in lines.iter_mut().zip(weights.chunks(weight_type.inputs_per_line())) {
                for (i, &weight) in weights.iter().enumerate() {
                    let element = weight_type.element(output % LANES, i);
                    line.0.as_chunks_mut::<N>().0[element] = to_bytes(weight);
                }
            }
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

    /// The element type.
    pub fn weight_type(&self) -> WeightType {
        self.weight_type
    }

    /// Bytes that a pass reads, padding included.
    pub fn size_bytes(&self) -> usize {
        self.lines.len() * LINE_BYTES
    }

    /// Panels of 16 outputs; the last may be part filled.
    pub(crate) fn num_panels(&self) -> usize {
        self.out_features.div_ceil(LANES)
    }

    pub(crate) fn lines_per_panel(&self) -> usize {
        self.in_features.div_ceil(self.weight_type.inputs_per_line())
    }

    /// Bytes from one panel to the next.
    pub(crate) fn panel_bytes(&self) -> usize {
        self.lines_per_panel() * LINE_BYTES
    }

    /// First byte of the panels; aligned to a line.
    pub(crate) fn panels(&self) -> *const u8 {
        self.lines.as_ptr().cast()
    }

    /// The panel that holds an output.
    fn panel(&self, output: usize) -> &[Line] {
        &self.lines[output / LANES * self.lines_per_panel()..][..self.lines_per_panel()]
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
        let (panel, lane) = (self.panel(index), index % LANES);
        // The types by name, so that each loop knows its stride.
        match self.weight_type {
            WeightType::F32 => unpack(panel, lane, WeightType::F32, out, f32::from_ne_bytes),
            WeightType::Bf16 => {
                unpack(panel, lane, WeightType::Bf16, out, |b| bf16_to_f32(u16::from_ne_bytes(b)));
            }
            WeightType::F16 => {
                unpack(panel, lane, WeightType::F16, out, |b| f16_to_f32(u16::from_ne_bytes(b)));
            }
        }
    }
}

/// Fills `out` with the weights of one output of a panel.
#[inline(always)]
fn unpack<const N: usize>(
    panel: &[Line],
    lane: usize,
    weight_type: WeightType,
    out: &mut [f32],
    from_bytes: impl Fn([u8; N]) -> f32,
) {
    for (line, out) in panel.iter().zip(out.chunks_mut(weight_type.inputs_per_line())) {
        for (input, out) in out.iter_mut().enumerate() {
            *out = from_bytes(line.0.as_chunks::<N>().0[weight_type.element(lane, input)]);
        }
    }
}

fn assert_size(len: usize, out: usize, inp: usize) {
    assert!(Some(len) == out.checked_mul(inp), "{len} weights for a matrix of shape [{out}, {inp}]");
}

#[cfg(test)]
mod tests {
    use super::*;

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
