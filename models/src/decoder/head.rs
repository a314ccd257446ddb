//! A drafting head and the decoder that it drafts for. A head is a decoder of one layer whose stream begins
//! with more than a token: with the token's embedding and, beside it, the *features* of the token before,
//! which are what its target made of the text so far. EAGLE-3 heads (arXiv 2503.01840) and layers for
//! multi-token prediction (DeepSeek-V3, arXiv 2412.19437) differ in options of that beginning alone;
//! everything else is the forward pass in `decoder.rs`.
//!
//! **Where features lie**: in storage of one row a slot of the KV cache, beside keys and values and under the
//! same block table. The target leaves those of every token that it computes; a head that gives the logits
//! after a token leaves its guess of that token's own, so that it can go on before the target has
//! been there, and the target's next pass over the token replaces it. So features come and go with blocks: those
//! of a cached prefix are there, and what was rejected is overwritten, as with keys and values.
//!
//! **Rows**: the head's row of token `t` is made of `t`'s embedding and of the features at `t - 1`, and gives
//! the logits of `t + 1`, as the target's row of `t` does. A first token has nothing before it: its row is not
//! part of the head as it was trained, so nobody attends to its key.

use std::sync::Arc;

use tandem_kernels::ThreadPool;
use tandem_kernels::kv::KvType;

use super::load::Loader;
use super::weights::{NormWeights, Weights};
use super::{Asked, Decoder, Pass, PassShape, ready};
use crate::backend::{Backend, BackendKind, Columns, CpuBackend, Linear, ReferenceBackend, Rows};
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::family::Role;
use crate::heads::{Features, Head, Input};
use crate::kv_cache::KvLayout;
use crate::model::Model;
use crate::outputs::{Wanted, WholeRows};

/// A logit that is never drawn, and still a number.
const NEVER: f32 = -1e30;

/// What a head's stream begins with.
pub(super) struct HeadStart<B: Backend> {
    input: Input,
    token_norm: NormWeights<B>,
    hidden_norm: NormWeights<B>,
    /// Makes one of embedding and features; without it the attention reads both.
    projection: Option<B::Matrix>,
    /// `[num_slots, hidden_size]`; see the file's header.
    features: Option<B::Buffer>,
    /// `[rows, 2 * hidden_size]`: normed embedding and features side by side.
    joined: Option<B::Buffer>,
    /// Of a head whose outputs are some of the target's tokens.
    own_outputs: Option<OwnOutputs>,
}

/// Outputs that are some of the target's tokens.
pub(super) struct OwnOutputs {
    /// The target's token of every output.
    to_target: Vec<u32>,
    /// Rows in the target's vocabulary.
    pub(super) spread: WholeRows,
    /// `[rows]`: the head's own rows, of which those are made.
    pub(super) all_whole: Vec<Wanted>,
}

/// A head at its target.
pub(super) struct Attached<B: Backend> {
    head: Decoder<B>,
    tap: Tap<B>,
}

/// What a target leaves for its head.
struct Tap<B: Backend> {
    features: Features,
    /// Makes one of the hidden states of several layers.
    projection: Option<B::Matrix>,
    /// `[rows, layers * hidden_size]`: those of the layers so far.
    joined: Option<B::Buffer>,
    /// `[rows, head's hidden_size]`
    projected: Option<B::Buffer>,
}

/// As [`super::load_with`], with a head that drafts for the model: its [`Model::drafting_head`].
///
/// # Errors
/// As [`Decoder::load`], for either.
pub fn load_with_head(
    checkpoint: &Checkpoint,
    head: &Head,
    kind: BackendKind,
    kv_type: KvType,
    pool: Arc<ThreadPool>,
) -> Result<Box<dyn Model>, ModelError> {
    fn attached<B: Backend + 'static>(
        checkpoint: &Checkpoint,
        head: &Head,
        backend: impl Fn() -> B,
    ) -> Result<Box<dyn Model>, ModelError> {
        let mut target = Decoder::load(checkpoint, backend())?;
        target.attach(head, backend())?;
        Ok(Box::new(target))
    }
    match kind {
        BackendKind::Cpu => attached(checkpoint, head, || CpuBackend::new(Arc::clone(&pool), kv_type)),
        BackendKind::Reference => {
            attached(checkpoint, head, || ReferenceBackend::new(candle_core::Device::Cpu))
        }
    }
}

impl<B: Backend> Decoder<B> {
    /// Loads `head` onto `backend`, a second one of this decoder's device, to draft from this decoder.
    ///
    /// # Errors
    /// As [`Decoder::load`].
    pub fn attach(&mut self, head: &Head, backend: B) -> Result<(), ModelError> {
        let config = head.checkpoint.config.clone();
        let attn_width = if head.input.is_projected() { 1 } else { 2 } * config.hidden_size;
        let mut loader = Loader::new(&head.checkpoint, &config, attn_width, backend);
        let tap = self.tap(head, &mut loader)?;
        let (weights, start) = self.head_weights(head, &mut loader)?;
        head.checkpoint.weights.release();
        let Loader { backend, memory, heads, .. } = loader;
        let decoder = Decoder {
            heads,
            weights,
            memory,
            short_head: None,
            start: Some(start),
            drafter: None,
            cache: None,
            workspace: None,
            pass: Pass::default(),
            asked: Asked::default(),
            backend,
            config,
        };
        self.drafter = Some(Box::new(Attached { head: decoder, tap }));
        Ok(())
    }

    /// What this decoder is to leave for a head.
    fn tap(&self, head: &Head, loader: &mut Loader<'_, B>) -> Result<Tap<B>, ModelError> {
        let projection = match &head.features {
            Features::FinalNorm => None,
            Features::Layers(layers) => {
                let (name, width) = (
                    head.checkpoint.names.global(Role::DraftFeatures),
                    layers.len() * self.config.hidden_size,
                );
                let part = loader.part(&name, &[loader.config.hidden_size, width])?;
                Some(loader.matrix(&[part], width)?)
            }
        };
        Ok(Tap { features: head.features.clone(), projection, joined: None, projected: None })
    }

    /// A head's weights, with those that it shares with this decoder: embedding and outputs, unless it has its own.
    fn head_weights(
        &mut self,
        head: &Head,
        loader: &mut Loader<'_, B>,
    ) -> Result<(Weights<B>, HeadStart<B>), ModelError> {
        let (names, hidden) = (&head.checkpoint.names, loader.config.hidden_size);
        let vocab_size = loader.config.vocab_size;
        let embed = match head.has_embedding {
            true => {
                let part = loader.rows((Role::Embed, 0), vocab_size, hidden)?;
                loader.matrix(&[part], hidden)?
            }
            false => self.backend.first_outputs(&self.weights.embed, vocab_size)?,
        };
        let token_norm = loader.norm(&names.layer(Role::DraftTokenNorm, head.layer))?;
        let hidden_norm = loader.norm(&names.layer(Role::DraftHiddenNorm, head.layer))?;
        let input = match head.input.is_projected() {
            true => {
                let part = loader.part(&names.layer(Role::DraftInput, head.layer), &[hidden, 2 * hidden])?;
                Some(loader.matrix(&[part], 2 * hidden)?)
            }
            false => None,
        };
        let layers = vec![loader.layer(head.layer)?];
        let final_norm = loader.norm(&names.layer(Role::FinalNorm, head.layer))?;
        let lm_head = match head.has_outputs {
            true => {
                let num_outputs = head.to_target.as_ref().map_or(vocab_size, Vec::len);
                let part = loader.rows((Role::LmHead, 0), num_outputs, hidden)?;
                loader.matrix(&[part], hidden)?
            }
            false => self.backend.first_outputs(self.weights.head(), vocab_size)?,
        };
        let start = HeadStart {
            input: head.input,
            token_norm,
            hidden_norm,
            projection: input,
            features: None,
            joined: None,
            own_outputs: head.to_target.clone().map(OwnOutputs::new),
        };
        Ok((Weights { embed, layers, final_norm, lm_head: Some(lm_head) }, start))
    }

    /// Bytes that a token costs beside this decoder's keys and values.
    pub(super) fn head_bytes_per_token(&self) -> usize {
        let features = self.start.as_ref().map_or(0, |_| self.config.hidden_size * size_of::<f32>());
        features + self.drafter.as_ref().map_or(0, |attached| attached.head.kv_bytes_per_token())
    }

    /// Storage of features for a KV cache of this layout, and all that this decoder's head needs.
    pub(super) fn allocate_head_storage(&mut self, kv: &KvLayout) -> Result<(), ModelError> {
        if let Some(start) = &mut self.start {
            start.features = None;
            start.features = Some(self.backend.allocate_slots(kv.num_slots(), self.config.hidden_size)?);
        }
        match &mut self.drafter {
            Some(attached) => attached.head.allocate_kv_cache(kv.num_blocks, kv.block_size),
            None => Ok(()),
        }
    }

    /// Makes room for passes of `max_tokens` rows.
    pub(super) fn reserve_for_head(&mut self, max_tokens: usize) -> Result<(), ModelError> {
        let (backend, hidden) = (&mut self.backend, self.config.hidden_size);
        if let Some(start) = &mut self.start {
            start.joined = Some(backend.allocate_buffer(max_tokens * 2 * hidden)?);
        }
        if let Some(attached) = &mut self.drafter
            && let Features::Layers(layers) = &attached.tap.features
        {
            let width = attached.head.config.hidden_size;
            attached.tap.joined = Some(backend.allocate_buffer(max_tokens * layers.len() * hidden)?);
            attached.tap.projected = Some(backend.allocate_buffer(max_tokens * width)?);
        }
        Ok(())
    }

    /// A head's stream: embeddings and the features before them, normed, side by side, and what is made of
    /// them.
    pub(super) fn embed_with_features(&mut self, shape: PassShape) -> Result<(), ModelError> {
        let Decoder { config, weights, start, cache, workspace, backend, .. } = self;
        let (start, ws, cache) = (ready(start), ready(workspace), ready(cache));
        let (rows, hidden) = (shape.num_tokens, config.hidden_size);
        let joined = ready(&mut start.joined);
        backend.embed(&cache.inputs, &weights.embed, &mut ws.normed)?;
        if config.embed_scale != 1.0 {
            backend.scale(rows * hidden, &mut ws.normed, config.embed_scale)?;
        }
        backend.norm(rows, &ws.normed, start.token_norm.of(config), &mut ws.update)?;
        let (block_size, features) = (cache.bounds.kv.block_size, ready(&mut start.features));
        backend.load_slots_before(&cache.inputs, block_size, hidden, features, &mut ws.residual)?;
        backend.norm(rows, &ws.residual, start.hidden_norm.of(config), &mut ws.normed)?;
        let halves = match start.input {
            Input::Projection { hidden_first: true } => [&ws.normed, &ws.update],
            _ => [&ws.update, &ws.normed],
        };
        for (index, half) in halves.into_iter().enumerate() {
            let columns = Columns { first: index * hidden, width: hidden, of: 2 * hidden };
            backend.put_columns(rows, half, columns, joined)?;
        }
        match (start.input, &start.projection) {
            (_, Some(weight)) => {
                backend.matmul(rows, joined, Linear { weight, bias: None }, &mut ws.residual)?;
            }
            (Input::Attention { normed_residual: true }, None) => {
                std::mem::swap(&mut ws.residual, &mut ws.normed);
            }
            _ => {}
        }
        match &weights.layers[0].attn_norm {
            None => Ok(()),
            Some(norm) => backend.norm(rows, &ws.residual, norm.of(config), &mut ws.normed),
        }
    }

    /// After `num_layers_done` layers of a pass: what this decoder leaves for its head, or, being one, its guesses.
    pub(super) fn leave_features(
        &mut self,
        num_layers_done: usize,
        shape: PassShape,
    ) -> Result<(), ModelError> {
        if self.start.is_none() && self.drafter.is_none() {
            return Ok(());
        }
        let Decoder { config, start, drafter, cache, workspace, backend, .. } = self;
        let (ws, cache) = (ready(workspace), ready(cache));
        let (hidden, is_last) = (config.hidden_size, num_layers_done == config.num_layers);
        if let Some(start) = start
            && is_last
            && shape.num_logits_rows > 0
        {
            let guesses = if start.input.is_projected() { &ws.normed } else { &ws.residual };
            backend.store_slots(&cache.inputs, Rows::Logits, hidden, guesses, ready(&mut start.features))?;
        }
        let Some(Attached { head, tap }) = drafter.as_deref_mut() else { return Ok(()) };
        let rows = shape.num_tokens;
        let (width, features) = (head.config.hidden_size, ready(&mut ready(&mut head.start).features));
        match &tap.features {
            Features::FinalNorm if is_last => {
                backend.store_slots(&cache.inputs, Rows::All, width, &ws.normed, features)?;
            }
            Features::FinalNorm => {}
            Features::Layers(layers) => {
                let joined = ready(&mut tap.joined);
                for (index, _) in layers.iter().enumerate().filter(|(_, layer)| **layer == num_layers_done) {
                    let columns = Columns { first: index * hidden, width: hidden, of: layers.len() * hidden };
                    backend.put_columns(rows, &ws.residual, columns, joined)?;
                }
                if layers.last() == Some(&num_layers_done) {
                    let (weight, projected) = (ready(&mut tap.projection), ready(&mut tap.projected));
                    backend.matmul(rows, joined, Linear { weight, bias: None }, projected)?;
                    backend.store_slots(&cache.inputs, Rows::All, width, projected, features)?;
                }
            }
        }
        Ok(())
    }

    /// True if a head wants what is there after the last layer, of every row.
    pub(super) fn leaves_last_features(&self) -> bool {
        self.drafter.as_ref().is_some_and(|attached| match &attached.tap.features {
            Features::FinalNorm => true,
            Features::Layers(layers) => layers.contains(&self.config.num_layers),
        })
    }

    /// Rows of the output matrix.
    pub(super) fn num_outputs(&self) -> usize {
        let own = self.start.as_ref().and_then(|start| start.own_outputs.as_ref());
        own.map_or(self.config.vocab_size, |own| own.to_target.len())
    }

    /// True of a head whose outputs are some of the target's tokens.
    pub(super) fn has_own_vocabulary(&self) -> bool {
        self.start.as_ref().is_some_and(|start| start.own_outputs.is_some())
    }
}

impl OwnOutputs {
    fn new(to_target: Vec<u32>) -> Self {
        OwnOutputs { to_target, spread: WholeRows::default(), all_whole: Vec::new() }
    }

    /// Makes of rows of the head's outputs rows of the target's vocabulary; tokens that it has no output for are
    /// never drawn.
    pub(super) fn spread(&mut self, outputs: &[f32], vocab_size: usize) {
        let logits = &mut self.spread.logits;
        logits.clear();
        logits.resize(outputs.len() / self.to_target.len() * vocab_size, NEVER);
        let rows = logits.chunks_exact_mut(vocab_size);
        for (outputs, row) in outputs.chunks_exact(self.to_target.len()).zip(rows) {
            for (&output, &id) in outputs.iter().zip(&self.to_target) {
                row[id as usize] = output;
            }
        }
    }
}

impl<B: Backend> HeadStart<B> {
    /// Of a head whose outputs are some of the target's tokens.
    pub(super) fn own_outputs(&mut self) -> Option<&mut OwnOutputs> {
        self.own_outputs.as_mut()
    }

    /// What the attention reads instead of the normed stream.
    pub(super) fn attention_input(&self) -> Option<&B::Buffer> {
        self.joined.as_ref().filter(|_| self.projection.is_none())
    }
}

impl<B: Backend> Attached<B> {
    pub(super) fn as_model(&mut self) -> &mut dyn Model {
        &mut self.head
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outputs::{Choice, choose};

    /// The policy goes by it: a head with few outputs must not look less sure than it is.
    #[test]
    fn a_share_is_of_the_outputs_that_a_head_has() {
        let to_target: Vec<u32> = (0..700).map(|output| 5 * output + 3).collect();
        let outputs: Vec<f32> = (0..700).map(|i| ((i * 37 % 101) as f32 - 50.0) / 10.0).collect();
        let choice = Choice { share: true, ..Choice::default() };
        let own = choose(&outputs, &choice);
        let mut spread = OwnOutputs::new(to_target.clone());
        // Longer than the last output: some chunks of the sum have none.
        spread.spread(&outputs, 5_000);
        let chosen = spread.spread.outputs(&[Wanted::Token(choice)], 5_000).chosen[0];
        assert_eq!(chosen.token, to_target[own.token as usize]);
        assert!(own.share > 0.01 && chosen.is_finite);
        // The same terms, added in other chunks.
        assert!((chosen.share / own.share - 1.0).abs() < 1e-5, "{} is not {}", chosen.share, own.share);
    }
}
