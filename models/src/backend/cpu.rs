//! The CPU backend: packed weights in the element type of their file, f32 activations, keys and values of
//! any [`KvType`], `tandem-kernels` for every operation. A pass neither allocates nor synchronises with
//! anything but the pool's own workers, and keeps the bit rule of [`crate::Model`] because every
//! kernel does.

mod attention;
mod experts;
mod rows;

use std::sync::Arc;

use tandem_kernels::kv::KvType;
use tandem_kernels::matmul::gated::{FeedForward, feed_forward};
use tandem_kernels::matmul::head;
use tandem_kernels::matmul::heads::{HeadProducts, head_matmul};
use tandem_kernels::pack::{WeightType, Weights};
use tandem_kernels::pages::PageWarmer;
use tandem_kernels::{PackedMatrix, ThreadPool, gate, head_norm, layer_norm, matmul, norm, scaling};

use super::{
    Attention, Backend, Columns, ExpertLinear, GatedFeedForward, Heads, Linear, Norm, OutputHead, OutputRoom,
    QkNormWeights, Rows, Share,
};
use crate::batch::ForwardBatch;
use crate::config::{Activation, Experts, NormKind};
use crate::error::ModelError;
use crate::kv_cache::KvLayout;
use crate::outputs::{Outputs, Wanted};
use crate::rope::RopeTable;
use crate::weights::{Dtype, TensorView};
pub use attention::KvLayer;
pub use experts::Routing;

/// See the module's documentation.
pub struct CpuBackend {
    pool: Arc<ThreadPool>,
    kv_type: KvType,
    warmer: PageWarmer,
    /// Slots of a block.
    block_size: usize,
}

/// Bytes of the KV cache that are made ready ahead of use, over all layers.
const BYTES_AHEAD: usize = 512 << 20;

impl CpuBackend {
    /// A backend whose operations run on `pool` and whose keys and values are stored as `kv_type`.
    pub fn new(pool: Arc<ThreadPool>, kv_type: KvType) -> Self {
        let warmer = PageWarmer::new(BYTES_AHEAD, &pool);
        CpuBackend { pool, kv_type, warmer, block_size: 1 }
    }
}

fn gate_of(activation: Activation) -> gate::Gate {
    match activation {
        Activation::Silu => gate::Gate::Silu,
        Activation::GeluTanh => gate::Gate::Gelu,
        Activation::ClampedSwiglu { alpha, limit } => gate::Gate::ClampedSwiglu { alpha, limit },
    }
}

/// A tensor's bytes as the packer takes them.
fn weights<'a>(view: &TensorView<'a>) -> Weights<'a> {
    let weight_type = match view.dtype {
        Dtype::F32 => WeightType::F32,
        Dtype::Bf16 => WeightType::Bf16,
        Dtype::F16 => WeightType::F16,
        Dtype::Quantized(format) => WeightType::Quantized(format),
    };
    Weights::new(weight_type, view.data)
}

impl Backend for CpuBackend {
    type Buffer = Vec<f32>;
    type Matrix = PackedMatrix;
    type Vector = Vec<f32>;
    type KvLayer = KvLayer;
    type Rope = RopeTable;
    type Inputs = ForwardBatch;
    type Routing = Routing;

    fn load_matrix(
        &mut self,
        parts: &[TensorView<'_>],
        in_features: usize,
    ) -> Result<PackedMatrix, ModelError> {
        // Every part keeps its type: a stack of a Q4_K and a Q6_K tensor stays at that.
        let parts: Vec<Weights<'_>> = parts.iter().map(weights).collect();
        Ok(PackedMatrix::stack_on(&self.pool, &parts, in_features))
    }

    fn first_outputs(
        &mut self,
        matrix: &PackedMatrix,
        num_outputs: usize,
    ) -> Result<PackedMatrix, ModelError> {
        Ok(matrix.first_outputs(num_outputs))
    }

    fn load_vector(&mut self, parts: &[TensorView<'_>]) -> Result<Vec<f32>, ModelError> {
        Ok(parts.iter().flat_map(TensorView::to_f32).collect())
    }

    fn load_rope(&mut self, table: RopeTable) -> Result<RopeTable, ModelError> {
        Ok(table)
    }

    fn kv_type(&self) -> KvType {
        self.kv_type
    }

    fn allocate_kv_layer(&mut self, shape: &KvLayout) -> Result<KvLayer, ModelError> {
        let layer = KvLayer::new(shape)?;
        layer.be_watched(&mut self.warmer);
        self.block_size = shape.block_size;
        Ok(layer)
    }

    fn allocate_buffer(&mut self, len: usize) -> Result<Vec<f32>, ModelError> {
        Ok(vec![0.0; len])
    }

    fn allocate_routing(&mut self, max_rows: usize, experts: &Experts) -> Result<Routing, ModelError> {
        Ok(Routing::new(max_rows, experts))
    }

    fn allocate_inputs(&mut self, _layout: &KvLayout) -> Result<ForwardBatch, ModelError> {
        Ok(ForwardBatch::new())
    }

    fn upload(&mut self, batch: &ForwardBatch, inputs: &mut ForwardBatch) -> Result<(), ModelError> {
        if let Some(&last) = batch.slot_mapping.iter().max() {
            self.warmer.note_use(last as usize / self.block_size + 1);
        }
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

    /// Rows of which a token is wanted are chosen from as they are computed; whole rows are lent.
    fn outputs<'a>(
        &mut self,
        x: &Vec<f32>,
        head: OutputHead<'_, PackedMatrix>,
        wanted: &[Wanted],
        room: &'a mut OutputRoom<Vec<f32>>,
    ) -> Result<Outputs<'a>, ModelError> {
        let num_whole = wanted.iter().filter(|wanted| wanted.is_whole()).count();
        let len = num_whole * head.num_outputs;
        if num_whole == wanted.len() {
            self.logits(num_whole, x, &head, &mut room.logits)?;
            return Ok(Outputs { logits: &room.logits[..len], ..Outputs::default() });
        }
        let OutputHead { weight, num_token_ids, scale, soft_cap, .. } = head;
        let x = &x[..wanted.len() * weight.in_features()];
        let head = head::Head { weights: weight, scale, soft_cap, num_token_ids };
        let OutputRoom { logits, head: scratch, .. } = room;
        head::head(&self.pool, x, &head, wanted, scratch, &mut logits[..len]);
        Ok(Outputs { logits: &logits[..len], chosen: scratch.chosen(), top: scratch.top() })
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

    fn norm(
        &mut self,
        rows: usize,
        x: &Vec<f32>,
        norm: Norm<'_, Vec<f32>>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let len = rows * norm.weight.len();
        let (x, out) = (&x[..len], &mut out[..len]);
        match norm.kind {
            NormKind::Rms => norm::rms_norm(&self.pool, x, norm.weight, norm.eps, out),
            NormKind::Layer => {
                let bias = norm.bias.expect("a layer norm has a bias: this is a bug");
                layer_norm::layer_norm(&self.pool, x, norm.weight, bias, norm.eps, out);
            }
        }
        Ok(())
    }

    fn add_norm(
        &mut self,
        rows: usize,
        residual: &mut Vec<f32>,
        x: &Vec<f32>,
        norm: Norm<'_, Vec<f32>>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let len = rows * norm.weight.len();
        if norm.kind == NormKind::Layer {
            self.add(len, residual, x)?;
            return self.norm(rows, residual, norm, out);
        }
        let (residual, out) = (&mut residual[..len], &mut out[..len]);
        norm::add_rms_norm(&self.pool, residual, &x[..len], norm.weight, norm.eps, out);
        Ok(())
    }

    fn add(&mut self, len: usize, sum: &mut Vec<f32>, x: &Vec<f32>) -> Result<(), ModelError> {
        scaling::add(&self.pool, &mut sum[..len], &x[..len]);
        Ok(())
    }

    fn scale(&mut self, len: usize, x: &mut Vec<f32>, factor: f32) -> Result<(), ModelError> {
        scaling::scale(&self.pool, &mut x[..len], factor);
        Ok(())
    }

    fn soft_cap(&mut self, len: usize, x: &mut Vec<f32>, cap: f32) -> Result<(), ModelError> {
        scaling::soft_cap(&self.pool, &mut x[..len], cap);
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

    fn qk_norm(
        &mut self,
        rows: usize,
        heads: Heads,
        norm: QkNormWeights<'_, Vec<f32>>,
        qkv: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let row_stride = heads.qkv_width();
        let mut first = 0;
        for (weight, width) in [(norm.q, heads.q_width()), (norm.k, heads.kv_width())] {
            let parts = head_norm::Heads { rows, row_stride, num_heads: width / weight.len() };
            head_norm::head_norm(&self.pool, &mut qkv[first..], weight, norm.eps, parts);
            first += width;
        }
        Ok(())
    }

    fn norm_first(
        &mut self,
        rows: usize,
        width: usize,
        norm: Norm<'_, Vec<f32>>,
        x: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let parts = head_norm::Heads { rows, row_stride: width, num_heads: 1 };
        head_norm::head_norm(&self.pool, x, norm.weight, norm.eps, parts);
        Ok(())
    }

    fn join_latents(
        &mut self,
        rows: usize,
        heads: Heads,
        q: &Vec<f32>,
        up: &[PackedMatrix],
        latents: &Vec<f32>,
        qkv: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let (width, row_stride) = (heads.head_dim, heads.qkv_width());
        let tail = width - up[0].out_features();
        let q = &q[..rows * up.len() * (up[0].in_features() + tail)];
        head_matmul(&self.pool, q, &HeadProducts { weights: up, tail, out_row_stride: row_stride }, qkv);
        for (latent, row) in latents.chunks_exact(width).zip(qkv.chunks_exact_mut(row_stride)).take(rows) {
            row[heads.q_width()..].copy_from_slice(latent);
        }
        Ok(())
    }

    fn head_matmul(
        &mut self,
        rows: usize,
        x: &Vec<f32>,
        weights: &[PackedMatrix],
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let x = &x[..rows * weights.len() * weights[0].in_features()];
        let out_row_stride = weights.len() * weights[0].out_features();
        head_matmul(&self.pool, x, &HeadProducts { weights, tail: 0, out_row_stride }, out);
        Ok(())
    }

    fn rope_and_store(
        &mut self,
        inputs: &ForwardBatch,
        heads: Heads,
        table: Option<&RopeTable>,
        qkv: &mut Vec<f32>,
        kv: &mut KvLayer,
    ) -> Result<(), ModelError> {
        if let Some(table) = table {
            attention::rotate(&self.pool, inputs, heads, table, qkv);
        }
        kv.store(&self.pool, inputs, heads, qkv);
        Ok(())
    }

    fn attention(
        &mut self,
        inputs: &ForwardBatch,
        heads: Heads,
        attention: Attention<'_, Vec<f32>>,
        qkv: &Vec<f32>,
        kv: &KvLayer,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let len = inputs.num_tokens() * heads.out_width();
        kv.attend(&self.pool, inputs, heads, &attention, qkv, &mut out[..len]);
        Ok(())
    }

    fn activate(
        &mut self,
        rows: usize,
        width: usize,
        activation: Activation,
        x: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let (x, out) = (&x[..rows * width], &mut out[..rows * width]);
        match activation {
            Activation::GeluTanh => gate::gelu(&self.pool, x, out),
            other => return Err(gated_only(other)),
        }
        Ok(())
    }

    fn gate(
        &mut self,
        rows: usize,
        width: usize,
        activation: Activation,
        gate_up: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let (gate_up, out) = (&gate_up[..rows * 2 * width], &mut out[..rows * width]);
        gate::gate_stacked(&self.pool, gate_of(activation), gate_up, width, out);
        Ok(())
    }

    fn gated_feed_forward(
        &mut self,
        rows: usize,
        x: &Vec<f32>,
        layer: GatedFeedForward<'_, PackedMatrix, Vec<f32>>,
        _room: [&mut Vec<f32>; 2],
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let GatedFeedForward { up, activation, down } = layer;
        let x = &x[..rows * up.weight.in_features()];
        let out = &mut out[..rows * down.weight.out_features()];
        let layer = FeedForward {
            up: up.weight,
            up_bias: up.bias.map(Vec::as_slice),
            gate: gate_of(activation),
            down: down.weight,
            down_bias: down.bias.map(Vec::as_slice),
        };
        feed_forward(&self.pool, x, &layer, out);
        Ok(())
    }

    fn route(
        &mut self,
        rows: usize,
        config: &Experts,
        choice_bias: Option<&Vec<f32>>,
        logits: &Vec<f32>,
        routing: &mut Routing,
    ) -> Result<(), ModelError> {
        routing.route(rows, config, choice_bias.map(Vec::as_slice), logits);
        Ok(())
    }

    fn expert_matmul(
        &mut self,
        routing: &mut Routing,
        x: &Vec<f32>,
        share: Share,
        linear: ExpertLinear<'_, PackedMatrix, Vec<f32>>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        routing.project(&self.pool, x, share, &linear, out);
        Ok(())
    }

    fn combine(
        &mut self,
        rows: usize,
        width: usize,
        routing: &Routing,
        x: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        routing.combine(&self.pool, x, width, &mut out[..rows * width]);
        Ok(())
    }

    fn allocate_slots(&mut self, num_slots: usize, width: usize) -> Result<Vec<f32>, ModelError> {
        rows::allocate_slots(num_slots, width)
    }

    fn store_slots(
        &mut self,
        inputs: &ForwardBatch,
        rows: Rows,
        width: usize,
        x: &Vec<f32>,
        store: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        rows::store_slots(inputs, rows, width, x, store);
        Ok(())
    }

    fn load_slots_before(
        &mut self,
        inputs: &ForwardBatch,
        block_size: usize,
        width: usize,
        store: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        rows::load_slots_before(inputs, block_size, width, store, out);
        Ok(())
    }

    fn put_columns(
        &mut self,
        rows: usize,
        x: &Vec<f32>,
        columns: Columns,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        rows::put_columns(rows, x, columns, out);
        Ok(())
    }

    fn pick_logits_rows(
        &mut self,
        inputs: &ForwardBatch,
        width: usize,
        x: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        rows::pick_logits_rows(inputs, width, x);
        Ok(())
    }
}

/// Families pair each nonlinearity with a gate or without, as they were trained; see `family/`.
fn gated_only(activation: Activation) -> ModelError {
    let reason = format!("{activation:?} without a gate; wanted GeluTanh");
    ModelError::Backend { context: "feed-forward layer", reason }
}

impl std::fmt::Debug for CpuBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CpuBackend").field("threads", &self.pool.threads()).finish()
    }
}
