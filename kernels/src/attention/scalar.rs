//! Attention in plain Rust: the specification.

use super::{CHUNK, Task};
use crate::LANES;
use crate::kv::KvLayout;
use crate::math::exp;
use crate::norm::scalar::fold;

/// # Safety
/// No other task may hold the same rows and head.
pub(crate) unsafe fn attention(task: &Task<'_>) {
    let args = task.args;
    let (group, head_dim) = (args.group(), args.layout.head_dim);
    let tokens = args.tokens(task.sequence);
    let start_position = args.context_lens[task.sequence] as usize - tokens.len();
    for row in task.rows.clone() {
        let token = tokens.start + row / group;
        let head = task.kv_head * group + row % group;
        let q = &args.q[token * args.q_row_stride + head * head_dim..][..head_dim];
        // SAFETY: the caller's promise.
        let out = unsafe { task.out.part((token * args.num_heads + head) * head_dim, head_dim) };
        attend(task, q, start_position + row / group, out);
    }
}

/// One query row over the keys `0..=position`.
fn attend(task: &Task<'_>, q: &[f32], position: usize, out: &mut [f32]) {
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0f32);
    for chunk in 0..=position / CHUNK {
        let visible = CHUNK.min(position + 1 - chunk * CHUNK);
        let mut weights = [0.0f32; CHUNK];
        let mut chunk_max = f32::NEG_INFINITY;
        for (j, weight) in weights[..visible].iter_mut().enumerate() {
            *weight = score(task, q, chunk * CHUNK + j) * task.args.scale;
            chunk_max = chunk_max.max(*weight);
        }
        let mut sums = [0.0f32; LANES];
        for (j, weight) in weights[..visible].iter_mut().enumerate() {
            *weight = exp(*weight - chunk_max);
            sums[j % LANES] += *weight;
        }
        let chunk_sum = fold(sums);
        let new_max = max.max(chunk_max);
        let (a, b) = (exp(max - new_max), exp(chunk_max - new_max));
        for (d, out) in out.iter_mut().enumerate() {
            let mut part = 0.0f32;
            for (j, &weight) in weights[..visible].iter().enumerate() {
                part = weight.mul_add(value(task, chunk * CHUNK + j, d), part);
            }
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
