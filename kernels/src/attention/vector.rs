//! Attention over 16 lanes: of keys for the scores, of the head for the values.
//!
//! `R` query rows (tokens of one sequence and heads of one group) go through the context together, so
//! each key and value that is loaded serves all of them. Rows that see less of a chunk than others
//! take part in what they see: a score beyond a row's position becomes a weight of 0, and values are
//! added up to each row's own position only (a slot that was never written may hold anything).

#![allow(
    clippy::needless_range_loop,
    reason = "indices name rows, panels and tiles of several arrays at once"
)]

use std::ops::Range;

use super::{CHUNK, MAX_HEAD_DIM, Output, Task};
use crate::LANES;
use crate::kv::KvLayout;
use crate::math::exp as scalar_exp;
use crate::simd::{Simd, exp};

/// An instruction set's compiled row groups.
pub(crate) trait Target {
    /// Query rows of the largest group.
    const MAX_ROWS: usize;
    /// [`group`] in a function that enables the instruction set.
    ///
    /// # Safety
    /// As for [`group`].
    unsafe fn group<const R: usize>(task: &Task<'_>, first_row: usize);
}

/// # Safety
/// The processor has the target's instruction set; the arguments are checked and no other task holds
/// the same rows and head.
pub(crate) unsafe fn attention<T: Target>(task: &Task<'_>) {
    let num_rows = task.rows.len();
    let num_groups = num_rows.div_ceil(T::MAX_ROWS);
    for i in 0..num_groups {
        let begin = task.rows.start + i * num_rows / num_groups;
        let end = task.rows.start + (i + 1) * num_rows / num_groups;
        // SAFETY: the caller's promise; the rows are the task's.
        unsafe {
            match end - begin {
                1 => T::group::<1>(task, begin),
                2 => T::group::<2>(task, begin),
                3 => T::group::<3>(task, begin),
                4 => T::group::<4>(task, begin),
                5 => T::group::<5>(task, begin),
                _ => T::group::<6>(task, begin),
            }
        }
    }
}

/// What the rows of a group have gathered so far, and what they need.
struct Group<'a, const R: usize> {
    task: &'a Task<'a>,
    /// `token * num_heads + head`
    rows: [usize; R],
    queries: [*const f32; R],
    /// Where a row's weighted values go.
    outs: [*mut f32; R],
    positions: [usize; R],
    max: [f32; R],
    sum: [f32; R],
}

/// One chunk as the rows see it.
struct Chunk<const R: usize> {
    /// Position of its first key.
    start: usize,
    /// True if there is nothing yet to merge it with.
    first: bool,
    /// Keys that each row sees.
    visible: [usize; R],
    /// Scores, then weights.
    weights: [[f32; CHUNK]; R],
}

/// Computes `R` rows, from `first_row`, over their whole context.
///
/// # Safety
/// The processor has `V`'s instruction set; the arguments are checked; rows `first_row..first_row + R`
/// are the task's, and no other task holds them. `T` tiles of 16 keys and `C` vectors of a head are
/// taken at once.
#[inline(always)]
pub(crate) unsafe fn group<V: Simd, const R: usize, const T: usize, const C: usize>(
    task: &Task<'_>,
    first_row: usize,
) {
    let args = task.args;
    let (heads_per_kv, head_dim) = (args.group(), args.layout.head_dim);
    let first_token = args.tokens(task.sequence).start;
    let mut group: Group<'_, R> = Group {
        task,
        rows: [0; R],
        queries: [std::ptr::null(); R],
        outs: [std::ptr::null_mut(); R],
        positions: [0; R],
        max: [f32::NEG_INFINITY; R],
        sum: [0.0; R],
    };
    for r in 0..R {
        let (token, head) = ((first_row + r) / heads_per_kv, (first_row + r) % heads_per_kv);
        let head = task.kv_head * heads_per_kv + head;
        group.rows[r] = (first_token + token) * args.num_heads + head;
        group.positions[r] = args.start_position(task.sequence) + token;
        let at = (first_token + token) * args.q_row_stride + head * head_dim;
        // SAFETY: the checked lengths cover every token's queries.
        group.queries[r] = unsafe { args.q.as_ptr().add(at) };
        if let Output::Whole(out) = &task.output {
            // SAFETY: and its outputs.
            group.outs[r] = unsafe { out.start().add(group.rows[r] * head_dim) };
        }
    }
    // Rows ascend in position, so the last row sees the most.
    let seen = group.positions[R - 1] / CHUNK + 1;
    let mut chunk = Chunk { start: 0, first: true, visible: [0; R], weights: [[0.0; CHUNK]; R] };
    for index in task.output.chunks(seen) {
        chunk.start = index * CHUNK;
        chunk.first = index == 0;
        for r in 0..R {
            chunk.visible[r] = (group.positions[r] + 1).saturating_sub(chunk.start).min(CHUNK);
        }
        // SAFETY: the caller's promise; columns are below `head_dim`.
        unsafe {
            if let Output::Parts { parts, num_chunks, .. } = &task.output {
                chunk.first = true;
                for r in 0..R {
                    group.max[r] = f32::NEG_INFINITY;
                    group.outs[r] = parts.start().add((group.rows[r] * num_chunks + index) * (head_dim + 2));
                }
            }
            group.score::<V, T>(&mut chunk);
            let merges = group.weigh::<V>(&mut chunk);
            let mut column = 0;
            while column + C * LANES <= head_dim {
                group.gather::<V, C>(&chunk, &merges, column, LANES);
                column += C * LANES;
            }
            while column < head_dim {
                group.gather::<V, 1>(&chunk, &merges, column, LANES.min(head_dim - column));
                column += LANES;
            }
            if let Output::Parts { .. } = task.output {
                for r in 0..R {
                    if chunk.visible[r] > 0 {
                        *group.outs[r].add(head_dim) = group.max[r];
                        *group.outs[r].add(head_dim + 1) = group.sum[r];
                    }
                }
            }
        }
    }
    if let Output::Whole(_) = task.output {
        for r in 0..R {
            // SAFETY: the row's outputs are the task's.
            unsafe { rescale::<V>(group.outs[r], head_dim, 1.0 / group.sum[r]) };
        }
    }
}

/// Multiplies `len` elements by `scale`.
///
/// # Safety
/// The processor has `V`'s instruction set; the elements are the caller's.
#[inline(always)]
unsafe fn rescale<V: Simd>(values: *mut f32, len: usize, scale: f32) {
    let mut i = 0;
    while i < len {
        // SAFETY: at most `len - i` elements at `i`.
        unsafe {
            let (at, count) = (values.add(i), LANES.min(len - i));
            V::load_part(at, count).mul(V::splat(scale)).store_part(at, count);
        }
        i += LANES;
    }
}

/// Merges the parts `[num_chunks, head_dim + 2]` of a row, at least one, in order.
///
/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn merge<V: Simd>(parts: &[f32], out: &mut [f32]) {
    let head_dim = out.len();
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0f32);
    for (chunk, part) in parts.chunks_exact(head_dim + 2).enumerate() {
        let (chunk_max, chunk_sum) = (part[head_dim], part[head_dim + 1]);
        let new_max = max.max(chunk_max);
        let (a, b) = (scalar_exp(max - new_max), scalar_exp(chunk_max - new_max));
        let mut i = 0;
        while i < head_dim {
            // SAFETY: at most `head_dim - i` elements at `i` of either.
            unsafe {
                let (at, count) = (out.as_mut_ptr().add(i), LANES.min(head_dim - i));
                let part = V::load_part(part.as_ptr().add(i), count);
                let merged = if chunk == 0 {
                    part
                } else {
                    V::load_part(at, count).fma(V::splat(a), part.mul(V::splat(b)))
                };
                merged.store_part(at, count);
            }
            i += LANES;
        }
        sum = if chunk == 0 { chunk_sum } else { sum.mul_add(a, chunk_sum * b) };
        max = new_max;
    }
    // SAFETY: the whole of `out`.
    unsafe { rescale::<V>(out.as_mut_ptr(), head_dim, 1.0 / sum) };
}

/// The factors with which a chunk joins what a row has; `None` leaves the row as it is.
type Merges<const R: usize> = [Option<(f32, f32)>; R];

impl<const R: usize> Group<'_, R> {
    /// Scaled scores of all keys of the chunk that the last row sees.
    ///
    /// # Safety
    /// As for [`group`].
    #[inline(always)]
    unsafe fn score<V: Simd, const T: usize>(&self, chunk: &mut Chunk<R>) {
        let layout = &self.task.args.layout;
        let end = chunk.start + chunk.visible[R - 1];
        let mut position = chunk.start;
        // SAFETY: keys below `end` are in the checked blocks; with a block size that is a multiple of
        // 16, so is the rest of the last tile.
        unsafe {
            if layout.block_size.is_multiple_of(LANES) {
                while position + (T - 1) * LANES < end {
                    let keys: [*const f32; T] = std::array::from_fn(|t| self.key(position + t * LANES));
                    self.score_tiles::<V, T>(chunk, position, keys, layout.block_size);
                    position += T * LANES;
                }
                while position < end {
                    self.score_tiles::<V, 1>(chunk, position, [self.key(position)], layout.block_size);
                    position += LANES;
                }
            } else {
                let mut tile = [0.0f32; MAX_HEAD_DIM * LANES];
                while position < end {
                    for lane in 0..LANES.min(end - position) {
                        let key = self.key(position + lane);
                        for d in 0..layout.head_dim {
                            tile[d * LANES + lane] = *key.add(d * layout.block_size);
                        }
                    }
                    self.score_tiles::<V, 1>(chunk, position, [tile.as_ptr()], LANES);
                    position += LANES;
                }
            }
        }
    }

    /// Scores of `T` tiles of 16 keys from `position`; elements of a key are `stride` apart.
    ///
    /// # Safety
    /// As for [`group`]; the tiles are readable.
    #[inline(always)]
    unsafe fn score_tiles<V: Simd, const T: usize>(
        &self,
        chunk: &mut Chunk<R>,
        position: usize,
        keys: [*const f32; T],
        stride: usize,
    ) {
        // SAFETY: the caller's promise; a query has `head_dim` elements, a chunk's row `CHUNK`.
        unsafe {
            let mut scores = [[V::splat(0.0); T]; R];
            for d in 0..self.task.args.layout.head_dim {
                let mut tiles = [V::splat(0.0); T];
                for t in 0..T {
                    tiles[t] = V::load(keys[t].add(d * stride));
                }
                for r in 0..R {
                    let q = V::splat(*self.queries[r].add(d));
                    for t in 0..T {
                        scores[r][t] = q.fma(tiles[t], scores[r][t]);
                    }
                }
            }
            let scale = V::splat(self.task.args.scale);
            for r in 0..R {
                for t in 0..T {
                    let at = position - chunk.start + t * LANES;
                    scores[r][t].mul(scale).store(chunk.weights[r].as_mut_ptr().add(at));
                }
            }
        }
    }

    /// Turns each row's scores into weights, and merges maximum and sum.
    ///
    /// # Safety
    /// As for [`group`].
    #[inline(always)]
    unsafe fn weigh<V: Simd>(&mut self, chunk: &mut Chunk<R>) -> Merges<R> {
        let mut merges = [None; R];
        for (r, merge) in merges.iter_mut().enumerate() {
            let visible = chunk.visible[r];
            if visible == 0 {
                continue;
            }
            let padded = visible.next_multiple_of(LANES);
            let weights = &mut chunk.weights[r];
            weights[visible..padded].fill(f32::NEG_INFINITY);
            // SAFETY: whole vectors below `padded <= CHUNK`.
            unsafe {
                let mut max = V::splat(f32::NEG_INFINITY);
                for tile in weights[..padded].chunks_exact(LANES) {
                    max = V::load(tile.as_ptr()).max(max);
                }
                let chunk_max = max.largest();
                let mut sum = V::splat(0.0);
                for tile in weights[..padded].chunks_exact_mut(LANES) {
                    let weight = exp(V::load(tile.as_ptr()).sub(V::splat(chunk_max)));
                    weight.store(tile.as_mut_ptr());
                    sum = sum.add(weight);
                }
                let chunk_sum = sum.sum();
                let new_max = self.max[r].max(chunk_max);
                let a = scalar_exp(self.max[r] - new_max);
                let b = scalar_exp(chunk_max - new_max);
                self.sum[r] = if chunk.first { chunk_sum } else { self.sum[r].mul_add(a, chunk_sum * b) };
                self.max[r] = new_max;
                *merge = Some((a, b));
            }
        }
        merges
    }

    /// Adds the weighted values to `C` vectors of the outputs from `column`. `count` is 16, or what is
    /// left of the head when `C` is 1.
    ///
    /// # Safety
    /// As for [`group`]; the columns are below `head_dim`.
    #[inline(always)]
    unsafe fn gather<V: Simd, const C: usize>(
        &self,
        chunk: &Chunk<R>,
        merges: &Merges<R>,
        column: usize,
        count: usize,
    ) {
        let shared = chunk.visible.iter().copied().fold(CHUNK, usize::min);
        // SAFETY: the caller's promise; keys below the last row's position are in the checked blocks.
        unsafe {
            let mut parts = [[V::splat(0.0); C]; R];
            self.add_values::<V, C, true>(chunk, &mut parts, 0..shared, column, count);
            self.add_values::<V, C, false>(chunk, &mut parts, shared..chunk.visible[R - 1], column, count);
            for r in 0..R {
                let Some((a, b)) = merges[r] else { continue };
                for c in 0..C {
                    let at = self.outs[r].add(column + c * LANES);
                    let merged = if chunk.first {
                        parts[r][c]
                    } else {
                        V::load_part(at, count).fma(V::splat(a), parts[r][c].mul(V::splat(b)))
                    };
                    merged.store_part(at, count);
                }
            }
        }
    }

    /// The chain of [`gather`](Self::gather) over some keys of the chunk: for all rows if `ALL`, else for
    /// those that see the key.
    ///
    /// # Safety
    /// As for [`gather`](Self::gather); the last row sees the keys.
    #[inline(always)]
    unsafe fn add_values<V: Simd, const C: usize, const ALL: bool>(
        &self,
        chunk: &Chunk<R>,
        parts: &mut [[V; C]; R],
        keys: Range<usize>,
        column: usize,
        count: usize,
    ) {
        let KvLayout { block_size, head_dim, .. } = self.task.args.layout;
        let mut key = keys.start;
        while key < keys.end {
            let run = (block_size - (chunk.start + key) % block_size).min(keys.end - key);
            // SAFETY: the caller's promise; values of one block follow one another.
            unsafe {
                let mut at = self.value(chunk.start + key).add(column);
                for key in key..key + run {
                    let mut values = [V::splat(0.0); C];
                    for c in 0..C {
                        let at = at.add(c * LANES);
                        values[c] = if count == LANES { V::load(at) } else { V::load_part(at, count) };
                    }
                    for r in 0..R {
                        if ALL || key < chunk.visible[r] {
                            let weight = V::splat(*chunk.weights[r].get_unchecked(key));
                            for c in 0..C {
                                parts[r][c] = weight.fma(values[c], parts[r][c]);
                            }
                        }
                    }
                    at = at.wrapping_add(head_dim);
                }
            }
            key += run;
        }
    }

    /// The first element of the key at `position`.
    ///
    /// # Safety
    /// The position is below the context length.
    #[inline(always)]
    unsafe fn key(&self, position: usize) -> *const f32 {
        let (tile, offset) = self.task.locate(position);
        // SAFETY: the checked blocks cover the context.
        unsafe { self.task.args.k_cache.as_ptr().add(tile + offset) }
    }

    /// The first element of the value at `position`.
    ///
    /// # Safety
    /// The position is below the context length.
    #[inline(always)]
    unsafe fn value(&self, position: usize) -> *const f32 {
        let (tile, offset) = self.task.locate(position);
        // SAFETY: the checked blocks cover the context.
        unsafe { self.task.args.v_cache.as_ptr().add(tile + offset * self.task.args.layout.head_dim) }
    }
}
