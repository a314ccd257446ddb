//! Products with quantised weights, in whole numbers.
//!
//! Activations are quantised first ([`QuantizedRows`]): every 32 inputs share one scale, the largest
//! magnitude over 127, and each becomes the nearest whole number of scales, ties to even. Then, for every
//! output, with `w` the code's whole number ([`crate::quant`]) and `a` the activation's:
//!
//! ```text
//! block by block, ascending:   y = fma(sum(w * a), scale of w * scale of a, y)
//!                              y = fma(minimum of w, sum(a) * scale of a, y)     if there are minima
//! ```
//!
//! Blocks are the 16 or 32 inputs that share a weight scale. Sums of whole numbers are exact in 32 bits and
//! in f32, so this order of the few float operations is all that an instruction set must keep. The bias
//! is added last.
//!
//! **Not finite**: 32 inputs that hold a NaN or an infinity have a NaN for their scale and zeros for codes,
//! so every output of that row is NaN. A largest magnitude below `127 * f32::MIN_POSITIVE` counts as zero.
//!
//! **Why a scale for 32**, not for 256: real activations have channels far larger than the rest, and each
//! takes its neighbours' precision. Root mean square error of a product, in percent of the product's (3584
//! inputs, exact weights):
//!
//! | activations | a scale for 256 | for 32 |
//! |---|---|---|
//! | normal | 0.70 | 0.54 |
//! | normal, channels of log-normal size (sigma 0.8) | 1.7 | 0.87 |
//! | normal, three channels a hundred times larger | 3.5 | 1.2 |
//!
//! Weights of Q8_0 alone cost 0.54, those of Q4_0 8.7. The finer scales take one more multiplication for
//! eight dot products, which only a long prefill feels.

mod dots;
pub(crate) mod formats;
pub(crate) mod grouped;
pub(crate) mod scalar;
pub(crate) mod vector;

use crate::pack::quantized::CHUNK;
use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// Inputs of a row that one thread quantises at a time.
const PIECE: usize = 512;

/// Elements that are quantised in a nanosecond on one core, about.
const ELEMENTS_PER_NS: usize = 4;

/// Rows of activations in whole numbers; a buffer that is used again and again.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    inputs: usize,
    /// `[rows][stride]`
    codes: Vec<i8>,
    /// One for every 32 inputs, `[rows][inputs / 32]`.
    scales: Vec<f32>,
    /// Minus the sum of the codes of every 16 inputs, `[rows][inputs / 16]`.
    neg_sums16: Vec<i32>,
    /// The same of every 32.
    neg_sums32: Vec<i32>,
    /// The same times their scale, which is what a minimum is multiplied with.
    scaled_neg_sums: Vec<f32>,
}

/// The place for some of a row of [`QuantizedRows`], in multiples of 32 inputs.
pub(crate) struct RowMut<'a> {
    pub(crate) codes: &'a mut [i8],
    pub(crate) scales: &'a mut [f32],
    pub(crate) neg_sums16: &'a mut [i32],
    pub(crate) neg_sums32: &'a mut [i32],
    pub(crate) scaled_neg_sums: &'a mut [f32],
}

/// A row of [`QuantizedRows`].
#[derive(Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) codes: &'a [i8],
    pub(crate) scales: &'a [f32],
    pub(crate) neg_sums16: &'a [i32],
    pub(crate) neg_sums32: &'a [i32],
    pub(crate) scaled_neg_sums: &'a [f32],
}

impl QuantizedRows {
    /// An empty buffer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Elements from one row's codes to the next's: off the powers of two at which rows would share
    /// the same few places of a cache.
    pub(crate) fn stride(&self) -> usize {
        self.inputs + 64
    }

    /// Inputs of a row.
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn row(&self, row: usize) -> Row<'_> {
        let inputs = self.inputs;
        Row {
            codes: &self.codes[row * self.stride()..][..inputs],
            scales: &self.scales[row * (inputs / 32)..][..inputs / 32],
            neg_sums16: &self.neg_sums16[row * (inputs / 16)..][..inputs / 16],
            neg_sums32: &self.neg_sums32[row * (inputs / 32)..][..inputs / 32],
            scaled_neg_sums: &self.scaled_neg_sums[row * (inputs / 32)..][..inputs / 32],
        }
    }

    /// Quantises `x: [rows, inputs]`.
    ///
    /// # Panics
    /// If `x` is not whole rows, or `inputs` is not a multiple of 32.
    pub fn quantize(&mut self, pool: &ThreadPool, x: &[f32], inputs: usize) {
        assert!(
            inputs > 0 && inputs.is_multiple_of(CHUNK),
            "rows of {inputs} are quantised in multiples of {CHUNK}"
        );
        assert!(x.len().is_multiple_of(inputs), "x has {} elements, not whole rows of {inputs}", x.len());
        let shared = self.begin(x.len() / inputs, inputs);
        // Parts of rows, so that a single long row is shared out as well.
        let pieces = inputs.div_ceil(PIECE);
        let units = x.len() / inputs * pieces;
        let tasks = pool.num_tasks(units, 1 + PIECE.min(inputs) / ELEMENTS_PER_NS);
        pool.run(tasks, &|i| {
            for unit in i * units / tasks..(i + 1) * units / tasks {
                let (row, begin) = (unit / pieces, unit % pieces * PIECE);
                let len = PIECE.min(inputs - begin);
                // SAFETY: a piece belongs to one task; its length is a multiple of 32.
                unsafe {
                    let to = shared.part(row, begin, len);
                    (pool.kernels().quantize)(&x[row * inputs + begin..][..len], to);
                }
            }
        });
    }

    /// Makes room for `rows` rows of `inputs`, a multiple of 32, to be written by several threads.
    pub(crate) fn begin(&mut self, rows: usize, inputs: usize) -> SharedRows<'_> {
        self.inputs = inputs;
        let stride = self.stride();
        grow(&mut self.codes, rows * stride);
        grow(&mut self.scales, rows * (inputs / 32));
        grow(&mut self.neg_sums16, rows * (inputs / 16));
        grow(&mut self.neg_sums32, rows * (inputs / 32));
        grow(&mut self.scaled_neg_sums, rows * (inputs / 32));
        SharedRows {
            inputs,
            stride,
            codes: SharedOut::new(&mut self.codes),
            scales: SharedOut::new(&mut self.scales),
            neg_sums16: SharedOut::new(&mut self.neg_sums16),
            neg_sums32: SharedOut::new(&mut self.neg_sums32),
            scaled_neg_sums: SharedOut::new(&mut self.scaled_neg_sums),
        }
    }
}

/// [`QuantizedRows`] whose parts several threads write.
pub(crate) struct SharedRows<'a> {
    inputs: usize,
    stride: usize,
    codes: SharedOut<'a, i8>,
    scales: SharedOut<'a, f32>,
    neg_sums16: SharedOut<'a, i32>,
    neg_sums32: SharedOut<'a, i32>,
    scaled_neg_sums: SharedOut<'a, f32>,
}

impl SharedRows<'_> {
    /// The place for inputs `begin..begin + len` of a row, both multiples of 32.
    ///
    /// # Safety
    /// No two live parts may overlap.
    pub(crate) unsafe fn part(&self, row: usize, begin: usize, len: usize) -> RowMut<'_> {
        let (at16, at32) = (row * (self.inputs / 16) + begin / 16, row * (self.inputs / 32) + begin / 32);
        // SAFETY: the caller's promise.
        unsafe {
            RowMut {
                codes: self.codes.part(row * self.stride + begin, len),
                scales: self.scales.part(at32, len / 32),
                neg_sums16: self.neg_sums16.part(at16, len / 16),
                neg_sums32: self.neg_sums32.part(at32, len / 32),
                scaled_neg_sums: self.scaled_neg_sums.part(at32, len / 32),
            }
        }
    }
}

/// At least `len` elements; what they are is written afterwards.
fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}
