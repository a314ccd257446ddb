//! RMSNorm: `x / sqrt(mean(x^2) + eps) * weight`, row by row.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::simd::{add, dot, vectorized};
use super::{ROWS_PER_TASK, cpu, slice};

struct RmsNorm {
    eps: f32,
}

/// RMSNorm over the rows of `x [rows, width]`, `weight [width]`.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    x.apply_op2(weight, RmsNorm { eps })
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm-fused"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (slice(x, x_layout)?, slice(weight, weight_layout)?);
        let width = weight.len();
        let mut out = vec![0.0; x.len()];
        let span = ROWS_PER_TASK * width;
        out.par_chunks_mut(span).zip(x.par_chunks(span)).for_each(|(out, x)| {
            vectorized(|| {
                for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    let inverse = inverse_rms(x, self.eps);
                    for i in 0..width {
                        out[i] = x[i] * inverse * weight[i];
                    }
                }
            });
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x_tensor: &Tensor,
        weight_tensor: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (x, x_layout) = x_tensor.storage_and_layout();
        let (weight, weight_layout) = weight_tensor.storage_and_layout();
        let (grad, grad_layout) = grad.storage_and_layout();
        let x = slice(cpu(&x)?, x_layout)?;
        let weight = slice(cpu(&weight)?, weight_layout)?;
        let grad = slice(cpu(&grad)?, grad_layout)?;
        let width = weight.len();
        let span = ROWS_PER_TASK * width;
        let mut x_grad = vec![0.0; x.len()];
        let partial: Vec<Vec<f32>> = (x_grad.par_chunks_mut(span), x.par_chunks(span), grad.par_chunks(span))
            .into_par_iter()
            .map(|(x_grad, x, grad)| vectorized(|| backward_rows(x_grad, x, grad, weight, self.eps)))
            .collect();
        let mut weight_grad = vec![0.0; width];
        for part in &partial {
            add(&mut weight_grad, part);
        }
        Ok((
            Some(Tensor::from_vec(x_grad, x_tensor.shape(), x_tensor.device())?),
            Some(Tensor::from_vec(weight_grad, width, x_tensor.device())?),
        ))
    }
}

/// Fills `x_grad` and returns the rows' share of the weight's gradient.
#[inline(always)]
fn backward_rows(x_grad: &mut [f32], x: &[f32], grad: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    let mut weight_grad = vec![0.0; width];
    let rows = x_grad.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(grad.chunks_exact(width));
    for ((x_grad, x), grad) in rows {
        let inverse = inverse_rms(x, eps);
        for i in 0..width {
            x_grad[i] = grad[i] * weight[i];
            weight_grad[i] += grad[i] * x[i] * inverse;
        }
        let pull = dot(x_grad, x) * inverse * inverse / width as f32;
        for i in 0..width {
            x_grad[i] = (x_grad[i] - x[i] * pull) * inverse;
        }
    }
    weight_grad
}
