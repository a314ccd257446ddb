//! The CPU backend: packed weights in the element type of their file, f32 activations, keys and values of
//! any [`KvType`], `tandem-kernels` for every operation. A pass neither allocates nor synchronises with
//! anything but the pool's own workers, and keeps the bit rule of [`crate::Model`] because every
//! kernel does.

use std::ops::Range;
use std::sync::Arc;

use tandem_kernels::attention::{PagedAttention, paged_attention};
use tandem_kernels::kv::{self, KvRows, KvType, Values, write_kv};
use tandem_kernels::matmul::gated::{FeedForward, feed_forward};
use tandem_kernels::matmul::head;
use tandem_kernels::matmul::heads::{HeadProducts, head_matmul};
use tandem_kernels::pack::{WeightType, Weights};
use tandem_kernels::pages::{PageWarmer, ZeroedPages};
use tandem_kernels::rope::{Rope, rope};
use tandem_kernels::{PackedMatrix, ThreadPool, experts, gate, head_norm, layer_norm, matmul, norm, scaling};

use super::{
    Attention, Backend, Columns, ExpertLinear, GatedFeedForward, Heads, Linear, Norm, OutputHead, OutputRoom,
    QkNormWeights, Rows, Share,
};
use crate::batch::ForwardBatch;
use crate::config::{Activation, Experts, NormKind};
use crate::error::ModelError;
use crate::kv_cache::{KvLayout, try_zeros};
use crate::outputs::{Outputs, Wanted};
use crate::rope::RopeTable;
use crate::weights::{Dtype, TensorView};

/// See the module's documentation.
pub struct CpuBackend {
    pool: Arc<ThreadPool>,
    kv_type: KvType,
    warmer: PageWarmer,
    /// Slots of a block.
    block_size: usize,
}

/// Bytes of the KV cache that are made ready ahead of use, over all layers.
const BYTES_AHEAD: usize = 128 << 20;

impl CpuBackend {
    /// A backend whose operations run on `pool` and whose keys and values are stored as `kv_type`.
    pub fn new(pool: Arc<ThreadPool>, kv_type: KvType) -> Self {
        CpuBackend { pool, kv_type, warmer: PageWarmer::new(BYTES_AHEAD), block_size: 1 }
    }
}

/// Keys and values of one layer, in the layout of [`tandem_kernels::kv`].
#[derive(Debug)]
pub struct KvLayer {
    layout: kv::KvLayout,
    storage: ZeroedPages,
}

/// Which experts compute which rows, and room to bring an expert's rows together.
#[derive(Debug)]
pub struct Routing {
    picks_per_row: usize,
    /// By which a row's experts are chosen; room for those of groups, too.
    scores: Vec<f32>,
    /// `[picks]`
    picks: Vec<u32>,
    /// `[picks]`
    weights: Vec<f32>,
    /// Of [`experts::group`].
    order: Vec<u32>,
    groups: Vec<(u32, Range<usize>)>,
    gathered: Vec<f32>,
    projected: Vec<f32>,
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
        let KvLayout { block_size, num_kv_heads, head_dim, values, kv_type, .. } = *shape;
        let layout = kv::KvLayout { block_size, num_kv_heads, head_dim, values, kv_type };
        let storage = try_zeros(shape.num_blocks * layout.block_bytes())?;
        self.warmer.watch(&storage, layout.block_bytes());
        self.block_size = block_size;
        Ok(KvLayer { layout, storage })
    }

    fn allocate_buffer(&mut self, len: usize) -> Result<Vec<f32>, ModelError> {
        Ok(vec![0.0; len])
    }

    fn allocate_routing(&mut self, max_rows: usize, experts: &Experts) -> Result<Routing, ModelError> {
        let picks = max_rows * experts.num_experts_per_token;
        Ok(Routing {
            picks_per_row: experts.num_experts_per_token,
            scores: Vec::with_capacity(2 * experts.num_experts),
            picks: Vec::with_capacity(picks),
            weights: Vec::with_capacity(picks),
            order: Vec::with_capacity(picks),
            groups: Vec::with_capacity(picks.min(experts.num_experts)),
            gathered: Vec::new(),
            projected: Vec::new(),
        })
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
        let num_whole = wanted.iter().filter(|wanted| **wanted == Wanted::Whole).count();
        let len = num_whole * head.num_outputs;
        if num_whole == wanted.len() {
            self.logits(num_whole, x, &head, &mut room.logits)?;
            return Ok(Outputs { logits: &room.logits[..len], chosen: &[] });
        }
        let OutputHead { weight, num_token_ids, scale, soft_cap, .. } = head;
        let x = &x[..wanted.len() * weight.in_features()];
        let head = head::Head { weights: weight, scale, soft_cap, num_token_ids };
        let OutputRoom { logits, head: scratch, .. } = room;
        head::head(&self.pool, x, &head, wanted, scratch, &mut logits[..len]);
        Ok(Outputs { logits: &logits[..len], chosen: scratch.chosen() })
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
        let row_stride = heads.qkv_width();
        if let Some(table) = table {
            let rotation = Rope {
                cos: &table.cos,
                sin: &table.sin,
                positions: &inputs.positions,
                // Queries and keys stand side by side.
                num_heads: heads.num_heads + heads.num_kv_heads,
                head_dim: table.width(),
                head_stride: heads.head_dim,
                row_stride,
            };
            rope(&self.pool, &mut qkv[heads.head_dim - table.width()..], &rotation);
        }
        let k = &qkv[heads.q_width()..];
        let v = if heads.values == Values::Own { &k[heads.kv_width()..] } else { &[] };
        let rows = KvRows { k, v, row_stride, slot_mapping: &inputs.slot_mapping };
        write_kv(&self.pool, &kv.layout, &rows, &mut kv.storage);
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
        let args = PagedAttention {
            q: qkv,
            q_row_stride: heads.qkv_width(),
            storage: &kv.storage,
            layout: kv.layout,
            num_heads: heads.num_heads,
            scale: attention.scale,
            window: attention.window,
            first_key: attention.first_key,
            soft_cap: attention.soft_cap,
            sinks: attention.sinks.map(Vec::as_slice),
            block_tables: &inputs.block_tables,
            block_table_offsets: &inputs.block_table_offsets,
            cu_seqlens_q: &inputs.cu_seqlens_q,
            context_lens: &inputs.context_lens,
        };
        let len = inputs.num_tokens() * heads.out_width();
        paged_attention(&self.pool, &args, &mut out[..len]);
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
        let router = experts::Router {
            num_experts: config.num_experts,
            num_picks: config.num_experts_per_token,
            scoring: config.scoring,
            choice_bias: choice_bias.map(Vec::as_slice),
            groups: config.groups,
            renormalise: config.renormalise,
            scale: config.weight_scale,
        };
        routing.picks.resize(rows * router.num_picks, 0);
        routing.weights.resize(rows * router.num_picks, 0.0);
        let Routing { scores, picks, weights, order, groups, .. } = routing;
        experts::route(&logits[..rows * router.num_experts], &router, scores, picks, weights);
        experts::group(picks, order, groups);
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
        let (inp, outp) = (linear.weights[0].in_features(), linear.weights[0].out_features());
        let Routing { picks_per_row, order, groups, gathered, projected, .. } = routing;
        for (expert, range) in groups.iter() {
            let picks = &order[range.clone()];
            gathered.clear();
            for &pick in picks {
                let row = match share {
                    Share::Row => pick as usize / *picks_per_row,
                    Share::Pick => pick as usize,
                };
                gathered.extend_from_slice(&x[row * inp..(row + 1) * inp]);
            }
            projected.resize(projected.len().max(picks.len() * outp), 0.0);
            let projected = &mut projected[..picks.len() * outp];
            let bias = linear.biases.map(|biases| biases[*expert as usize].as_slice());
            matmul::matmul(&self.pool, gathered, &linear.weights[*expert as usize], bias, projected);
            for (&pick, row) in picks.iter().zip(projected.chunks_exact(outp)) {
                out[pick as usize * outp..(pick as usize + 1) * outp].copy_from_slice(row);
            }
        }
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
        let x = &x[..routing.weights.len() * width];
        experts::combine(&self.pool, x, &routing.weights, width, &mut out[..rows * width]);
        Ok(())
    }

    fn allocate_slots(&mut self, num_slots: usize, width: usize) -> Result<Vec<f32>, ModelError> {
        // Not made ready ahead of use, as keys and values are: first touching a row of 896 to 3584 numbers takes 3 to
        // 9 us, once a token and not once a layer.
        let zeros = num_slots.checked_mul(width).map(bytemuck::allocation::try_zeroed_vec::<f32>);
        zeros.and_then(Result::ok).ok_or_else(|| ModelError::Backend {
            context: "KV cache",
            reason: format!("no memory for the hidden states of {num_slots} tokens, {width} numbers each"),
        })
    }

    fn store_slots(
        &mut self,
        inputs: &ForwardBatch,
        rows: Rows,
        width: usize,
        x: &Vec<f32>,
        store: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let mut put = |slot: u32, row: &[f32]| {
            let at = slot as usize * width;
            store[at..at + width].copy_from_slice(row);
        };
        let values = x.chunks_exact(width);
        match rows {
            Rows::All => inputs.slot_mapping.iter().zip(values).for_each(|(&slot, row)| put(slot, row)),
            Rows::Logits => {
                let slots = inputs.logits_rows.iter().map(|&row| inputs.slot_mapping[row as usize]);
                slots.zip(values).for_each(|(slot, row)| put(slot, row));
            }
        }
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
        for sequence in 0..inputs.num_seqs() {
            let rows = inputs.cu_seqlens_q[sequence] as usize..inputs.cu_seqlens_q[sequence + 1] as usize;
            let blocks = &inputs.block_tables[inputs.block_table_offsets[sequence] as usize..];
            for row in rows {
                let to = &mut out[row * width..(row + 1) * width];
                match (inputs.positions[row] as usize).checked_sub(1) {
                    None => to.fill(0.0),
                    Some(before) => {
                        let slot = blocks[before / block_size] as usize * block_size + before % block_size;
                        to.copy_from_slice(&store[slot * width..(slot + 1) * width]);
                    }
                }
            }
        }
        Ok(())
    }

    fn put_columns(
        &mut self,
        rows: usize,
        x: &Vec<f32>,
        columns: Columns,
        out: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let Columns { first, width, of } = columns;
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(of)).take(rows) {
            out[first..first + width].copy_from_slice(x);
        }
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
