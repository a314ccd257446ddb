//! Activations times a packed weight matrix: `out[r][o] = sum over k of x[r][k] * w[o][k] (+ bias[o])`.
//!
//! Weights of f32, bf16 and f16: each output is one chain of fused multiply-adds over `k` ascending,
//! starting at 0; the bias is added last. Quantised weights: see [`quantized`]. Lanes, registers, rows
//! and threads run over outputs only.

pub mod quantized;
pub(crate) mod scalar;
pub(crate) mod vector;

use std::ops::Range;

use crate::LANES;
use crate::pack::{PackedMatrix, Part, WeightType};
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
    /// `[num_rows, in_features]`, for dense weights.
    pub(crate) x: &'a [f32],
    /// The same rows, for quantised weights.
    pub(crate) quantized: &'a QuantizedRows,
    pub(crate) weights: &'a PackedMatrix,
    pub(crate) part: &'a Part,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) rows: Range<usize>,
    /// Panels of the part.
    pub(crate) panels: Range<usize>,
    /// `[num_rows, out_features]`
    pub(crate) out: &'a SharedOut<'a>,
}

/// `out = x * w^T + bias`, with `x: [rows, in_features]`, `bias: [out_features]` and
/// `out: [rows, out_features]`, rows being whatever `x` holds. Activations are quantised on the way if
/// some of the weights are; the buffer for that is the pool's.
///
/// # Panics
/// If a length does not fit the matrix.
pub fn matmul(pool: &ThreadPool, x: &[f32], w: &PackedMatrix, bias: Option<&[f32]>, out: &mut [f32]) {
    let (inp, outp) = (w.in_features(), w.out_features());
    assert!(x.len().is_multiple_of(inp), "matmul: x has {} elements, not whole rows of {inp}", x.len());
    let num_rows = x.len() / inp;
    assert!(
        out.len() == num_rows * outp,
        "matmul: out has {} elements for shape [{num_rows}, {outp}]",
        out.len()
    );
    if let Some(bias) = bias {
        assert!(bias.len() == outp, "matmul: bias has {} elements for {outp} outputs", bias.len());
    }
    if num_rows == 0 || outp == 0 {
        return;
    }
    if w.weight_types().all(|weight_type| !matches!(weight_type, WeightType::Quantized(_))) {
        return parts(pool, x, &QuantizedRows::new(), w, bias, out);
    }
    pool.with_scratch(|quantized| {
        quantized.quantize(pool, x, inp);
        parts(pool, x, quantized, w, bias, out);
    });
}

/// The product, part by part; lengths are checked, and `quantized` holds the rows of `x` if a part asks.
fn parts(
    pool: &ThreadPool,
    x: &[f32],
    quantized: &QuantizedRows,
    w: &PackedMatrix,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    let num_rows = x.len() / w.in_features();
    let out = SharedOut::new(out);
    for part in w.parts() {
        let num_panels = part.num_panels();
        // Panels go out in the groups that the kernels take at once.
        let groups = num_panels.div_ceil(GROUP);
        let tasks = pool.num_tasks(groups, GROUP * panel_ns(part, num_rows, w.in_features()));
        let (kernel, tile_rows) = match part.weight_type {
            WeightType::Quantized(_) => {
                (pool.kernels().matmul_quantized, (ROW_TILE_BYTES / w.in_features()).max(16))
            }
            _ => (pool.kernels().matmul, num_rows),
        };
        pool.run(tasks, &|i| {
            let panels = i * groups / tasks * GROUP..num_panels.min((i + 1) * groups / tasks * GROUP);
            for begin in (0..num_rows).step_by(tile_rows) {
                let rows = begin..num_rows.min(begin + tile_rows);
                let panels = panels.clone();
                let tile = Tile { x, quantized, weights: w, part, bias, rows, panels, out: &out };
                // SAFETY: lengths are checked by the caller; tasks have different panels, so different
                // outputs.
                unsafe { kernel(&tile) }
            }
        });
    }
}

/// What a panel takes on one core, about: a nanosecond reads 100 bytes of weights from a cache, or does
/// 120 multiply-adds in f32 or 400 in whole numbers.
fn panel_ns(part: &Part, num_rows: usize, inp: usize) -> usize {
    let per_ns = match part.weight_type {
        WeightType::Quantized(_) => 400,
        _ => 120,
    };
    (part.panel_bytes() / 100).max(num_rows * inp * LANES / per_ns)
}
