//! Small good files to begin with: the golden checkpoints, and a GGUF file with all that readers look at.

use serde_json::{Value, json};
use tandem_kernels::quant::BlockFormat;
use tandem_models::Dtype;
use tandem_models::weights::gguf::{ArrayValues, GgufBuilder};
use tandem_models::weights::quantize::encode;

/// Names and contents.
pub(crate) type Files = Vec<(&'static str, Vec<u8>)>;

/// A golden checkpoint's weights and configuration.
macro_rules! golden {
    ($case:literal) => {
        [
            include_bytes!(concat!("../../tests/golden/", $case, "/model.safetensors")).as_slice(),
            include_bytes!(concat!("../../tests/golden/", $case, "/config.json")).as_slice(),
        ]
    };
}

/// Checkpoints that are packed, one of every kind, so that their unpacking is tried as well, and one with every
/// kind of weight.
const CHECKPOINTS: [[&[u8]; 2]; 7] = [
    golden!("packed/gptq_sym"),
    golden!("packed/awq"),
    golden!("packed/fp8_block"),
    golden!("packed/ct_int4_asym"),
    golden!("packed/ct_int8_asym"),
    golden!("packed/mxfp4"),
    golden!("deepseek_v3"),
];
/// Those whose configurations have the most options.
const CONFIGS: [[&[u8]; 2]; 4] =
    [golden!("gpt_oss"), golden!("deepseek_v3"), golden!("gemma3"), golden!("deepseek_v2")];
const TEMPLATE: &[u8] = include_bytes!("../../tests/golden/templates/Qwen3-Coder.jinja");

pub(crate) fn safetensors(variant: usize) -> Files {
    let [weights, config] = CHECKPOINTS[variant % CHECKPOINTS.len()];
    vec![("model.safetensors", weights.to_vec()), ("config.json", config.to_vec())]
}

pub(crate) fn config(variant: usize) -> Files {
    let [weights, config] = CONFIGS[variant % CONFIGS.len()];
    vec![("config.json", config.to_vec()), ("model.safetensors", weights.to_vec())]
}

pub(crate) fn template(_variant: usize) -> Files {
    vec![("chat_template.jinja", TEMPLATE.to_vec())]
}

pub(crate) fn tokenizer(_variant: usize) -> Files {
    let tokens = ["<|bos|>", "a", "b", "ab", "Ġ", "Ġa", "Ċ", "Ã", "¤"];
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    let split = json!({"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s+|\\p{N}"}, "behavior": "Isolated",
        "invert": false});
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": {"type": "NFC"},
        "added_tokens": [{"id": 0, "content": "<|bos|>", "special": true, "single_word": false, "lstrip": false,
            "rstrip": true, "normalized": false}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}}},
        "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [["a", "b"], ["Ġ", "a"]]},
    });
    vec![("tokenizer.json", json.to_string().into_bytes())]
}

/// A model with a layer.
pub(crate) fn gguf(_variant: usize) -> Files {
    let q8 = Dtype::Quantized(BlockFormat::Q8_0);
    let block = |name: &str| format!("blk.0.{name}.weight");
    let mut tensors: Vec<_> =
        ["attn_norm", "ffn_norm"].map(|name| (block(name), Dtype::F32, vec![32])).into();
    let square = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
    tensors.extend(square.map(|name| (block(name), q8, vec![32, 32])));
    vec![("model.gguf", gguf_with(tensors))]
}

/// A file with all that readers look at, and `layers` among its tensors.
pub(crate) fn gguf_with(layers: Vec<(String, Dtype, Vec<usize>)>) -> Vec<u8> {
    let tokens: Vec<String> =
        ["<unk>", "<|bos|>", "</s>", "a", "b", "ab", "▁", "▁a", "<0x0A>"].map(str::to_owned).into();
    let mut file = GgufBuilder::new();
    file.string("general.architecture", "llama")
        .u32("general.alignment", 32)
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 64)
        .u32("llama.embedding_length", 32)
        .u32("llama.feed_forward_length", 32)
        .u32("llama.attention.head_count", 2)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .bool("tokenizer.ggml.add_bos_token", true)
        .string("tokenizer.ggml.model", "llama")
        .array("tokenizer.ggml.tokens", ArrayValues::Strings(&tokens))
        .array("tokenizer.ggml.scores", ArrayValues::F32(&[0.0, 0.0, 0.0, -3.0, -3.0, -1.0, -3.0, -2.0, 0.0]))
        .array("tokenizer.ggml.token_type", ArrayValues::I32(&[2, 3, 3, 1, 1, 1, 1, 1, 6]))
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .string("tokenizer.chat_template", "{{ messages[0].content }}");
    let q8 = Dtype::Quantized(BlockFormat::Q8_0);
    let mut tensors = vec![("token_embd.weight".to_owned(), q8, vec![9, 32])];
    tensors.extend(layers);
    tensors.push(("output_norm.weight".to_owned(), Dtype::F32, vec![32]));
    for (name, dtype, shape) in &tensors {
        file.tensor(name, *dtype, shape);
    }
    let mut writer = file.begin(Vec::new()).expect("memory can be written");
    for (_, dtype, shape) in &tensors {
        let mut bytes = Vec::new();
        assert!(encode(*dtype, &vec![0.5; shape.iter().product()], &mut bytes));
        writer.write(&bytes).expect("memory can be written");
    }
    writer.finish().expect("memory can be written")
}
