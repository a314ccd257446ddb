//! Activations times a packed weight matrix: `out[r][o] = sum over k of x[r][k] * w[o][k] (+ bias[o])`.
//!
//! Each output is one chain of fused multiply-adds over `k` ascending, starting at 0; the bias is added
//! last. Lanes, registers, rows and threads run over outputs only.

pub(crate) mod scalar;
pub(crate) mod vector;

use std::ops::Range;

use crate::LANES;
use crate::pack::PackedMatrix;
use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// Panels that go to one thread together.
const GROUP: usize = 4;

/// The part of a product that one task computes.
pub(crate) struct Tile<'a> {
    /// `[num_rows, in_features]`
    pub(crate) x: &'a [f32],
    pub(crate) weights: &'a PackedMatrix,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) rows: Range<usize>,
    pub(crate) panels: Range<usize>,
    /// `[num_rows, out_features]`
    pub(crate) out: &'a SharedOut<'a>,
}

/// `out = x * w^T + bias`, with `x: [rows, in_features]`, `bias: [out_features]` and
/// `out: [rows, out_features]`, rows being whatever `x` holds.
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
    let out = SharedOut::new(out);
    // About 100 bytes of weights, or 120 multiply-adds, a nanosecond.
    let panel_ns = (w.panel_bytes() / 100).max(num_rows * inp * LANES / 120);
    // Panels go out in the groups that the kernels take at once.
    let num_panels = w.num_panels();
    let groups = num_panels.div_ceil(GROUP);
    let tasks = pool.num_tasks(groups, GROUP * panel_ns);
    pool.run(tasks, &|i| {
        let panels = i * groups / tasks * GROUP..num_panels.min((i + 1) * groups / tasks * GROUP);
        let tile = Tile { x, weights: w, bias, rows: 0..num_rows, panels, out: &out };
        // SAFETY: lengths are checked above; tasks have different panels, so different outputs.
        unsafe { (pool.kernels().matmul)(&tile) }
    });
}
