//! `x @ weight^T`, so that no transpose node and no bias copy enters the graph.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{matmul, matrix, transposed};

struct Linear;

/// `x [rows, in] @ weight [out, in]^T (+ bias [out])`.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let product = x.apply_op2(weight, Linear)?;
    match bias {
        Some(bias) => product.broadcast_add(bias),
        None => Ok(product),
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, inputs) = x_layout.shape().dims2()?;
        let (outputs, weight_inputs) = weight_layout.shape().dims2()?;
        if inputs != weight_inputs || !x_layout.is_contiguous() || !weight_layout.is_contiguous() {
            candle_core::bail!(
                "linear: x {:?} and weight {:?} do not fit",
                x_layout.shape(),
                weight_layout.shape()
            )
        }
        let product = matmul(
            (x, &matrix(rows, inputs, inputs, x_layout.start_offset())),
            (weight, &transposed(outputs, inputs, inputs, weight_layout.start_offset())),
        )?;
        Ok((CpuStorage::F32(product), (rows, outputs).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.matmul(&weight.detach())?), Some(grad.t()?.matmul(&x.detach())?)))
    }
}
