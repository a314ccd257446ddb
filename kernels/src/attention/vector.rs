//! Attention over 16 lanes: of keys for the scores, of the head for the values.
//!
//! The rows of a task (tokens of one sequence and heads of one group) go through the context chunk by
//! chunk, in groups as large as the registers allow, so a chunk's keys and values come from memory once.
//! Rows that see less of a chunk than others take part in what they see: a score that a row does not
//! see becomes a weight of 0, and only the values that it sees are added (a slot that was never written
//! may hold anything).
//!
//! Blocks are scattered, which defeats the processor's own prefetching: while a chunk's keys are read its
//! values are fetched, and while its values are read the next chunk's keys are.

#![allow(
    clippy::needless_range_loop,
    reason = "indices name rows, panels and tiles of several arrays at once"
)]

mod scores;
mod values;

use std::mem::MaybeUninit;

use super::element::{Element, F16, F32, Q8};
use super::{CHUNK, MAX_HEAD_DIM, Output, TASK_ROWS, Task, chunks_of, last_factor};
use crate::LANES;
use crate::kv::{KvLayout, KvType};
use crate::math::exp as scalar_exp;
use crate::simd::{Simd, exp};

/// An instruction set's compiled row groups.
pub(crate) trait Target {
    /// Query rows of the largest group.
    const MAX_ROWS: usize;
    /// [`group`] in a function that enables the instruction set.
    ///
    /// # Safety
    /// As for [`group`], with at most `MAX_ROWS` rows.
    unsafe fn group<E: Element>(group: &Group<'_>, rows: &mut [Row]);
}

/// What a row has gathered so far.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    /// `token * num_heads + head`
    index: usize,
    /// Where its weighted values go.
    out: *mut f32,
    /// Positions of the keys that it sees, from `begin` to `end`; both ascend from row to row.
    begin: usize,
    end: usize,
    max: f32,
    sum: f32,
}

/// One chunk and a group of rows, as the kernel takes them.
pub(crate) struct Group<'a> {
    task: &'a Task<'a>,
    /// `[head_dim, rows]`; `[rows, head_dim]` where keys are rows.
    queries: *const f32,
    /// Position of the chunk's first key.
    start: usize,
    /// Where the chunk's tokens lie, if blocks are made of sixteens.
    places: Option<&'a Places>,
    /// The places whose keys are worth fetching meanwhile.
    ahead: Option<&'a Places>,
    /// `[rows, CHUNK]`, to work in.
    weights: *mut [f32; CHUNK],
}

/// Sixteen tokens of one block.
#[derive(Clone, Copy)]
struct Place {
    /// The first token's key.
    keys: *const u8,
    /// The tokens' values, one after the other.
    values: *const u8,
    /// As many bytes of the block's keys, one after the other: each sixteen of a block has its own.
    share_of_keys: *const u8,
}

/// The tokens of a chunk, or as many as the context has.
type Places = [Place; CHUNK / LANES];

/// Rows of the largest group of any instruction set.
const GROUP_ROWS: usize = 8;

/// # Safety
/// The processor has the target's instruction set; the arguments are checked and no other task holds
/// the same rows, head and chunks.
pub(crate) unsafe fn attention<T: Target>(task: &Task<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match task.args.layout.kv_type {
            KvType::F32 => attend::<T, F32>(task),
            KvType::F16 => attend::<T, F16>(task),
            KvType::Q8 => attend::<T, Q8>(task),
        }
    }
}

/// # Safety
/// As for [`attention`]; the storage is of `E`.
unsafe fn attend<T: Target, E: Element>(task: &Task<'_>) {
    let (args, num_rows) = (task.args, task.rows.len());
    let (head_dim, value_dim) = (args.layout.head_dim, args.layout.value_dim());
    let num_groups = num_rows.div_ceil(T::MAX_ROWS);
    let bounds = |group: usize| group * num_rows / num_groups..(group + 1) * num_rows / num_groups;
    let mut queries = [const { MaybeUninit::<f32>::uninit() }; TASK_ROWS * MAX_HEAD_DIM];
    let nothing = Row { index: 0, out: std::ptr::null_mut(), begin: 0, end: 0, max: 0.0, sum: 0.0 };
    let mut rows = [nothing; TASK_ROWS];
    let rows = &mut rows[..num_rows];
    for group in 0..num_groups {
        let bounds = bounds(group);
        for (r, row) in rows[bounds.clone()].iter_mut().enumerate() {
            let (new, q) = task.row(task.rows.start + bounds.start + r);
            *row = new;
            let (at, step) = if args.keys_are_rows() { (r * head_dim, 1) } else { (r, bounds.len()) };
            for (d, &q) in q.iter().enumerate() {
                queries[bounds.start * head_dim + at + d * step].write(q);
            }
        }
    }
    let chunks = task.output.chunks(chunks_of(&(rows[0].begin..rows[num_rows - 1].end)));
    let end = rows[num_rows - 1].end.min(chunks.end * CHUNK);
    let mut weights = [[0.0f32; CHUNK]; GROUP_ROWS];
    let mut ahead = task.places::<E>(chunks.start * CHUNK, end);
    for chunk in chunks {
        let start = chunk * CHUNK;
        let places = ahead;
        if start + CHUNK < end {
            ahead = task.places::<E>(start + CHUNK, end);
        }
        if let Output::Parts { parts, num_chunks, .. } = &task.output {
            for row in &mut *rows {
                // SAFETY: the parts hold every row's chunks.
                row.out = unsafe { parts.start().add((row.index * num_chunks + chunk) * (value_dim + 2)) };
                row.max = f32::NEG_INFINITY;
            }
        }
        for index in 0..num_groups {
            let bounds = bounds(index);
            // SAFETY: the queries of a group follow those of the groups before it.
            let queries = unsafe { queries.as_ptr().cast::<f32>().add(bounds.start * head_dim) };
            let rows = &mut rows[bounds];
            if rows[0].begin < start + CHUNK && start < rows[rows.len() - 1].end {
                // The first group brings the next chunk into the cache for the others.
                let ahead = if index == 0 { ahead.as_ref() } else { places.as_ref() };
                let weights = weights.as_mut_ptr();
                let group = Group { task, queries, start, places: places.as_ref(), ahead, weights };
                // SAFETY: the caller's promise.
                unsafe { T::group::<E>(&group, rows) };
            }
        }
        if let Output::Parts { .. } = task.output {
            for row in rows.iter().filter(|row| row.begin < start + CHUNK && start < row.end) {
                // SAFETY: a part ends with its maximum and sum.
                unsafe {
                    *row.out.add(value_dim) = row.max;
                    *row.out.add(value_dim + 1) = row.sum;
                }
            }
        }
    }
    if let Output::Whole(_) = task.output {
        for row in &*rows {
            let factor = last_factor(row.max, row.sum, args.sink(row.index % args.num_heads));
            // SAFETY: the row's outputs are the task's.
            let out = unsafe { std::slice::from_raw_parts_mut(row.out, value_dim) };
            out.iter_mut().for_each(|out| *out *= factor);
        }
    }
}

impl<'a> Task<'a> {
    /// Where the tokens of the chunk at `start` lie, sixteen by sixteen, up to `end`; `None` if a block may end
    /// within sixteen.
    fn places<E: Element>(&self, start: usize, end: usize) -> Option<Places> {
        let KvLayout { block_size, head_dim, .. } = self.args.layout;
        if !block_size.is_multiple_of(LANES) {
            return None;
        }
        let (storage, bytes) = (self.args.storage.as_ptr(), E::TYPE.element_bytes());
        let nowhere = std::ptr::null();
        let mut places = [Place { keys: nowhere, values: nowhere, share_of_keys: nowhere }; CHUNK / LANES];
        let mut block = None;
        for (place, position) in places.iter_mut().zip((start..end).step_by(LANES)) {
            let (tile, offset) =
                block.filter(|&(_, offset)| offset < block_size).unwrap_or_else(|| self.locate(position));
            let before = offset * head_dim * bytes;
            // SAFETY: the checked blocks cover the context, and the storage holds them.
            *place = unsafe {
                Place {
                    keys: storage.add(tile.keys + offset * bytes),
                    values: storage.add(tile.values + before),
                    share_of_keys: storage.add(tile.keys + before),
                }
            };
            block = Some((tile, offset + LANES));
        }
        Some(places)
    }

    /// Row `row` of the task's sequence and head as it begins, and its query.
    fn row(&self, row: usize) -> (Row, &'a [f32]) {
        let args = self.args;
        let (heads_per_kv, head_dim) = (args.group(), args.layout.head_dim);
        let token = args.tokens(self.sequence).start + row / heads_per_kv;
        let head = self.kv_head * heads_per_kv + row % heads_per_kv;
        let visible = args.visible(args.start_position(self.sequence) + row / heads_per_kv);
        let index = token * args.num_heads + head;
        let out = match &self.output {
            // SAFETY: the checked length covers every row.
            Output::Whole(out) => unsafe { out.start().add(index * args.layout.value_dim()) },
            Output::Parts { .. } => std::ptr::null_mut(),
        };
        let (begin, end) = (visible.start, visible.end);
        let row = Row { index, out, begin, end, max: f32::NEG_INFINITY, sum: 0.0 };
        (row, &args.q[token * args.q_row_stride + head * head_dim..][..head_dim])
    }
}

/// Merges the parts `[num_chunks, value_dim + 2]` of a row, at least one, in order.
///
/// # Safety
/// The processor has `V`'s instruction set.
#[inline(always)]
pub(crate) unsafe fn merge<V: Simd>(parts: &[f32], sink: Option<f32>, out: &mut [f32]) {
    let value_dim = out.len();
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0f32);
    for (chunk, part) in parts.chunks_exact(value_dim + 2).enumerate() {
        let (chunk_max, chunk_sum) = (part[value_dim], part[value_dim + 1]);
        let new_max = max.max(chunk_max);
        let (a, b) = (scalar_exp(max - new_max), scalar_exp(chunk_max - new_max));
        let mut i = 0;
        while i < value_dim {
            // SAFETY: at most `value_dim - i` elements at `i` of either.
            unsafe {
                let (at, count) = (out.as_mut_ptr().add(i), LANES.min(value_dim - i));
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
    unsafe { rescale::<V>(out.as_mut_ptr(), value_dim, last_factor(max, sum, sink)) };
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

/// The keys of a chunk that each of `R` rows sees, from `begin` to `end`, and what it makes of them.
struct Seen<'a, const R: usize> {
    begin: [usize; R],
    end: [usize; R],
    /// Scores, then weights; beyond what a row sees they mean nothing.
    weights: &'a mut [[f32; CHUNK]; R],
    /// The factors with which the chunk joins what a row has; `None` leaves the row as it is.
    merges: [Option<(f32, f32)>; R],
}

/// Takes `R` rows through one chunk, `W` tiles of 16 keys and `W` vectors of a head at once.
///
/// # Safety
/// The processor has `V`'s instruction set; the arguments are checked and the storage is of `E`; there are
/// `R` rows, they are the task's and no other task holds them; one of them sees some of the chunk.
#[inline(always)]
pub(crate) unsafe fn group<V: Simd, E: Element, const R: usize, const W: usize>(
    group: &Group<'_>,
    rows: &mut [Row],
) {
    let rows: &mut [Row; R] = rows.try_into().expect("the group's rows: this is a bug");
    const { assert!(R <= GROUP_ROWS) };
    let args = group.task.args;
    let value_dim = args.layout.value_dim();
    let within = |position: usize| position.saturating_sub(group.start).min(CHUNK);
    let mut seen = Seen {
        begin: std::array::from_fn(|r| within(rows[r].begin)),
        end: std::array::from_fn(|r| within(rows[r].end)),
        // SAFETY: a group has at most `GROUP_ROWS` rows, and the buffer is its own meanwhile.
        weights: unsafe { &mut *group.weights.cast::<[[f32; CHUNK]; R]>() },
        merges: [None; R],
    };
    // SAFETY: the caller's promise; columns are below `value_dim`.
    unsafe {
        if args.keys_are_rows() {
            group.score_rows::<V, E, R, W>(&mut seen);
        } else {
            group.score::<V, E, R, W>(&mut seen);
        }
        if let Some(cap) = args.soft_cap {
            group.cap::<V, R>(&mut seen, cap);
        }
        group.weigh::<V, E, R>(&mut seen, rows);
        let mut column = 0;
        while column + W * LANES <= value_dim {
            group.gather::<V, E, R, W>(&seen, rows, column, LANES);
            column += W * LANES;
        }
        while column < value_dim {
            group.gather::<V, E, R, 1>(&seen, rows, column, LANES.min(value_dim - column));
            column += LANES;
        }
    }
}

/// Asks for the cache line that holds `at`, which may be anywhere.
#[inline(always)]
fn fetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has it, and it faults on no address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(target_arch = "aarch64")]
    crate::simd::neon::prefetch(at);
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

impl Group<'_> {
    /// Turns each row's scores into weights, and merges maximum and sum.
    ///
    /// # Safety
    /// As for [`group`].
    #[inline(always)]
    unsafe fn weigh<V: Simd, E: Element, const R: usize>(&self, seen: &mut Seen<'_, R>, rows: &mut [Row; R]) {
        // A lane for each row.
        let mut maxima = [f32::NEG_INFINITY; LANES];
        let mut chunk_maxima = [f32::NEG_INFINITY; LANES];
        let mut chunk_sums = [0.0f32; R];
        for r in 0..R {
            maxima[r] = rows[r].max;
            if seen.begin[r] < seen.end[r] {
                // SAFETY: the caller's promise.
                (chunk_maxima[r], chunk_sums[r]) = unsafe { self.weigh_row::<V, E, R>(seen, r) };
            }
        }
        let [mut new_maxima, mut a, mut b] = [[0.0f32; LANES]; 3];
        // SAFETY: 16 elements each.
        unsafe {
            let (max, chunk_max) = (V::load(maxima.as_ptr()), V::load(chunk_maxima.as_ptr()));
            let new_max = max.max(chunk_max);
            new_max.store(new_maxima.as_mut_ptr());
            exp(max.sub(new_max)).store(a.as_mut_ptr());
            exp(chunk_max.sub(new_max)).store(b.as_mut_ptr());
        }
        for r in 0..R {
            if seen.begin[r] < seen.end[r] {
                let (row, chunk_sum) = (&mut rows[r], chunk_sums[r]);
                let first = self.is_first(row);
                row.sum = if first { chunk_sum } else { row.sum.mul_add(a[r], chunk_sum * b[r]) };
                row.max = new_maxima[r];
                seen.merges[r] = Some((a[r], b[r]));
            }
        }
    }

    /// Turns the scores of row `r`, which sees some of the chunk, into weights: their maximum and their sum.
    ///
    /// # Safety
    /// As for [`group`].
    #[inline(always)]
    unsafe fn weigh_row<V: Simd, E: Element, const R: usize>(
        &self,
        seen: &mut Seen<'_, R>,
        r: usize,
    ) -> (f32, f32) {
        let quantized = self.task.args.layout.kv_type == KvType::Q8;
        let (begin, end) = (seen.begin[r], seen.end[r]);
        let tiles = begin / LANES * LANES..end.next_multiple_of(LANES);
        let weights = &mut seen.weights[r];
        weights[tiles.start..begin].fill(f32::NEG_INFINITY);
        weights[end..tiles.end].fill(f32::NEG_INFINITY);
        let weights = &mut weights[tiles.clone()];
        // SAFETY: whole vectors.
        unsafe {
            let mut max = V::splat(f32::NEG_INFINITY);
            for tile in weights.chunks_exact(LANES) {
                max = V::load(tile.as_ptr()).max(max);
            }
            let max = max.largest();
            let mut sum = V::splat(0.0);
            for (i, tile) in weights.chunks_exact_mut(LANES).enumerate() {
                let mut weight = exp(V::load(tile.as_ptr()).sub(V::splat(max)));
                sum = sum.add(weight);
                let position = self.start + tiles.start + i * LANES;
                if quantized {
                    weight = weight.mul(self.scales(position, |tile| tile.value_scales));
                }
                weight.store(tile.as_mut_ptr());
            }
            (max, sum.sum())
        }
    }

    /// True if a row has nothing yet to merge the chunk with.
    #[inline(always)]
    fn is_first(&self, row: &Row) -> bool {
        row.begin >= self.start || matches!(self.task.output, Output::Parts { .. })
    }
}
