//! Attention in plain Rust: the specification.

use super::{CHUNK, Output, Task};
use crate::LANES;
use crate::kv::KvLayout;
use crate::math::exp;
use crate::norm::scalar::fold;

/// # Safety
/// No other task may hold the same rows, head and chunks.
pub(crate) unsafe fn attention(task: &Task<'_>) {
    let args = task.args;
    let (group, head_dim) = (args.group(), args.layout.head_dim);
    let first_token = args.tokens(task.sequence).start;
    for row in task.rows.clone() {
        let token = first_token + row / group;
        let head = task.kv_head * group + row % group;
        let q = &args.q[token * args.q_row_stride + head * head_dim..][..head_dim];
        let position = args.start_position(task.sequence) + row / group;
        let row = token * args.num_heads + head;
        let mut part = vec![0.0; head_dim + 2];
        let mut merged = Vec::new();
        for chunk in task.output.chunks(position / CHUNK + 1) {
            attend(task, q, position, chunk, &mut part);
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
            merge(&merged, unsafe { out.part(row * head_dim, head_dim) });
        }
    }
}

/// One query row over one chunk: `[head_dim]` weighted values, then the maximum and the sum.
fn attend(task: &Task<'_>, q: &[f32], position: usize, chunk: usize, part: &mut [f32]) {
    let visible = CHUNK.min(position + 1 - chunk * CHUNK);
    let mut weights = [0.0f32; CHUNK];
    let mut max = f32::NEG_INFINITY;
    for (j, weight) in weights[..visible].iter_mut().enumerate() {
        *weight = score(task, q, chunk * CHUNK + j) * task.args.scale;
        max = max.max(*weight);
    }
    let mut sums = [0.0f32; LANES];
    for (j, weight) in weights[..visible].iter_mut().enumerate() {
        *weight = exp(*weight - max);
        sums[j % LANES] += *weight;
    }
    for (d, part) in part[..q.len()].iter_mut().enumerate() {
        *part = 0.0;
        for (j, &weight) in weights[..visible].iter().enumerate() {
            *part = weight.mul_add(value(task, chunk * CHUNK + j, d), *part);
        }
    }
    part[q.len()] = max;
    part[q.len() + 1] = fold(sums);
}

/// Merges the parts `[num_chunks, head_dim + 2]` of a row, at least one, in order.
pub(crate) fn merge(parts: &[f32], out: &mut [f32]) {
    let head_dim = out.len();
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0f32);
    for (chunk, part) in parts.chunks_exact(head_dim + 2).enumerate() {
        let (chunk_max, chunk_sum) = (part[head_dim], part[head_dim + 1]);
        let new_max = max.max(chunk_max);
        let (a, b) = (exp(max - new_max), exp(chunk_max - new_max));
        for (out, &part) in out.iter_mut().zip(part) {
            *out = if chunk == 0 { part } else { out.mul_add(a, part * b) };
        }
        sum = if chunk == 0 { chunk_sum } else { sum.mul_add(a, chunk_sum * b) };
        max = new_max;
    }
    let scale = 1.0 / sum;
    for out in out {
        *out *= scale;
    }
}

fn score(task: &Task<'_>, q: &[f32], position: usize) -> f32 {
    let (tile, offset) = task.locate(position);
    let keys = task.args.k_cache[tile + offset..].iter().step_by(task.args.layout.block_size);
    q.iter().zip(keys).fold(0.0, |sum, (&q, &k)| q.mul_add(k, sum))
}

fn value(task: &Task<'_>, position: usize, d: usize) -> f32 {
    let (tile, offset) = task.locate(position);
    let KvLayout { head_dim, .. } = task.args.layout;
    task.args.v_cache[tile + offset * head_dim + d]
}
