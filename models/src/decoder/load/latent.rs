//! The weights of latent attention. Checkpoints have the projection from a latent to all heads' keys and
//! values as one matrix, which is cut here and its keys transposed, or, in newer GGUF files, cut already.

use super::{Loader, Part};
use crate::backend::Backend;
use crate::config::LatentAttention;
use crate::decoder::weights::LatentWeights;
use crate::error::ModelError;
use crate::family::Role;

/// Matrices, one a head.
type HeadParts<'a> = Vec<Part<'a>>;

impl<'a, B: Backend> Loader<'a, B> {
    pub(super) fn latent(
        &mut self,
        layer: usize,
        latent: &LatentAttention,
    ) -> Result<LatentWeights<B>, ModelError> {
        let (config, names) = (self.config, &self.checkpoint.names);
        let (hidden, turning) = (config.hidden_size, config.rope.dim);
        let q_width = config.num_heads * (latent.content_dim + turning);
        let (q_down, q_role, q_inputs) = match latent.q_rank {
            None => (None, Role::Q, hidden),
            Some(rank) => {
                let down = self.rows((Role::QDown, layer), rank, hidden)?;
                let bias = self.bias_if(config.qkv_bias, &names.layer(Role::QDown, layer), rank)?;
                let down = self.projection(vec![down], bias, hidden)?;
                let norm = self.part(&names.layer(Role::QDownNorm, layer), &[rank])?;
                (Some((down, self.vector(&[norm])?)), Role::QUp, rank)
            }
        };
        let mut q = self.rows((q_role, layer), q_width, q_inputs)?;
        self.turn_last(&mut q, latent.content_dim);

        let kv_width = latent.kv_rank + turning;
        let mut kv_down = self.rows((Role::KvDown, layer), kv_width, hidden)?;
        let mut bias = self.bias_if(config.qkv_bias, &names.layer(Role::KvDown, layer), kv_width)?;
        for part in bias.iter_mut().chain([&mut kv_down]) {
            self.turn_last(part, latent.kv_rank);
        }
        let kv_norm = self.part(&names.layer(Role::KvDownNorm, layer), &[latent.kv_rank])?;
        let (k_up, v_up) = self.key_and_value_parts(layer, latent)?;
        Ok(LatentWeights {
            q_down,
            q: self.projection(vec![q], None, q_inputs)?,
            kv_down: self.projection(vec![kv_down], bias, hidden)?,
            kv_norm: self.vector(&[kv_norm])?,
            k_up: self.head_matrices((Role::KUp, layer), k_up, latent.content_dim)?,
            v_up: self.head_matrices((Role::VUp, layer), v_up, latent.kv_rank)?,
        })
    }

    /// Puts the rows that turn, which follow `still` others, into the rotation's order, stretch by stretch.
    fn turn_last(&self, part: &mut Part<'_>, still: usize) {
        if let Some(order) = &self.row_order {
            let order: Vec<usize> = (0..still).chain(order.iter().map(|row| still + row)).collect();
            part.reorder_rows(&order);
        }
    }

    /// From query to latent, `[kv_rank, content_dim]`, and from latent to value, `[value_dim, kv_rank]`.
    fn key_and_value_parts(
        &self,
        layer: usize,
        latent: &LatentAttention,
    ) -> Result<(HeadParts<'a>, HeadParts<'a>), ModelError> {
        let &LatentAttention { kv_rank, content_dim, value_dim, .. } = latent;
        let (names, heads) = (&self.checkpoint.names, self.config.num_heads);
        let both = names.layer(Role::KvUp, layer);
        if names.has(Role::KUp) && !self.checkpoint.weights.contains(&both) {
            let k_up = self.part(&names.layer(Role::KUp, layer), &[heads, kv_rank, content_dim])?;
            let v_up = self.part(&names.layer(Role::VUp, layer), &[heads, value_dim, kv_rank])?;
            return Ok((0..heads).map(|head| (k_up.item(head), v_up.item(head))).unzip());
        }
        let both = self.part(&both, &[heads * (content_dim + value_dim), kv_rank])?;
        let cuts: Vec<usize> = (0..heads).flat_map(|_| [content_dim, value_dim]).collect();
        let mut parts = both.split(&cuts).into_iter();
        let (mut k_up, mut v_up) = (Vec::new(), Vec::new());
        while let (Some(mut key), Some(value)) = (parts.next(), parts.next()) {
            key.transpose();
            k_up.push(key);
            v_up.push(value);
        }
        Ok((k_up, v_up))
    }

    fn head_matrices(
        &mut self,
        (role, layer): (Role, usize),
        parts: HeadParts<'a>,
        in_features: usize,
    ) -> Result<Vec<B::Matrix>, ModelError> {
        let load = |part| {
            let part = self.quantized(part, role, layer);
            self.matrix(&[part], in_features)
        };
        parts.into_iter().map(load).collect()
    }
}
