//! From a checkpoint's named tensors to a backend's weights. Every tensor's shape is held against the
//! configuration before the backend sees it, so a lying `config.json` costs an error message and no
//! memory: sizes come from tensors that are known to lie in the file.

use std::sync::Arc;

use tandem_kernels::ThreadPool;
use tandem_kernels::kv::KvType;

use super::tensors::Part;
use super::weights::{
    AttentionWeights, Dense, ExpertProjection, FeedForward, LayerWeights, NormWeights, Projection,
    QkNormVectors, Weights,
};
use super::{Asked, Decoder, Pass};
use crate::backend::{Backend, BackendKind, CpuBackend, Heads, ReferenceBackend};
use crate::checkpoint::Checkpoint;
use crate::config::{DecoderConfig, Experts, NormKind, NormPlacement, QkNorm};
use crate::error::ModelError;
use crate::family::{ExpertLayout, Role, WeightNames, gguf};
use crate::model::{Model, WeightMemory};
use crate::rope::row_order;
use crate::weights::Dtype;
use crate::weights::gguf::Place;

mod latent;

/// Loads the weights of `checkpoint` onto a backend of the given kind, with keys and values in f32.
/// `pool` serves the CPU backend; models that never run at the same time may share it.
///
/// # Errors
/// As [`Decoder::load`].
pub fn load(
    checkpoint: &Checkpoint,
    kind: BackendKind,
    pool: Arc<ThreadPool>,
) -> Result<Box<dyn Model>, ModelError> {
    load_with(checkpoint, kind, KvType::F32, pool)
}

/// As [`load`], with keys and values of the CPU backend stored as `kv_type`; the reference backend has
/// f32 only.
///
/// # Errors
/// As [`Decoder::load`].
pub fn load_with(
    checkpoint: &Checkpoint,
    kind: BackendKind,
    kv_type: KvType,
    pool: Arc<ThreadPool>,
) -> Result<Box<dyn Model>, ModelError> {
    Ok(match kind {
        BackendKind::Cpu => Box::new(Decoder::load(checkpoint, CpuBackend::new(pool, kv_type))?),
        BackendKind::Reference => {
            Box::new(Decoder::load(checkpoint, ReferenceBackend::new(candle_core::Device::Cpu))?)
        }
    })
}

impl<B: Backend> Decoder<B> {
    /// Loads the weights of `checkpoint` onto `backend`.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape than the configuration implies, or if the backend
    /// cannot hold it.
    pub fn load(checkpoint: &Checkpoint, backend: B) -> Result<Self, ModelError> {
        let config = checkpoint.config.clone();
        let mut loader = Loader::new(checkpoint, &config, config.hidden_size, backend);
        let weights = loader.weights()?;
        checkpoint.weights.release();
        let Loader { backend, memory, heads, .. } = loader;
        Ok(Decoder {
            config,
            heads,
            weights,
            memory,
            short_head: None,
            start: None,
            drafter: None,
            cache: None,
            workspace: None,
            pass: Pass::default(),
            asked: Asked::default(),
            backend,
        })
    }
}

pub(super) struct Loader<'a, B> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) config: &'a DecoderConfig,
    pub(super) heads: Heads,
    /// Width of what the query, key and value projections read.
    pub(super) attn_width: usize,
    /// Of the rows of each query and key head, or of the part of it that turns; see [`row_order`].
    pub(super) row_order: Option<Vec<usize>>,
    pub(super) memory: WeightMemory,
    /// Of the matrices that were made since the files' pages were released.
    pub(super) unreleased_bytes: usize,
    pub(super) backend: B,
}

/// Bytes of matrices after which the files' pages are given back: so many that giving them back costs nothing. Of the
/// files, at most the largest tensor or what about so much was made of lies in memory beside the weights, whichever
/// is more (where matrices are quantised as they are loaded, several times this): a fraction of a model that is large.
const RELEASE_BYTES: usize = 64 << 20;

impl<'a, B: Backend> Loader<'a, B> {
    /// For layers whose query, key and value projections read rows of `attn_width`.
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        config: &'a DecoderConfig,
        attn_width: usize,
        backend: B,
    ) -> Self {
        Loader {
            checkpoint,
            config,
            heads: Heads::of(config),
            attn_width,
            row_order: row_order(&config.rope, config.rotary_width()),
            memory: WeightMemory::default(),
            unreleased_bytes: 0,
            backend,
        }
    }

    fn weights(&mut self) -> Result<Weights<B>, ModelError> {
        let (config, names) = (self.config, &self.checkpoint.names);
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embed = self.rows((Role::Embed, 0), vocab, hidden)?;
        let embed = self.matrix(&[embed], hidden)?;
        // Not with_capacity: the number of layers is the file's claim until the tensors are found.
        let mut layers = Vec::new();
        for index in 0..config.num_layers {
            layers.push(self.layer(index)?);
        }
        let final_norm = self.norm(&names.global(Role::FinalNorm))?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => {
                let head = self.rows((Role::LmHead, 0), vocab, hidden)?;
                Some(self.matrix(&[head], hidden)?)
            }
        };
        Ok(Weights { embed, layers, final_norm, lm_head })
    }

    pub(super) fn layer(&mut self, index: usize) -> Result<LayerWeights<B>, ModelError> {
        let (config, names) = (self.config, &self.checkpoint.names);
        let placement: NormPlacement = config.norm_placement;
        let name = |role: Role| names.layer(role, index);
        let is_dense = config.layer(index).dense;
        let experts = config.experts.filter(|_| !is_dense);
        // In the order of the pass, so that the first tensor missing is the first one needed.
        Ok(LayerWeights {
            // A drafting head may have it on the halves of what its attention reads.
            attn_norm: self
                .norm_if(placement.has_pre() && names.has(Role::AttnNorm), || name(Role::AttnNorm))?,
            attention: match &config.latent {
                None => AttentionWeights::Heads { qkv: self.qkv(index)?, qk_norm: self.qk_norm(index)? },
                Some(latent) => AttentionWeights::Latent(self.latent(index, latent)?),
            },
            sinks: match config.attn_sinks {
                false => None,
                true => {
                    let sinks = self.part(&name(Role::Sinks), &[config.num_heads])?;
                    Some(self.vector(&[sinks])?)
                }
            },
            o: {
                let width = config.latent.map_or(self.heads.head_dim, |latent| latent.value_dim);
                let width = self.heads.num_heads * width;
                let part = self.rows((Role::O, index), config.hidden_size, width)?;
                let bias = self.bias_if(config.o_bias, &name(Role::O), config.hidden_size)?;
                self.projection(vec![part], bias, width)?
            },
            attn_post_norm: self.norm_if(placement.has_post(), || name(Role::AttnPostNorm))?,
            ffn_norm: self.norm_if(placement.has_pre(), || name(Role::FfnNorm))?,
            ffn: match experts {
                None => {
                    const ROLES: [Role; 3] = [Role::Gate, Role::Up, Role::Down];
                    FeedForward::Dense(self.dense(index, ROLES, config.intermediate_size)?)
                }
                Some(experts) => self.experts(index, &experts)?,
            },
            ffn_post_norm: self.norm_if(placement.has_post(), || name(Role::FfnPostNorm))?,
        })
    }

    /// Query, key and value projections as one, rows of queries and keys in the rotation's order.
    fn qkv(&mut self, layer: usize) -> Result<Projection<B>, ModelError> {
        let (hidden, names) = (self.attn_width, &self.checkpoint.names);
        let (q, kv) = (self.heads.q_width(), self.heads.kv_width());
        let sizes = [q, kv, kv];
        let (mut parts, mut biases) = (Vec::new(), Vec::new());
        if names.has(Role::Qkv) {
            let name = names.layer(Role::Qkv, layer);
            parts.extend(self.rows((Role::Qkv, layer), q + 2 * kv, hidden)?.split(&sizes));
            if let Some(bias) = self.bias_if(self.config.qkv_bias, &name, q + 2 * kv)? {
                biases.extend(bias.split(&sizes));
            }
        } else {
            for (role, size) in [Role::Q, Role::K, Role::V].into_iter().zip(sizes) {
                let name = names.layer(role, layer);
                parts.push(self.rows((role, layer), size, hidden)?);
                biases.extend(self.bias_if(self.config.qkv_bias, &name, size)?);
            }
        }
        if let Some(order) = &self.row_order {
            for part in parts[..2].iter_mut().chain(biases.iter_mut().take(2)) {
                part.reorder_rows(order);
            }
        }
        let weight = self.matrix(&parts, hidden)?;
        let bias = if biases.is_empty() { None } else { Some(self.vector(&biases)?) };
        Ok(Projection { weight, bias })
    }

    fn qk_norm(&mut self, layer: usize) -> Result<Option<QkNormVectors<B>>, ModelError> {
        let Heads { head_dim, .. } = self.heads;
        let (q, k) = match self.config.qk_norm {
            QkNorm::None => return Ok(None),
            QkNorm::PerHead => (head_dim, head_dim),
            QkNorm::AllHeads => (self.heads.q_width(), self.heads.kv_width()),
        };
        let mut load = |role: Role, width: usize| {
            let mut part = self.part(&self.checkpoint.names.layer(role, layer), &[width])?;
            if let Some(order) = &self.row_order {
                part.reorder_rows(order);
            }
            part.add(self.config.norm_weight_offset);
            self.vector(&[part])
        };
        Ok(Some(QkNormVectors { q: load(Role::QNorm, q)?, k: load(Role::KNorm, k)? }))
    }

    /// A feed-forward layer of `ffn` channels whose gate, up and down projections are those of `roles`.
    fn dense(
        &mut self,
        layer: usize,
        [gate, up, down]: [Role; 3],
        ffn: usize,
    ) -> Result<Dense<B>, ModelError> {
        let (config, names) = (self.config, &self.checkpoint.names);
        let (hidden, bias) = (config.hidden_size, config.mlp_bias);
        let (mut parts, mut biases) = (Vec::new(), Vec::new());
        let roles: &[(Role, usize)] = match config.gated {
            true if gate == Role::Gate && names.has(Role::GateUp) => &[(Role::GateUp, 2 * ffn)],
            true => &[(gate, ffn), (up, ffn)],
            false => &[(up, ffn)],
        };
        for &(role, size) in roles {
            let name = names.layer(role, layer);
            parts.push(self.rows((role, layer), size, hidden)?);
            biases.extend(self.bias_if(bias, &name, size)?);
        }
        let up = self.matrix(&parts, hidden)?;
        let up_bias = if biases.is_empty() { None } else { Some(self.vector(&biases)?) };
        let name = names.layer(down, layer);
        let down = self.rows((down, layer), hidden, ffn)?;
        let down_bias = self.bias_if(bias, &name, hidden)?;
        Ok(Dense {
            up: Projection { weight: up, bias: up_bias },
            down: self.projection(vec![down], down_bias, ffn)?,
        })
    }

    fn experts(&mut self, layer: usize, experts: &Experts) -> Result<FeedForward<B>, ModelError> {
        let (hidden, ffn, names) =
            (self.config.hidden_size, experts.intermediate_size, &self.checkpoint.names);
        let router_name = names.layer(Role::Router, layer);
        let router = self.rows((Role::Router, layer), experts.num_experts, hidden)?;
        let router_bias = self.bias_if(experts.bias, &router_name, experts.num_experts)?;
        let router = self.projection(vec![router], router_bias, hidden)?;
        let up_roles: &[(Role, usize)] = match names.has(Role::ExpertGateUp) {
            true => &[(Role::ExpertGateUp, 2 * ffn)],
            false => &[(Role::ExpertGate, ffn), (Role::ExpertUp, ffn)],
        };
        let choice_bias = match experts.choice_bias {
            false => None,
            true => {
                let bias = self.part(&names.layer(Role::RouterChoiceBias, layer), &[experts.num_experts])?;
                Some(self.vector(&[bias])?)
            }
        };
        const SHARED: [Role; 3] = [Role::SharedGate, Role::SharedUp, Role::SharedDown];
        let shared = match experts.shared_intermediate_size {
            0 => None,
            width => Some(self.dense(layer, SHARED, width)?),
        };
        Ok(FeedForward::Experts {
            router,
            choice_bias,
            shared,
            up: self.expert_projection(layer, experts, up_roles, hidden)?,
            down: self.expert_projection(layer, experts, &[(Role::ExpertDown, hidden)], ffn)?,
        })
    }

    /// One projection of every expert; its outputs are those of `roles`, side by side.
    fn expert_projection(
        &mut self,
        layer: usize,
        experts: &Experts,
        roles: &[(Role, usize)],
        in_features: usize,
    ) -> Result<ExpertProjection<B>, ModelError> {
        // Tensors of all experts are read once: unpacking one may cost more than all else.
        let mut stacks = Vec::new();
        for &(role, size) in roles {
            stacks.push(self.expert_stack(layer, experts, (role, size), in_features)?);
        }
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for expert in 0..experts.num_experts {
            let (mut parts, mut bias_parts) = (Vec::new(), Vec::new());
            for (&(role, size), stack) in roles.iter().zip(&stacks) {
                let (part, bias) = match stack {
                    Some(stack) => self.expert_of_stack(stack, expert, role),
                    None => {
                        let name = self.checkpoint.names.expert(role, layer, expert);
                        let bias = self.bias_if(experts.bias, &name, size)?;
                        (self.part(&name, &[size, in_features])?, bias)
                    }
                };
                parts.push(self.quantized(part, role, layer));
                bias_parts.extend(bias);
            }
            weights.push(self.matrix(&parts, in_features)?);
            if experts.bias {
                biases.push(self.vector(&bias_parts)?);
            }
        }
        Ok(ExpertProjection { weights, biases: experts.bias.then_some(biases) })
    }

    /// A projection of all experts in one tensor, with its biases; `None` where each has its own.
    fn expert_stack(
        &self,
        layer: usize,
        experts: &Experts,
        (role, size): (Role, usize),
        in_features: usize,
    ) -> Result<Option<(Part<'a>, Option<Part<'a>>)>, ModelError> {
        let names = &self.checkpoint.names;
        if names.is_per_expert(role) {
            return Ok(None);
        }
        let (name, count) = (names.layer(role, layer), experts.num_experts);
        let shape = match names.expert_layout {
            ExpertLayout::Columns => [count, in_features, size],
            ExpertLayout::Rows | ExpertLayout::PairedRows => [count, size, in_features],
        };
        let bias = match experts.bias {
            true => Some(self.part(&WeightNames::bias(&name), &[count, size])?),
            false => None,
        };
        Ok(Some((self.part(&name, &shape)?, bias)))
    }

    /// One expert's share of a tensor of all.
    fn expert_of_stack(
        &self,
        (stack, biases): &(Part<'a>, Option<Part<'a>>),
        expert: usize,
        role: Role,
    ) -> (Part<'a>, Option<Part<'a>>) {
        let layout = self.checkpoint.names.expert_layout;
        let mut part = stack.item(expert);
        let mut bias = biases.as_ref().map(|biases| biases.item(expert));
        if layout == ExpertLayout::Columns {
            part.transpose();
        }
        if layout != ExpertLayout::Rows && role == Role::ExpertGateUp {
            // Gate and up of a channel are neighbours: the even ones first.
            let size = part.view().shape[0];
            let order: Vec<usize> = (0..size).step_by(2).chain((1..size).step_by(2)).collect();
            part.reorder_rows(&order);
            bias.iter_mut().for_each(|bias| bias.reorder_rows(&order));
        }
        (part, bias)
    }

    fn projection(
        &mut self,
        parts: Vec<Part<'_>>,
        bias: Option<Part<'_>>,
        in_features: usize,
    ) -> Result<Projection<B>, ModelError> {
        let weight = self.matrix(&parts, in_features)?;
        let bias = bias.map(|bias| self.vector(&[bias])).transpose()?;
        Ok(Projection { weight, bias })
    }

    pub(super) fn matrix(&mut self, parts: &[Part<'_>], in_features: usize) -> Result<B::Matrix, ModelError> {
        let views: Vec<_> = parts.iter().map(Part::view).collect();
        for view in &views {
            self.memory.add(view);
            self.unreleased_bytes += view.data.len();
        }
        let matrix = self.backend.load_matrix(&views, in_features)?;
        if self.unreleased_bytes >= RELEASE_BYTES {
            self.unreleased_bytes = 0;
            self.checkpoint.weights.release();
        }
        Ok(matrix)
    }

    fn vector(&mut self, parts: &[Part<'_>]) -> Result<B::Vector, ModelError> {
        let views: Vec<_> = parts.iter().map(Part::view).collect();
        for view in &views {
            self.memory.add(view);
        }
        self.backend.load_vector(&views)
    }

    fn norm_if(
        &mut self,
        wanted: bool,
        name: impl FnOnce() -> String,
    ) -> Result<Option<NormWeights<B>>, ModelError> {
        if wanted { self.norm(&name()).map(Some) } else { Ok(None) }
    }

    pub(super) fn norm(&mut self, name: &str) -> Result<NormWeights<B>, ModelError> {
        let width = self.config.hidden_size;
        let mut weight = self.part(name, &[width])?;
        weight.add(self.config.norm_weight_offset);
        let bias = self.bias_if(self.config.norm == NormKind::Layer, name, width)?;
        Ok(NormWeights {
            weight: self.vector(&[weight])?,
            bias: bias.map(|bias| self.vector(&[bias])).transpose()?,
        })
    }

    /// A matrix of `[rows, in_features]`, in the type that it is kept in.
    pub(super) fn rows(
        &self,
        (role, layer): (Role, usize),
        rows: usize,
        in_features: usize,
    ) -> Result<Part<'a>, ModelError> {
        let part = self.part(&self.checkpoint.names.layer(role, layer), &[rows, in_features])?;
        Ok(self.quantized(part, role, layer))
    }

    /// `part`, whose rows are those of the matrix to be, as the kind of file that was asked for stores it.
    fn quantized(&self, mut part: Part<'a>, role: Role, layer: usize) -> Part<'a> {
        if let Some(kind) = self.checkpoint.quantize
            && !matches!(part.dtype(), Dtype::Quantized(_))
        {
            let (name, config) = (gguf::tensor_name(role, layer), self.config);
            let (num_layers, tied) = (config.num_layers, config.tie_word_embeddings);
            let dtype = kind.dtype_of(Place { name: &name, shape: part.view().shape, num_layers, tied });
            // What does not fit blocks stays as it is, and so does what is sensitive.
            if matches!(dtype, Dtype::Quantized(_)) {
                part.encode(dtype);
            }
        }
        part
    }

    /// The bias that belongs to weight `name`, if it is wanted.
    fn bias_if(&self, wanted: bool, name: &str, size: usize) -> Result<Option<Part<'a>>, ModelError> {
        if wanted { self.part(&WeightNames::bias(name), &[size]).map(Some) } else { Ok(None) }
    }

    pub(super) fn part(&self, name: &str, wanted: &[usize]) -> Result<Part<'a>, ModelError> {
        let checkpoint: &'a Checkpoint = self.checkpoint;
        let tensor = checkpoint.weights.read(name)?;
        if tensor.shape != wanted {
            return Err(ModelError::TensorShape {
                name: name.to_owned(),
                found: tensor.shape,
                wanted: wanted.to_vec(),
            });
        }
        Ok(Part::of(tensor))
    }
}
