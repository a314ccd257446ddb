//! The reference backend: candle tensors in f32 on any candle device. Plain and slow on purpose, each
//! operation the formula as one would write it down; what the fast backends are compared with, and a
//! way to serve on a device that has no fast backend yet.
//!
//! It allocates in every operation, and it keeps the bit rule of [`crate::Model`] only up to
//! rounding: candle's own matrix product may sum in another order when the number of rows changes.

use candle_core::{D, Device, Error, Result as CandleResult, Tensor};

use super::{Backend, Heads, Linear, Norm};
use crate::batch::ForwardBatch;
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
    /// `[num_rows, context_len]`: 0 where a row may look, -inf where it may not.
    mask: Tensor,
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

    fn load_matrix(&mut self, parts: &[TensorView<'_>], in_features: usize) -> Result<Tensor, ModelError> {
        let flat = self.load_vector(parts)?;
        flat.reshape(((), in_features)).map_err(failed)
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
            let zeros = crate::kv_cache::try_zeros(layout.layer_len())?;
            Tensor::from_vec(zeros, shape, &self.device).map_err(failed)
        };
        Ok(KvTensors { keys: zeros()?, values: zeros()? })
    }

    fn allocate_buffer(&mut self, _len: usize) -> Result<Tensor, ModelError> {
        // Every operation that writes a buffer replaces its tensor.
        Tensor::new(0.0f32, &self.device).map_err(failed)
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

    fn rms_norm(
        &mut self,
        rows: usize,
        x: &Tensor,
        norm: Norm<'_, Tensor>,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        assert_eq!(x.dims()[0], rows);
        replace(out, rms_norm(x, norm))
    }

    fn add_rms_norm(
        &mut self,
        rows: usize,
        residual: &mut Tensor,
        x: &Tensor,
        norm: Norm<'_, Tensor>,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        replace(residual, &*residual + x)?;
        self.rms_norm(rows, residual, norm, out)
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

    fn rope_and_store(
        &mut self,
        inputs: &Inputs,
        heads: Heads,
        rope: &RopeTensors,
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
        qkv: &Tensor,
        kv: &KvTensors,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        let rows: CandleResult<Vec<Tensor>> =
            inputs.pass().sequences.iter().map(|sequence| attend(sequence, heads, qkv, kv)).collect();
        replace(out, rows.and_then(|rows| Tensor::cat(&rows, 0)))
    }

    fn silu_mul(
        &mut self,
        rows: usize,
        width: usize,
        gate_up: &Tensor,
        out: &mut Tensor,
    ) -> Result<(), ModelError> {
        assert_eq!(gate_up.dims(), [rows, 2 * width]);
        let gate = gate_up.narrow(1, 0, width).and_then(|gate| gate.silu());
        replace(out, gate.and_then(|gate| gate * gate_up.narrow(1, width, width)))
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
        let mask: Vec<f32> = batch.positions[rows.clone()]
            .iter()
            .flat_map(|&row| {
                (0..context_len).map(move |key| if key <= row as usize { 0.0 } else { f32::NEG_INFINITY })
            })
            .collect();
        Ok(Some(Sequence {
            first_row: rows.start,
            num_rows: rows.len(),
            slots: Tensor::new(slots, device)?,
            mask: Tensor::from_vec(mask, (rows.len(), context_len), device)?,
        }))
    }
}

fn rms_norm(x: &Tensor, norm: Norm<'_, Tensor>) -> CandleResult<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    let root = (mean_square + f64::from(norm.eps))?.sqrt()?;
    x.broadcast_div(&root)?.broadcast_mul(norm.weight)
}

/// Stores keys and values; returns the rotated queries, `[num_tokens, q_width]`.
fn rotate_and_store(
    pass: &Pass,
    heads: Heads,
    rope: &RopeTensors,
    qkv: &Tensor,
    kv: &mut KvTensors,
) -> CandleResult<Tensor> {
    let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
    let cos = rope.cos.index_select(&pass.positions, 0)?;
    let sin = rope.sin.index_select(&pass.positions, 0)?;
    let rotate =
        |start: usize, width: usize| rotate(&qkv.narrow(1, start, width)?, heads.head_dim, &cos, &sin);
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

/// Attention of one sequence's rows: `[num_rows, q_width]`.
fn attend(sequence: &Sequence, heads: Heads, queries: &Tensor, kv: &KvTensors) -> CandleResult<Tensor> {
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
    let scores = (queries.matmul(&context(&kv.keys)?.t()?)? / (head_dim as f64).sqrt())?;
    let scores = scores.broadcast_add(&sequence.mask)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
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
