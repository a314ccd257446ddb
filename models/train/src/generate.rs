//! Text that a frozen model generates, many rows at once, for distillation on its own outputs.
//!
//! Plain and rectangular: all rows have prompts of one length and end together. Keys and values are
//! kept, so a token costs one pass over the weights for all rows.

use candle_core::{Device, Tensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::TrainError;
use crate::model::{Decoder, Layer};
use crate::ops::simd::{dot, softmax, vectorized};
use crate::ops::{linear, rms_norm, rotate};

/// Keys and values of one layer, `[rows, capacity, kv_width]`.
struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Keeps the state of one generation.
struct Generation<'a> {
    decoder: &'a Decoder,
    caches: Vec<Cache>,
    rows: usize,
    capacity: usize,
    /// Tokens of every row that are in the caches.
    cached: usize,
}

/// Continues `prompts`, all of one length, to `length` tokens each. Row `i` draws from `rngs[i]`.
///
/// # Panics
/// Where prompts are empty or differ in length.
pub(crate) fn generate(
    decoder: &Decoder,
    prompts: Vec<Vec<u32>>,
    length: usize,
    temperature: f64,
    rngs: &mut [ChaCha8Rng],
) -> Result<Vec<Vec<u32>>, TrainError> {
    let prompt_len = prompts.first().map_or(0, Vec::len);
    assert!(
        prompt_len > 0 && prompts.iter().all(|prompt| prompt.len() == prompt_len),
        "prompts of one length"
    );
    let width = decoder.config.num_kv_heads * decoder.config.head_dim;
    let size = prompts.len() * length * width;
    let caches =
        decoder.layers.iter().map(|_| Cache { keys: vec![0.0; size], values: vec![0.0; size] }).collect();
    let mut generation = Generation { decoder, caches, rows: prompts.len(), capacity: length, cached: 0 };
    let mut texts = prompts;
    while texts[0].len() < length {
        let fresh: Vec<u32> = texts.iter().flat_map(|text| text[generation.cached..].to_vec()).collect();
        let logits = generation.pass(&fresh)?;
        let vocab = decoder.config.vocab_size;
        for ((text, row), rng) in texts.iter_mut().zip(logits.chunks_exact(vocab)).zip(rngs.iter_mut()) {
            text.push(pick(row, temperature, rng));
        }
    }
    Ok(texts)
}

/// A token drawn from the softmax of `logits / temperature`; the most likely one at 0.
fn pick(logits: &[f32], temperature: f64, rng: &mut ChaCha8Rng) -> u32 {
    let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
    if temperature == 0.0 {
        return best as u32;
    }
    let weight = |&x: &f32| (f64::from(x - logits[best]) / temperature).exp();
    let total: f64 = logits.iter().map(weight).sum();
    let mut left = rng.random::<f64>() * total;
    for (i, x) in logits.iter().enumerate() {
        left -= weight(x);
        if left < 0.0 {
            return i as u32;
        }
    }
    best as u32
}

impl Generation<'_> {
    /// Runs the next tokens of every row (`ids [rows, new]`); returns logits of the last, `[rows, vocab]`.
    fn pass(&mut self, ids: &[u32]) -> Result<Vec<f32>, TrainError> {
        let decoder = self.decoder;
        let new = ids.len() / self.rows;
        let mut x = decoder.embed.detach().index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?;
        for (index, layer) in decoder.layers.iter().enumerate() {
            let attended = self.attend(index, layer, &x, new)?;
            x = (x + layer.o.apply(&attended)?)?;
            x = (&x + decoder.feed_forward(layer, &x)?)?;
        }
        self.cached += new;
        let last: Vec<u32> = (1..=self.rows).map(|row| (row * new - 1) as u32).collect();
        let last = x.index_select(&Tensor::new(last, &Device::Cpu)?, 0)?;
        let hidden = rms_norm(&last, &decoder.final_norm, decoder.config.norm_eps)?;
        Ok(linear(&hidden, &decoder.head, None)?.flatten_all()?.to_vec1()?)
    }

    fn attend(&mut self, index: usize, layer: &Layer, x: &Tensor, new: usize) -> Result<Tensor, TrainError> {
        let config = &self.decoder.config;
        let normed = rms_norm(x, &layer.attn_norm, config.norm_eps)?;
        let flat = |tensor: Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let mut q = flat(layer.q.apply(&normed)?)?;
        let mut k = flat(layer.k.apply(&normed)?)?;
        let v = flat(layer.v.apply(&normed)?)?;
        let (dim, heads) = (config.head_dim, config.num_heads);
        let (q_width, kv_width) = (heads * dim, config.num_kv_heads * dim);
        let (cached, capacity, rope) = (self.cached, self.capacity, &self.decoder.rope);
        q.chunks_exact_mut(q_width)
            .enumerate()
            .for_each(|(i, q)| rotate(rope, dim, q, cached + i % new, 1.0));
        k.chunks_exact_mut(kv_width)
            .enumerate()
            .for_each(|(i, k)| rotate(rope, dim, k, cached + i % new, 1.0));
        let Cache { keys, values } = &mut self.caches[index];
        for (i, (k, v)) in k.chunks_exact(kv_width).zip(v.chunks_exact(kv_width)).enumerate() {
            let at = ((i / new) * capacity + cached + i % new) * kv_width;
            keys[at..at + kv_width].copy_from_slice(k);
            values[at..at + kv_width].copy_from_slice(v);
        }
        let (keys, values) = (&*keys, &*values);
        let group = heads / config.num_kv_heads;
        let scale = 1.0 / (dim as f32).sqrt();
        let mut out = vec![0.0; q.len()];
        out.par_chunks_mut(q_width).zip(q.par_chunks(q_width)).enumerate().for_each(|(i, (out, q))| {
            let row = (i / new) * capacity * kv_width;
            let seen = cached + i % new + 1;
            let mut weights = vec![0.0; seen];
            vectorized(|| {
                for head in 0..heads {
                    let q = &q[head * dim..(head + 1) * dim];
                    let column = row + head / group * dim;
                    for (position, weight) in weights.iter_mut().enumerate() {
                        let at = column + position * kv_width;
                        *weight = dot(q, &keys[at..at + dim]);
                    }
                    softmax(&mut weights, scale);
                    let out = &mut out[head * dim..(head + 1) * dim];
                    for (position, &weight) in weights.iter().enumerate() {
                        let at = column + position * kv_width;
                        for (out, value) in out.iter_mut().zip(&values[at..at + dim]) {
                            *out += weight * value;
                        }
                    }
                }
            });
        });
        Ok(Tensor::from_vec(out, (self.rows * new, q_width), &Device::Cpu)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelShape;
    use crate::ops::score;
    use crate::random::{Purpose, stream};

    #[test]
    fn greedy_text_is_what_the_whole_pass_would_choose() {
        let shape = ModelShape {
            vocab_size: 40,
            hidden: 16,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            ffn: 24,
            qkv_bias: true,
            ..Default::default()
        };
        let decoder = Decoder::init(&shape, 5).expect("init");
        let prompts = vec![vec![1, 2, 3], vec![4, 5, 6]];
        let mut rngs: Vec<_> = (0..2).map(|row| stream(1, Purpose::Generation, 0, row)).collect();
        let texts = generate(&decoder, prompts, 20, 0.0, &mut rngs).expect("generate");
        for text in &texts {
            let hidden = decoder.hidden(&text[..19], 19).expect("hidden");
            let scores = score(&hidden, &decoder.head, &text[1..]).expect("score");
            let chosen: Vec<u32> = scores.iter().map(|&(_, choice)| choice).collect();
            assert_eq!(text[3..], chosen[2..]);
        }
    }

    #[test]
    fn sampling_follows_the_distribution() {
        let logits = [0.0, 2f32.ln(), 5f32.ln()];
        let mut rng = stream(1, Purpose::Generation, 0, 0);
        let mut counts = [0i32; 3];
        (0..8000).for_each(|_| counts[pick(&logits, 1.0, &mut rng) as usize] += 1);
        for (count, wanted) in counts.iter().zip([1000, 2000, 5000]) {
            assert!((count - wanted).abs() < 200, "{counts:?}");
        }
    }
}
