//! The reference backend: candle tensors in f32 on any candle device. Plain and slow on purpose, each
//! operation the formula as one would write it down; what the fast backends are compared with, and a
//! way to serve on a device that has no fast backend yet.
//!
//! It allocates in every operation, and it keeps the bit rule of [`crate::Model`] only up to
//! rounding: candle's own matrix product may sum in another order when the number of rows changes.

mod formulas;

use candle_core::{Device, Error, Result as CandleResult, Tensor};
use tandem_kernels::kv::Values;

use super::{
    Attention, Backend, Columns, ExpertLinear, GatedFeedForward, Heads, Linear, Norm, QkNormWeights, Rows,
    Share,
};
use crate::batch::ForwardBatch;
use crate::config::{Activation, Experts};
use crate::error::ModelError;
use crate::kv_cache::KvLayout;
use crate::rope::RopeTable;
use crate::weights::TensorView;
use formulas::{
    attend, join_latents, norm_queries_and_keys, normalise, rms_norm, rotate_and_store, route, soft_cap,
};

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

/// Keys and values of one layer, each `[num_slots, num_kv_heads * head_dim]`; no values where they are those of
/// the keys.
#[derive(Debug)]
pub struct KvTensors {
    keys: Tensor,
    values: Option<Tensor>,
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
    /// Their tokens' slots.
    logits_slots: Vec<usize>,
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
        let values = if layout.values == Values::Own { Some(zeros()?) } else { None };
        Ok(KvTensors { keys: zeros()?, values })
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

    fn download(&mut self, x: &Tensor, len: usize, out: &mut Vec<f32>) -> Result<(), ModelError> {
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

    fn norm_first(
        &mut self,
        rows: usize,
        width: usize,
        norm: Norm<'_, Tensor>,
        x: &mut Tensor,
    ) -> Result<(), ModelError> {
        assert_eq!(x.dims(), [rows, width]);
        let first = norm.weight.elem_count();
        let normed = x.narrow(1, 0, first).and_then(|part| rms_norm(&part, norm.weight, norm.eps));
        let rest = x.narrow(1, first, width - first);
        replace(x, normed.and_then(|normed| Tensor::cat(&[normed, rest?], 1)))
    }

    fn join_latents(
        &mut self,
        rows: usize,
        heads: Heads,
        q: &Tensor,
        up: &[Tensor],
        latents: &Tensor,
        qkv: &mut Tensor,
    ) -> Result<(), ModelError> {
        assert_eq!(latents.dims(), [rows, heads.head_dim]);
        replace(qkv, join_latents(heads, q, up, latents))
    }

    fn head_matmul(
        &mut self,
        rows: usize,
        x: &Tensor,
        weights: &[Tensor],
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        assert_eq!(x.dims()[0], rows);
        let product = |(head, weight): (usize, &Tensor)| {
            let inputs = weight.dims()[1];
            x.narrow(1, head * inputs, inputs)?.contiguous()?.matmul(&weight.t()?)
        };
        let heads: CandleResult<Vec<Tensor>> = weights.iter().enumerate().map(product).collect();
        replace(out, heads.and_then(|heads| Tensor::cat(&heads, 1)))
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
        choice_bias: Option<&Tensor>,
        logits: &Tensor,
        routing: &mut Routing,
    ) -> Result<(), ModelError> {
        assert_eq!(logits.dims(), [rows, experts.num_experts]);
        route(experts, choice_bias, logits, routing).map_err(failed)
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

    fn allocate_slots(&mut self, num_slots: usize, width: usize) -> Result<Tensor, ModelError> {
        let zeros = num_slots.checked_mul(width).map(bytemuck::allocation::try_zeroed_vec::<f32>);
        let zeros = zeros.and_then(Result::ok);
        let zeros =
            zeros.ok_or_else(|| failed(Error::Msg(format!("no memory for {num_slots} x {width}"))))?;
        Tensor::from_vec(zeros, (num_slots, width), &self.device).map_err(failed)
    }

    fn store_slots(
        &mut self,
        inputs: &Inputs,
        rows: Rows,
        width: usize,
        x: &Tensor,
        store: &mut Tensor,
    ) -> Result<(), ModelError> {
        let pass = inputs.pass();
        let slots = match rows {
            Rows::All => &pass.slot_mapping,
            Rows::Logits => &pass.logits_slots,
        };
        assert_eq!(x.dims(), [slots.len(), width]);
        let store_rows = || -> CandleResult<()> {
            let x = x.contiguous()?;
            (slots.iter().enumerate())
                .try_for_each(|(row, &slot)| store.slice_set(&x.narrow(0, row, 1)?, 0, slot))
        };
        store_rows().map_err(failed)
    }

    fn load_slots_before(
        &mut self,
        inputs: &Inputs,
        _block_size: usize,
        width: usize,
        store: &Tensor,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        let rows = || -> CandleResult<Tensor> {
            let mut rows = Vec::new();
            for sequence in &inputs.pass().sequences {
                for position in &sequence.positions {
                    rows.push(match position.checked_sub(1) {
                        None => Tensor::zeros((1, width), candle_core::DType::F32, store.device())?,
                        Some(before) => store.index_select(&sequence.slots.narrow(0, before, 1)?, 0)?,
                    });
                }
            }
            Tensor::cat(&rows, 0)
        };
        replace(out, rows())
    }

    fn put_columns(
        &mut self,
        rows: usize,
        x: &Tensor,
        columns: Columns,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        assert_eq!(x.dims(), [rows, columns.width]);
        let joined = match columns.first {
            0 => Ok(x.clone()),
            first => out.narrow(1, 0, first).and_then(|left| Tensor::cat(&[&left, x], 1)),
        };
        replace(out, joined)
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
            logits_slots: batch
                .logits_rows
                .iter()
                .map(|&row| batch.slot_mapping[row as usize] as usize)
                .collect(),
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

fn replace(out: &mut Tensor, result: CandleResult<Tensor>) -> Result<(), ModelError> {
    *out = result.map_err(failed)?;
    Ok(())
}

fn failed(error: Error) -> ModelError {
    ModelError::Backend { context: "reference backend", reason: error.to_string() }
}
