//! What a device must be able to do for [`crate::Decoder`]: some twenty operations on buffers that live on
//! the device. A plain Llama needs the first dozen; the rest are the options of other families.
//!
//! **Architecture invariant**: no operation here waits for the device or copies to the host. A pass is
//! [`Backend::upload`], then any number of operations that are merely put in order, then
//! [`Backend::outputs`], before it [`Backend::download`] if hidden states are wanted. So a backend may queue them on a
//! stream or record them as a graph: which operations run, and on which buffers, depends only on the *counts* of a
//! batch (tokens, logits rows), never on its contents, which reach the operations through [`Backend::Inputs`]. The one
//! that looks at more is [`Backend::outputs`], the last: what it does depends on what is wanted of each row.
//!
//! Activations are f32 in row-major `[rows, width]`; a buffer may be longer than what an operation
//! uses of it. Weights keep the element type of their file where the device can.

pub mod cpu;
pub mod reference;

use tandem_kernels::kv::{KvType, Values};
use tandem_kernels::matmul::head::HeadRoom;

use crate::batch::ForwardBatch;
use crate::config::{Activation, DecoderConfig, Experts, NormKind};
use crate::error::ModelError;
use crate::kv_cache::KvLayout;
use crate::outputs::{Outputs, Wanted, WholeRows};
use crate::rope::RopeTable;
use crate::weights::TensorView;

pub use cpu::CpuBackend;
pub use reference::ReferenceBackend;

/// Which backend computes a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BackendKind {
    /// The fast one for the machine's own processor.
    Cpu,
    /// Candle tensors on the CPU: slow, plain, for comparison.
    Reference,
}

/// The heads of an attention layer. Queries, keys and values of a token lie side by side in one row:
/// `num_heads` queries, `num_kv_heads` keys, `num_kv_heads` values, each of `head_dim`; without values where
/// they are those of the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// What values are.
    pub values: Values,
}

impl Heads {
    /// Those of a model.
    pub fn of(config: &DecoderConfig) -> Self {
        Heads {
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            values: config.values(),
        }
    }

    /// Width of a row of queries.
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Width of a row of keys, and of values where they are their own.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Width of queries, keys and values side by side.
    pub fn qkv_width(&self) -> usize {
        let stored = if self.values == Values::Own { 2 } else { 1 };
        self.q_width() + stored * self.kv_width()
    }

    /// Width of a head's value.
    pub fn value_dim(&self) -> usize {
        self.values.width(self.head_dim)
    }

    /// Width of a row of attention's output.
    pub fn out_width(&self) -> usize {
        self.num_heads * self.value_dim()
    }
}

/// A device. Errors are for devices that can fail; arguments of wrong size are bugs and panic.
pub trait Backend: Send {
    /// Activations.
    type Buffer: Send;
    /// A weight matrix, `[out_features, in_features]`, in whatever form is fastest.
    type Matrix: Send;
    /// A bias or the weight of a norm.
    type Vector: Send;
    /// Keys and values of one layer.
    type KvLayer: Send;
    /// Rotary tables.
    type Rope: Send;
    /// What a pass needs to know of its [`ForwardBatch`].
    type Inputs: Send;
    /// Which experts compute which rows.
    type Routing: Send;

    /// Loads the matrix whose rows are the rows of `parts`, one part after the other. All parts are
    /// `[_, in_features]`.
    fn load_matrix(
        &mut self,
        parts: &[TensorView<'_>],
        in_features: usize,
    ) -> Result<Self::Matrix, ModelError>;

    /// The matrix of the first `num_outputs` outputs of `matrix`; shares its memory where it can.
    fn first_outputs(
        &mut self,
        matrix: &Self::Matrix,
        num_outputs: usize,
    ) -> Result<Self::Matrix, ModelError>;

    /// Loads the vector that is the concatenation of `parts`.
    fn load_vector(&mut self, parts: &[TensorView<'_>]) -> Result<Self::Vector, ModelError>;

    /// Loads rotary tables.
    fn load_rope(&mut self, table: RopeTable) -> Result<Self::Rope, ModelError>;

    /// Element type of the KV caches that this backend allocates.
    fn kv_type(&self) -> KvType {
        KvType::F32
    }

    /// Storage for one layer of a KV cache.
    fn allocate_kv_layer(&mut self, layout: &KvLayout) -> Result<Self::KvLayer, ModelError>;

    /// A buffer of `len` elements with any contents.
    fn allocate_buffer(&mut self, len: usize) -> Result<Self::Buffer, ModelError>;

    /// Room for the routing of `max_rows` rows.
    fn allocate_routing(&mut self, max_rows: usize, experts: &Experts) -> Result<Self::Routing, ModelError>;

    /// Inputs of no batch yet, for a KV cache of this layout.
    fn allocate_inputs(&mut self, layout: &KvLayout) -> Result<Self::Inputs, ModelError>;

    /// Host to device: makes `inputs` those of `batch`, which is known to be valid.
    fn upload(&mut self, batch: &ForwardBatch, inputs: &mut Self::Inputs) -> Result<(), ModelError>;

    /// Device to host: waits for the operations so far and overwrites `out` with the first `len`
    /// elements of `x`.
    fn download(&mut self, x: &Self::Buffer, len: usize, out: &mut Vec<f32>) -> Result<(), ModelError>;

    /// The last product and what is made of it, and the moment at which the host waits: of every row of
    /// `x: [wanted.len(), in_features]` what is wanted. `room` is for nothing else.
    ///
    /// As it stands here the device computes whole rows and the host chooses.
    fn outputs<'a>(
        &mut self,
        x: &Self::Buffer,
        head: OutputHead<'_, Self::Matrix>,
        wanted: &[Wanted],
        room: &'a mut OutputRoom<Self::Buffer>,
    ) -> Result<Outputs<'a>, ModelError> {
        let len = wanted.len() * head.num_outputs;
        self.logits(wanted.len(), x, &head, &mut room.logits)?;
        self.download(&room.logits, len, &mut room.rows.logits)?;
        Ok(room.rows.outputs(wanted, head.num_token_ids))
    }

    /// `out` = the logits of `rows` rows of `x`, whole.
    fn logits(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        head: &OutputHead<'_, Self::Matrix>,
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError> {
        let len = rows * head.num_outputs;
        self.matmul(rows, x, Linear { weight: head.weight, bias: None }, out)?;
        if head.scale != 1.0 {
            self.scale(len, out, head.scale)?;
        }
        match head.soft_cap {
            None => Ok(()),
            Some(cap) => self.soft_cap(len, out, cap),
        }
    }

    /// `out[token] = table[token_ids[token]]` for every token of the pass.
    fn embed(
        &mut self,
        inputs: &Self::Inputs,
        table: &Self::Matrix,
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// `out` = the norm of `x`, row by row; see [`NormKind`].
    fn norm(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        norm: Norm<'_, Self::Vector>,
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// `residual += x`, then `out` = the norm of `residual`.
    fn add_norm(
        &mut self,
        rows: usize,
        residual: &mut Self::Buffer,
        x: &Self::Buffer,
        norm: Norm<'_, Self::Vector>,
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// `sum += x`, on the first `len` elements of either.
    fn add(&mut self, len: usize, sum: &mut Self::Buffer, x: &Self::Buffer) -> Result<(), ModelError>;

    /// `x *= factor`, on the first `len` elements.
    fn scale(&mut self, len: usize, x: &mut Self::Buffer, factor: f32) -> Result<(), ModelError>;

    /// `x = cap * tanh(x / cap)`, on the first `len` elements.
    fn soft_cap(&mut self, len: usize, x: &mut Self::Buffer, cap: f32) -> Result<(), ModelError>;

    /// `out = x * weight^T + bias`: `[rows, in_features]` to `[rows, out_features]`.
    fn matmul(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        linear: Linear<'_, Self::Matrix, Self::Vector>,
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// RMS-normalises the queries and keys of `qkv` (`[rows, heads.qkv_width()]`) in place: head by head
    /// where a weight is as wide as one, else all queries or all keys of a row together.
    fn qk_norm(
        &mut self,
        rows: usize,
        heads: Heads,
        norm: QkNormWeights<'_, Self::Vector>,
        qkv: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// RMS-normalises the first channels of every row of `x`, as many as the weight has, in place. Rows are of
    /// `width`.
    fn norm_first(
        &mut self,
        rows: usize,
        width: usize,
        norm: Norm<'_, Self::Vector>,
        x: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// `qkv` = queries as they meet latents, then the token's own latent. `q` is `[rows, num_heads, _]`: the
    /// channels of a head that `up` has inputs for are projected by the head's own matrix of it
    /// (`[num_heads]` of `[latent, inputs]`), and those that turn follow as they are. `latents` is
    /// `[rows, heads.head_dim]`.
    fn join_latents(
        &mut self,
        rows: usize,
        heads: Heads,
        q: &Self::Buffer,
        up: &[Self::Matrix],
        latents: &Self::Buffer,
        qkv: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// `out` = every head of `x` (`[rows, num_heads, in_features]`) times a matrix of its own.
    fn head_matmul(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        weights: &[Self::Matrix],
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// Rotates the queries and keys of `qkv` (`[num_tokens, heads.qkv_width()]`) to their positions, if
    /// there is a rotation, and stores keys and values at their slots. A rotation narrower than a head turns
    /// its last channels. Afterwards only the queries of `qkv` are defined.
    fn rope_and_store(
        &mut self,
        inputs: &Self::Inputs,
        heads: Heads,
        rope: Option<&Self::Rope>,
        qkv: &mut Self::Buffer,
        kv: &mut Self::KvLayer,
    ) -> Result<(), ModelError>;

    /// Causal attention of the queries in `qkv` over each sequence's blocks of `kv`: `out` is
    /// `[num_tokens, heads.out_width()]`.
    fn attention(
        &mut self,
        inputs: &Self::Inputs,
        heads: Heads,
        attention: Attention<'_, Self::Vector>,
        qkv: &Self::Buffer,
        kv: &Self::KvLayer,
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// `out = act(x)`, rows of `width`.
    fn activate(
        &mut self,
        rows: usize,
        width: usize,
        activation: Activation,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// `out = act(gate) * up`, where a row of `gate_up` is `width` gates, then `width` ups.
    fn gate(
        &mut self,
        rows: usize,
        width: usize,
        activation: Activation,
        gate_up: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// `out = down(act(gate) * up)`, gate and up being the halves of the first product of `x`. `room` may be
    /// used for what lies between: gates and ups, and the gated.
    fn gated_feed_forward(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        layer: GatedFeedForward<'_, Self::Matrix, Self::Vector>,
        room: [&mut Self::Buffer; 2],
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// Chooses every row's experts from the router's `logits` (`[rows, num_experts]`): those with the
    /// largest scores, the largest first, ties to the lower number. These are the row's *picks*.
    /// `choice_bias` is `[num_experts]`, where experts are chosen by one.
    fn route(
        &mut self,
        rows: usize,
        experts: &Experts,
        choice_bias: Option<&Self::Vector>,
        logits: &Self::Buffer,
        routing: &mut Self::Routing,
    ) -> Result<(), ModelError>;

    /// The projection of every pick by its own expert: `out` is `[picks, out_features]`. `x` has a row
    /// a pick, or one a row of the pass, which all its picks share. Reads the weights of chosen experts
    /// only; which rows share an expert does not show in the result.
    fn expert_matmul(
        &mut self,
        routing: &mut Self::Routing,
        x: &Self::Buffer,
        share: Share,
        experts: ExpertLinear<'_, Self::Matrix, Self::Vector>,
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// `out[row]` = the sum, in their order, of the row's picks in `x` times their weights.
    fn combine(
        &mut self,
        rows: usize,
        width: usize,
        routing: &Self::Routing,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// Zeros, a row of `width` a slot of the KV cache: a place for hidden states beside it.
    fn allocate_slots(&mut self, num_slots: usize, width: usize) -> Result<Self::Buffer, ModelError>;

    /// `store[slot] = x[i]`, rows of `width`, for the slots of the pass's tokens, of all or of those in
    /// `logits_rows`.
    fn store_slots(
        &mut self,
        inputs: &Self::Inputs,
        rows: Rows,
        width: usize,
        x: &Self::Buffer,
        store: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// `out[i]` = the row in `store` of the token before the `i`-th of the pass, in its sequence; zeros for
    /// a first token. Blocks have `block_size` slots.
    fn load_slots_before(
        &mut self,
        inputs: &Self::Inputs,
        block_size: usize,
        width: usize,
        store: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// Puts the rows of `x` side by side with what rows of `out` have before `columns.first`. Called from
    /// left to right; after the last columns the rows are whole.
    fn put_columns(
        &mut self,
        rows: usize,
        x: &Self::Buffer,
        columns: Columns,
        out: &mut Self::Buffer,
    ) -> Result<(), ModelError>;

    /// `x[i] = x[logits_rows[i]]`, rows of `width`. In place: the rows ascend, so front to back no row
    /// is overwritten before it is read.
    fn pick_logits_rows(
        &mut self,
        inputs: &Self::Inputs,
        width: usize,
        x: &mut Self::Buffer,
    ) -> Result<(), ModelError>;
}

/// Rows of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// One a token.
    All,
    /// One of each of its `logits_rows`.
    Logits,
}

/// A stretch of columns in wider rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    /// Where they begin.
    pub first: usize,
    /// How many there are.
    pub width: usize,
    /// Width of the rows that they are part of.
    pub of: usize,
}

/// A norm's parameters.
#[derive(Debug)]
pub struct Norm<'a, V> {
    /// What is normalised.
    pub kind: NormKind,
    /// One factor a channel.
    pub weight: &'a V,
    /// One addend a channel; of a layer norm.
    pub bias: Option<&'a V>,
    /// Added to the mean square, or to the variance.
    pub eps: f32,
}

/// The parameters of the norms on queries and keys.
#[derive(Debug)]
pub struct QkNormWeights<'a, V> {
    /// `[head_dim]` or `[heads.q_width()]`
    pub q: &'a V,
    /// `[head_dim]` or `[heads.kv_width()]`
    pub k: &'a V,
    /// Added to the mean square.
    pub eps: f32,
}

/// What a layer's attention is like.
#[derive(Debug)]
pub struct Attention<'a, V> {
    /// Factor on the scores.
    pub scale: f32,
    /// Keys that a query sees, its own included; `None`: all before it.
    pub window: Option<usize>,
    /// Keys before this position are seen by nobody but their own token.
    pub first_key: usize,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// `[num_heads]`: a logit that joins the softmax of a head and has no value.
    pub sinks: Option<&'a V>,
}

/// Whose row of the input an expert computes for a pick.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Share {
    /// The row's, which all its picks share.
    Row,
    /// The pick's own.
    Pick,
}

/// A projection's parameters in every expert of a layer.
#[derive(Debug)]
pub struct ExpertLinear<'a, M, V> {
    /// `[num_experts]` of `[out_features, in_features]`
    pub weights: &'a [M],
    /// `[num_experts]` of `[out_features]`
    pub biases: Option<&'a [V]>,
}

/// A gated feed-forward layer's parameters.
#[derive(Debug)]
pub struct GatedFeedForward<'a, M, V> {
    /// `[2 * width, in_features]`: gates, then ups.
    pub up: Linear<'a, M, V>,
    /// On the gates.
    pub activation: Activation,
    /// `[out_features, width]`
    pub down: Linear<'a, M, V>,
}

/// The output head.
#[derive(Debug)]
pub struct OutputHead<'a, M> {
    /// `[num_outputs, in_features]`
    pub weight: &'a M,
    /// Logits of a row.
    pub num_outputs: usize,
    /// Of which the first so many are tokens; at most `num_outputs`.
    pub num_token_ids: usize,
    /// What logits are multiplied by.
    pub scale: f32,
    /// What they are capped at after that.
    pub soft_cap: Option<f32>,
}

/// Room for [`Backend::outputs`].
#[derive(Debug)]
pub struct OutputRoom<B> {
    /// `[rows, num_outputs]`
    pub logits: B,
    /// The host's copy of them, of backends that choose on the host.
    pub rows: WholeRows,
    /// Of those that choose as they compute.
    pub head: HeadRoom,
}

/// A projection's parameters.
#[derive(Debug)]
pub struct Linear<'a, M, V> {
    /// `[out_features, in_features]`
    pub weight: &'a M,
    /// `[out_features]`
    pub bias: Option<&'a V>,
}
