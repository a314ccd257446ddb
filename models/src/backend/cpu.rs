//! The CPU backend: packed weights in the element type of their file, f32 activations and keys and
//! values, `tandem-kernels` for every operation. A pass neither allocates nor synchronises with
//! anything but the pool's own workers, and keeps the bit rule of [`crate::Model`] because every
//! kernel does.

use std::sync::Arc;

use tandem_kernels::attention::{PagedAttention, paged_attention};
use tandem_kernels::kv::{self, KvRows, write_kv};
use tandem_kernels::pack::Weights;
use tandem_kernels::rope::{Rope, rope};
use tandem_kernels::{PackedMatrix, ThreadPool, activation, matmul, norm};

use super::{Backend, Heads, Linear, Norm};
use crate::batch::ForwardBatch;
use crate::error::ModelError;
use crate::kv_cache::{KvLayout, try_zeros};
use crate::rope::RopeTable;
use crate::weights::{Dtype, TensorView};

/// See the module's documentation.
pub struct CpuBackend {
    pool: Arc<ThreadPool>,
}

impl CpuBackend {
    /// A backend whose operations run on `pool`.
    pub fn new(pool: Arc<ThreadPool>) -> Self {
        CpuBackend { pool }
    }
}

/// Keys and values of one layer, in the layout of [`tandem_kernels::kv`].
#[derive(Debug)]
pub struct KvLayer {
    layout: kv::KvLayout,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Backend for CpuBackend {
    type Buffer = Vec<f32>;
    type Matrix = PackedMatrix;
    type Vector = Vec<f32>;
    type KvLayer = KvLayer;
    type Rope = RopeTable;
    type Inputs = ForwardBatch;

    fn load_matrix(
        &mut self,
        parts: &[TensorView<'_>],
        in_features: usize,
    ) -> Result<PackedMatrix, ModelError> {
        let dtype = parts[0].dtype;
        if dtype == Dtype::F32 || parts.iter().any(|part| part.dtype != dtype) {
            // f32 holds every value of the 16-bit types, so parts of several types lose nothing.
            let parts: Vec<Vec<f32>> = parts.iter().map(TensorView::to_f32).collect();
            let parts: Vec<Weights<'_>> = parts.iter().map(|part| Weights::F32(part)).collect();
            return Ok(PackedMatrix::stack(&parts, in_features));
        }
        let parts: Vec<_> = parts.iter().filter_map(TensorView::bits16).collect();
        let parts: Vec<Weights<'_>> = parts
            .iter()
            .map(|bits| match dtype {
                Dtype::Bf16 => Weights::Bf16(bits),
                _ => Weights::F16(bits),
            })
            .collect();
        Ok(PackedMatrix::stack(&parts, in_features))
    }

    fn load_vector(&mut self, parts: &[TensorView<'_>]) -> Result<Vec<f32>, ModelError> {
        Ok(parts.iter().flat_map(TensorView::to_f32).collect())
    }

    fn load_rope(&mut self, table: RopeTable) -> Result<RopeTable, ModelError> {
        Ok(table)
    }

    fn allocate_kv_layer(&mut self, layout: &KvLayout) -> Result<KvLayer, ModelError> {
        let KvLayout { block_size, num_kv_heads, head_dim, .. } = *layout;
        Ok(KvLayer {
            layout: kv::KvLayout { block_size, num_kv_heads, head_dim },
            keys: try_zeros(layout.layer_len())?,
            values: try_zeros(layout.layer_len())?,
        })
    }

    fn allocate_buffer(&mut self, len: usize) -> Result<Vec<f32>, ModelError> {
        Ok(vec![0.0; len])
    }

    fn allocate_inputs(&mut self, _layout: &KvLayout) -> Result<ForwardBatch, ModelError> {
        Ok(ForwardBatch::new())
    }

    fn upload(&mut self, batch: &ForwardBatch, inputs: &mut ForwardBatch) -> Result<(), ModelError> {
        // Field by field: a derived `clone_from` would allocate.
        inputs.token_ids.clone_from(&batch.token_ids);
        inputs.positions.clone_from(&batch.positions);
        inputs.slot_mapping.clone_from(&batch.slot_mapping);
        inputs.cu_seqlens_q.clone_from(&batch.cu_seqlens_q);
        inputs.context_lens.clone_from(&batch.context_lens);
        inputs.block_tables.clone_from(&batch.block_tables);
        inputs.block_table_offsets.clone_from(&batch.block_table_offsets);
        inputs.logits_rows.clone_from(&batch.logits_rows);
        Ok(())
    }

    fn download(&mut self, x: &Vec<f32>, len: usize, out: &mut Vec<f32>) -> Result<(), ModelError> {
        out.clear();
        out.extend_from_slice(&x[..len]);
        Ok(())
    }

    fn embed(
        &mut self,
        inputs: &ForwardBatch,
        table: &PackedMatrix,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let rows = out.chunks_exact_mut(table.in_features());
        for (&token, row) in inputs.token_ids.iter().zip(rows) {
            table.row(token as usize, row);
        }
        Ok(())
    }

    fn rms_norm(
        &mut self,
        rows: usize,
        x: &Vec<f32>,
        norm: Norm<'_, Vec<f32>>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let len = rows * norm.weight.len();
        norm::rms_norm(&self.pool, &x[..len], norm.weight, norm.eps, &mut out[..len]);
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        rows: usize,
        residual: &mut Vec<f32>,
        x: &Vec<f32>,
        norm: Norm<'_, Vec<f32>>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let len = rows * norm.weight.len();
        let (residual, out) = (&mut residual[..len], &mut out[..len]);
        norm::add_rms_norm(&self.pool, residual, &x[..len], norm.weight, norm.eps, out);
        Ok(())
    }

    fn matmul(
        &mut self,
        rows: usize,
        x: &Vec<f32>,
        linear: Linear<'_, PackedMatrix, Vec<f32>>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let x = &x[..rows * linear.weight.in_features()];
        let out = &mut out[..rows * linear.weight.out_features()];
        matmul::matmul(&self.pool, x, linear.weight, linear.bias.map(Vec::as_slice), out);
        Ok(())
    }

    fn rope_and_store(
        &mut self,
        inputs: &ForwardBatch,
        heads: Heads,
        table: &RopeTable,
        qkv: &mut Vec<f32>,
        kv: &mut KvLayer,
    ) -> Result<(), ModelError> {
        let row_stride = heads.qkv_width();
        let rotation = Rope {
            cos: &table.cos,
            sin: &table.sin,
            positions: &inputs.positions,
            // Queries and keys stand side by side.
            num_heads: heads.num_heads + heads.num_kv_heads,
            head_dim: heads.head_dim,
            row_stride,
        };
        rope(&self.pool, qkv, &rotation);
        let k = &qkv[heads.q_width()..];
        let rows = KvRows { k, v: &k[heads.kv_width()..], row_stride, slot_mapping: &inputs.slot_mapping };
        write_kv(&kv.layout, &rows, &mut kv.keys, &mut kv.values);
        Ok(())
    }

    fn attention(
        &mut self,
        inputs: &ForwardBatch,
        heads: Heads,
        qkv: &Vec<f32>,
        kv: &KvLayer,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let scale = 1.0 / (heads.head_dim as f32).sqrt();
        let args = PagedAttention {
            q: qkv,
            q_row_stride: heads.qkv_width(),
            k_cache: &kv.keys,
            v_cache: &kv.values,
            layout: kv.layout,
            num_heads: heads.num_heads,
            scale,
            block_tables: &inputs.block_tables,
            block_table_offsets: &inputs.block_table_offsets,
            cu_seqlens_q: &inputs.cu_seqlens_q,
            context_lens: &inputs.context_lens,
        };
        let len = inputs.num_tokens() * heads.q_width();
        paged_attention(&self.pool, &args, &mut out[..len]);
        Ok(())
    }

    fn silu_mul(
        &mut self,
        rows: usize,
        width: usize,
        gate_up: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let (gate_up, out) = (&gate_up[..rows * 2 * width], &mut out[..rows * width]);
        activation::silu_mul_stacked(&self.pool, gate_up, width, out);
        Ok(())
    }

    fn pick_logits_rows(
        &mut self,
        inputs: &ForwardBatch,
        width: usize,
        x: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        for (to, &from) in inputs.logits_rows.iter().enumerate() {
            let from = from as usize * width;
            x.copy_within(from..from + width, to * width);
        }
        Ok(())
    }
}

impl std::fmt::Debug for CpuBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CpuBackend").field("threads", &self.pool.threads()).finish()
    }
}
