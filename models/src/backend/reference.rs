//! The reference backend: candle tensors in f32 on any candle device. Plain and slow on purpose, each
//! operation the formula as one would write it down; what the fast backends are compared with, and a
//! way to serve on a device that has no fast backend yet.
//!
//! It allocates in every operation, and it keeps the bit rule of [`crate::Model`] only up to
//! rounding: candle's own matrix product may sum in another order when the number of rows changes.

use candle_core::{D, Device, Error, Result as CandleResult, Tensor};

use super::{Attention, Backend, ExpertLinear, GatedFeedForward, Heads, Linear, Norm, QkNormWeights, Share};
use crate::batch::ForwardBatch;
use crate::config::{Activation, Experts, NormKind};
use crate::error::ModelError;
use crate::kv_cache::KvLayout;
use crate::rope::RopeTable;
use crate::weights::TensorView;

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct ReferenceBackend {
    device: Device,
}

impl ReferenceBackend {
    /// A backend on `device`.
    pub fn new(device: Device) -> Self {
        ReferenceBackend { device }
    }
}

/// Keys and values of one layer, each `[num_slots, num_kv_heads * head_dim]`.
#[derive(Debug)]
pub struct KvTensors {
    keys: Tensor,
    values: Tensor,
}

/// Rotary tables, each `[num_positions, head_dim / 2]`.
#[derive(Debug)]
pub struct RopeTensors {
    cos: Tensor,
    sin: Tensor,
}

/// One pass on the device; see [`Backend::Inputs`].
#[derive(Debug)]
pub struct Inputs {
    block_size: usize,
    pass: Option<Pass>,
}

#[derive(Debug)]
struct Pass {
    token_ids: Tensor,
    positions: Tensor,
    slot_mapping: Vec<usize>,
    sequences: Vec<Sequence>,
    /// `None` if there are none: candle has no empty tensors on some devices.
    logits_rows: Option<Tensor>,
}

#[derive(Debug)]
struct Sequence {
    first_row: usize,
    num_rows: usize,
    /// `[context_len]`: where the context's keys and values lie.
    slots: Tensor,
    /// Position of each row; it sees that one and those before.
    positions: Vec<usize>,
}

/// Which experts compute which rows.
#[derive(Debug)]
pub struct Routing {
    picks_per_row: usize,
    /// `[picks]`
    picks: Vec<usize>,
    /// `[picks, 1]`; of no use before the first routing.
    weights: Tensor,
}

impl Inputs {
    fn pass(&self) -> &Pass {
        self.pass.as_ref().expect("upload comes before the operations of a pass: this is a bug")
    }
}

impl Backend for ReferenceBackend {
    type Buffer = Tensor;
    type Matrix = Tensor;
    type Vector = Tensor;
    type KvLayer = KvTensors;
    type Rope = RopeTensors;
    type Inputs = Inputs;
    type Routing = Routing;

    fn load_matrix(&mut self, parts: &[TensorView<'_>], in_features: usize) -> Result<Tensor, ModelError> {
        let flat = self.load_vector(parts)?;
        flat.reshape(((), in_features)).map_err(failed)
    }

    fn first_outputs(&mut self, matrix: &Tensor, num_outputs: usize) -> Result<Tensor, ModelError> {
        matrix.narrow(0, 0, num_outputs).and_then(|rows| rows.contiguous()).map_err(failed)
    }

    fn load_vector(&mut self, parts: &[TensorView<'_>]) -> Result<Tensor, ModelError> {
        let elements: Vec<f32> = parts.iter().flat_map(TensorView::to_f32).collect();
        let len = elements.len();
        Tensor::from_vec(elements, len, &self.device).map_err(failed)
    }

    fn load_rope(&mut self, table: RopeTable) -> Result<RopeTensors, ModelError> {
        let load = |values: Vec<f32>| {
            let width = values.len() / table.num_positions;
            Tensor::from_vec(values, (table.num_positions, width), &self.device).map_err(failed)
        };
        Ok(RopeTensors { cos: load(table.cos)?, sin: load(table.sin)? })
    }

    fn allocate_kv_layer(&mut self, layout: &KvLayout) -> Result<KvTensors, ModelError> {
        let shape = (layout.num_slots(), layout.row_len());
        let zeros = || {
            let zeros = bytemuck::allocation::try_zeroed_vec::<f32>(layout.layer_len());
            let zeros = zeros.map_err(|()| failed(Error::Msg(format!("no memory for {layout:?}"))))?;
            Tensor::from_vec(zeros, shape, &self.device).map_err(failed)
        };
        Ok(KvTensors { keys: zeros()?, values: zeros()? })
    }

    fn allocate_buffer(&mut self, _len: usize) -> Result<Tensor, ModelError> {
        // Every operation that writes a buffer replaces its tensor.
        Tensor::new(0.0f32, &self.device).map_err(failed)
    }

    fn allocate_routing(&mut self, _max_rows: usize, experts: &Experts) -> Result<Routing, ModelError> {
        let weights = self.allocate_buffer(0)?;
        Ok(Routing { picks_per_row: experts.num_experts_per_token, picks: Vec::new(), weights })
    }

    fn allocate_inputs(&mut self, layout: &KvLayout) -> Result<Inputs, ModelError> {
        Ok(Inputs { block_size: layout.block_size, pass: None })
    }

    fn upload(&mut self, batch: &ForwardBatch, inputs: &mut Inputs) -> Result<(), ModelError> {
        inputs.pass = match batch.is_empty() {
            true => None,
            false => Some(Pass::new(batch, inputs.block_size, &self.device).map_err(failed)?),
        };
        Ok(())
    }

    fn download(&mut self, x: &mut Tensor, len: usize, out: &mut Vec<f32>) -> Result<(), ModelError> {
        let elements = x.flatten_all().and_then(|flat| flat.to_vec1::<f32>()).map_err(failed)?;
        assert_eq!(elements.len(), len);
        *out = elements;
        Ok(())
    }

    fn embed(&mut self, inputs: &Inputs, table: &Tensor, out: &mut Tensor) -> Result<(), ModelError> {
        replace(out, table.index_select(&inputs.pass().token_ids, 0))
    }

    fn norm(
        &mut self,
        rows: usize,
        x: &Tensor,
        norm: Norm<'_, Tensor>,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        assert_eq!(x.dims()[0], rows);
        replace(out, normalise(x, norm))
    }

    fn add_norm(
        &mut self,
        rows: usize,
        residual: &mut Tensor,
        x: &Tensor,
        norm: Norm<'_, Tensor>,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        replace(residual, &*residual + x)?;
        self.norm(rows, residual, norm, out)
    }

    fn add(&mut self, len: usize, sum: &mut Tensor, x: &Tensor) -> Result<(), ModelError> {
        assert_eq!((sum.elem_count(), x.elem_count()), (len, len));
        replace(sum, &*sum + x)
    }

    fn scale(&mut self, len: usize, x: &mut Tensor, factor: f32) -> Result<(), ModelError> {
        assert_eq!(x.elem_count(), len);
        replace(x, x.affine(f64::from(factor), 0.0))
    }

    fn soft_cap(&mut self, len: usize, x: &mut Tensor, cap: f32) -> Result<(), ModelError> {
        assert_eq!(x.elem_count(), len);
        replace(x, soft_cap(x, cap))
    }

    fn matmul(
        &mut self,
        rows: usize,
        x: &Tensor,
        linear: Linear<'_, Tensor, Tensor>,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        assert_eq!(x.dims()[0], rows);
        let product = linear.weight.t().and_then(|transposed| x.matmul(&transposed));
        match linear.bias {
            None => replace(out, product),
            Some(bias) => replace(out, product.and_then(|product| product.broadcast_add(bias))),
        }
    }

    fn qk_norm(
        &mut self,
        rows: usize,
        heads: Heads,
        norm: QkNormWeights<'_, Tensor>,
        qkv: &mut Tensor,
    ) -> Result<(), ModelError> {
        assert_eq!(qkv.dims(), [rows, heads.qkv_width()]);
        let normed = norm_queries_and_keys(qkv, heads, norm);
        replace(qkv, normed)
    }

    fn rope_and_store(
        &mut self,
        inputs: &Inputs,
        heads: Heads,
        rope: Option<&RopeTensors>,
        qkv: &mut Tensor,
        kv: &mut KvTensors,
    ) -> Result<(), ModelError> {
        let pass = inputs.pass();
        let queries = rotate_and_store(pass, heads, rope, qkv, kv);
        replace(qkv, queries)
    }

    fn attention(
        &mut self,
        inputs: &Inputs,
        heads: Heads,
        attention: Attention<'_, Tensor>,
        qkv: &Tensor,
        kv: &KvTensors,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        let attend = |sequence| attend(sequence, heads, &attention, qkv, kv);
        let rows: CandleResult<Vec<Tensor>> = inputs.pass().sequences.iter().map(attend).collect();
        replace(out, rows.and_then(|rows| Tensor::cat(&rows, 0)))
    }

    fn activate(
        &mut self,
        rows: usize,
        width: usize,
        activation: Activation,
        x: &Tensor,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        assert_eq!(x.dims(), [rows, width]);
        replace(
            out,
            match activation {
                Activation::Silu => x.silu(),
                Activation::GeluTanh => x.gelu(),
                Activation::ClampedSwiglu { .. } => Err(Error::Msg("a gate alone".to_owned())),
            },
        )
    }

    fn gate(
        &mut self,
        rows: usize,
        width: usize,
        activation: Activation,
        gate_up: &Tensor,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        assert_eq!(gate_up.dims(), [rows, 2 * width]);
        let halves =
            gate_up.narrow(1, 0, width).and_then(|gate| Ok((gate, gate_up.narrow(1, width, width)?)));
        let gated = halves.and_then(|(gate, up)| match activation {
            Activation::Silu => gate.silu()? * up,
            Activation::GeluTanh => gate.contiguous()?.gelu()? * up,
            Activation::ClampedSwiglu { alpha, limit } => {
                let gate = gate.minimum(limit)?;
                let up = up.clamp(-limit, limit)?;
                let sigmoid = (gate.affine(-f64::from(alpha), 0.0)?.exp()? + 1.0)?.recip()?;
                (up + 1.0)? * (gate * sigmoid)?
            }
        });
        replace(out, gated)
    }

    fn gated_feed_forward(
        &mut self,
        rows: usize,
        x: &Tensor,
        layer: GatedFeedForward<'_, Tensor, Tensor>,
        [gate_up, gated]: [&mut Tensor; 2],
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        let width = layer.down.weight.dims()[1];
        self.matmul(rows, x, layer.up, gate_up)?;
        self.gate(rows, width, layer.activation, gate_up, gated)?;
        self.matmul(rows, gated, layer.down, out)
    }

    fn route(
        &mut self,
        rows: usize,
        experts: &Experts,
        logits: &Tensor,
        routing: &mut Routing,
    ) -> Result<(), ModelError> {
        assert_eq!(logits.dims(), [rows, experts.num_experts]);
        route(experts, logits, routing).map_err(failed)
    }

    fn expert_matmul(
        &mut self,
        routing: &mut Routing,
        x: &Tensor,
        share: Share,
        experts: ExpertLinear<'_, Tensor, Tensor>,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        let product = |(pick, &expert): (usize, &usize)| {
            let row = match share {
                Share::Row => pick / routing.picks_per_row,
                Share::Pick => pick,
            };
            let product = x.narrow(0, row, 1)?.matmul(&experts.weights[expert].t()?)?;
            match experts.biases {
                None => Ok(product),
                Some(biases) => product.broadcast_add(&biases[expert]),
            }
        };
        let rows: CandleResult<Vec<Tensor>> = routing.picks.iter().enumerate().map(product).collect();
        replace(out, rows.and_then(|rows| Tensor::cat(&rows, 0)))
    }

    fn combine(
        &mut self,
        rows: usize,
        width: usize,
        routing: &Routing,
        x: &Tensor,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        let weighted = x.broadcast_mul(&routing.weights);
        let weighted = weighted.and_then(|x| x.reshape((rows, routing.picks_per_row, width)));
        replace(out, weighted.and_then(|x| x.sum(1)))
    }

    fn pick_logits_rows(&mut self, inputs: &Inputs, width: usize, x: &mut Tensor) -> Result<(), ModelError> {
        assert_eq!(x.dims()[1], width);
        let rows = inputs.pass().logits_rows.as_ref();
        replace(x, x.index_select(rows.expect("only called with logits rows: this is a bug"), 0))
    }
}

impl Pass {
    fn new(batch: &ForwardBatch, block_size: usize, device: &Device) -> CandleResult<Self> {
        let sequences = (0..batch.num_seqs()).map(|index| Sequence::new(batch, index, block_size, device));
        let logits_rows = match batch.logits_rows.as_slice() {
            [] => None,
            rows => Some(Tensor::new(rows, device)?),
        };
        Ok(Pass {
            token_ids: Tensor::new(batch.token_ids.as_slice(), device)?,
            positions: Tensor::new(batch.positions.as_slice(), device)?,
            slot_mapping: batch.slot_mapping.iter().map(|&slot| slot as usize).collect(),
            sequences: sequences.filter_map(CandleResult::transpose).collect::<CandleResult<_>>()?,
            logits_rows,
        })
    }
}

impl Sequence {
    /// Sequence `index` of the batch; `None` if it has no rows.
    fn new(
        batch: &ForwardBatch,
        index: usize,
        block_size: usize,
        device: &Device,
    ) -> CandleResult<Option<Self>> {
        let rows = batch.cu_seqlens_q[index] as usize..batch.cu_seqlens_q[index + 1] as usize;
        if rows.is_empty() {
            return Ok(None);
        }
        let context_len = batch.context_lens[index] as usize;
        let first_block = batch.block_table_offsets[index] as usize;
        let blocks = &batch.block_tables[first_block..];
        let slots: Vec<u32> = (0..context_len)
            .map(|position| {
                blocks[position / block_size] * block_size as u32 + (position % block_size) as u32
            })
            .collect();
        Ok(Some(Sequence {
            first_row: rows.start,
            num_rows: rows.len(),
            slots: Tensor::new(slots, device)?,
            positions: batch.positions[rows].iter().map(|&position| position as usize).collect(),
        }))
    }
}

fn normalise(x: &Tensor, norm: Norm<'_, Tensor>) -> CandleResult<Tensor> {
    match norm.kind {
        NormKind::Rms => rms_norm(x, norm.weight, norm.eps),
        NormKind::Layer => {
            let bias = norm.bias.expect("a layer norm has a bias: this is a bug");
            let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            rms_norm(&centred, norm.weight, norm.eps)?.broadcast_add(bias)
        }
    }
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> CandleResult<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    let root = (mean_square + f64::from(eps))?.sqrt()?;
    x.broadcast_div(&root)?.broadcast_mul(weight)
}

fn soft_cap(x: &Tensor, cap: f32) -> CandleResult<Tensor> {
    let cap = f64::from(cap);
    x.affine(1.0 / cap, 0.0)?.tanh()?.affine(cap, 0.0)
}

fn norm_queries_and_keys(
    qkv: &Tensor,
    heads: Heads,
    norm: QkNormWeights<'_, Tensor>,
) -> CandleResult<Tensor> {
    let (num_tokens, (q, kv)) = (qkv.dims()[0], (heads.q_width(), heads.kv_width()));
    let part = |start: usize, width: usize, weight: &Tensor| {
        let parts = qkv.narrow(1, start, width)?.reshape((num_tokens, (), weight.elem_count()))?;
        rms_norm(&parts, weight, norm.eps)?.reshape((num_tokens, width))
    };
    Tensor::cat(&[part(0, q, norm.q)?, part(q, kv, norm.k)?, qkv.narrow(1, q + kv, kv)?], 1)
}

/// Sorting on the host: the device's own sort has no rule for ties.
fn route(experts: &Experts, logits: &Tensor, routing: &mut Routing) -> CandleResult<()> {
    routing.picks.clear();
    let mut weights = Vec::new();
    for logits in logits.to_vec2::<f32>()? {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let max = logits[order[0]];
        let weight = |&expert: &usize| (logits[expert] - max).exp();
        let all: f32 = order.iter().map(weight).sum();
        order.truncate(experts.num_experts_per_token);
        let chosen: f32 = order.iter().map(weight).sum();
        let sum = if experts.renormalise { chosen } else { all };
        weights.extend(order.iter().map(|expert| weight(expert) / sum));
        routing.picks.extend(order);
    }
    routing.weights = Tensor::from_vec(weights, (routing.picks.len(), 1), logits.device())?;
    Ok(())
}

/// Stores keys and values; returns the rotated queries, `[num_tokens, q_width]`.
fn rotate_and_store(
    pass: &Pass,
    heads: Heads,
    rope: Option<&RopeTensors>,
    qkv: &Tensor,
    kv: &mut KvTensors,
) -> CandleResult<Tensor> {
    let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
    let rotate = |start: usize, width: usize| {
        let part = qkv.narrow(1, start, width)?.contiguous()?;
        let Some(rope) = rope else { return Ok(part) };
        let cos = rope.cos.index_select(&pass.positions, 0)?;
        let sin = rope.sin.index_select(&pass.positions, 0)?;
        rotate(&part, heads.head_dim, &cos, &sin)
    };
    let queries = rotate(0, q_width)?;
    let keys = rotate(q_width, kv_width)?;
    let values = qkv.narrow(1, q_width + kv_width, kv_width)?.contiguous()?;
    for (row, &slot) in pass.slot_mapping.iter().enumerate() {
        kv.keys.slice_set(&keys.narrow(0, row, 1)?, 0, slot)?;
        kv.values.slice_set(&values.narrow(0, row, 1)?, 0, slot)?;
    }
    Ok(queries)
}

/// `x` is `[num_tokens, _ * head_dim]`; channel `i` of a head turns with channel `i + head_dim / 2`.
fn rotate(x: &Tensor, head_dim: usize, cos: &Tensor, sin: &Tensor) -> CandleResult<Tensor> {
    let (num_tokens, width) = x.dims2()?;
    let half = head_dim / 2;
    let x = x.reshape((num_tokens, width / head_dim, head_dim))?;
    let (first, second) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    let rotated_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let rotated_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    Tensor::cat(&[rotated_first, rotated_second], 2)?.reshape((num_tokens, width))
}

/// `[num_rows, context_len]`: 0 where a row may look, -inf where it may not.
fn mask(sequence: &Sequence, window: Option<usize>) -> CandleResult<Tensor> {
    let context_len = sequence.slots.dims1()?;
    let visible = |row: usize, key: usize| key <= row && window.is_none_or(|window| key + window > row);
    let mask: Vec<f32> = sequence
        .positions
        .iter()
        .flat_map(|&row| (0..context_len).map(move |key| (row, key)))
        .map(|(row, key)| if visible(row, key) { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    Tensor::from_vec(mask, (sequence.num_rows, context_len), sequence.slots.device())
}

/// Attention of one sequence's rows: `[num_rows, q_width]`.
fn attend(
    sequence: &Sequence,
    heads: Heads,
    attention: &Attention<'_, Tensor>,
    queries: &Tensor,
    kv: &KvTensors,
) -> CandleResult<Tensor> {
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    let group = num_heads / num_kv_heads;
    let context_len = sequence.slots.dims1()?;
    // [num_heads, context_len, head_dim]: each key/value head serves `group` query heads.
    let context = |cache: &Tensor| {
        cache
            .index_select(&sequence.slots, 0)?
            .reshape((context_len, num_kv_heads, 1, head_dim))?
            .broadcast_as((context_len, num_kv_heads, group, head_dim))?
            .reshape((context_len, num_heads, head_dim))?
            .transpose(0, 1)?
            .contiguous()
    };
    let queries = queries
        .narrow(0, sequence.first_row, sequence.num_rows)?
        .reshape((sequence.num_rows, num_heads, head_dim))?
        .transpose(0, 1)?
        .contiguous()?;
    let mut scores = queries.matmul(&context(&kv.keys)?.t()?)?.affine(f64::from(attention.scale), 0.0)?;
    if let Some(cap) = attention.soft_cap {
        scores = soft_cap(&scores, cap)?;
    }
    scores = scores.broadcast_add(&mask(sequence, attention.window)?)?;
    // A sink is one more column, left out again after the softmax.
    if let Some(sinks) = attention.sinks {
        let column = sinks.reshape((num_heads, 1, 1))?.broadcast_as((num_heads, sequence.num_rows, 1))?;
        scores = Tensor::cat(&[scores, column.contiguous()?], 2)?;
    }
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    let weights = weights.narrow(2, 0, context_len)?.contiguous()?;
    let mixed = weights.matmul(&context(&kv.values)?)?;
    mixed.transpose(0, 1)?.reshape((sequence.num_rows, num_heads * head_dim))
}

fn replace(out: &mut Tensor, result: CandleResult<Tensor>) -> Result<(), ModelError> {
    *out = result.map_err(failed)?;
    Ok(())
}

fn failed(error: Error) -> ModelError {
    ModelError::Backend { context: "reference backend", reason: error.to_string() }
}
