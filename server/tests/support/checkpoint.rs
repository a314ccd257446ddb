//! A random Llama with a byte-level BPE trained on a few lines of code, written as a model folder.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

const CORPUS: &[&str] = &[
    "def add(a, b):\n    return a + b\n",
    "fn add(a: i32, b: i32) -> i32 {\n    a + b\n}\n",
    "for item in items:\n    print(item)\n",
    "The quick brown fox jumps over the lazy dog. Über größe 世界\n",
];

const CHAT_TEMPLATE: &str = "{% for message in messages %}\
    {% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}\
    {{ raise_exception('unknown role ' + message['role']) }}{% endif %}\
    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// What the folder holds besides weights.
#[derive(Clone)]
pub(crate) struct CheckpointSpec {
    pub(crate) with_fim: bool,
    pub(crate) fim_order: Option<&'static str>,
    pub(crate) with_chat_template: bool,
    /// In the place of the usual one.
    pub(crate) chat_template: Option<&'static str>,
    /// Further tokens of the vocabulary, marked as special.
    pub(crate) tokens: &'static [&'static str],
    pub(crate) generation_config: Value,
    /// Tokens that the model is made for.
    pub(crate) context: usize,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        CheckpointSpec {
            with_fim: true,
            fim_order: None,
            with_chat_template: true,
            chat_template: None,
            tokens: &[],
            generation_config: json!({}),
            context: 8192,
        }
    }
}

const HIDDEN: usize = 32;
const INTERMEDIATE: usize = 64;
const HEADS: usize = 2;
const KV_HEADS: usize = 1;
const HEAD_DIM: usize = 16;

impl CheckpointSpec {
    pub(crate) fn write(&self, dir: &Path, num_layers: usize, seed: u64) {
        fs::create_dir_all(dir).expect("a folder");
        let tokenizer = self.tokenizer();
        tokenizer.save(dir.join("tokenizer.json"), false).expect("tokenizer.json is written");
        let vocab_size = tokenizer.get_vocab_size(true);
        let end = tokenizer.token_to_id("<|endoftext|>").expect("a special token");
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": num_layers,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
            "vocab_size": vocab_size, "max_position_embeddings": self.context, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "float32",
            "eos_token_id": end,
        });
        write_json(dir, "config.json", &config);
        let mut generation = self.generation_config.clone();
        generation["eos_token_id"] = json!(end);
        write_json(dir, "generation_config.json", &generation);
        let mut tokenizer_config =
            json!({ "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>" });
        if self.with_chat_template {
            tokenizer_config["chat_template"] = json!(self.chat_template.unwrap_or(CHAT_TEMPLATE));
        }
        if let Some(order) = self.fim_order {
            tokenizer_config["fim_order"] = json!(order);
        }
        write_json(dir, "tokenizer_config.json", &tokenizer_config);
        fs::write(dir.join("model.safetensors"), weights(vocab_size, num_layers, seed)).expect("weights");
    }

    fn tokenizer(&self) -> Tokenizer {
        let mut names = vec!["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
        if self.with_fim {
            names.extend(["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]);
        }
        names.extend(self.tokens);
        let special = names.into_iter().map(|name| AddedToken::from(name, true)).collect();
        let trainer = BpeTrainer::builder()
            .vocab_size(320)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(special)
            .build();
        let mut tokenizer = Tokenizer::new(BPE::default());
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tokenizer.with_decoder(Some(ByteLevelDecoder::default()));
        tokenizer.train(&mut TrainerWrapper::from(trainer), CORPUS.iter().copied()).expect("training works");
        tokenizer
    }
}

fn write_json(dir: &Path, name: &str, value: &Value) {
    fs::write(dir.join(name), value.to_string()).expect("a file is written");
}

/// A safetensors file with small pseudo-random weights.
fn weights(vocab_size: usize, num_layers: usize, seed: u64) -> Vec<u8> {
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![vocab_size, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
    ];
    for layer in 0..num_layers {
        let shapes = [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.k_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.v_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HEADS * HEAD_DIM]),
            ("mlp.gate_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.up_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INTERMEDIATE]),
        ];
        tensors.extend(
            shapes.into_iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)),
        );
    }
    let mut header = Map::new();
    let mut data = Vec::new();
    let mut state = seed;
    for (name, shape) in tensors {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            // Knuth's 64-bit linear congruential generator; the high bits are the good ones.
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let uniform = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            let value = if shape.len() == 1 { 1.0 } else { uniform };
            data.extend_from_slice(&value.to_le_bytes());
        }
        header.insert(name, json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] }));
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    file
}
