//! The gate of SwiGLU: `silu(gate) * up`.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::simd::{exp, vectorized};
use super::{cpu, slice};

/// Elements that one task takes.
const SPAN: usize = 16_384;

struct SiluMul;

/// `silu(gate) * up`, element by element.
pub(crate) fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.apply_op2(up, SiluMul)
}

impl CustomOp2 for SiluMul {
    fn name(&self) -> &'static str {
        "silu-mul"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (slice(gate, gate_layout)?, slice(up, up_layout)?);
        let mut out = vec![0.0; gate.len()];
        (out.par_chunks_mut(SPAN), gate.par_chunks(SPAN), up.par_chunks(SPAN)).into_par_iter().for_each(
            |(out, gate, up)| {
                vectorized(|| {
                    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                        *out = gate / (1.0 + exp(-gate)) * up;
                    }
                });
            },
        );
        Ok((CpuStorage::F32(out), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (shape, device) = (gate.shape(), gate.device());
        let grad = grad.contiguous()?;
        let (gate, gate_layout) = gate.storage_and_layout();
        let (up, up_layout) = up.storage_and_layout();
        let (grad, grad_layout) = grad.storage_and_layout();
        let gate = slice(cpu(&gate)?, gate_layout)?;
        let up = slice(cpu(&up)?, up_layout)?;
        let grad = slice(cpu(&grad)?, grad_layout)?;
        let (mut gate_grad, mut up_grad) = (vec![0.0; gate.len()], vec![0.0; gate.len()]);
        let tasks = (
            gate_grad.par_chunks_mut(SPAN),
            up_grad.par_chunks_mut(SPAN),
            gate.par_chunks(SPAN),
            up.par_chunks(SPAN),
            grad.par_chunks(SPAN),
        );
        tasks.into_par_iter().for_each(|(gate_grad, up_grad, gate, up, grad)| {
            vectorized(|| {
                let outputs = gate_grad.iter_mut().zip(up_grad);
                let inputs = gate.iter().zip(up).zip(grad);
                for ((gate_grad, up_grad), ((&gate, &up), &grad)) in outputs.zip(inputs) {
                    let sigmoid = 1.0 / (1.0 + exp(-gate));
                    *up_grad = grad * gate * sigmoid;
                    *gate_grad = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
                }
            });
        });
        Ok((
            Some(Tensor::from_vec(gate_grad, shape, device)?),
            Some(Tensor::from_vec(up_grad, shape, device)?),
        ))
    }
}
