//! Products of heads: each head of a row times a matrix of its own, in one operation for all of them, because
//! one head alone is too little work to share between threads. An output is computed as
//! [`matmul`](super::matmul) would.

use std::cell::RefCell;

use super::{Place, Tile, compute, panel_ns, tile_rows, with_input};
use crate::pack::PackedMatrix;
use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// The matrices of all heads, and how the rows lie.
#[derive(Clone, Copy, Debug)]
pub struct HeadProducts<'a> {
    /// `[num_heads]` of `[out_features, in_features]`.
    pub weights: &'a [PackedMatrix],
    /// Elements of a head after those that its product takes; they follow its outputs as they are.
    pub tail: usize,
    /// Elements from one row of the output to the next.
    pub out_row_stride: usize,
}

/// `x: [rows, num_heads, in_features + tail]` to `[num_heads, out_features + tail]` at the beginning of each
/// row of `out`.
///
/// # Panics
/// If there is no head, the matrices are not of one shape, or a length does not fit.
pub fn head_matmul(pool: &ThreadPool, x: &[f32], heads: &HeadProducts<'_>, out: &mut [f32]) {
    thread_local! {
        /// The caller's, kept from one pass to the next: `[num_heads, rows, in_features]`.
        static GATHERED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let HeadProducts { weights, tail, out_row_stride } = *heads;
    let (inp, outp) = (weights[0].in_features(), weights[0].out_features());
    assert!(
        weights.iter().all(|w| (w.in_features(), w.out_features()) == (inp, outp)),
        "head_matmul: matrices of several shapes"
    );
    let (in_width, out_width) = (weights.len() * (inp + tail), weights.len() * (outp + tail));
    assert!(x.len().is_multiple_of(in_width), "head_matmul: {} elements in rows of {in_width}", x.len());
    let rows = x.len() / in_width;
    assert!(
        out_row_stride >= out_width,
        "head_matmul: rows of {out_width} with a stride of {out_row_stride}"
    );
    let needed = rows.checked_sub(1).map_or(0, |last| last * out_row_stride + out_width);
    assert!(out.len() >= needed, "head_matmul: out has {} elements; {rows} rows need {needed}", out.len());
    if rows == 0 {
        return;
    }
    GATHERED.with_borrow_mut(|gathered| {
        gathered.clear();
        for head in 0..weights.len() {
            for row in x.chunks_exact(in_width) {
                gathered.extend_from_slice(&row[head * (inp + tail)..][..inp]);
            }
        }
        // Activations are quantised if any head's matrix is.
        let is_quantized = |w: &&PackedMatrix| w.weight_types().any(|kind| kind.is_quantized());
        let typical = weights.iter().find(is_quantized).unwrap_or(&weights[0]);
        let head_ns: usize = typical.parts().iter().map(|p| p.num_panels() * panel_ns(p, rows, inp)).sum();
        let tasks = pool.num_tasks(weights.len(), head_ns);
        let out = SharedOut::new(out);
        with_input(pool, gathered, typical, |input| {
            pool.run(tasks, &|i| {
                for head in i * weights.len() / tasks..(i + 1) * weights.len() / tasks {
                    let of_head = out.after(head * (outp + tail));
                    let first_row = head * rows;
                    let place = Place { to: &of_head, stride: out_row_stride, first_row, first_output: 0 };
                    for part in weights[head].parts() {
                        for begin in (0..rows).step_by(tile_rows(part, rows, inp)) {
                            let end = rows.min(begin + tile_rows(part, rows, inp));
                            let tile = Tile {
                                input,
                                weights: &weights[head],
                                part,
                                bias: None,
                                rows: first_row + begin..first_row + end,
                                panels: 0..part.num_panels(),
                                out: place,
                            };
                            // SAFETY: lengths are checked; a head belongs to one task.
                            unsafe { compute(pool, &tile) };
                        }
                    }
                    for (row, x) in x.chunks_exact(in_width).enumerate() {
                        let from = &x[head * (inp + tail) + inp..][..tail];
                        // SAFETY: as above; no product writes there.
                        unsafe { of_head.part(row * out_row_stride + outp, tail) }.copy_from_slice(from);
                    }
                }
            });
        });
    });
}
