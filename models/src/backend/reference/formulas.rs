//! The operations that are more than a call or two, each as one would write it down.

use candle_core::{D, Result as CandleResult, Tensor};
use tandem_kernels::experts::{Groups, Scoring};

use super::{KvTensors, Pass, RopeTensors, Routing, Sequence};
use crate::backend::{Attention, Heads, Norm, QkNormWeights};
use crate::config::{Experts, NormKind};

pub(super) fn normalise(x: &Tensor, norm: Norm<'_, Tensor>) -> CandleResult<Tensor> {
    match norm.kind {
        NormKind::Rms => rms_norm(x, norm.weight, norm.eps),
        NormKind::Layer => {
            let bias = norm.bias.expect("a layer norm has a bias: this is a bug");
            let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            rms_norm(&centred, norm.weight, norm.eps)?.broadcast_add(bias)
        }
    }
}

pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> CandleResult<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    let root = (mean_square + f64::from(eps))?.sqrt()?;
    x.broadcast_div(&root)?.broadcast_mul(weight)
}

pub(super) fn soft_cap(x: &Tensor, cap: f32) -> CandleResult<Tensor> {
    let cap = f64::from(cap);
    x.affine(1.0 / cap, 0.0)?.tanh()?.affine(cap, 0.0)
}

pub(super) fn norm_queries_and_keys(
    qkv: &Tensor,
    heads: Heads,
    norm: QkNormWeights<'_, Tensor>,
) -> CandleResult<Tensor> {
    let (num_tokens, (q, kv)) = (qkv.dims()[0], (heads.q_width(), heads.kv_width()));
    let part = |start: usize, width: usize, weight: &Tensor| {
        let parts = qkv.narrow(1, start, width)?.reshape((num_tokens, (), weight.elem_count()))?;
        rms_norm(&parts, weight, norm.eps)?.reshape((num_tokens, width))
    };
    Tensor::cat(&[part(0, q, norm.q)?, part(q, kv, norm.k)?, qkv.narrow(1, q + kv, kv)?], 1)
}

/// `[rows, heads.qkv_width()]`; see [`Backend::join_latents`].
pub(super) fn join_latents(
    heads: Heads,
    q: &Tensor,
    up: &[Tensor],
    latents: &Tensor,
) -> CandleResult<Tensor> {
    let mut parts = Vec::new();
    for (head, up) in up.iter().enumerate() {
        let (rank, content) = up.dims2()?;
        let turning = heads.head_dim - rank;
        let first = head * (content + turning);
        parts.push(q.narrow(1, first, content)?.contiguous()?.matmul(&up.t()?)?);
        parts.push(q.narrow(1, first + content, turning)?);
    }
    parts.push(latents.clone());
    Tensor::cat(&parts, 1)
}

/// Sorting on the host: the device's own sort has no rule for ties.
pub(super) fn route(
    experts: &Experts,
    choice_bias: Option<&Tensor>,
    logits: &Tensor,
    routing: &mut Routing,
) -> CandleResult<()> {
    routing.picks.clear();
    let mut weights = Vec::new();
    let bias = choice_bias.map(Tensor::to_vec1::<f32>).transpose()?;
    for logits in logits.to_vec2::<f32>()? {
        let scores: Vec<f32> = match experts.scoring {
            Scoring::Softmax => {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
                logits.iter().map(|logit| (logit - max).exp() / sum).collect()
            }
            Scoring::Sigmoid => logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
        };
        let choice = |expert: usize| scores[expert] + bias.as_ref().map_or(0.0, |bias| bias[expert]);
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| choice(b).total_cmp(&choice(a)));
        if let Some(Groups { num_groups, num_picked, two_best }) = experts.groups {
            let group_of = |expert: usize| expert / (experts.num_experts / num_groups);
            let score = |group: usize| -> f32 {
                let best = order.iter().filter(|&&expert| group_of(expert) == group);
                best.take(if two_best { 2 } else { 1 }).map(|&expert| choice(expert)).sum()
            };
            let mut groups: Vec<usize> = (0..num_groups).collect();
            groups.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
            groups.truncate(num_picked);
            order.retain(|&expert| groups.contains(&group_of(expert)));
        }
        order.truncate(experts.num_experts_per_token);
        let chosen: f32 = order.iter().map(|&expert| scores[expert]).sum();
        let factor = experts.weight_scale / if experts.renormalise { chosen } else { 1.0 };
        weights.extend(order.iter().map(|&expert| scores[expert] * factor));
        routing.picks.extend(order);
    }
    routing.weights = Tensor::from_vec(weights, (routing.picks.len(), 1), logits.device())?;
    Ok(())
}

/// Stores keys and values; returns the rotated queries, `[num_tokens, q_width]`.
pub(super) fn rotate_and_store(
    pass: &Pass,
    heads: Heads,
    rope: Option<&RopeTensors>,
    qkv: &Tensor,
    kv: &mut KvTensors,
) -> CandleResult<Tensor> {
    let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
    let rotate = |start: usize, width: usize| {
        let part = qkv.narrow(1, start, width)?.contiguous()?;
        let Some(rope) = rope else { return Ok(part) };
        let cos = rope.cos.index_select(&pass.positions, 0)?;
        let sin = rope.sin.index_select(&pass.positions, 0)?;
        rotate(&part, heads.head_dim, &cos, &sin)
    };
    let queries = rotate(0, q_width)?;
    let keys = rotate(q_width, kv_width)?;
    for (row, &slot) in pass.slot_mapping.iter().enumerate() {
        kv.keys.slice_set(&keys.narrow(0, row, 1)?, 0, slot)?;
    }
    if let Some(stored) = &kv.values {
        let values = qkv.narrow(1, q_width + kv_width, kv_width)?.contiguous()?;
        for (row, &slot) in pass.slot_mapping.iter().enumerate() {
            stored.slice_set(&values.narrow(0, row, 1)?, 0, slot)?;
        }
    }
    Ok(queries)
}

/// `x` is `[num_tokens, _ * head_dim]`; `cos` and `sin` are for a head's last `2 * half` channels, of which
/// channel `i` turns with channel `i + half`.
fn rotate(x: &Tensor, head_dim: usize, cos: &Tensor, sin: &Tensor) -> CandleResult<Tensor> {
    let (num_tokens, width) = x.dims2()?;
    let half = cos.dims()[1];
    let still = head_dim - 2 * half;
    let x = x.reshape((num_tokens, width / head_dim, head_dim))?;
    let (first, second) = (x.narrow(2, still, half)?, x.narrow(2, still + half, half)?);
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    let rotated_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let rotated_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    let mut parts = vec![rotated_first, rotated_second];
    if still > 0 {
        parts.insert(0, x.narrow(2, 0, still)?);
    }
    Tensor::cat(&parts, 2)?.reshape((num_tokens, width))
}

/// `[num_rows, context_len]`: 0 where a row may look, -inf where it may not.
fn mask(sequence: &Sequence, attention: &Attention<'_, Tensor>) -> CandleResult<Tensor> {
    let Attention { window, first_key, .. } = *attention;
    let context_len = sequence.slots.dims1()?;
    let visible = |row: usize, key: usize| {
        let is_near = key <= row && window.is_none_or(|window| key + window > row);
        is_near && (key >= first_key || key == row)
    };
    let mask: Vec<f32> = sequence
        .positions
        .iter()
        .flat_map(|&row| (0..context_len).map(move |key| (row, key)))
        .map(|(row, key)| if visible(row, key) { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    Tensor::from_vec(mask, (sequence.num_rows, context_len), sequence.slots.device())
}

/// Attention of one sequence's rows: `[num_rows, q_width]`.
pub(super) fn attend(
    sequence: &Sequence,
    heads: Heads,
    attention: &Attention<'_, Tensor>,
    queries: &Tensor,
    kv: &KvTensors,
) -> CandleResult<Tensor> {
    let Heads { num_heads, num_kv_heads, head_dim, .. } = heads;
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
    let mut scores = queries.matmul(&context(&kv.keys)?.t()?)?.affine(f64::from(attention.scale), 0.0)?;
    if let Some(cap) = attention.soft_cap {
        scores = soft_cap(&scores, cap)?;
    }
    scores = scores.broadcast_add(&mask(sequence, attention)?)?;
    // A sink is one more column, left out again after the softmax.
    if let Some(sinks) = attention.sinks {
        let column = sinks.reshape((num_heads, 1, 1))?.broadcast_as((num_heads, sequence.num_rows, 1))?;
        scores = Tensor::cat(&[scores, column.contiguous()?], 2)?;
    }
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    let weights = weights.narrow(2, 0, context_len)?.contiguous()?;
    let values = match &kv.values {
        Some(values) => context(values)?,
        None => context(&kv.keys)?.narrow(2, 0, heads.value_dim())?.contiguous()?,
    };
    let mixed = weights.matmul(&values)?;
    mixed.transpose(0, 1)?.reshape((sequence.num_rows, heads.out_width()))
}
