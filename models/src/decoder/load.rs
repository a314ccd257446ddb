//! From a checkpoint's named tensors to a backend's weights. Every tensor's shape is held against the
//! configuration before the backend sees it, so a lying `config.json` costs an error message and no
//! memory: sizes come from tensors that are known to lie in the file.

use std::sync::Arc;

use tandem_kernels::ThreadPool;

use super::{Decoder, LayerWeights, Pass, Projection, Weights};
use crate::backend::{Backend, BackendKind, CpuBackend, Heads, ReferenceBackend};
use crate::checkpoint::Checkpoint;
use crate::config::DecoderConfig;
use crate::error::ModelError;
use crate::family::{LayerNames, WeightNames};
use crate::model::Model;
use crate::weights::TensorView;

/// Loads the weights of `checkpoint` onto a backend of the given kind. `pool` serves the CPU backend;
/// models that never run at the same time may share it.
///
/// # Errors
/// As [`Decoder::load`].
pub fn load(
    checkpoint: &Checkpoint,
    kind: BackendKind,
    pool: Arc<ThreadPool>,
) -> Result<Box<dyn Model>, ModelError> {
    Ok(match kind {
        BackendKind::Cpu => Box::new(Decoder::load(checkpoint, CpuBackend::new(pool))?),
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
        let heads = Heads {
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
        };
        let mut loader = Loader { checkpoint, config: &config, heads, backend };
        let weights = loader.weights()?;
        let backend = loader.backend;
        Ok(Decoder { config, heads, weights, cache: None, workspace: None, pass: Pass::default(), backend })
    }
}

struct Loader<'a, B> {
    checkpoint: &'a Checkpoint,
    config: &'a DecoderConfig,
    heads: Heads,
    backend: B,
}

impl<B: Backend> Loader<'_, B> {
    fn weights(&mut self) -> Result<Weights<B>, ModelError> {
        let (config, names) = (self.config, &self.checkpoint.names);
        let embed = self.matrix(&[(&names.embed, config.vocab_size)], config.hidden_size)?;
        // Not with_capacity: the number of layers is the file's claim until the tensors are found.
        let mut layers = Vec::new();
        for index in 0..config.num_layers {
            layers.push(self.layer(&names.layer(index))?);
        }
        let final_norm = self.norm(&names.final_norm)?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(self.matrix(&[(&names.lm_head, config.vocab_size)], config.hidden_size)?),
        };
        Ok(Weights { embed, layers, final_norm, lm_head })
    }

    fn layer(&mut self, names: &LayerNames) -> Result<LayerWeights<B>, ModelError> {
        let config = self.config;
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (self.heads.q_width(), self.heads.kv_width());
        let qkv = [(names.q.as_str(), q), (&names.k, kv), (&names.v, kv)];
        let gate_up = [(names.gate.as_str(), ffn), (&names.up, ffn)];
        Ok(LayerWeights {
            attn_norm: self.norm(&names.attn_norm)?,
            qkv: self.projection(&qkv, hidden, config.qkv_bias)?,
            o: self.projection(&[(&names.o, hidden)], q, config.o_bias)?,
            ffn_norm: self.norm(&names.ffn_norm)?,
            gate_up: self.projection(&gate_up, hidden, config.mlp_bias)?,
            down: self.projection(&[(&names.down, hidden)], ffn, config.mlp_bias)?,
        })
    }

    /// The projection whose outputs are those of `parts` (name, out_features), side by side.
    fn projection(
        &mut self,
        parts: &[(&str, usize)],
        in_features: usize,
        has_bias: bool,
    ) -> Result<Projection<B>, ModelError> {
        let weight = self.matrix(parts, in_features)?;
        let bias = match has_bias {
            true => Some(self.biases(parts)?),
            false => None,
        };
        Ok(Projection { weight, bias })
    }

    fn matrix(&mut self, parts: &[(&str, usize)], in_features: usize) -> Result<B::Matrix, ModelError> {
        let views = parts
            .iter()
            .map(|&(name, out_features)| self.tensor(name, &[out_features, in_features]))
            .collect::<Result<Vec<_>, _>>()?;
        self.backend.load_matrix(&views, in_features)
    }

    fn biases(&mut self, parts: &[(&str, usize)]) -> Result<B::Vector, ModelError> {
        let names: Vec<String> = parts.iter().map(|(name, _)| WeightNames::bias(name)).collect();
        let views = names
            .iter()
            .zip(parts)
            .map(|(name, &(_, out_features))| self.tensor(name, &[out_features]))
            .collect::<Result<Vec<_>, _>>()?;
        self.backend.load_vector(&views)
    }

    fn norm(&mut self, name: &str) -> Result<B::Vector, ModelError> {
        let view = self.tensor(name, &[self.config.hidden_size])?;
        self.backend.load_vector(&[view])
    }

    fn tensor<'s>(&self, name: &str, wanted: &[usize]) -> Result<TensorView<'s>, ModelError>
    where
        Self: 's,
    {
        let checkpoint: &'s Checkpoint = self.checkpoint;
        let view = checkpoint.weights.tensor(name)?;
        if view.shape != wanted {
            return Err(ModelError::TensorShape {
                name: name.to_owned(),
                found: view.shape.to_vec(),
                wanted: wanted.to_vec(),
            });
        }
        Ok(view)
    }
}
