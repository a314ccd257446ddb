//! Rotary position embedding, half-split ("neox") pairing: element `i` of a head's first half is rotated
//! with element `i` of its second half by the angle of the token's position and `i`.
//!
//! `(a, b) -> (fma(a, cos, -(b * sin)), fma(b, cos, a * sin))`.

pub(crate) mod scalar;
pub(crate) mod vector;

use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// Angles, and where the heads stand.
#[derive(Clone, Copy, Debug)]
pub struct Rope<'a> {
    /// `[max_positions, head_dim / 2]`
    pub cos: &'a [f32],
    /// `[max_positions, head_dim / 2]`
    pub sin: &'a [f32],
    /// `[num_tokens]`: the absolute position of each row.
    pub positions: &'a [u32],
    /// Consecutive heads of a row to rotate. Query and key heads of a stacked projection are
    /// neighbours, so one call does both.
    pub num_heads: usize,
    /// Width of a head, or of the part of it that turns; even.
    pub head_dim: usize,
    /// Elements from one head to the next; at least `head_dim`.
    pub head_stride: usize,
    /// Elements from one row's first head to the next row's.
    pub row_stride: usize,
}

/// Rotates, in place, `args.num_heads` heads of each row of `x`; row `r` begins at `r * row_stride`.
///
/// # Panics
/// If `x` or a table is too short, a position is outside the tables, or `head_dim` is odd.
pub fn rope(pool: &ThreadPool, x: &mut [f32], args: &Rope<'_>) {
    let Rope { cos, sin, positions, num_heads, head_dim, head_stride, row_stride } = *args;
    let half = head_dim / 2;
    let width = num_heads.checked_sub(1).map_or(0, |last| last * head_stride + head_dim);
    assert!(half > 0 && head_dim % 2 == 0, "rope: head_dim is {head_dim}; it must be even and not 0");
    assert!(head_stride >= head_dim, "rope: heads of {head_dim} elements with a stride of {head_stride}");
    assert!(row_stride >= width, "rope: rows of {width} elements with a stride of {row_stride}");
    assert!(cos.len() == sin.len(), "rope: {} cosines and {} sines", cos.len(), sin.len());
    let rows = positions.len();
    let needed = rows.checked_sub(1).map_or(0, |last| last * row_stride + width);
    assert!(x.len() >= needed, "rope: x has {} elements; {rows} rows need {needed}", x.len());
    let max_positions = cos.len() / half;
    if let Some(&position) = positions.iter().find(|&&p| p as usize >= max_positions) {
        panic!("rope: position {position} in a table of {max_positions} positions");
    }
    let x = SharedOut::new(x);
    let tasks = pool.num_tasks(rows, 1 + num_heads * head_dim / 8);
    pool.run(tasks, &|i| {
        let begin = i * rows / tasks;
        for (row, &position) in positions[begin..(i + 1) * rows / tasks].iter().enumerate() {
            let row = begin + row;
            let angles = position as usize * half..(position as usize + 1) * half;
            // SAFETY: a row belongs to one task and rows do not overlap.
            let heads = unsafe { x.part(row * row_stride, width) };
            for head in heads.chunks_mut(head_stride) {
                let head = &mut head[..head_dim];
                // SAFETY: the head is twice as long as its angles.
                unsafe { (pool.kernels().rope)(head, &cos[angles.clone()], &sin[angles.clone()]) };
            }
        }
    });
}
