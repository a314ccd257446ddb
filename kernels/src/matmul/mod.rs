//! Activations times a packed weight matrix: `out[r][o] = sum over k of x[r][k] * w[o][k] (+ bias[o])`.
//!
//! Weights of f32, bf16 and f16: each output is one chain of fused multiply-adds over `k` ascending,
//! starting at 0; the bias is added last. Quantised weights: see [`quantized`]. Lanes, registers, rows
//! and threads run over outputs only.

pub mod gated;
pub mod head;
pub mod heads;
pub mod quantized;
pub(crate) mod scalar;
pub(crate) mod vector;

use std::ops::Range;

use crate::LANES;
use crate::pack::{PackedMatrix, Part};
use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;
use quantized::QuantizedRows;

/// Panels that go to one thread together.
const GROUP: usize = 4;

/// Bytes of quantised activations that a long product works on at a time, so that they stay in a core's
/// cache while all of a task's panels pass by.
const ROW_TILE_BYTES: usize = 256 << 10;

/// The part of a product that one task computes.
pub(crate) struct Tile<'a> {
    pub(crate) input: Input<'a>,
    pub(crate) weights: &'a PackedMatrix,
    pub(crate) part: &'a Part,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) rows: Range<usize>,
    /// Panels of the part.
    pub(crate) panels: Range<usize>,
    pub(crate) out: Place<'a>,
}

/// Where the outputs of a tile go.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) to: &'a SharedOut<'a>,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    /// The row and the output of the matrix that come first.
    pub(crate) first_row: usize,
    pub(crate) first_output: usize,
}

impl Place<'_> {
    /// The element for an output of a row.
    #[inline]
    pub(crate) fn at(&self, row: usize, output: usize) -> usize {
        (row - self.first_row) * self.stride + output - self.first_output
    }
}

/// Rows of activations, as products take them.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub(crate) num_rows: usize,
    /// `[num_rows, in_features]`, for dense weights.
    pub(crate) x: &'a [f32],
    /// The same, for quantised weights.
    pub(crate) quantized: &'a QuantizedRows,
}

/// `out = x * w^T + bias`, with `x: [rows, in_features]`, `bias: [out_features]` and
/// `out: [rows, out_features]`, rows being whatever `x` holds. Activations are quantised on the way if
/// some of the weights are; the buffer for that is the pool's.
///
/// # Panics
/// If a length does not fit the matrix.
pub fn matmul(pool: &ThreadPool, x: &[f32], w: &PackedMatrix, bias: Option<&[f32]>, out: &mut [f32]) {
    let num_rows = check("matmul", x.len(), w, bias);
    assert!(
        out.len() == num_rows * w.out_features(),
        "matmul: out has {} elements for shape [{num_rows}, {}]",
        out.len(),
        w.out_features()
    );
    if num_rows > 0 && w.out_features() > 0 {
        with_input(pool, x, w, |input| product(pool, input, w, bias, out));
    }
}

/// The rows of `x`, lengths checked.
fn check(op: &str, x_len: usize, w: &PackedMatrix, bias: Option<&[f32]>) -> usize {
    let (inp, outp) = (w.in_features(), w.out_features());
    assert!(x_len.is_multiple_of(inp), "{op}: x has {x_len} elements, not whole rows of {inp}");
    if let Some(bias) = bias {
        assert!(bias.len() == outp, "{op}: bias has {} elements for {outp} outputs", bias.len());
    }
    x_len / inp
}

/// Calls `work` with the rows of `x` as `w` takes them.
fn with_input(pool: &ThreadPool, x: &[f32], w: &PackedMatrix, work: impl FnOnce(Input<'_>)) {
    let num_rows = x.len() / w.in_features();
    if w.weight_types().all(|weight_type| !weight_type.is_quantized()) {
        return work(Input { num_rows, x, quantized: &QuantizedRows::new() });
    }
    pool.with_scratch(|quantized| {
        quantized.quantize(pool, x, w.in_features());
        work(Input { num_rows, x, quantized });
    });
}

/// The product, part by part; lengths are checked.
fn product(pool: &ThreadPool, input: Input<'_>, w: &PackedMatrix, bias: Option<&[f32]>, out: &mut [f32]) {
    let out = SharedOut::new(out);
    let out = Place { to: &out, stride: w.out_features(), first_row: 0, first_output: 0 };
    for part in w.parts() {
        let num_panels = part.num_panels();
        // Panels go out in the groups that the kernels take at once.
        let groups = num_panels.div_ceil(GROUP);
        let tasks = pool.num_tasks(groups, GROUP * panel_ns(part, input.num_rows, w.in_features()));
        let tile_rows = tile_rows(part, input.num_rows, w.in_features());
        pool.run(tasks, &|i| {
            let panels = i * groups / tasks * GROUP..num_panels.min((i + 1) * groups / tasks * GROUP);
            for begin in (0..input.num_rows).step_by(tile_rows) {
                let rows = begin..input.num_rows.min(begin + tile_rows);
                let panels = panels.clone();
                // SAFETY: lengths are checked by the caller; tasks have different panels, so different
                // outputs.
                unsafe { compute(pool, &Tile { input, weights: w, part, bias, rows, panels, out }) };
            }
        });
    }
}

/// Computes a tile.
///
/// # Safety
/// The lengths of the tile are checked, and no other task holds its outputs.
unsafe fn compute(pool: &ThreadPool, tile: &Tile<'_>) {
    let kernels = pool.kernels();
    let kernel = if tile.part.weight_type.is_quantized() { kernels.matmul_quantized } else { kernels.matmul };
    // SAFETY: the caller's promise; the pool's table is for this processor.
    unsafe { kernel(tile) }
}

/// Rows that a task takes against all its panels before it takes the next.
fn tile_rows(part: &Part, num_rows: usize, inp: usize) -> usize {
    if part.weight_type.is_quantized() { (ROW_TILE_BYTES / inp).max(16) } else { num_rows.max(1) }
}

/// What a panel takes on one core, about: a nanosecond reads 100 bytes of weights from a cache, or does
/// 120 multiply-adds in f32 or 400 in whole numbers.
fn panel_ns(part: &Part, num_rows: usize, inp: usize) -> usize {
    let per_ns = if part.weight_type.is_quantized() { 400 } else { 120 };
    (part.panel_bytes() / 100).max(num_rows * inp * LANES / per_ns)
}
