//! Logits against Hugging Face transformers: checkpoints and logits that `golden/make_golden.py` wrote.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use tandem_kernels::ThreadPool;
use tandem_kernels::experts::Scoring;
use tandem_models::backend::BackendKind;
use tandem_models::config::{Activation, Positions, QkNorm};
use tandem_models::{Checkpoint, DecoderConfig, ForwardBatch, Model, Rope, RopeScaling};

const TOLERANCE: f32 = 1e-4;
const BLOCK_SIZE: usize = 4;
/// The script's NUM_PROMPT_TOKENS: tokens that transformers read in one pass.
const NUM_PROMPT_TOKENS: usize = 13;

const CASES: [&str; 27] = [
    "llama_plain",
    "llama_rope_llama3",
    "llama_biases",
    "llama_head_dim",
    "llama_rope_dynamic",
    "llama_rope_yarn",
    "llama_rope_yarn_gains",
    "qwen2_tied",
    "qwen2_untied",
    "qwen2_window",
    "qwen3",
    "mistral_window",
    "starcoder2",
    "granite",
    "phi3_longrope",
    "gemma2",
    "gemma3",
    "olmo2",
    "smollm3",
    "glm4",
    "qwen3_moe",
    "qwen3_moe_shares",
    "gpt_oss",
    "deepseek_v2_lite",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v3_half_split",
];

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

/// Token ids, and the logits after each of them.
fn golden(case: &str) -> (Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(folder(case).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> { file.tensor(name).unwrap().data().as_chunks().0.to_vec() };
    (
        words("tokens").into_iter().map(u32::from_le_bytes).collect(),
        words("logits").into_iter().map(f32::from_le_bytes).collect(),
    )
}

/// Logits at every position, the prompt in one pass and the rest token by token.
fn logits_of(model: &mut dyn Model, tokens: &[u32]) -> Vec<f32> {
    logits_with_prompt_of(model, tokens, NUM_PROMPT_TOKENS)
}

fn logits_with_prompt_of(model: &mut dyn Model, tokens: &[u32], num_prompt_tokens: usize) -> Vec<f32> {
    let num_blocks = tokens.len().div_ceil(BLOCK_SIZE);
    model.allocate_kv_cache(num_blocks, BLOCK_SIZE).unwrap();
    // Any block will do for any stretch of the context.
    let block_table: Vec<u32> = (0..num_blocks as u32).rev().collect();
    let mut batch = ForwardBatch::new();
    let (mut all, mut logits) = (Vec::new(), Vec::new());
    let mut pass = |tokens: &[u32], start: usize| {
        batch.clear();
        batch.push_sequence(tokens, start, &block_table, BLOCK_SIZE, tokens.len());
        model.forward(&batch, &mut logits).unwrap();
        all.extend_from_slice(&logits);
    };
    pass(&tokens[..num_prompt_tokens], 0);
    for start in num_prompt_tokens..tokens.len() {
        pass(&tokens[start..=start], start);
    }
    all
}

#[test]
fn logits_are_those_of_transformers() {
    for case in CASES {
        let (tokens, wanted) = golden(case);
        let checkpoint = Checkpoint::open(&folder(case)).unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_eq!(wanted.len(), tokens.len() * checkpoint.config.vocab_size);
        for kind in [BackendKind::Cpu, BackendKind::Reference] {
            let mut model = tandem_models::load(&checkpoint, kind, Arc::new(ThreadPool::new(2))).unwrap();
            let found = logits_of(model.as_mut(), &tokens);
            assert_eq!(found.len(), wanted.len());
            for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                let position = i / checkpoint.config.vocab_size;
                assert!(
                    (found - wanted).abs() <= TOLERANCE,
                    "{case}, {kind:?}, position {position}: {found} is not {wanted}"
                );
            }
        }
    }
}

/// The bit rule for every option: what a row gives depends on nothing that is computed with it.
#[test]
fn every_case_gives_the_same_bits_however_it_is_cut() {
    let bits = |logits: &[f32]| logits.iter().map(|logit| logit.to_bits()).collect::<Vec<_>>();
    for case in CASES {
        let (tokens, _) = golden(case);
        let checkpoint = Checkpoint::open(&folder(case)).unwrap();
        let model = |threads| {
            tandem_models::load(&checkpoint, BackendKind::Cpu, Arc::new(ThreadPool::new(threads))).unwrap()
        };
        let whole = bits(&logits_with_prompt_of(model(1).as_mut(), &tokens, tokens.len()));
        for (threads, num_prompt_tokens) in [(1, 1), (2, NUM_PROMPT_TOKENS), (3, 7), (2, tokens.len())] {
            let found = bits(&logits_with_prompt_of(model(threads).as_mut(), &tokens, num_prompt_tokens));
            assert!(found == whole, "{case}: {threads} threads, prompt of {num_prompt_tokens}");
        }
    }
}

/// A golden checkpoint tests an option only if the logits are others without it.
#[test]
fn every_option_shows_in_the_logits() {
    type Change = fn(&mut DecoderConfig);
    let changes: [(&str, &[&str], Change); 26] = [
        (
            "windows",
            &["qwen2_window", "mistral_window", "starcoder2", "phi3_longrope", "gemma2", "gemma3"],
            |c| {
                c.layers.iter_mut().for_each(|layer| layer.window = None);
            },
        ),
        ("windows by one", &["mistral_window", "smollm3", "gpt_oss"], |c| {
            c.layers.iter_mut().for_each(|layer| layer.window = layer.window.map(|window| window + 1));
        }),
        (
            "rope scaling",
            &["llama_rope_dynamic", "llama_rope_yarn", "phi3_longrope", "gemma3", "gpt_oss"],
            |c| {
                c.rope.scaling = RopeScaling::None;
            },
        ),
        ("attention factor", &["llama_rope_yarn", "llama_rope_yarn_gains", "deepseek_v2_lite"], |c| {
            if let RopeScaling::Yarn { attention_factor, .. } = &mut c.rope.scaling {
                *attention_factor = 1.0;
            }
        }),
        ("interleaved", &["glm4", "deepseek_v2", "deepseek_v3", "deepseek_v3_half_split"], |c| {
            c.rope.interleaved ^= true;
        }),
        ("partial rotation", &["glm4", "phi3_longrope"], |c| {
            *c =
                DecoderConfig { rope: Rope { dim: c.head_dim, ..Rope::plain(0, c.rope.theta) }, ..c.clone() };
        }),
        ("positions", &["smollm3", "gemma3"], |c| {
            c.layers.iter_mut().for_each(|layer| layer.positions = Positions::Rope);
        }),
        ("norm weight offset", &["gemma2", "gemma3"], |c| c.norm_weight_offset = 0.0),
        ("attention scale", &["granite", "gemma2", "gemma3"], |c| c.attn_scale = None),
        ("attention soft cap", &["gemma2"], |c| c.attn_soft_cap = None),
        ("attention sinks", &["gpt_oss"], |c| c.attn_sinks = false),
        ("activation", &["gemma2", "gemma3"], |c| c.activation = Activation::Silu),
        ("clamp", &["gpt_oss"], |c| c.activation = Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 }),
        (
            "renormalised experts",
            &["qwen3_moe", "qwen3_moe_shares", "deepseek_v3", "deepseek_v3_half_split"],
            |c| {
                c.experts.iter_mut().for_each(|experts| experts.renormalise ^= true);
            },
        ),
        ("scoring", &["deepseek_v3", "deepseek_v3_half_split"], |c| {
            c.experts.iter_mut().for_each(|experts| experts.scoring = Scoring::Softmax);
        }),
        ("biased choice", &["deepseek_v3", "deepseek_v3_half_split"], |c| {
            c.experts.iter_mut().for_each(|experts| experts.choice_bias = false);
        }),
        ("groups", &["deepseek_v2", "deepseek_v3"], |c| {
            c.experts.iter_mut().for_each(|experts| experts.groups = None);
        }),
        ("rank of groups", &["deepseek_v2", "deepseek_v3"], |c| {
            let groups = c.experts.iter_mut().flat_map(|experts| &mut experts.groups);
            groups.for_each(|groups| groups.two_best ^= true);
        }),
        ("scale of experts", &["deepseek_v2", "deepseek_v3"], |c| {
            c.experts.iter_mut().for_each(|experts| experts.weight_scale = 1.0);
        }),
        ("shared experts", &["deepseek_v2_lite", "deepseek_v2", "deepseek_v3"], |c| {
            c.experts.iter_mut().for_each(|experts| experts.shared_intermediate_size = 0);
        }),
        ("gain of scores", &["deepseek_v2_lite", "deepseek_v3"], |c| {
            c.attn_scale = Some(20.0f32.sqrt().recip());
        }),
        ("norm of latents", &["deepseek_v2"], |c| {
            c.latent.iter_mut().for_each(|latent| latent.norm_eps = c.norm_eps);
        }),
        ("biases", &["deepseek_v2", "deepseek_v3"], |c| c.qkv_bias = false),
        ("qk-norm", &["qwen3", "gemma3", "olmo2"], |c| c.qk_norm = QkNorm::None),
        ("scales", &["granite", "gemma2"], |c| {
            *c = DecoderConfig { embed_scale: 1.0, residual_scale: 1.0, ..c.clone() };
        }),
        ("scales of logits", &["granite", "gemma2"], |c| {
            *c = DecoderConfig { logits_scale: 1.0, logits_soft_cap: None, ..c.clone() };
        }),
    ];
    for (option, cases, change) in changes {
        for case in cases {
            let (tokens, wanted) = golden(case);
            let mut checkpoint = Checkpoint::open(&folder(case)).unwrap();
            change(&mut checkpoint.config);
            let pool = Arc::new(ThreadPool::new(1));
            let mut model = tandem_models::load(&checkpoint, BackendKind::Cpu, pool).unwrap();
            let found = logits_of(model.as_mut(), &tokens);
            let diff = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(diff > 100.0 * TOLERANCE, "{case} without its {option} differs by {diff} only");
        }
    }
}

#[test]
fn the_cases_are_as_different_as_their_names_say() {
    let config = |case: &str| Checkpoint::open(&folder(case)).unwrap().config;
    assert!(matches!(config("llama_rope_llama3").rope.scaling, RopeScaling::Llama3 { .. }));
    let biases = config("llama_biases");
    assert!(biases.qkv_bias && biases.o_bias && biases.mlp_bias && !biases.tie_word_embeddings);
    assert!(matches!(biases.rope.scaling, RopeScaling::Linear { .. }));
    let head_dim = config("llama_head_dim");
    assert_ne!(head_dim.head_dim * head_dim.num_heads, head_dim.hidden_size);
    let (tied, untied) = (config("qwen2_tied"), config("qwen2_untied"));
    assert!(tied.qkv_bias && !tied.o_bias && tied.tie_word_embeddings && !untied.tie_word_embeddings);

    let gemma2 = config("gemma2");
    assert!(gemma2.attn_soft_cap.is_some() && gemma2.logits_soft_cap.is_some());
    assert!(gemma2.layer(0).window.is_some() && gemma2.layer(1).window.is_none());
    let gemma3 = config("gemma3");
    assert!(gemma3.local_rope.is_some_and(|local| local.theta != gemma3.rope.theta));
    let RopeScaling::LongRope { factors, .. } = config("phi3_longrope").rope.scaling else {
        panic!("phi3_longrope is none")
    };
    assert_eq!(factors, [1.0, 2.5, 4.0, 7.5]);
    let glm = config("glm4");
    assert!(glm.rope.interleaved && glm.rope.dim < glm.head_dim);
    let moe = config("qwen3_moe");
    assert!(moe.layer(1).dense && !moe.layer(0).dense && moe.experts.unwrap().renormalise);
    let shares = config("qwen3_moe_shares");
    assert!(shares.layer(0).dense && !shares.layer(1).dense && !shares.experts.unwrap().renormalise);
    assert!(config("gpt_oss").attn_sinks);
    let lite = config("deepseek_v2_lite");
    assert!(lite.layer(0).dense && !lite.layer(1).dense && lite.experts.unwrap().groups.is_none());
    assert_eq!((lite.head_dim, lite.num_kv_heads), (20 + 8, 1));
    assert!(lite.latent.unwrap().q_rank.is_none() && config("deepseek_v2").latent.unwrap().q_rank.is_some());
}
