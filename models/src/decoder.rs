//! THE forward pass, once, for every family and every backend: a decoder of attention and feed-forward
//! layers around a residual stream. What differs between families is in [`DecoderConfig`], as options
//! that combine freely; what differs between devices is behind [`Backend`].
//!
//! Query, key and value projections are one matrix, and so are gate and up: small models are bound by
//! the number of operations, and larger ones lose nothing.

use crate::backend::{Attention, Backend, Heads, Norm, OutputHead, Share};
use crate::batch::ForwardBatch;
use crate::config::{DecoderConfig, NormKind, Positions};
use crate::error::ModelError;
use crate::kv_cache::{KvLayout, kv_bytes_per_token};
use crate::model::{Model, WeightMemory};
use crate::outputs::{Outputs, Wanted};
use crate::rope::RopeTable;
use crate::validate::Bounds;

mod head;
mod load;
pub(crate) mod tensors;
mod weights;
mod workspace;

pub use head::load_with_head;
use head::{Attached, HeadStart};
pub use load::{load, load_with};
use weights::{AttentionWeights, FeedForward, LatentWeights, LayerWeights, NormWeights, Weights};
use workspace::Workspace;

/// A decoder-only transformer on a backend.
pub struct Decoder<B: Backend> {
    config: DecoderConfig,
    heads: Heads,
    weights: Weights<B>,
    memory: WeightMemory,
    short_head: Option<ShortHead<B>>,
    /// Of a drafting head: what its stream begins with instead of the embedding.
    start: Option<HeadStart<B>>,
    /// The head that drafts from this decoder's hidden states.
    drafter: Option<Box<Attached<B>>>,
    cache: Option<Cache<B>>,
    workspace: Option<Workspace<B>>,
    pass: Pass,
    asked: Asked,
    backend: B,
}

/// What the pass's batch asks for.
#[derive(Default)]
struct Asked {
    hidden_rows: Vec<u32>,
    wanted: Vec<Wanted>,
    num_token_ids: usize,
}

/// The head over the first tokens of the vocabulary.
struct ShortHead<B: Backend> {
    weight: B::Matrix,
    num_tokens: usize,
}

/// The pass that is under way.
#[derive(Clone, Copy, Debug, Default)]
struct Pass {
    shape: PassShape,
    /// Layers computed so far.
    num_layers_done: usize,
}

/// What [`Model::allocate_kv_cache`] sets up: the storage, and all that is sized by it.
struct Cache<B: Backend> {
    bounds: Bounds,
    layers: Vec<B::KvLayer>,
    ropes: Ropes<B>,
    inputs: B::Inputs,
}

struct Ropes<B: Backend> {
    rope: B::Rope,
    local: Option<B::Rope>,
}

impl<B: Backend> Ropes<B> {
    fn of(&self, positions: Positions) -> Option<&B::Rope> {
        match positions {
            Positions::Rope => Some(&self.rope),
            Positions::LocalRope => self.local.as_ref(),
            Positions::None => None,
        }
    }
}

/// The counts that decide which operations a pass is made of.
#[derive(Clone, Copy, Debug, Default)]
struct PassShape {
    num_tokens: usize,
    num_logits_rows: usize,
    /// Somebody wants hidden states, of some rows or (a drafting head) of all: then all rows go through the last
    /// layer whole, and those that get logits are picked after it.
    keeps_rows: bool,
    short_head: bool,
}

impl<B: Backend> Model for Decoder<B> {
    fn config(&self) -> &DecoderConfig {
        &self.config
    }

    fn weight_memory(&self) -> WeightMemory {
        self.memory.clone()
    }

    fn kv_bytes_per_token(&self) -> usize {
        kv_bytes_per_token(&self.config, self.backend.kv_type()) + self.head_bytes_per_token()
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize, block_size: usize) -> Result<(), ModelError> {
        let kv = KvLayout::new(&self.config, self.backend.kv_type(), num_blocks, block_size)?;
        // Release the old storage first: there may not be room for both.
        self.cache = None;
        let num_positions = self.config.max_position_embeddings.min(kv.num_slots());
        let layers =
            (0..kv.num_layers).map(|_| self.backend.allocate_kv_layer(&kv)).collect::<Result<_, _>>()?;
        let mut load_rope =
            |rope| self.backend.load_rope(RopeTable::new(rope, self.config.rotary_width(), num_positions));
        self.cache = Some(Cache {
            bounds: Bounds { vocab_size: self.config.vocab_size, num_positions, kv },
            layers,
            ropes: Ropes {
                rope: load_rope(&self.config.rope)?,
                local: self.config.local_rope.as_ref().map(load_rope).transpose()?,
            },
            inputs: self.backend.allocate_inputs(&kv)?,
        });
        self.allocate_head_storage(&kv)
    }

    fn drafting_head(&mut self) -> Option<&mut dyn Model> {
        self.drafter.as_mut().map(|attached| attached.as_model())
    }

    fn set_short_head(&mut self, num_tokens: usize) -> Result<bool, ModelError> {
        let vocab_size = self.config.vocab_size;
        if num_tokens == 0 || num_tokens > vocab_size {
            let reason = format!("of {num_tokens} tokens; wanted 1 to {vocab_size}");
            return Err(ModelError::Backend { context: "short head", reason });
        }
        if self.has_own_vocabulary() {
            return Ok(false);
        }
        let weight = self.backend.first_outputs(self.weights.head(), num_tokens)?;
        self.short_head = Some(ShortHead { weight, num_tokens });
        Ok(true)
    }

    fn begin(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        // A pass that fails to begin must leave none behind to go on with.
        self.pass = Pass::default();
        let shape = self.set_up(batch)?;
        if shape.num_tokens > 0 {
            self.embed(shape)?;
            self.leave_features(0, shape)?;
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
        self.leave_features(num_layers_done + 1, shape)?;
        self.pass.num_layers_done += 1;
        Ok(true)
    }

    fn hidden_states(&mut self, hidden: &mut Vec<f32>) -> Result<(), ModelError> {
        hidden.clear();
        let Pass { shape, num_layers_done } = self.pass;
        if self.asked.hidden_rows.is_empty() || num_layers_done < self.weights.layers.len() {
            return Ok(());
        }
        let Decoder { config, workspace, asked, backend, .. } = self;
        let width = config.hidden_size;
        backend.download(&ready(workspace).normed, shape.num_tokens * width, hidden)?;
        // They ascend, so none is overwritten before it is read.
        for (to, &from) in asked.hidden_rows.iter().enumerate() {
            let from = from as usize * width;
            hidden.copy_within(from..from + width, to * width);
        }
        hidden.truncate(asked.hidden_rows.len() * width);
        Ok(())
    }

    fn finish(&mut self) -> Result<Outputs<'_>, ModelError> {
        let Pass { shape, .. } = std::mem::take(&mut self.pass);
        self.outputs(shape)
    }
}

impl<B: Backend> Decoder<B> {
    /// The device, for what it alone knows.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Checks the batch, makes room for it and hands it to the device.
    fn set_up(&mut self, batch: &ForwardBatch) -> Result<PassShape, ModelError> {
        let leaves_last_features = self.leaves_last_features();
        let cache = self.cache.as_mut().ok_or_else(|| ModelError::Backend {
            context: "forward pass",
            reason: "no KV cache; call allocate_kv_cache first".to_owned(),
        })?;
        cache.bounds.check(batch)?;
        if batch.short_head && self.short_head.is_none() {
            let reason = "no short head; call set_short_head first".to_owned();
            return Err(ModelError::Backend { context: "forward pass", reason });
        }
        let shape = PassShape {
            num_tokens: batch.num_tokens(),
            num_logits_rows: batch.logits_rows.len(),
            keeps_rows: !batch.hidden_rows.is_empty() || leaves_last_features,
            short_head: batch.short_head,
        };
        self.backend.upload(batch, &mut cache.inputs)?;
        self.asked.hidden_rows.clone_from(&batch.hidden_rows);
        self.asked.wanted.clone_from(&batch.wanted);
        self.asked.num_token_ids = batch.num_token_ids;
        self.reserve(shape)?;
        Ok(shape)
    }

    fn embed(&mut self, shape: PassShape) -> Result<(), ModelError> {
        if self.start.is_some() {
            return self.embed_with_features(shape);
        }
        let Decoder { config, weights, cache, workspace, backend, .. } = self;
        let (ws, cache) = (ready(workspace), ready(cache));
        backend.embed(&cache.inputs, &weights.embed, &mut ws.residual)?;
        if config.embed_scale != 1.0 {
            backend.scale(shape.num_tokens * config.hidden_size, &mut ws.residual, config.embed_scale)?;
        }
        match &weights.layers[0].attn_norm {
            None => Ok(()),
            Some(norm) => backend.norm(shape.num_tokens, &ws.residual, norm.of(config), &mut ws.normed),
        }
    }

    /// Layer `index`, from its attention to the norm before the next layer's attention, or before the
    /// head. All state of a pass between two layers is `residual` and, where there are norms before
    /// sublayers, `normed`.
    fn layer(&mut self, index: usize, shape: PassShape) -> Result<(), ModelError> {
        let Decoder { config, heads, weights, start, cache, workspace, backend, .. } = self;
        let (config, heads, ws, cache) = (&*config, *heads, ready(workspace), ready(cache));
        let (layer, kind) = (&weights.layers[index], config.layer(index));
        let next_layer = weights.layers.get(index + 1);
        let next_norm = next_layer.map_or(Some(&weights.final_norm), |next| next.attn_norm.as_ref());
        let mut rows = shape.num_tokens;

        let joined = start.as_ref().and_then(HeadStart::attention_input);
        queries_keys_values(backend, config, joined, rows, ws, layer)?;
        let Cache { layers, ropes, inputs, .. } = cache;
        let kv = &mut layers[index];
        backend.rope_and_store(inputs, heads, ropes.of(kind.positions), &mut ws.qkv, kv)?;
        let leaves_rows = next_layer.is_none() && !shape.keeps_rows;
        if leaves_rows && shape.num_logits_rows == 0 {
            return Ok(()); // Nobody reads what this layer computes from here on.
        }
        let attention = Attention {
            scale: config.attn_scale.unwrap_or_else(|| (config.head_dim as f32).sqrt().recip()),
            window: kind.window,
            first_key: usize::from(start.is_some()),
            soft_cap: config.attn_soft_cap,
            sinks: layer.sinks.as_ref(),
        };
        backend.attention(inputs, heads, attention, &ws.qkv, kv, &mut ws.attn)?;
        let values = match &layer.attention {
            AttentionWeights::Heads { .. } => &ws.attn,
            AttentionWeights::Latent(weights) => {
                let room = ready(&mut ws.latent);
                backend.head_matmul(rows, &ws.attn, &weights.v_up, &mut room.values)?;
                &room.values
            }
        };
        backend.matmul(rows, values, layer.o.linear(), &mut ws.update)?;

        if leaves_rows && shape.num_logits_rows < rows {
            // The other rows have left their keys and values; no later layer asks for more of them.
            rows = shape.num_logits_rows;
            backend.pick_logits_rows(inputs, config.hidden_size, &mut ws.residual)?;
            backend.pick_logits_rows(inputs, config.hidden_size, &mut ws.update)?;
        }
        add_update(backend, config, rows, ws, [layer.attn_post_norm.as_ref(), layer.ffn_norm.as_ref()])?;
        feed_forward(backend, config, rows, ws, &layer.ffn, layer.ffn_norm.is_some())?;
        add_update(backend, config, rows, ws, [layer.ffn_post_norm.as_ref(), next_norm])
    }

    /// The head, and the one moment at which the host waits.
    fn outputs(&mut self, shape: PassShape) -> Result<Outputs<'_>, ModelError> {
        if shape.num_logits_rows == 0 {
            return Ok(Outputs::default());
        }
        let num_outputs = self.num_outputs();
        let Decoder { config, weights, start, short_head, workspace, cache, asked, backend, .. } = self;
        let ws = ready(workspace);
        if shape.keeps_rows && shape.num_logits_rows < shape.num_tokens {
            backend.pick_logits_rows(&ready(cache).inputs, config.hidden_size, &mut ws.normed)?;
        }
        let (weight, num_outputs) = match short_head {
            Some(short) if shape.short_head => (&short.weight, short.num_tokens),
            _ => (weights.head(), num_outputs),
        };
        let num_token_ids = asked.num_token_ids.min(num_outputs);
        let (scale, soft_cap) = (config.logits_scale, config.logits_soft_cap);
        let head = OutputHead { weight, num_outputs, num_token_ids, scale, soft_cap };
        let Asked { wanted, num_token_ids, .. } = asked;
        match start.as_mut().and_then(HeadStart::own_outputs) {
            None => backend.outputs(&ws.normed, head, wanted, &mut ws.outputs),
            Some(own) => {
                own.all_whole.resize(wanted.len(), Wanted::Whole);
                let outputs = backend.outputs(&ws.normed, head, &own.all_whole, &mut ws.outputs)?;
                own.spread(outputs.logits, config.vocab_size);
                Ok(own.spread.outputs(wanted, *num_token_ids))
            }
        }
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
        self.workspace = None;
        self.workspace =
            Some(Workspace::new(&mut self.backend, &self.config, self.heads, max_tokens, max_logits_rows)?);
        self.reserve_for_head(max_tokens).inspect_err(|_| self.workspace = None)
    }
}

/// Queries, keys and values of every row, side by side, into `qkv`.
fn queries_keys_values<B: Backend>(
    backend: &mut B,
    config: &DecoderConfig,
    joined: Option<&B::Buffer>,
    rows: usize,
    ws: &mut Workspace<B>,
    layer: &LayerWeights<B>,
) -> Result<(), ModelError> {
    let heads = Heads::of(config);
    let input = match joined {
        Some(joined) => joined,
        None if layer.attn_norm.is_some() => &ws.normed,
        None => &ws.residual,
    };
    let (qkv, qk_norm) = match &layer.attention {
        AttentionWeights::Heads { qkv, qk_norm } => (qkv, qk_norm),
        AttentionWeights::Latent(weights) => {
            let LatentWeights { q_down, q, kv_down, kv_norm, k_up, .. } = weights;
            let (room, eps) = (ready(&mut ws.latent), config.latent.map_or(0.0, |latent| latent.norm_eps));
            let norm = |weight| Norm { kind: NormKind::Rms, weight, bias: None, eps };
            let [made, normed] = &mut room.q_down;
            let q_input = match q_down {
                None => input,
                Some((down, weight)) => {
                    backend.matmul(rows, input, down.linear(), made)?;
                    backend.norm(rows, made, norm(weight), normed)?;
                    &*normed
                }
            };
            backend.matmul(rows, q_input, q.linear(), &mut room.q)?;
            backend.matmul(rows, input, kv_down.linear(), &mut room.latents)?;
            backend.norm_first(rows, heads.head_dim, norm(kv_norm), &mut room.latents)?;
            return backend.join_latents(rows, heads, &room.q, k_up, &room.latents, &mut ws.qkv);
        }
    };
    backend.matmul(rows, input, qkv.linear(), &mut ws.qkv)?;
    match qk_norm {
        None => Ok(()),
        Some(norm) => backend.qk_norm(rows, heads, norm.of(config), &mut ws.qkv),
    }
}

/// Adds what a sublayer has computed, in `update`, to the residual stream, and puts the norm that comes
/// next, if one does, into `normed`. `norms`: the one on the update itself, and the next.
fn add_update<B: Backend>(
    backend: &mut B,
    config: &DecoderConfig,
    rows: usize,
    ws: &mut Workspace<B>,
    norms: [Option<&NormWeights<B>>; 2],
) -> Result<(), ModelError> {
    let len = rows * config.hidden_size;
    let [post_norm, next_norm] = norms;
    if let Some(norm) = post_norm {
        backend.norm(rows, &ws.update, norm.of(config), &mut ws.normed)?;
        std::mem::swap(&mut ws.update, &mut ws.normed);
    }
    if config.residual_scale != 1.0 {
        backend.scale(len, &mut ws.update, config.residual_scale)?;
    }
    match next_norm {
        None => backend.add(len, &mut ws.residual, &ws.update),
        Some(norm) => backend.add_norm(rows, &mut ws.residual, &ws.update, norm.of(config), &mut ws.normed),
    }
}

/// The feed-forward sublayer, into `update`.
fn feed_forward<B: Backend>(
    backend: &mut B,
    config: &DecoderConfig,
    rows: usize,
    ws: &mut Workspace<B>,
    ffn: &FeedForward<B>,
    is_pre_norm: bool,
) -> Result<(), ModelError> {
    let input = if is_pre_norm { &ws.normed } else { &ws.residual };
    match ffn {
        FeedForward::Dense(dense) => {
            let (width, activation) = (config.intermediate_size, config.activation);
            let room = [&mut ws.gate_up, &mut ws.activated];
            if config.gated {
                return backend.gated_feed_forward(rows, input, dense.gated(config), room, &mut ws.update);
            }
            backend.matmul(rows, input, dense.up.linear(), &mut ws.gate_up)?;
            backend.activate(rows, width, activation, &ws.gate_up, &mut ws.activated)?;
            backend.matmul(rows, &ws.activated, dense.down.linear(), &mut ws.update)
        }
        FeedForward::Experts { router, choice_bias, up, down, shared } => {
            let (experts, room) = config
                .experts
                .as_ref()
                .zip(ws.experts.as_mut())
                .expect("a layer of experts has its options and its room: this is a bug");
            let picks = rows * experts.num_experts_per_token;
            backend.matmul(rows, input, router.linear(), &mut room.router)?;
            backend.route(rows, experts, choice_bias.as_ref(), &room.router, &mut room.routing)?;
            backend.expert_matmul(&mut room.routing, input, Share::Row, up.linear(), &mut ws.gate_up)?;
            let (width, act) = (experts.intermediate_size, config.activation);
            backend.gate(picks, width, act, &ws.gate_up, &mut ws.activated)?;
            let (x, answers) = (&ws.activated, &mut room.answers);
            backend.expert_matmul(&mut room.routing, x, Share::Pick, down.linear(), answers)?;
            backend.combine(rows, config.hidden_size, &room.routing, answers, &mut ws.update)?;
            let Some(shared) = shared else { return Ok(()) };
            let between = [&mut ws.gate_up, &mut ws.activated];
            backend.gated_feed_forward(rows, input, shared.gated(config), between, answers)?;
            backend.add(rows * config.hidden_size, &mut ws.update, answers)
        }
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
