//! Attention in plain Rust: the specification.

use std::ops::Range;

use super::{CHUNK, Output, Task, chunks_of, last_factor};
use crate::LANES;
use crate::kv::{KvType, element};
use crate::math::{exp, tanh};
use crate::norm::scalar::fold;

/// # Safety
/// No other task may hold the same rows, head and chunks.
pub(crate) unsafe fn attention(task: &Task<'_>) {
    let args = task.args;
    let (group, head_dim, value_dim) = (args.group(), args.layout.head_dim, args.layout.value_dim());
    let first_token = args.tokens(task.sequence).start;
    for row in task.rows.clone() {
        let token = first_token + row / group;
        let head = task.kv_head * group + row % group;
        let q = &args.q[token * args.q_row_stride + head * head_dim..][..head_dim];
        let visible = args.visible(args.start_position(task.sequence) + row / group);
        let row = token * args.num_heads + head;
        let mut part = vec![0.0; value_dim + 2];
        let mut merged = Vec::new();
        for chunk in task.output.chunks(chunks_of(&visible)) {
            let keys = visible.start.max(chunk * CHUNK)..visible.end.min((chunk + 1) * CHUNK);
            attend(task, q, keys, &mut part);
            match &task.output {
                Output::Whole(_) => merged.extend_from_slice(&part),
                Output::Parts { parts, num_chunks, .. } => {
                    let at = (row * num_chunks + chunk) * part.len();
                    // SAFETY: the caller's promise.
                    unsafe { parts.part(at, part.len()) }.copy_from_slice(&part);
                }
            }
        }
        if let Output::Whole(out) = &task.output {
            // SAFETY: the caller's promise.
            merge(&merged, args.sink(head), unsafe { out.part(row * value_dim, value_dim) });
        }
    }
}

/// One query row over some keys of one chunk: `[value_dim]` weighted values, then the maximum and the sum.
fn attend(task: &Task<'_>, q: &[f32], keys: Range<usize>, part: &mut [f32]) {
    let mut weights = [0.0f32; CHUNK];
    let weights = &mut weights[..keys.len()];
    let mut max = f32::NEG_INFINITY;
    for (position, weight) in keys.clone().zip(&mut *weights) {
        *weight = score(task, q, position) * task.args.scale;
        if let Some(cap) = task.args.soft_cap {
            *weight = cap * tanh(*weight / cap);
        }
        max = max.max(*weight);
    }
    let mut sums = [0.0f32; LANES];
    for (position, weight) in keys.clone().zip(&mut *weights) {
        *weight = exp(*weight - max);
        sums[position % LANES] += *weight;
        if task.args.layout.kv_type == KvType::Q8 {
            let (tile, offset) = task.locate(position);
            *weight *= element(KvType::F32, task.args.storage, tile.value_scales, offset);
        }
    }
    let value_dim = task.args.layout.value_dim();
    for (d, part) in part[..value_dim].iter_mut().enumerate() {
        *part = 0.0;
        for (position, &weight) in keys.clone().zip(&*weights) {
            *part = weight.mul_add(value(task, position, d), *part);
        }
    }
    part[value_dim] = max;
    part[value_dim + 1] = fold(sums);
}

/// Merges the parts `[num_chunks, value_dim + 2]` of a row, at least one, in order.
pub(crate) fn merge(parts: &[f32], sink: Option<f32>, out: &mut [f32]) {
    let value_dim = out.len();
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0f32);
    for (chunk, part) in parts.chunks_exact(value_dim + 2).enumerate() {
        let (chunk_max, chunk_sum) = (part[value_dim], part[value_dim + 1]);
        let new_max = max.max(chunk_max);
        let (a, b) = (exp(max - new_max), exp(chunk_max - new_max));
        for (out, &part) in out.iter_mut().zip(part) {
            *out = if chunk == 0 { part } else { out.mul_add(a, part * b) };
        }
        sum = if chunk == 0 { chunk_sum } else { sum.mul_add(a, chunk_sum * b) };
        max = new_max;
    }
    let scale = last_factor(max, sum, sink);
    for out in out {
        *out *= scale;
    }
}

/// The product of a query and a key, the key's own scale included.
fn score(task: &Task<'_>, q: &[f32], position: usize) -> f32 {
    let (tile, offset) = task.locate(position);
    let (storage, layout) = (task.args.storage, &task.args.layout);
    let score = if task.args.keys_are_rows() {
        let mut sums = [0.0f32; LANES];
        for (d, &q) in q.iter().enumerate() {
            let key = element(layout.kv_type, storage, tile.keys, offset * layout.head_dim + d);
            sums[d % LANES] = q.mul_add(key, sums[d % LANES]);
        }
        fold(sums)
    } else {
        let key = |d| element(layout.kv_type, storage, tile.keys, d * layout.block_size + offset);
        q.iter().enumerate().fold(0.0, |sum, (d, &q)| q.mul_add(key(d), sum))
    };
    match layout.kv_type {
        KvType::Q8 => score * element(KvType::F32, storage, tile.key_scales, offset),
        KvType::F32 | KvType::F16 => score,
    }
}

/// Element `d` of a value, without the value's own scale.
fn value(task: &Task<'_>, position: usize, d: usize) -> f32 {
    let (tile, offset) = task.locate(position);
    let layout = &task.args.layout;
    element(layout.kv_type, task.args.storage, tile.values, offset * layout.head_dim + d)
}
