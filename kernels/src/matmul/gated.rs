//! A gated feed-forward layer in two steps: `down(gate(gates, ups))`, gates and ups being the halves of one
//! product.
//!
//! A task takes some columns of both halves together: it computes them for a few dozen rows, applies the gate
//! and quantises the result for the second product, all in a few kilobytes. So what lies between the two
//! products, several times as wide as a row of the model, is written to memory once and in bytes, if the second
//! weights are quantised. The operations on an element are those of [`matmul`](super::matmul) and
//! [`gate_stacked`](crate::gate::gate_stacked).

use std::cell::RefCell;
use std::ops::Range;

use super::quantized::{QuantizedRows, SharedRows};
use super::{GROUP, Input, Place, Tile, check, compute, panel_ns, product, tile_rows, with_input};
use crate::LANES;
use crate::gate::Gate;
use crate::pack::{PackedMatrix, Part};
use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// A layer's weights.
#[derive(Clone, Copy, Debug)]
pub struct FeedForward<'a> {
    /// `[2 * width, inputs]`: gates, then ups.
    pub up: &'a PackedMatrix,
    /// `[2 * width]`
    pub up_bias: Option<&'a [f32]>,
    /// What joins the two.
    pub gate: Gate,
    /// `[outputs, width]`
    pub down: &'a PackedMatrix,
    /// `[outputs]`
    pub down_bias: Option<&'a [f32]>,
}

/// Outputs of a half that a task holds at a time, of all rows together.
const SCRATCH: usize = 3072;
/// Rows that it holds at a time.
const SCRATCH_ROWS: usize = 48;

/// Columns go out in groups of so many.
const GROUP_COLUMNS: usize = GROUP * LANES;

const _: () = assert!(SCRATCH_ROWS * GROUP_COLUMNS <= SCRATCH && GROUP_COLUMNS.is_multiple_of(32));

/// What lies between the two products.
#[derive(Default)]
struct Between {
    quantized: QuantizedRows,
    dense: Vec<f32>,
}

/// The layer's answer to every row of `x: [rows, inputs]` in `out: [rows, outputs]`.
///
/// # Panics
/// If a length does not fit the others.
pub fn feed_forward(pool: &ThreadPool, x: &[f32], layer: &FeedForward<'_>, out: &mut [f32]) {
    thread_local! {
        /// The caller's, kept from one pass to the next.
        static BETWEEN: RefCell<Between> = RefCell::default();
    }
    let FeedForward { up, up_bias, down, down_bias, .. } = *layer;
    let width = down.in_features();
    assert!(
        up.out_features() == 2 * width,
        "feed_forward: {} gates and ups for a width of {width}",
        up.out_features()
    );
    let rows = check("feed_forward", x.len(), up, up_bias);
    check("feed_forward", rows * width, down, down_bias);
    assert!(
        out.len() == rows * down.out_features(),
        "feed_forward: out has {} elements for shape [{rows}, {}]",
        out.len(),
        down.out_features()
    );
    if rows == 0 || out.is_empty() {
        return;
    }
    BETWEEN.with_borrow_mut(|Between { quantized, dense }| {
        let takes_f32 = down.weight_types().any(|weight_type| !weight_type.is_quantized());
        with_input(pool, x, up, |input| match Halves::of(up, width) {
            Some(halves) if !takes_f32 => {
                let to = To::Quantized(quantized.begin(rows, width));
                gated(pool, input, layer, &halves, &to);
            }
            Some(halves) => {
                dense.resize(rows * width, 0.0);
                gated(pool, input, layer, &halves, &To::Dense(SharedOut::new(dense)));
            }
            None => {
                let mut gate_up = vec![0.0; rows * 2 * width];
                product(pool, input, up, up_bias, &mut gate_up);
                dense.resize(rows * width, 0.0);
                crate::gate::gate_stacked(pool, layer.gate, &gate_up, width, dense);
            }
        });
        if takes_f32 || Halves::of(up, width).is_none() {
            return with_input(pool, dense, down, |input| product(pool, input, down, down_bias, out));
        }
        product(pool, Input { num_rows: rows, x: &[], quantized }, down, down_bias, out);
    });
}

/// Where gates and ups begin, if both do with a panel.
struct Halves<'a> {
    parts: [&'a Part; 2],
    first_panels: [usize; 2],
}

impl<'a> Halves<'a> {
    fn of(up: &'a PackedMatrix, width: usize) -> Option<Self> {
        match up.parts() {
            [both] if width.is_multiple_of(LANES) => {
                Some(Halves { parts: [both, both], first_panels: [0, width / LANES] })
            }
            [gates, ups] if gates.outputs == width => {
                Some(Halves { parts: [gates, ups], first_panels: [0, 0] })
            }
            _ => None,
        }
    }
}

/// Where the gated elements go.
enum To<'a> {
    Dense(SharedOut<'a>),
    Quantized(SharedRows<'a>),
}

/// The first product and the gate.
fn gated(pool: &ThreadPool, input: Input<'_>, layer: &FeedForward<'_>, halves: &Halves<'_>, to: &To<'_>) {
    let (width, inp) = (layer.down.in_features(), layer.up.in_features());
    let groups = width.div_ceil(GROUP_COLUMNS);
    let ns: usize = halves.parts.iter().map(|part| GROUP * panel_ns(part, input.num_rows, inp)).sum();
    let tasks = pool.num_tasks(groups, ns);
    // As wide as there is room for all rows: weights are streams, and each has a beginning to wait for.
    let rows_at_once = input.num_rows.min(SCRATCH_ROWS);
    let columns_at_once = SCRATCH / rows_at_once / GROUP_COLUMNS * GROUP_COLUMNS;
    let tile_rows = halves.parts.map(|part| tile_rows(part, input.num_rows, inp)).into_iter().min();
    let tile_rows = tile_rows.unwrap_or(1).next_multiple_of(SCRATCH_ROWS);
    pool.run(tasks, &|i| {
        let task = i * groups / tasks * GROUP_COLUMNS..width.min((i + 1) * groups / tasks * GROUP_COLUMNS);
        for first in (0..input.num_rows).step_by(tile_rows) {
            let tile = first..input.num_rows.min(first + tile_rows);
            for begin in task.clone().step_by(columns_at_once) {
                let columns = begin..task.end.min(begin + columns_at_once);
                for begin in tile.clone().step_by(rows_at_once) {
                    let rows = begin..tile.end.min(begin + rows_at_once);
                    SCRATCH_ROOM.with_borrow_mut(|scratch| {
                        // SAFETY: lengths are checked by the caller; tasks have different columns.
                        unsafe { scratch.compute(pool, input, layer, halves, (rows, columns.clone()), to) };
                    });
                }
            }
        }
    });
}

thread_local! {
    /// One for each thread, as clearing it for every task would cost as much as the gate.
    static SCRATCH_ROOM: RefCell<Box<Scratch>> =
        RefCell::new(Box::new(Scratch { halves: [[0.0; SCRATCH]; 2], row: [0.0; SCRATCH] }));
}

/// A task's room.
struct Scratch {
    /// `[rows, columns]` of gates, and of ups.
    halves: [[f32; SCRATCH]; 2],
    /// `[columns]`
    row: [f32; SCRATCH],
}

impl Scratch {
    /// Some rows and columns of the gated elements.
    ///
    /// # Safety
    /// The lengths are checked, the halves are those of the layer, and no other task holds these columns.
    unsafe fn compute(
        &mut self,
        pool: &ThreadPool,
        input: Input<'_>,
        layer: &FeedForward<'_>,
        halves: &Halves<'_>,
        (rows, columns): (Range<usize>, Range<usize>),
        to: &To<'_>,
    ) {
        for ((part, &first), half) in halves.parts.into_iter().zip(&halves.first_panels).zip(&mut self.halves)
        {
            let half = SharedOut::new(half);
            let panels = first + columns.start / LANES..first + columns.end.div_ceil(LANES);
            let first_output = part.first_output + panels.start * LANES;
            let out = Place { to: &half, stride: columns.len(), first_row: rows.start, first_output };
            let (weights, bias, rows) = (layer.up, layer.up_bias, rows.clone());
            // SAFETY: the caller's promise; the scratch is this task's and holds all rows and columns.
            unsafe { compute(pool, &Tile { input, weights, part, bias, rows, panels, out }) };
        }
        let (width, len, kernels) = (layer.down.in_features(), columns.len(), pool.kernels());
        for (i, row) in rows.enumerate() {
            let [gates, ups] = self.halves.each_ref().map(|half| &half[i * len..][..len]);
            // SAFETY: the caller's promise; lengths are equal, and multiples of 32 where they are quantised.
            unsafe {
                match to {
                    To::Dense(out) => {
                        (kernels.gate)(layer.gate, gates, ups, out.part(row * width + columns.start, len));
                    }
                    To::Quantized(out) => {
                        (kernels.gate)(layer.gate, gates, ups, &mut self.row[..len]);
                        (kernels.quantize)(&self.row[..len], out.part(row, columns.start, len));
                    }
                }
            }
        }
    }
}
