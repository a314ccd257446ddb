//! The head and its loss in one op: logits are made for a few hundred rows at a time, turned into
//! gradients while they are in the cache, and never kept.
//!
//! Loss of a row, with logits `z`, label `y` and the teacher's probabilities `t`:
//! `ce_weight * -log softmax(z)[y] + kl_weight * KL(t || softmax(z))`; the op returns the mean.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::simd::{add, dot, max, softmax, vectorized};
use super::{cpu, matmul, matrix, slice, transposed};

/// Rows whose logits exist at the same time.
const ROWS: usize = 256;

/// The teacher's last hidden states and its head; their product is its logits.
pub(crate) struct Teacher {
    /// `[rows, teacher width]`
    pub(crate) hidden: Tensor,
    /// `[vocab, teacher width]`
    pub(crate) head: Tensor,
}

/// The op; holds the gradients (of hidden states and head) from forward to backward.
pub(crate) struct HeadLoss {
    labels: Vec<u32>,
    ce_weight: f32,
    teacher: Option<(Teacher, f32)>,
    gradients: Mutex<Option<(Vec<f32>, Vec<f32>)>>,
}

impl HeadLoss {
    /// Cross-entropy alone.
    pub(crate) fn cross_entropy(labels: Vec<u32>) -> Self {
        Self { labels, ce_weight: 1.0, teacher: None, gradients: Mutex::default() }
    }

    /// Cross-entropy and the divergence from a teacher.
    pub(crate) fn distillation(labels: Vec<u32>, ce_weight: f32, teacher: Teacher, kl_weight: f32) -> Self {
        Self { labels, ce_weight, teacher: Some((teacher, kl_weight)), gradients: Mutex::default() }
    }

    /// Mean loss over the rows of `hidden [rows, width]` under `head [vocab, width]`.
    pub(crate) fn apply(self, hidden: &Tensor, head: &Tensor) -> Result<Tensor> {
        hidden.apply_op2(head, self)
    }
}

/// Turns a row of logits into its gradient (times `rows`); returns cross-entropy and divergence.
#[inline(always)]
fn row_loss(z: &mut [f32], label: usize, ce_weight: f32, teacher: Option<(&mut [f32], f32)>) -> (f32, f32) {
    let label_logit = z[label];
    let Some((t, kl_weight)) = teacher else {
        let normaliser = softmax(z, 1.0);
        z.iter_mut().for_each(|p| *p *= ce_weight);
        z[label] -= ce_weight;
        return (normaliser - label_logit, 0.0);
    };
    // KL = sum t (log t - log p) = sum t (teacher logit - logit) - teacher normaliser + normaliser.
    let mut gaps = t.to_vec();
    for (gap, z) in gaps.iter_mut().zip(z.iter()) {
        *gap -= z;
    }
    let teacher_normaliser = softmax(t, 1.0);
    let normaliser = softmax(z, 1.0);
    let divergence = dot(t, &gaps) - teacher_normaliser + normaliser;
    for (p, t) in z.iter_mut().zip(t.iter()) {
        *p = *p * (ce_weight + kl_weight) - t * kl_weight;
    }
    z[label] -= ce_weight;
    (normaliser - label_logit, divergence)
}

impl CustomOp2 for HeadLoss {
    fn name(&self) -> &'static str {
        "head-loss"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        head: &CpuStorage,
        head_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = hidden_layout.shape().dims2()?;
        let (vocab, _) = head_layout.shape().dims2()?;
        let teacher_vocab = self.teacher.as_ref().map_or(Ok(vocab), |(teacher, _)| teacher.head.dim(0))?;
        if self.labels.len() != rows
            || teacher_vocab != vocab
            || self.labels.iter().any(|&y| y as usize >= vocab)
        {
            candle_core::bail!(
                "head loss: {} labels for {rows} rows, vocabulary {vocab}, teacher's {teacher_vocab}",
                self.labels.len()
            )
        }
        let mut hidden_grad = Vec::with_capacity(rows * width);
        let mut head_grad = vec![0.0; vocab * width];
        let (mut cross_entropy, mut divergence) = (0.0f64, 0.0f64);
        for first in (0..rows).step_by(ROWS) {
            let count = ROWS.min(rows - first);
            let hidden_rows = matrix(count, width, width, hidden_layout.start_offset() + first * width);
            let head_columns = transposed(vocab, width, width, head_layout.start_offset());
            let mut z = matmul((hidden, &hidden_rows), (head, &head_columns))?;
            let mut teacher = match &self.teacher {
                Some((teacher, kl_weight)) => Some((teacher.logits(first, count)?, *kl_weight)),
                None => None,
            };
            let losses = self.rows(&mut z, first, vocab, teacher.as_mut());
            for (ce, kl) in losses {
                cross_entropy += f64::from(ce);
                divergence += f64::from(kl);
            }
            let factor = 1.0 / rows as f32;
            z.par_chunks_mut(vocab).for_each(|row| row.iter_mut().for_each(|x| *x *= factor));
            let z = CpuStorage::F32(z);
            let head_rows = matrix(vocab, width, width, head_layout.start_offset());
            hidden_grad.extend(matmul((&z, &matrix(count, vocab, vocab, 0)), (head, &head_rows))?);
            let part = matmul((&z, &transposed(count, vocab, vocab, 0)), (hidden, &hidden_rows))?;
            head_grad.par_chunks_mut(1 << 16).zip(part.par_chunks(1 << 16)).for_each(|(a, b)| add(a, b));
        }
        let kl_weight = self.teacher.as_ref().map_or(0.0, |(_, weight)| f64::from(*weight));
        let loss = (f64::from(self.ce_weight) * cross_entropy + kl_weight * divergence) / rows as f64;
        *self.gradients.lock().expect("loss op panicked: this is a bug") = Some((hidden_grad, head_grad));
        Ok((CpuStorage::F32(vec![loss as f32]), Shape::from(())))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let kept = self.gradients.lock().expect("loss op panicked: this is a bug").take();
        let Some((hidden_grad, head_grad)) = kept else {
            candle_core::bail!("head loss: backward ran twice")
        };
        let factor = f64::from(grad.to_scalar::<f32>()?);
        let scaled = |values: Vec<f32>, like: &Tensor| -> Result<Tensor> {
            let gradient = Tensor::from_vec(values, like.shape(), like.device())?;
            if factor == 1.0 { Ok(gradient) } else { gradient * factor }
        };
        Ok((Some(scaled(hidden_grad, hidden)?), Some(scaled(head_grad, head)?)))
    }
}

impl HeadLoss {
    /// Losses of a chunk of rows; `z` becomes gradients.
    fn rows(
        &self,
        z: &mut [f32],
        first: usize,
        vocab: usize,
        teacher: Option<&mut (Vec<f32>, f32)>,
    ) -> Vec<(f32, f32)> {
        let labels = &self.labels[first..];
        match teacher {
            Some((t, kl_weight)) => (z.par_chunks_mut(vocab), t.par_chunks_mut(vocab), labels)
                .into_par_iter()
                .map(|(z, t, &label)| {
                    vectorized(|| row_loss(z, label as usize, self.ce_weight, Some((t, *kl_weight))))
                })
                .collect(),
            None => (z.par_chunks_mut(vocab), labels)
                .into_par_iter()
                .map(|(z, &label)| vectorized(|| row_loss(z, label as usize, self.ce_weight, None)))
                .collect(),
        }
    }
}

impl Teacher {
    fn logits(&self, first: usize, count: usize) -> Result<Vec<f32>> {
        chunk_logits(&self.hidden, &self.head, first, count)
    }
}

fn chunk_logits(hidden: &Tensor, head: &Tensor, first: usize, count: usize) -> Result<Vec<f32>> {
    let (_, width) = hidden.dims2()?;
    let vocab = head.dim(0)?;
    let (hidden, hidden_layout) = hidden.storage_and_layout();
    let (head, head_layout) = head.storage_and_layout();
    let (hidden, head) = (cpu(&hidden)?, cpu(&head)?);
    slice(hidden, hidden_layout)?;
    slice(head, head_layout)?;
    matmul(
        (hidden, &matrix(count, width, width, hidden_layout.start_offset() + first * width)),
        (head, &transposed(vocab, width, width, head_layout.start_offset())),
    )
}

/// For every row: minus the log probability of its label, and the most likely token (the first
/// of equals). Used to evaluate, so nothing is differentiated.
pub(crate) fn score(hidden: &Tensor, head: &Tensor, labels: &[u32]) -> Result<Vec<(f32, u32)>> {
    let rows = hidden.dim(0)?;
    let vocab = head.dim(0)?;
    let mut scores = Vec::with_capacity(rows);
    for first in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - first);
        let mut z = chunk_logits(hidden, head, first, count)?;
        let chunk: Vec<(f32, u32)> = (z.par_chunks_mut(vocab), &labels[first..])
            .into_par_iter()
            .map(|(z, &label)| {
                vectorized(|| {
                    let best = max(z);
                    let choice = z.iter().position(|&x| x == best).unwrap_or(0);
                    let label_logit = z[label as usize];
                    (softmax(z, 1.0) - label_logit, choice as u32)
                })
            })
            .collect();
        scores.extend(chunk);
    }
    Ok(scores)
}
