//! Causal attention with grouped heads, on token-major rows: no transposes, no repeated heads, and
//! no `[T, T]` matrix in memory.
//!
//! Queries go in blocks of [`BLOCK`] rows; a block multiplies with the keys up to its last row only
//! (about 60 % of the full square). The backward pass computes the probabilities again instead of
//! storing them (as in FlashAttention, arXiv 2205.14135).

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::simd::{add, dot, softmax, vectorized};
use super::{cpu, matmul, matrix, slice, transposed};

/// Query rows in a block.
const BLOCK: usize = 128;

/// Sizes of an attention call; rows are `[batch * seq_len]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape {
    pub(crate) seq_len: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

struct CausalAttention(AttentionShape);

/// `softmax(q k^T / sqrt(head_dim), causal) v`: `q [rows, heads * head_dim]`,
/// `k`, `v [rows, kv_heads * head_dim]`.
pub(crate) fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: AttentionShape) -> Result<Tensor> {
    q.apply_op3(k, v, CausalAttention(shape))
}

/// Where the buffers of one call start.
#[derive(Clone, Copy)]
struct Buffers<'a> {
    q: (&'a CpuStorage, usize),
    k: (&'a CpuStorage, usize),
    v: (&'a CpuStorage, usize),
}

impl AttentionShape {
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Offset of a head's first row in a buffer of `width` columns.
    fn at(&self, sequence: usize, row: usize, width: usize, head: usize) -> usize {
        (sequence * self.seq_len + row) * width + head * self.head_dim
    }

    /// Probabilities `[rows, keys]` of a block of queries; zero where a key lies ahead.
    fn probabilities(&self, buffers: &Buffers<'_>, block: &Block) -> Result<Vec<f32>> {
        let q_at = buffers.q.1 + self.at(block.sequence, block.first, self.q_width(), block.head);
        let k_at = buffers.k.1 + self.at(block.sequence, 0, self.kv_width(), block.head / self.group());
        let keys = block.first + block.rows;
        let mut scores = matmul(
            (buffers.q.0, &matrix(block.rows, self.head_dim, self.q_width(), q_at)),
            (buffers.k.0, &transposed(keys, self.head_dim, self.kv_width(), k_at)),
        )?;
        vectorized(|| {
            for (i, row) in scores.chunks_exact_mut(keys).enumerate() {
                let (seen, ahead) = row.split_at_mut(block.first + i + 1);
                softmax(seen, self.scale());
                ahead.fill(0.0);
            }
        });
        Ok(scores)
    }

    fn blocks(&self, sequence: usize, head: usize) -> impl Iterator<Item = Block> + use<> {
        let seq_len = self.seq_len;
        (0..seq_len).step_by(BLOCK).map(move |first| Block {
            sequence,
            head,
            first,
            rows: BLOCK.min(seq_len - first),
        })
    }

    /// Copies `rows` of one head `[seq_len, head_dim]` to their places among the other heads.
    fn place(&self, into: &mut [f32], width: usize, sequence: usize, head: usize, rows: &[f32]) {
        for (row, values) in rows.chunks_exact(self.head_dim).enumerate() {
            let at = self.at(sequence, row, width, head);
            into[at..at + self.head_dim].copy_from_slice(values);
        }
    }
}

/// A run of query rows of one head of one sequence.
struct Block {
    sequence: usize,
    head: usize,
    first: usize,
    rows: usize,
}

impl CustomOp3 for CausalAttention {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = self.0;
        let (rows, width) = q_layout.shape().dims2()?;
        let kv = (rows, shape.kv_width());
        let fits = width == shape.q_width() && rows % shape.seq_len == 0;
        if !fits || k_layout.shape().dims2()? != kv || v_layout.shape().dims2()? != kv {
            candle_core::bail!("causal attention: q {:?}, k {:?} do not fit {shape:?}", q_layout, k_layout)
        }
        for layout in [q_layout, k_layout, v_layout] {
            if !layout.is_contiguous() {
                candle_core::bail!("causal attention: strides {:?} are not contiguous", layout.stride())
            }
        }
        let buffers = Buffers {
            q: (q, q_layout.start_offset()),
            k: (k, k_layout.start_offset()),
            v: (v, v_layout.start_offset()),
        };
        let heads: Vec<Vec<f32>> = (0..rows / shape.seq_len * shape.heads)
            .into_par_iter()
            .map(|task| forward_head(&shape, &buffers, task / shape.heads, task % shape.heads))
            .collect::<Result<_>>()?;
        let mut out = vec![0.0; rows * width];
        for (task, head) in heads.iter().enumerate() {
            shape.place(&mut out, width, task / shape.heads, task % shape.heads, head);
        }
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q_tensor: &Tensor,
        k_tensor: &Tensor,
        v_tensor: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let shape = self.0;
        let grad = grad.contiguous()?;
        let (q, q_layout) = q_tensor.storage_and_layout();
        let (k, k_layout) = k_tensor.storage_and_layout();
        let (v, v_layout) = v_tensor.storage_and_layout();
        let (out, out_layout) = out.storage_and_layout();
        let (grad, grad_layout) = grad.storage_and_layout();
        let buffers = Buffers {
            q: (cpu(&q)?, q_layout.start_offset()),
            k: (cpu(&k)?, k_layout.start_offset()),
            v: (cpu(&v)?, v_layout.start_offset()),
        };
        let downstream = Downstream {
            grad: (cpu(&grad)?, grad_layout.start_offset()),
            grad_rows: slice(cpu(&grad)?, grad_layout)?,
            out_rows: slice(cpu(&out)?, out_layout)?,
        };
        let rows = q_tensor.dim(0)?;
        let sequences = rows / shape.seq_len;
        let parts: Vec<HeadGradients> = (0..sequences * shape.kv_heads)
            .into_par_iter()
            .map(|task| {
                backward_group(&shape, &buffers, &downstream, task / shape.kv_heads, task % shape.kv_heads)
            })
            .collect::<Result<_>>()?;
        let (q_width, kv_width) = (shape.q_width(), shape.kv_width());
        let mut q_grad = vec![0.0; rows * q_width];
        let (mut k_grad, mut v_grad) = (vec![0.0; rows * kv_width], vec![0.0; rows * kv_width]);
        for (task, part) in parts.iter().enumerate() {
            let (sequence, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
            shape.place(&mut k_grad, kv_width, sequence, kv_head, &part.k);
            shape.place(&mut v_grad, kv_width, sequence, kv_head, &part.v);
            for (i, q) in part.q.iter().enumerate() {
                shape.place(&mut q_grad, q_width, sequence, kv_head * shape.group() + i, q);
            }
        }
        let device = q_tensor.device();
        Ok((
            Some(Tensor::from_vec(q_grad, (rows, q_width), device)?),
            Some(Tensor::from_vec(k_grad, (rows, kv_width), device)?),
            Some(Tensor::from_vec(v_grad, (rows, kv_width), device)?),
        ))
    }
}

/// `[seq_len, head_dim]` of one query head.
fn forward_head(
    shape: &AttentionShape,
    buffers: &Buffers<'_>,
    sequence: usize,
    head: usize,
) -> Result<Vec<f32>> {
    let mut out = Vec::with_capacity(shape.seq_len * shape.head_dim);
    let v_at = buffers.v.1 + shape.at(sequence, 0, shape.kv_width(), head / shape.group());
    for block in shape.blocks(sequence, head) {
        let keys = block.first + block.rows;
        let probabilities = CpuStorage::F32(shape.probabilities(buffers, &block)?);
        let rows = matmul(
            (&probabilities, &matrix(block.rows, keys, keys, 0)),
            (buffers.v.0, &matrix(keys, shape.head_dim, shape.kv_width(), v_at)),
        )?;
        out.extend_from_slice(&rows);
    }
    Ok(out)
}

/// What the backward pass receives from above.
struct Downstream<'a> {
    grad: (&'a CpuStorage, usize),
    grad_rows: &'a [f32],
    out_rows: &'a [f32],
}

/// Gradients of one key/value head and of the query heads that share it, `[seq_len, head_dim]` each.
struct HeadGradients {
    q: Vec<Vec<f32>>,
    k: Vec<f32>,
    v: Vec<f32>,
}

fn backward_group(
    shape: &AttentionShape,
    buffers: &Buffers<'_>,
    downstream: &Downstream<'_>,
    sequence: usize,
    kv_head: usize,
) -> Result<HeadGradients> {
    let size = shape.seq_len * shape.head_dim;
    let mut gradients = HeadGradients { q: Vec::new(), k: vec![0.0; size], v: vec![0.0; size] };
    let kv_at = shape.at(sequence, 0, shape.kv_width(), kv_head);
    let dim = shape.head_dim;
    for head in kv_head * shape.group()..(kv_head + 1) * shape.group() {
        let mut q_grad = Vec::with_capacity(size);
        for block in shape.blocks(sequence, head) {
            let keys = block.first + block.rows;
            let row_at = shape.at(sequence, block.first, shape.q_width(), head);
            let probabilities = shape.probabilities(buffers, &block)?;
            let grad_rows = matrix(block.rows, dim, shape.q_width(), downstream.grad.1 + row_at);
            let v_columns = transposed(keys, dim, shape.kv_width(), buffers.v.1 + kv_at);
            let mut score_grad = matmul((downstream.grad.0, &grad_rows), (buffers.v.0, &v_columns))?;
            vectorized(|| {
                let rows = score_grad.chunks_exact_mut(keys).zip(probabilities.chunks_exact(keys));
                for (i, (score_grad, p)) in rows.enumerate() {
                    let at = row_at + i * shape.q_width();
                    let pull = dot(&downstream.grad_rows[at..at + dim], &downstream.out_rows[at..at + dim]);
                    for (score_grad, &p) in score_grad.iter_mut().zip(p) {
                        *score_grad = (*score_grad - pull) * p * shape.scale();
                    }
                }
            });
            let (p, ds) = (CpuStorage::F32(probabilities), CpuStorage::F32(score_grad));
            let k_rows = matrix(keys, dim, shape.kv_width(), buffers.k.1 + kv_at);
            q_grad.extend(matmul((&ds, &matrix(block.rows, keys, keys, 0)), (buffers.k.0, &k_rows))?);
            let across = transposed(block.rows, keys, keys, 0);
            let q_rows = matrix(block.rows, dim, shape.q_width(), buffers.q.1 + row_at);
            add(&mut gradients.k[..keys * dim], &matmul((&ds, &across), (buffers.q.0, &q_rows))?);
            add(&mut gradients.v[..keys * dim], &matmul((&p, &across), (downstream.grad.0, &grad_rows))?);
        }
        gradients.q.push(q_grad);
    }
    Ok(gradients)
}
