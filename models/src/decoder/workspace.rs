//! The activations of a pass: allocated for the largest pass so far, used by all.

use tandem_kernels::matmul::head::HeadRoom;

use crate::backend::{Backend, Heads, OutputRoom};
use crate::config::DecoderConfig;
use crate::error::ModelError;
use crate::outputs::WholeRows;

/// Activations of one pass, `[rows, _]`.
pub(super) struct Workspace<B: Backend> {
    pub(super) max_tokens: usize,
    pub(super) max_logits_rows: usize,
    /// `hidden_size`: the residual stream.
    pub(super) residual: B::Buffer,
    /// `hidden_size`: the norm of the residual stream.
    pub(super) normed: B::Buffer,
    /// `hidden_size`: what a sublayer adds to the residual stream.
    pub(super) update: B::Buffer,
    /// `heads.qkv_width()`
    pub(super) qkv: B::Buffer,
    /// `heads.out_width()`
    pub(super) attn: B::Buffer,
    pub(super) latent: Option<LatentWorkspace<B>>,
    /// Gates and ups of the feed-forward layer, or of every pick of a row.
    pub(super) gate_up: B::Buffer,
    /// The same after the nonlinearity.
    pub(super) activated: B::Buffer,
    /// For logits rows only; `vocab_size` logits of each.
    pub(super) outputs: OutputRoom<B::Buffer>,
    pub(super) experts: Option<ExpertWorkspace<B>>,
}

/// What attention over latents needs besides.
pub(super) struct LatentWorkspace<B: Backend> {
    /// `q_rank`, as made and as normalised.
    pub(super) q_down: [B::Buffer; 2],
    /// `num_heads * (content_dim + rope.dim)`
    pub(super) q: B::Buffer,
    /// `kv_rank + rope.dim`
    pub(super) latents: B::Buffer,
    /// `num_heads * value_dim`
    pub(super) values: B::Buffer,
}

/// What layers of experts need besides.
pub(super) struct ExpertWorkspace<B: Backend> {
    /// `num_experts`
    pub(super) router: B::Buffer,
    pub(super) routing: B::Routing,
    /// `picks * hidden_size`: what the experts answer, the one that computes every token last.
    pub(super) answers: B::Buffer,
}

impl<B: Backend> Workspace<B> {
    pub(super) fn new(
        backend: &mut B,
        config: &DecoderConfig,
        heads: Heads,
        max_tokens: usize,
        max_logits_rows: usize,
    ) -> Result<Self, ModelError> {
        let projections = if config.gated { 2 } else { 1 };
        let has_dense = config.experts.is_none() || config.layers.iter().any(|layer| layer.dense);
        let dense = if has_dense { config.intermediate_size } else { 0 };
        let picked = config.experts.map_or(0, |e| e.num_experts_per_token * e.intermediate_size);
        let shared = config.experts.map_or(0, |e| e.shared_intermediate_size);
        let ffn_width = dense.max(picked).max(shared);
        let mut rows_of = |width: usize| backend.allocate_buffer(max_tokens * width);
        let buffers = Workspace {
            max_tokens,
            max_logits_rows,
            residual: rows_of(config.hidden_size)?,
            normed: rows_of(config.hidden_size)?,
            update: rows_of(config.hidden_size)?,
            qkv: rows_of(heads.qkv_width())?,
            attn: rows_of(heads.out_width())?,
            latent: match &config.latent {
                None => None,
                Some(latent) => Some(LatentWorkspace {
                    q_down: [rows_of(latent.q_rank.unwrap_or(0))?, rows_of(latent.q_rank.unwrap_or(0))?],
                    q: rows_of(heads.num_heads * (latent.content_dim + config.rope.dim))?,
                    latents: rows_of(heads.head_dim)?,
                    values: rows_of(heads.num_heads * latent.value_dim)?,
                }),
            },
            gate_up: rows_of(projections * ffn_width)?,
            activated: rows_of(ffn_width)?,
            outputs: OutputRoom {
                logits: backend.allocate_buffer(max_logits_rows * config.vocab_size)?,
                rows: WholeRows::default(),
                head: HeadRoom::default(),
            },
            experts: None,
        };
        let Some(experts) = &config.experts else { return Ok(buffers) };
        let experts = ExpertWorkspace {
            router: backend.allocate_buffer(max_tokens * experts.num_experts)?,
            routing: backend.allocate_routing(max_tokens, experts)?,
            answers: backend
                .allocate_buffer(max_tokens * experts.num_experts_per_token * config.hidden_size)?,
        };
        Ok(Workspace { experts: Some(experts), ..buffers })
    }
}
