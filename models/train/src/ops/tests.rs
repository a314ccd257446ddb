//! Every op against plain candle autograd and against finite differences.

use std::sync::Arc;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::ops::{log_softmax, softmax};
use tandem_models::Rope;
use tandem_models::rope::RopeTable;

use super::*;

fn values(shape: impl Into<candle_core::Shape>, seed: usize) -> Var {
    let shape = shape.into();
    let data: Vec<f32> =
        (0..shape.elem_count()).map(|i| ((i * 37 + seed * 101 + 13) as f32 * 0.713).sin()).collect();
    Var::from_tensor(&Tensor::from_vec(data, shape, &Device::Cpu).expect("shape")).expect("var")
}

/// A scalar that weighs every element differently, so that no gradient hides behind a symmetry.
fn weigh(x: &Tensor) -> Result<Tensor> {
    let weights = values(x.shape().clone(), 9).as_tensor().detach();
    (x * weights)?.sum_all()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|t| t.to_vec1()).expect("f32 tensor")
}

fn assert_close(ours: &[f32], wanted: &[f32], tolerance: f32, what: &str) {
    assert_eq!(ours.len(), wanted.len(), "{what}");
    for (i, (a, b)) in ours.iter().zip(wanted).enumerate() {
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "{what}[{i}]: {a}, wanted {b}");
    }
}

/// Value and gradients of `fused` against those of `plain`, and the gradients against central
/// differences at a few places.
fn check(vars: &[&Var], fused: impl Fn() -> Result<Tensor>, plain: impl Fn() -> Result<Tensor>) {
    let (ours, wanted) = (fused().expect("fused"), plain().expect("plain"));
    assert_close(&flat(&ours), &flat(&wanted), 2e-5, "value");
    let (our_grads, plain_grads) = (ours.backward().expect("fused"), wanted.backward().expect("plain"));
    for (i, var) in vars.iter().enumerate() {
        let gradient = flat(our_grads.get(var.as_tensor()).expect("gradient"));
        let expected = flat(plain_grads.get(var.as_tensor()).expect("gradient"));
        assert_close(&gradient, &expected, 1e-4, &format!("gradient {i} against autograd"));
        let original = flat(var.as_tensor());
        let step = 1e-2;
        for at in (0..original.len()).step_by(original.len().div_ceil(7)) {
            let at_offset = |delta: f32| {
                let mut moved = original.clone();
                moved[at] += delta;
                var.set(&Tensor::from_vec(moved, var.shape(), &Device::Cpu).expect("shape")).expect("set");
                fused().and_then(|t| t.to_scalar::<f32>()).expect("scalar")
            };
            let slope = (at_offset(step) - at_offset(-step)) / (2.0 * step);
            assert!(
                (slope - gradient[at]).abs() < 2e-2 * (1.0 + slope.abs()),
                "{i}[{at}]: {} {slope}",
                gradient[at]
            );
        }
        var.set(&Tensor::from_vec(original, var.shape(), &Device::Cpu).expect("shape")).expect("set");
    }
}

#[test]
fn linear_matches_autograd() {
    let (x, w, b) = (values((5, 8), 1), values((3, 8), 2), values(3, 3));
    check(
        &[&x, &w, &b],
        || weigh(&linear(&x, &w, Some(&b))?),
        || weigh(&x.matmul(&w.t()?)?.broadcast_add(&b)?),
    );
}

#[test]
fn rms_norm_matches_autograd() {
    let (x, w) = (values((70, 24), 1), values(24, 2));
    check(
        &[&x, &w],
        || weigh(&rms_norm(&x, &w, 1e-5)?),
        || {
            let inverse = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?.recip()?;
            weigh(&x.broadcast_mul(&inverse)?.broadcast_mul(&w)?)
        },
    );
}

#[test]
fn silu_mul_matches_autograd() {
    let (gate, up) = (values((7, 19), 1), values((7, 19), 2));
    check(&[&gate, &up], || weigh(&silu_mul(&gate, &up)?), || weigh(&(gate.silu()? * up.as_tensor())?));
}

fn table(head_dim: usize, positions: usize) -> Arc<RopeTable> {
    Arc::new(RopeTable::new(&Rope::plain(head_dim, 100.0), head_dim, positions))
}

#[test]
fn rope_matches_candle() {
    let (seq_len, heads, head_dim) = (5, 2, 8);
    let x = values((2 * seq_len, heads * head_dim), 1);
    let table = table(head_dim, seq_len);
    let half = |values: &[f32]| Tensor::from_slice(values, (seq_len, head_dim / 2), &Device::Cpu);
    let (cos, sin) = (half(&table.cos).expect("cos"), half(&table.sin).expect("sin"));
    check(
        &[&x],
        || weigh(&rope(&x, &table, head_dim, seq_len)?),
        || {
            let split = x.reshape((2, seq_len, heads, head_dim))?.transpose(1, 2)?;
            let turned = candle_nn::rotary_emb::rope_slow(&split.contiguous()?, &cos, &sin)?;
            weigh(&turned.transpose(1, 2)?.reshape((2 * seq_len, heads * head_dim))?)
        },
    );
}

/// Attention as a textbook writes it.
fn plain_attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: AttentionShape) -> Result<Tensor> {
    let AttentionShape { seq_len, heads, kv_heads, head_dim } = shape;
    let batch = q.dim(0)? / seq_len;
    let split = |x: &Tensor, heads: usize| {
        x.reshape((batch, seq_len, heads, head_dim))?.transpose(1, 2)?.contiguous()
    };
    let repeat = |x: Tensor| {
        let wide = (batch, kv_heads, heads / kv_heads, seq_len, head_dim);
        x.unsqueeze(2)?.expand(wide)?.reshape((batch, heads, seq_len, head_dim))
    };
    let (q, k, v) = (split(q, heads)?, repeat(split(k, kv_heads)?)?, repeat(split(v, kv_heads)?)?);
    let mask: Vec<f32> = (0..seq_len * seq_len)
        .map(|i| if i % seq_len > i / seq_len { f32::NEG_INFINITY } else { 0.0 })
        .collect();
    let mask = Tensor::from_vec(mask, (seq_len, seq_len), q.device())?;
    let scores = (q.matmul(&k.t()?)? / (head_dim as f64).sqrt())?.broadcast_add(&mask)?;
    softmax(&scores, D::Minus1)?.matmul(&v)?.transpose(1, 2)?.reshape((batch * seq_len, heads * head_dim))
}

#[test]
fn attention_matches_autograd_across_blocks() {
    // 131 rows: a whole block and a short one.
    let shape = AttentionShape { seq_len: 131, heads: 4, kv_heads: 2, head_dim: 4 };
    let (q, k, v) = (values((262, 16), 1), values((262, 8), 2), values((262, 8), 3));
    check(
        &[&q, &k, &v],
        || weigh(&causal_attention(&q, &k, &v, shape)?),
        || weigh(&plain_attention(&q, &k, &v, shape)?),
    );
}

#[test]
fn head_loss_matches_autograd() {
    let (hidden, head) = (values((9, 6), 1), values((11, 6), 2));
    let labels: Vec<u32> = (0..9).map(|i| i * 7 % 11).collect();
    let (teacher_hidden, teacher_head) = (values((9, 4), 3), values((11, 4), 4));
    let picked = Tensor::new(labels.clone(), &Device::Cpu).and_then(|t| t.unsqueeze(1)).expect("labels");
    let cross_entropy = || -> Result<Tensor> {
        let log_p = log_softmax(&hidden.matmul(&head.t()?)?, D::Minus1)?;
        log_p.gather(&picked, 1)?.mean_all()?.neg()
    };
    check(&[&hidden, &head], || HeadLoss::cross_entropy(labels.clone()).apply(&hidden, &head), cross_entropy);
    check(
        &[&hidden, &head],
        || {
            let teacher = Teacher {
                hidden: teacher_hidden.as_tensor().detach(),
                head: teacher_head.as_tensor().detach(),
            };
            HeadLoss::distillation(labels.clone(), 0.3, teacher, 0.7).apply(&hidden, &head)
        },
        || {
            let log_p = log_softmax(&hidden.matmul(&head.t()?)?, D::Minus1)?;
            let log_t =
                log_softmax(&teacher_hidden.detach().matmul(&teacher_head.detach().t()?)?, D::Minus1)?;
            let kl = (log_t.exp()? * (log_t - log_p)?)?.sum(D::Minus1)?.mean_all()?;
            (cross_entropy()? * 0.3)? + (kl * 0.7)?
        },
    );
}

#[test]
fn score_finds_the_first_best() {
    let hidden = Tensor::ones((1, 1), DType::F32, &Device::Cpu).expect("tensor");
    let head = Tensor::new(&[[0.0f32], [2.0], [2.0]], &Device::Cpu).expect("tensor");
    let scores = score(&hidden, &head, &[0]).expect("score");
    let wanted = (1.0 + 2.0 * 2f32.exp()).ln();
    assert_eq!(scores[0].1, 1);
    assert!((scores[0].0 - wanted).abs() < 1e-5);
}

/// The claim the module rests on: candle-nn cuts the graph without an error, so a model built on
/// these would silently not learn. When candle grows the backward passes, our own ops can go.
#[test]
fn candle_nn_has_no_backward_for_its_fused_ops() {
    let (x, w) = (values((2, 8), 1), values(8, 2));
    let cos = values((2, 4), 3);
    let fused = [
        candle_nn::ops::rms_norm(&x, &w, 1e-5),
        candle_nn::ops::softmax_last_dim(&x),
        x.reshape((1, 1, 2, 8)).and_then(|x| candle_nn::rotary_emb::rope(&x, &cos, &cos)),
    ];
    for result in fused {
        let gradients = result.and_then(|t| t.sum_all()).expect("forward").backward();
        assert!(gradients.is_ok_and(|gradients| gradients.get(x.as_tensor()).is_none()));
    }
}
