//! Checkpoints of real models' shapes with random weights, for sizing hardware before any weights are
//! there, and for benchmarks: GGUF files of any kind, written as a stream.
//!
//! Weights are a bell curve with the variance that keeps activations of order one through every layer.
//! They are drawn once for each type and width into a pool that is written over and over, each time from
//! another place, so the cost is that of writing the file. The text such a model makes is noise.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::Path;

use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

use crate::text::{add_json, add_tokenizer};
use crate::weights::Dtype;
use crate::weights::gguf::{FileType, GgufBuilder, GgufWriter, Place};
use crate::weights::quantize::encode;
use crate::{ModelError, Tokenizer};

/// A model's shape.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The name it is asked for by.
    pub name: &'static str,
    architecture: &'static str,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_layers: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    context_len: usize,
    rope_theta: f32,
    rms_norm_eps: f32,
    tied: bool,
    deepseek: Option<DeepSeek>,
}

/// What DeepSeek-V2's shape has besides: latent attention, and experts after the first layer.
#[derive(Clone, Copy, Debug)]
struct DeepSeek {
    kv_rank: usize,
    content_dim: usize,
    turning_dim: usize,
    value_dim: usize,
    num_experts: usize,
    num_experts_per_token: usize,
    num_shared_experts: usize,
    expert_size: usize,
    /// YaRN's.
    factor: f32,
    gain: f32,
    original_context_len: usize,
}

const QWEN25: Shape = Shape {
    name: "",
    architecture: "qwen2",
    vocab_size: 151_936,
    hidden_size: 0,
    intermediate_size: 0,
    num_layers: 0,
    num_heads: 0,
    num_kv_heads: 2,
    head_dim: 128,
    context_len: 32_768,
    rope_theta: 1e6,
    rms_norm_eps: 1e-6,
    tied: true,
    deepseek: None,
};
const QWEN25_LARGE: Shape = Shape { vocab_size: 152_064, num_kv_heads: 8, tied: false, ..QWEN25 };
const LLAMA3: Shape = Shape {
    architecture: "llama",
    vocab_size: 128_256,
    num_kv_heads: 8,
    context_len: 131_072,
    rope_theta: 5e5,
    rms_norm_eps: 1e-5,
    ..QWEN25
};

/// DeepSeek-V2-Lite's and DeepSeek-Coder-V2-Lite's.
const DEEPSEEK2_LITE: Shape = Shape {
    architecture: "deepseek2",
    vocab_size: 102_400,
    num_kv_heads: 1,
    context_len: 163_840,
    rope_theta: 1e4,
    tied: false,
    deepseek: Some(DeepSeek {
        kv_rank: 512,
        content_dim: 128,
        turning_dim: 64,
        value_dim: 128,
        num_experts: 64,
        num_experts_per_token: 6,
        num_shared_experts: 2,
        expert_size: 1408,
        factor: 40.0,
        gain: 0.707,
        original_context_len: 4096,
    }),
    ..QWEN25
};

/// `(name, hidden_size, intermediate_size, num_layers, num_heads)` over the rest in `base`.
const fn shape(base: Shape, name: &'static str, sizes: [usize; 4]) -> Shape {
    let [hidden_size, intermediate_size, num_layers, num_heads] = sizes;
    Shape { name, hidden_size, intermediate_size, num_layers, num_heads, ..base }
}

/// The known shapes.
pub const SHAPES: [Shape; 10] = [
    Shape { head_dim: 64, ..shape(QWEN25, "qwen2.5-coder-0.5b", [896, 4864, 24, 14]) },
    shape(QWEN25, "qwen2.5-coder-1.5b", [1536, 8960, 28, 12]),
    shape(QWEN25, "qwen2.5-coder-3b", [2048, 11_008, 36, 16]),
    Shape { num_kv_heads: 4, ..shape(QWEN25_LARGE, "qwen2.5-coder-7b", [3584, 18_944, 28, 28]) },
    shape(QWEN25_LARGE, "qwen2.5-coder-14b", [5120, 13_824, 48, 40]),
    shape(QWEN25_LARGE, "qwen2.5-coder-32b", [5120, 27_648, 64, 40]),
    Shape { head_dim: 64, ..shape(LLAMA3, "llama-3.2-1b", [2048, 8192, 16, 32]) },
    shape(LLAMA3, "llama-3.2-3b", [3072, 8192, 28, 24]),
    Shape { tied: false, ..shape(LLAMA3, "llama-3.1-8b", [4096, 14_336, 32, 32]) },
    shape(DEEPSEEK2_LITE, "deepseek-coder-v2-lite", [2048, 10_944, 27, 16]),
];

impl Shape {
    /// The shape of that name.
    pub fn find(name: &str) -> Option<Self> {
        SHAPES.into_iter().find(|shape| shape.name == name)
    }

    /// Names and shapes of all tensors, in the order of the file; shapes are outermost first.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let Shape { vocab_size, hidden_size: hidden, .. } = *self;
        let mut tensors = vec![("token_embd.weight".to_owned(), vec![vocab_size, hidden])];
        for layer in 0..self.num_layers {
            let mut add = |name: &str, shape: &[usize]| {
                tensors.push((format!("blk.{layer}.{name}"), shape.to_vec()));
            };
            add("attn_norm.weight", &[hidden]);
            self.attention(&mut add);
            add("ffn_norm.weight", &[hidden]);
            self.feed_forward(layer, &mut add);
        }
        tensors.push(("output_norm.weight".to_owned(), vec![hidden]));
        if !self.tied {
            tensors.push(("output.weight".to_owned(), vec![vocab_size, hidden]));
        }
        tensors
    }

    fn attention(&self, add: &mut dyn FnMut(&str, &[usize])) {
        let (hidden, heads) = (self.hidden_size, self.num_heads);
        if let Some(DeepSeek { kv_rank, content_dim, turning_dim, value_dim, .. }) = self.deepseek {
            add("attn_q.weight", &[heads * (content_dim + turning_dim), hidden]);
            add("attn_kv_a_mqa.weight", &[kv_rank + turning_dim, hidden]);
            add("attn_kv_a_norm.weight", &[kv_rank]);
            add("attn_k_b.weight", &[heads, kv_rank, content_dim]);
            add("attn_v_b.weight", &[heads, value_dim, kv_rank]);
            return add("attn_output.weight", &[hidden, heads * value_dim]);
        }
        let (q, kv) = (heads * self.head_dim, self.num_kv_heads * self.head_dim);
        for (name, width) in [("attn_q", q), ("attn_k", kv), ("attn_v", kv)] {
            add(&format!("{name}.weight"), &[width, hidden]);
            if self.architecture == "qwen2" {
                add(&format!("{name}.bias"), &[width]);
            }
        }
        add("attn_output.weight", &[hidden, q]);
    }

    fn feed_forward(&self, layer: usize, add: &mut dyn FnMut(&str, &[usize])) {
        let (hidden, mut ffn, mut ending) = (self.hidden_size, self.intermediate_size, "");
        if let Some(shape) = self.deepseek.filter(|_| layer > 0) {
            let (experts, size) = (shape.num_experts, shape.expert_size);
            add("ffn_gate_inp.weight", &[experts, hidden]);
            add("ffn_gate_exps.weight", &[experts, size, hidden]);
            add("ffn_up_exps.weight", &[experts, size, hidden]);
            add("ffn_down_exps.weight", &[experts, hidden, size]);
            (ffn, ending) = (shape.num_shared_experts * size, "_shexp");
        }
        add(&format!("ffn_gate{ending}.weight"), &[ffn, hidden]);
        add(&format!("ffn_up{ending}.weight"), &[ffn, hidden]);
        add(&format!("ffn_down{ending}.weight"), &[hidden, ffn]);
    }

    fn describe(&self, kind: FileType) -> GgufBuilder {
        let mut file = GgufBuilder::new();
        let key = |name: &str| format!("{}.{name}", self.architecture);
        file.string("general.architecture", self.architecture)
            .string("general.name", &format!("random weights in the shape of {}", self.name))
            .u32("general.file_type", kind.id())
            .u32(&key("block_count"), self.num_layers as u32)
            .u32(&key("context_length"), self.context_len as u32)
            .u32(&key("embedding_length"), self.hidden_size as u32)
            .u32(&key("feed_forward_length"), self.intermediate_size as u32)
            .u32(&key("attention.head_count"), self.num_heads as u32)
            .u32(&key("attention.head_count_kv"), self.num_kv_heads as u32)
            .f32(&key("rope.freq_base"), self.rope_theta)
            .f32(&key("attention.layer_norm_rms_epsilon"), self.rms_norm_eps)
            .u32(&key("vocab_size"), self.vocab_size as u32);
        let sizes: &[(&str, usize)] = match self.deepseek {
            None => &[
                ("attention.key_length", self.head_dim),
                ("attention.value_length", self.head_dim),
                ("rope.dimension_count", self.head_dim),
            ],
            Some(shape) => {
                file.string(&key("rope.scaling.type"), "yarn")
                    .f32(&key("rope.scaling.factor"), shape.factor)
                    .f32(&key("rope.scaling.yarn_log_multiplier"), 0.1 * shape.gain)
                    .f32(&key("expert_weights_scale"), 1.0);
                &[
                    ("attention.key_length", shape.kv_rank + shape.turning_dim),
                    ("attention.value_length", shape.kv_rank),
                    ("attention.key_length_mla", shape.content_dim + shape.turning_dim),
                    ("attention.value_length_mla", shape.value_dim),
                    ("attention.kv_lora_rank", shape.kv_rank),
                    ("rope.dimension_count", shape.turning_dim),
                    ("rope.scaling.original_context_length", shape.original_context_len),
                    ("leading_dense_block_count", 1),
                    ("expert_count", shape.num_experts),
                    ("expert_used_count", shape.num_experts_per_token),
                    ("expert_shared_count", shape.num_shared_experts),
                    ("expert_feed_forward_length", shape.expert_size),
                ]
            }
        };
        for (name, size) in sizes {
            file.u32(&key(name), *size as u32);
        }
        file
    }
}

/// Writes a model of `shape` to `out`. The tokenizer is that of the folder `tokenizer`, or a small one
/// trained on this project's own source; either is filled up to the shape's vocabulary.
///
/// # Errors
/// If the tokenizer cannot be read or does not fit, or `out` fails.
pub fn write(
    shape: &Shape,
    kind: FileType,
    tokenizer: Option<&Path>,
    seed: u64,
    out: impl Write,
) -> Result<(), SynthError> {
    let mut file = shape.describe(kind);
    match tokenizer {
        Some(dir) => add_tokenizer(dir, &Tokenizer::from_dir(dir)?, shape.vocab_size, &mut file)?,
        None => add_own_tokenizer(shape.vocab_size, &mut file).map_err(SynthError::Tokenizer)?,
    }
    let tensors: Vec<(String, Vec<usize>, Dtype)> = shape
        .tensors()
        .into_iter()
        .map(|(name, extents)| {
            let place =
                Place { name: &name, shape: &extents, num_layers: shape.num_layers, tied: shape.tied };
            let dtype = kind.dtype_of(place);
            (name, extents, dtype)
        })
        .collect();
    for (name, extents, dtype) in &tensors {
        file.tensor(name, *dtype, extents);
    }
    let mut writer = file.begin(out)?;
    let mut pools = HashMap::new();
    for (name, extents, dtype) in &tensors {
        write_tensor(&mut writer, &mut pools, name, extents, *dtype, seed)?;
    }
    writer.finish()?;
    Ok(())
}

/// Why a synthetic model was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SynthError {
    /// The tokenizer of a folder cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer made here cannot be used.
    #[error("the tokenizer made for it: {0}")]
    Tokenizer(String),
    /// The output failed.
    #[error("cannot write: {0}")]
    Io(#[from] io::Error),
}

/// Random weights as they are stored, and where the next tensor begins in them.
struct Pool {
    bytes: Vec<u8>,
    block_bytes: usize,
    next_block: usize,
    round: usize,
}

/// Blocks of a pool: a prime, so that rows of any length come round at every place in it.
const POOL_BLOCKS: usize = 32_771;

fn write_tensor<W: Write>(
    writer: &mut GgufWriter<W>,
    pools: &mut HashMap<(Dtype, usize), Pool>,
    name: &str,
    extents: &[usize],
    dtype: Dtype,
    seed: u64,
) -> io::Result<()> {
    let num_elements: usize = extents.iter().product();
    if extents.len() == 1 {
        let value: f32 = if name.ends_with("bias") { 0.0 } else { 1.0 };
        let bytes: Vec<u8> = (0..num_elements).flat_map(|_| value.to_le_bytes()).collect();
        return writer.write(&bytes);
    }
    let in_features = extents[extents.len() - 1];
    let pool = pools.entry((dtype, in_features)).or_insert_with(|| Pool::draw(dtype, in_features, seed));
    let mut left = dtype.bytes_for(num_elements).expect("the writer has counted it: this is a bug");
    while left > 0 {
        let start = pool.next_block * pool.block_bytes;
        let end = pool.bytes.len().min(start + left);
        writer.write(&pool.bytes[start..end])?;
        left -= end - start;
        pool.next_block = end / pool.block_bytes;
        if end == pool.bytes.len() {
            // One block further in than the round before, so that no round repeats another.
            pool.round = (pool.round + 1) % POOL_BLOCKS;
            pool.next_block = pool.round;
        }
    }
    Ok(())
}

impl Pool {
    fn draw(dtype: Dtype, in_features: usize, seed: u64) -> Self {
        let block_len = dtype.block_len().max(32);
        let deviation = 1.0 / (in_features as f32).sqrt();
        let mut random = Random(seed ^ (in_features as u64) << 32);
        let mut bytes = Vec::new();
        let mut block = vec![0.0; block_len];
        for _ in 0..POOL_BLOCKS {
            block.fill_with(|| random.bell() * deviation);
            assert!(
                encode(dtype, &block, &mut bytes),
                "file types have writable formats only: this is a bug"
            );
        }
        Pool { block_bytes: bytes.len() / POOL_BLOCKS, bytes, next_block: 0, round: 0 }
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): fast, and good enough for noise.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }

    /// Mean 0, variance 1: the sum of four uniform numbers.
    fn bell(&mut self) -> f32 {
        let bits = self.next();
        let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xFFFF).sum();
        (sum as f32 / 65_536.0 - 2.0) * 3.0f32.sqrt()
    }
}

/// Trained on the source of this crate: code, so that prompts of code have about as many tokens as usual.
fn add_own_tokenizer(vocab_size: usize, file: &mut GgufBuilder) -> Result<(), String> {
    const CORPUS: [&str; 4] = [
        include_str!("decoder.rs"),
        include_str!("family/mod.rs"),
        include_str!("weights/safetensors.rs"),
        include_str!("text/tokenizer.rs"),
    ];
    const SPECIAL: [&str; 9] = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
        "<|fim_pad|>",
        "<|repo_name|>",
        "<|file_sep|>",
    ];
    const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}\
        <|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(4096)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(SPECIAL.map(|token| AddedToken::from(token, true)).to_vec())
        .build();
    let mut tokenizer =
        TokenizerBuilder::<_, tokenizers::NormalizerWrapper, _, tokenizers::PostProcessorWrapper, _>::new()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)))
            .with_decoder(Some(ByteLevel::default()))
            .build()
            .map_err(|error| error.to_string())?;
    tokenizer.train(&mut trainer, CORPUS.iter()).map_err(|error| error.to_string())?;
    let json = tokenizer.to_string(false).map_err(|error| error.to_string())?;
    let json: serde_json::Value = serde_json::from_str(&json).map_err(|error| error.to_string())?;
    add_json(&json, vocab_size, file)?;
    // Special tokens come first, in order.
    file.u32("tokenizer.ggml.eos_token_id", 0)
        .u32("tokenizer.ggml.bos_token_id", 0)
        .u32("tokenizer.ggml.padding_token_id", 6)
        .bool("tokenizer.ggml.add_bos_token", false)
        .string("tokenizer.chat_template", TEMPLATE);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tandem_kernels::ThreadPool;

    use super::*;
    use crate::{BackendKind, Checkpoint, ForwardBatch, load};

    #[test]
    fn a_shape_with_latents_and_experts_is_a_model() {
        let lite = Shape::find("deepseek-coder-v2-lite").unwrap();
        let parts = lite.deepseek.unwrap();
        let small = Shape {
            vocab_size: 5000,
            hidden_size: 64,
            intermediate_size: 96,
            num_layers: 2,
            num_heads: 2,
            context_len: 160,
            deepseek: Some(DeepSeek {
                kv_rank: 64,
                content_dim: 32,
                turning_dim: 32,
                value_dim: 32,
                num_experts: 8,
                expert_size: 32,
                original_context_len: 4,
                ..parts
            }),
            ..lite
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("synth.gguf");
        write(&small, FileType::Q4KM, None, 1, std::fs::File::create(&path).unwrap()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!((checkpoint.config.head_dim, checkpoint.config.num_kv_heads), (96, 1));
        let pool = Arc::new(ThreadPool::new(1));
        let mut model = load(&checkpoint, BackendKind::Cpu, pool).unwrap();
        model.allocate_kv_cache(1, 16).unwrap();
        let (mut batch, mut logits) = (ForwardBatch::new(), Vec::new());
        batch.push_sequence(&[1, 2, 3], 0, &[0], 16, 1);
        model.forward(&batch, &mut logits).unwrap();
        assert!(logits.len() == 5000 && logits.iter().all(|logit| logit.is_finite()));
    }
}
