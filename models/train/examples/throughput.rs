//! Tokens a second of the trainer against the same model on candle's plain autograd, on this
//! machine, in one run:
//!
//! ```text
//! cargo run --release -p tandem-train --example throughput -- CORPUS_FOLDER [STEPS]
//! ```
//!
//! Both sides train the demo shapes with AdamW on rows of 8 x 512; the trainer also with Muon. The
//! plain side is what candle offers without custom ops: every op differentiable, one by one.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::optim::{AdamW, Optimizer};
use tandem_train::{
    Budget, CorpusOptions, ModelShape, OptimizerKind, RunOptions, TrainError, TrainOptions, train,
};

const SEQ_LEN: usize = 512;
const BATCH: usize = 8;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let Some(corpus) = arguments.next().map(PathBuf::from) else {
        eprintln!("usage: throughput CORPUS_FOLDER [STEPS]");
        std::process::exit(2);
    };
    let steps = arguments.next().and_then(|steps| steps.parse().ok()).unwrap_or(5);
    for (name, shape) in [("target", ModelShape::small_target()), ("draft", ModelShape::small_draft())] {
        let plain = plain_tokens_per_second(&shape, steps).expect("plain training");
        let adamw = ours(&corpus, &shape, steps, OptimizerKind::AdamW).expect("training");
        let muon = ours(&corpus, &shape, steps, OptimizerKind::Muon).expect("training");
        println!(
            "{name}: plain autograd {plain:.0} tokens/s, fused {adamw:.0} ({:.2}x), fused with Muon {muon:.0} ({:.2}x)",
            adamw / plain,
            muon / plain
        );
    }
}

fn ours(
    corpus: &std::path::Path,
    shape: &ModelShape,
    steps: u64,
    optimizer: OptimizerKind,
) -> std::result::Result<f64, TrainError> {
    let out = std::env::temp_dir().join(format!("tandem-throughput-{}", std::process::id()));
    let options = TrainOptions {
        corpus: CorpusOptions { dir: corpus.to_owned(), held_out: 0.0, ..Default::default() },
        out: out.clone(),
        shape: shape.clone(),
        run: RunOptions {
            seq_len: SEQ_LEN,
            batch: BATCH,
            budget: Budget::Steps(steps),
            optimizer,
            checkpoint_interval: 0,
            eval_interval: 0,
            progress: false,
            ..Default::default()
        },
        ..Default::default()
    };
    let report = train(&options);
    // The folder is scratch; leaving it behind is no reason to fail.
    let _ = std::fs::remove_dir_all(&out);
    Ok(report?.tokens_per_second)
}

struct Block {
    norms: [Var; 2],
    q: Var,
    k: Var,
    v: Var,
    o: Var,
    gate: Var,
    up: Var,
    down: Var,
}

fn plain_tokens_per_second(shape: &ModelShape, steps: u64) -> Result<f64> {
    let device = Device::Cpu;
    let matrix = |rows: usize, columns: usize| Var::randn(0f32, 0.02, (rows, columns), &device);
    let ones = || Var::ones(shape.hidden, DType::F32, &device);
    let (q_width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let embed = matrix(shape.vocab_size, shape.hidden)?;
    let final_norm = ones()?;
    let mut blocks = Vec::new();
    let mut vars = vec![embed.clone(), final_norm.clone()];
    for _ in 0..shape.layers {
        let block = Block {
            norms: [ones()?, ones()?],
            q: matrix(q_width, shape.hidden)?,
            k: matrix(kv_width, shape.hidden)?,
            v: matrix(kv_width, shape.hidden)?,
            o: matrix(shape.hidden, q_width)?,
            gate: matrix(shape.ffn, shape.hidden)?,
            up: matrix(shape.ffn, shape.hidden)?,
            down: matrix(shape.hidden, shape.ffn)?,
        };
        vars.extend(block.norms.iter().cloned());
        let matrices = [&block.q, &block.k, &block.v, &block.o, &block.gate, &block.up, &block.down];
        vars.extend(matrices.map(Var::clone));
        blocks.push(block);
    }
    let angles: Vec<f32> = (0..SEQ_LEN * shape.head_dim / 2)
        .map(|i| {
            let (position, pair) = (i / (shape.head_dim / 2), i % (shape.head_dim / 2));
            position as f32 * shape.rope_theta.powf(-2.0 * pair as f32 / shape.head_dim as f32)
        })
        .collect();
    let angles = Tensor::from_vec(angles, (SEQ_LEN, shape.head_dim / 2), &device)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let mask: Vec<f32> = (0..SEQ_LEN * SEQ_LEN)
        .map(|i| if i % SEQ_LEN > i / SEQ_LEN { f32::NEG_INFINITY } else { 0.0 })
        .collect();
    let mask = Tensor::from_vec(mask, (SEQ_LEN, SEQ_LEN), &device)?;
    let ids: Vec<u32> = (0..BATCH * SEQ_LEN).map(|i| (i * 7919 % shape.vocab_size) as u32).collect();
    let ids = Tensor::new(ids, &device)?;
    let mut optimizer = AdamW::new_lr(vars, 1e-3)?;
    let mut step = || -> Result<()> {
        let mut x = embed.index_select(&ids, 0)?;
        for block in &blocks {
            x = (&x + attention(shape, block, &rms_norm(&x, &block.norms[0])?, &cos, &sin, &mask)?)?;
            let normed = rms_norm(&x, &block.norms[1])?;
            let gated = (normed.matmul(&block.gate.t()?)?.silu()? * normed.matmul(&block.up.t()?)?)?;
            x = (&x + gated.matmul(&block.down.t()?)?)?;
        }
        let logits = rms_norm(&x, &final_norm)?.matmul(&embed.t()?)?;
        optimizer.backward_step(&candle_nn::loss::cross_entropy(&logits, &ids)?)
    };
    step()?;
    let started = Instant::now();
    for _ in 0..steps {
        step()?;
    }
    Ok((steps as usize * BATCH * SEQ_LEN) as f64 / started.elapsed().as_secs_f64())
}

fn rms_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?;
    x.broadcast_div(&scale)?.broadcast_mul(weight)
}

fn attention(
    shape: &ModelShape,
    block: &Block,
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    mask: &Tensor,
) -> Result<Tensor> {
    let ModelShape { heads, kv_heads, head_dim, .. } = *shape;
    let split =
        |x: Tensor, heads: usize| x.reshape((BATCH, SEQ_LEN, heads, head_dim))?.transpose(1, 2)?.contiguous();
    let repeat = |x: Tensor| {
        let wide = (BATCH, kv_heads, heads / kv_heads, SEQ_LEN, head_dim);
        x.unsqueeze(2)?.expand(wide)?.reshape((BATCH, heads, SEQ_LEN, head_dim))
    };
    let q = candle_nn::rotary_emb::rope_slow(&split(x.matmul(&block.q.t()?)?, heads)?, cos, sin)?;
    let k = candle_nn::rotary_emb::rope_slow(&split(x.matmul(&block.k.t()?)?, kv_heads)?, cos, sin)?;
    let k = repeat(k)?;
    let v = repeat(split(x.matmul(&block.v.t()?)?, kv_heads)?)?;
    let scores = (q.matmul(&k.t()?)? / (head_dim as f64).sqrt())?.broadcast_add(mask)?;
    let attended = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
    attended.transpose(1, 2)?.reshape((BATCH * SEQ_LEN, heads * head_dim))?.matmul(&block.o.t()?)
}
