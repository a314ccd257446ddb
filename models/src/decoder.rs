//! THE forward pass, once, for every family and every backend: a pre-norm decoder with rotary
//! grouped-query attention and a gated feed-forward layer. What differs between families is in
//! [`DecoderConfig`] (shapes, biases, tying); what differs between devices is behind [`Backend`].
//!
//! Query, key and value projections are one matrix, and so are gate and up: small models are bound by
//! the number of operations, and larger ones lose nothing.

use crate::backend::{Backend, Heads, Linear, Norm};
use crate::batch::ForwardBatch;
use crate::config::DecoderConfig;
use crate::error::ModelError;
use crate::kv_cache::{KvLayout, kv_bytes_per_token};
use crate::model::Model;
use crate::rope::RopeTable;
use crate::validate::Bounds;

mod load;

pub use load::load;

/// A decoder-only transformer on a backend.
pub struct Decoder<B: Backend> {
    config: DecoderConfig,
    heads: Heads,
    weights: Weights<B>,
    cache: Option<Cache<B>>,
    workspace: Option<Workspace<B>>,
    pass: Pass,
    backend: B,
}

/// The pass that is under way.
#[derive(Clone, Copy, Debug, Default)]
struct Pass {
    shape: PassShape,
    /// Layers computed so far.
    num_layers_done: usize,
}

struct Weights<B: Backend> {
    embed: B::Matrix,
    layers: Vec<LayerWeights<B>>,
    final_norm: B::Vector,
    /// `None` if the head is the embedding.
    lm_head: Option<B::Matrix>,
}

struct LayerWeights<B: Backend> {
    attn_norm: B::Vector,
    qkv: Projection<B>,
    o: Projection<B>,
    ffn_norm: B::Vector,
    gate_up: Projection<B>,
    down: Projection<B>,
}

struct Projection<B: Backend> {
    weight: B::Matrix,
    bias: Option<B::Vector>,
}

impl<B: Backend> Projection<B> {
    fn linear(&self) -> Linear<'_, B::Matrix, B::Vector> {
        Linear { weight: &self.weight, bias: self.bias.as_ref() }
    }
}

/// What [`Model::allocate_kv_cache`] sets up: the storage, and all that is sized by it.
struct Cache<B: Backend> {
    bounds: Bounds,
    layers: Vec<B::KvLayer>,
    rope: B::Rope,
    inputs: B::Inputs,
}

/// Activations of one pass, `[rows, _]`; sized for the largest pass so far.
struct Workspace<B: Backend> {
    max_tokens: usize,
    max_logits_rows: usize,
    /// `hidden_size`: the residual stream.
    residual: B::Buffer,
    /// `hidden_size`: the norm of the residual stream.
    normed: B::Buffer,
    /// `hidden_size`: what a sublayer adds to the residual stream.
    update: B::Buffer,
    /// `heads.qkv_width()`
    qkv: B::Buffer,
    /// `heads.q_width()`
    attn: B::Buffer,
    /// `2 * intermediate_size`
    gate_up: B::Buffer,
    /// `intermediate_size`
    activated: B::Buffer,
    /// `vocab_size`, for logits rows only.
    logits: B::Buffer,
}

/// The counts that decide which operations a pass is made of.
#[derive(Clone, Copy, Debug, Default)]
struct PassShape {
    num_tokens: usize,
    num_logits_rows: usize,
}

impl<B: Backend> Model for Decoder<B> {
    fn config(&self) -> &DecoderConfig {
        &self.config
    }

    fn kv_bytes_per_token(&self) -> usize {
        kv_bytes_per_token(&self.config)
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize, block_size: usize) -> Result<(), ModelError> {
        let kv = KvLayout::new(&self.config, num_blocks, block_size)?;
        // Release the old storage first: there may not be room for both.
        self.cache = None;
        let num_positions = self.config.max_position_embeddings.min(kv.num_slots());
        let layers =
            (0..kv.num_layers).map(|_| self.backend.allocate_kv_layer(&kv)).collect::<Result<_, _>>()?;
        self.cache = Some(Cache {
            bounds: Bounds { vocab_size: self.config.vocab_size, num_positions, kv },
            layers,
            rope: self.backend.load_rope(RopeTable::new(&self.config, num_positions))?,
            inputs: self.backend.allocate_inputs(&kv)?,
        });
        Ok(())
    }

    fn begin(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        // A pass that fails to begin must leave none behind to go on with.
        self.pass = Pass::default();
        let shape = self.set_up(batch)?;
        if shape.num_tokens > 0 {
            self.embed(shape)?;
        }
        self.pass = Pass { shape, num_layers_done: 0 };
        Ok(())
    }

    fn advance(&mut self) -> Result<bool, ModelError> {
        let Pass { shape, num_layers_done } = self.pass;
        if shape.num_tokens == 0 || num_layers_done == self.weights.layers.len() {
            return Ok(false);
        }
        self.layer(num_layers_done, shape)?;
        self.pass.num_layers_done += 1;
        Ok(true)
    }

    fn finish(&mut self, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        let Pass { shape, .. } = std::mem::take(&mut self.pass);
        self.head(shape, logits)
    }
}

impl<B: Backend> Decoder<B> {
    /// The device, for what it alone knows.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Checks the batch, makes room for it and hands it to the device.
    fn set_up(&mut self, batch: &ForwardBatch) -> Result<PassShape, ModelError> {
        let cache = self.cache.as_mut().ok_or_else(|| ModelError::Backend {
            context: "forward pass",
            reason: "no KV cache; call allocate_kv_cache first".to_owned(),
        })?;
        cache.bounds.check(batch)?;
        let shape = PassShape { num_tokens: batch.num_tokens(), num_logits_rows: batch.logits_rows.len() };
        self.backend.upload(batch, &mut cache.inputs)?;
        self.reserve(shape)?;
        Ok(shape)
    }

    fn embed(&mut self, shape: PassShape) -> Result<(), ModelError> {
        let Decoder { config, weights, cache, workspace, backend, .. } = self;
        let (ws, cache) = (ready(workspace), ready(cache));
        backend.embed(&cache.inputs, &weights.embed, &mut ws.residual)?;
        let norm = Norm { weight: &weights.layers[0].attn_norm, eps: config.rms_norm_eps };
        backend.rms_norm(shape.num_tokens, &ws.residual, norm, &mut ws.normed)
    }

    /// Layer `index`, from the norm before its attention (in `normed`) to the norm before the next
    /// layer's, or before the head. All state of a pass between two layers is `residual` and `normed`.
    fn layer(&mut self, index: usize, shape: PassShape) -> Result<(), ModelError> {
        let Decoder { config, heads, weights, cache, workspace, backend, .. } = self;
        let (ws, cache) = (ready(workspace), ready(cache));
        let (layer, heads, eps) = (&weights.layers[index], *heads, config.rms_norm_eps);
        let next_layer = weights.layers.get(index + 1);
        let next_norm = next_layer.map_or(&weights.final_norm, |next| &next.attn_norm);
        let mut rows = shape.num_tokens;

        backend.matmul(rows, &ws.normed, layer.qkv.linear(), &mut ws.qkv)?;
        let kv = &mut cache.layers[index];
        backend.rope_and_store(&cache.inputs, heads, &cache.rope, &mut ws.qkv, kv)?;
        if next_layer.is_none() && shape.num_logits_rows == 0 {
            return Ok(()); // Nobody reads what this layer computes from here on.
        }
        backend.attention(&cache.inputs, heads, &ws.qkv, kv, &mut ws.attn)?;
        backend.matmul(rows, &ws.attn, layer.o.linear(), &mut ws.update)?;

        if next_layer.is_none() && shape.num_logits_rows < rows {
            // The other rows have left their keys and values; no later layer asks for more of them.
            rows = shape.num_logits_rows;
            backend.pick_logits_rows(&cache.inputs, config.hidden_size, &mut ws.residual)?;
            backend.pick_logits_rows(&cache.inputs, config.hidden_size, &mut ws.update)?;
        }

        let norm = Norm { weight: &layer.ffn_norm, eps };
        backend.add_rms_norm(rows, &mut ws.residual, &ws.update, norm, &mut ws.normed)?;
        backend.matmul(rows, &ws.normed, layer.gate_up.linear(), &mut ws.gate_up)?;
        backend.silu_mul(rows, config.intermediate_size, &ws.gate_up, &mut ws.activated)?;
        backend.matmul(rows, &ws.activated, layer.down.linear(), &mut ws.update)?;
        let norm = Norm { weight: next_norm, eps };
        backend.add_rms_norm(rows, &mut ws.residual, &ws.update, norm, &mut ws.normed)
    }

    /// The head, and the one moment at which the host waits.
    fn head(&mut self, shape: PassShape, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        if shape.num_logits_rows == 0 {
            logits.clear();
            return Ok(());
        }
        let Decoder { config, weights, workspace, backend, .. } = self;
        let ws = ready(workspace);
        let head = Linear { weight: weights.lm_head.as_ref().unwrap_or(&weights.embed), bias: None };
        backend.matmul(shape.num_logits_rows, &ws.normed, head, &mut ws.logits)?;
        backend.download(&ws.logits, shape.num_logits_rows * config.vocab_size, logits)
    }

    /// Makes the workspace at least as large as the pass.
    fn reserve(&mut self, shape: PassShape) -> Result<(), ModelError> {
        let (max_tokens, max_logits_rows) =
            self.workspace.as_ref().map_or((0, 0), |ws| (ws.max_tokens, ws.max_logits_rows));
        if shape.num_tokens <= max_tokens && shape.num_logits_rows <= max_logits_rows {
            return Ok(());
        }
        let max_tokens = max_tokens.max(shape.num_tokens);
        let max_logits_rows = max_logits_rows.max(shape.num_logits_rows);
        let Decoder { config, heads, backend, .. } = self;
        let mut rows_of = |width: usize| backend.allocate_buffer(max_tokens * width);
        self.workspace = None;
        self.workspace = Some(Workspace {
            max_tokens,
            max_logits_rows,
            residual: rows_of(config.hidden_size)?,
            normed: rows_of(config.hidden_size)?,
            update: rows_of(config.hidden_size)?,
            qkv: rows_of(heads.qkv_width())?,
            attn: rows_of(heads.q_width())?,
            gate_up: rows_of(2 * config.intermediate_size)?,
            activated: rows_of(config.intermediate_size)?,
            logits: backend.allocate_buffer(max_logits_rows * config.vocab_size)?,
        });
        Ok(())
    }
}

/// Workspace and cache exist from [`Decoder::set_up`] to the end of the pass.
fn ready<T>(part: &mut Option<T>) -> &mut T {
    part.as_mut().expect("set_up() prepares the pass: this is a bug")
}

impl<B: Backend> std::fmt::Debug for Decoder<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("config", &self.config).finish_non_exhaustive()
    }
}
