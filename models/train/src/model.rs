//! The decoder that is trained: Llama and Qwen2 (biases on q, k, v), grouped heads, SwiGLU.
//!
//! Activations are `[batch * seq_len, width]`, token-major throughout. The same type holds the model
//! being trained (weights are candle variables) and a frozen target (plain tensors, no graph).

use std::sync::Arc;

use candle_core::{Device, Result as TensorResult, Tensor, Var};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tandem_models::family::{self, WeightNames};
use tandem_models::rope::RopeTable;
use tandem_models::{Checkpoint, DecoderConfig, Rope};

use crate::ops::{AttentionShape, causal_attention, linear, rms_norm, rope, silu_mul};
use crate::random::normal;
use crate::{ModelShape, TrainError};

/// What a parameter is, which decides how it is optimised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// A hidden matrix.
    Matrix,
    /// The embedding, which is also the head.
    Embedding,
    /// A norm's weight or a bias.
    Vector,
}

/// One trainable tensor under its checkpoint name.
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) var: Var,
}

pub(crate) struct Projection {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
}

impl Projection {
    pub(crate) fn apply(&self, x: &Tensor) -> TensorResult<Tensor> {
        linear(x, &self.weight, self.bias.as_ref())
    }
}

pub(crate) struct Layer {
    pub(crate) attn_norm: Tensor,
    pub(crate) q: Projection,
    pub(crate) k: Projection,
    pub(crate) v: Projection,
    pub(crate) o: Projection,
    pub(crate) ffn_norm: Tensor,
    pub(crate) gate: Projection,
    pub(crate) up: Projection,
    pub(crate) down: Projection,
}

/// A decoder and, when it is trained, its parameters.
pub(crate) struct Decoder {
    pub(crate) config: DecoderConfig,
    pub(crate) embed: Tensor,
    pub(crate) layers: Vec<Layer>,
    pub(crate) final_norm: Tensor,
    /// `[vocab_size, hidden_size]`; the embedding itself where tied.
    pub(crate) head: Tensor,
    pub(crate) rope: Arc<RopeTable>,
    /// Empty for a frozen model. The order is fixed by the shape.
    pub(crate) parameters: Vec<Parameter>,
}

/// Makes or finds the tensor of a name and shape.
type Source<'a> = &'a mut dyn FnMut(&str, &[usize]) -> Result<Tensor, TrainError>;

impl Decoder {
    /// A freshly initialised model whose weights are variables.
    ///
    /// Normal with standard deviation 0.02 for the embedding, `0.5 / sqrt(inputs)` for matrices,
    /// and that over `sqrt(2 * layers)` for the two that write to the residual stream.
    pub(crate) fn init(shape: &ModelShape, seed: u64) -> Result<Self, TrainError> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let config = decoder_config(shape);
        let residual = 1.0 / (2.0 * shape.layers as f32).sqrt();
        let mut parameters = Vec::new();
        let mut make = |name: &str, dims: &[usize]| {
            let count = dims.iter().product();
            let (role, values) = match dims {
                [_, _] if name.contains("embed") => (Role::Embedding, normal(&mut rng, count, 0.02)),
                [_, inputs] => {
                    let writes = name.contains("o_proj") || name.contains("down_proj");
                    let deviation = 0.5 / (*inputs as f32).sqrt() * if writes { residual } else { 1.0 };
                    (Role::Matrix, normal(&mut rng, count, deviation))
                }
                _ => (Role::Vector, vec![if name.ends_with("bias") { 0.0 } else { 1.0 }; count]),
            };
            let var = Var::from_tensor(&Tensor::from_vec(values, dims, &Device::Cpu)?)?;
            let tensor = var.as_tensor().clone();
            parameters.push(Parameter { name: name.to_owned(), role, var });
            Ok(tensor)
        };
        let mut decoder =
            Self::assemble(config, &WeightNames::hugging_face(), shape.max_position_embeddings, &mut make)?;
        decoder.parameters = parameters;
        Ok(decoder)
    }

    /// A frozen model from an opened checkpoint, for sequences of up to `positions` tokens.
    pub(crate) fn load(checkpoint: &Checkpoint, positions: usize) -> Result<Self, TrainError> {
        let mut read = |name: &str, dims: &[usize]| {
            let view = checkpoint.weights.tensor(name)?;
            if view.shape != dims {
                let problem =
                    format!("tensor {name} has shape {:?}; config.json implies {dims:?}", view.shape);
                return Err(TrainError::Checkpoint { path: checkpoint.dir.clone(), problem });
            }
            Ok(Tensor::from_vec(view.to_f32(), dims, &Device::Cpu)?)
        };
        Self::assemble(checkpoint.config.clone(), &checkpoint.names, positions, &mut read)
    }

    fn assemble(
        config: DecoderConfig,
        names: &WeightNames,
        positions: usize,
        source: Source<'_>,
    ) -> Result<Self, TrainError> {
        let hidden = config.hidden_size;
        let (q_width, kv_width) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let embed = source(&names.global(family::Role::Embed), &[config.vocab_size, hidden])?;
        let mut layers = Vec::with_capacity(config.num_layers);
        for index in 0..config.num_layers {
            let name = |role: family::Role| names.layer(role, index);
            let mut projection = |name: &str, outputs: usize, inputs: usize, bias: bool| {
                let weight = source(name, &[outputs, inputs])?;
                let bias = if bias { Some(source(&WeightNames::bias(name), &[outputs])?) } else { None };
                Ok::<_, TrainError>(Projection { weight, bias })
            };
            let q = projection(&name(family::Role::Q), q_width, hidden, config.qkv_bias)?;
            let k = projection(&name(family::Role::K), kv_width, hidden, config.qkv_bias)?;
            let v = projection(&name(family::Role::V), kv_width, hidden, config.qkv_bias)?;
            let o = projection(&name(family::Role::O), hidden, q_width, config.o_bias)?;
            let gate =
                projection(&name(family::Role::Gate), config.intermediate_size, hidden, config.mlp_bias)?;
            let up = projection(&name(family::Role::Up), config.intermediate_size, hidden, config.mlp_bias)?;
            let down =
                projection(&name(family::Role::Down), hidden, config.intermediate_size, config.mlp_bias)?;
            let attn_norm = source(&name(family::Role::AttnNorm), &[hidden])?;
            let ffn_norm = source(&name(family::Role::FfnNorm), &[hidden])?;
            layers.push(Layer { attn_norm, q, k, v, o, ffn_norm, gate, up, down });
        }
        let final_norm = source(&names.global(family::Role::FinalNorm), &[hidden])?;
        let head = if config.tie_word_embeddings {
            embed.clone()
        } else {
            source(&names.global(family::Role::LmHead), &[config.vocab_size, hidden])?
        };
        let rope = Arc::new(RopeTable::new(&config.rope, config.head_dim, positions));
        Ok(Self { config, embed, layers, final_norm, head, rope, parameters: Vec::new() })
    }

    /// Trainable numbers.
    pub(crate) fn num_parameters(&self) -> usize {
        self.parameters.iter().map(|parameter| parameter.var.elem_count()).sum()
    }

    /// Normed hidden states `[ids.len(), hidden_size]` of sequences of `seq_len` tokens each.
    pub(crate) fn hidden(&self, ids: &[u32], seq_len: usize) -> TensorResult<Tensor> {
        let config = &self.config;
        let shape = AttentionShape {
            seq_len,
            heads: config.num_heads,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
        };
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let mut x = self.embed.index_select(&ids, 0)?;
        for layer in &self.layers {
            let normed = rms_norm(&x, &layer.attn_norm, config.norm_eps)?;
            let q = rope(&layer.q.apply(&normed)?, &self.rope, config.head_dim, seq_len)?;
            let k = rope(&layer.k.apply(&normed)?, &self.rope, config.head_dim, seq_len)?;
            let attended = causal_attention(&q, &k, &layer.v.apply(&normed)?, shape)?;
            x = (x + layer.o.apply(&attended)?)?;
            x = (&x + self.feed_forward(layer, &x)?)?;
        }
        rms_norm(&x, &self.final_norm, config.norm_eps)
    }

    pub(crate) fn feed_forward(&self, layer: &Layer, x: &Tensor) -> TensorResult<Tensor> {
        let normed = rms_norm(x, &layer.ffn_norm, self.config.norm_eps)?;
        layer.down.apply(&silu_mul(&layer.gate.apply(&normed)?, &layer.up.apply(&normed)?)?)
    }
}

/// The configuration a shape stands for.
pub(crate) fn decoder_config(shape: &ModelShape) -> DecoderConfig {
    DecoderConfig {
        vocab_size: shape.vocab_size,
        hidden_size: shape.hidden,
        intermediate_size: shape.ffn,
        num_layers: shape.layers,
        num_heads: shape.heads,
        num_kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        norm_eps: shape.rms_norm_eps,
        rope: Rope::plain(shape.head_dim, shape.rope_theta),
        max_position_embeddings: shape.max_position_embeddings,
        qkv_bias: shape.qkv_bias,
        tie_word_embeddings: true,
        ..DecoderConfig::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causal_and_independent_of_other_sequences() {
        let shape = ModelShape {
            vocab_size: 32,
            hidden: 16,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 8,
            ffn: 24,
            qkv_bias: true,
            ..Default::default()
        };
        let model = Decoder::init(&shape, 1).expect("init");
        assert_eq!(model.num_parameters(), 32 * 16 + 16 + 2 * (2 * (256 + 128) + 32 + 3 * 384 + 32));
        let rows = |ids: &[u32], seq_len| {
            model.hidden(ids, seq_len).and_then(|h| h.to_vec2::<f32>()).expect("hidden")
        };
        let both = rows(&[1, 2, 3, 4, 9, 8, 7, 6], 4);
        let alone = rows(&[1, 2, 3, 5], 4);
        assert_eq!(both[..3], alone[..3], "a later token changed an earlier one");
        assert_ne!(both[3], alone[3]);
    }
}
