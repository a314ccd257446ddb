//! Writes what the server loads: configuration, weights, tokenizer, chat template, model card.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::folder::{RunFolder, TOKENIZER};
use crate::model::Decoder;
use crate::tokenizer::{END_OF_TEXT, FIM_PAD, Text};
use crate::{CorpusSummary, ModelShape, PairReport, TrainError, WeightDtype};

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const GENERATION_CONFIG: &str = "generation_config.json";

/// ChatML: each message between `<|im_start|>role` and `<|im_end|>`.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' \
    + message['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Everything but the tokenizer's files: `config.json` and `model.safetensors`.
pub(crate) fn write_model(
    folder: &RunFolder,
    decoder: &Decoder,
    shape: &ModelShape,
    text: &Text,
    dtype: WeightDtype,
) -> Result<(), TrainError> {
    write_json(folder, "config.json", &config_json(shape, text, dtype))?;
    let mut tensors = Vec::new();
    for parameter in &decoder.parameters {
        let values = parameter.var.flatten_all()?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = match dtype {
            WeightDtype::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            WeightDtype::Bf16 => {
                values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect()
            }
        };
        tensors.push((parameter.name.as_str(), parameter.var.dims().to_vec(), bytes));
    }
    let format = match dtype {
        WeightDtype::F32 => Dtype::F32,
        WeightDtype::Bf16 => Dtype::BF16,
    };
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = tensors
        .iter()
        .map(|(name, dims, bytes)| Ok((*name, TensorView::new(format, dims.clone(), bytes)?)))
        .collect::<Result<Vec<_>, _>>()
        .and_then(|views| safetensors::serialize(views, Some(metadata)))
        .map_err(|error: safetensors::SafeTensorError| TrainError::Checkpoint {
            path: folder.dir().join("model.safetensors"),
            problem: error.to_string(),
        })?;
    folder.write("model.safetensors", &bytes)
}

fn config_json(shape: &ModelShape, text: &Text, dtype: WeightDtype) -> Value {
    let (architecture, model_type) =
        if shape.qkv_bias { ("Qwen2ForCausalLM", "qwen2") } else { ("LlamaForCausalLM", "llama") };
    json!({
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "attention_bias": shape.qkv_bias,
        "mlp_bias": false,
        "tie_word_embeddings": true,
        "torch_dtype": match dtype {
            WeightDtype::F32 => "float32",
            WeightDtype::Bf16 => "bfloat16",
        },
        "eos_token_id": text.special.end_of_text,
    })
}

/// The files of a tokenizer of ours.
pub(crate) fn write_tokenizer(folder: &RunFolder, shape: &ModelShape, text: &Text) -> Result<(), TrainError> {
    folder.write(TOKENIZER, text.json.as_bytes())?;
    let pad = text.tokenizer.token_to_id(FIM_PAD);
    let end = text.tokenizer.id_to_token(text.special.end_of_text);
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_position_embeddings,
        "bos_token": null,
        "add_bos_token": false,
        "eos_token": end.unwrap_or_else(|| END_OF_TEXT.to_owned()),
        "pad_token": pad.map(|_| FIM_PAD),
        "clean_up_tokenization_spaces": false,
    });
    let mut ends = vec![text.special.end_of_text];
    if let Some([_, chat_end]) = text.special.chat {
        config["chat_template"] = CHAT_TEMPLATE.into();
        ends.push(chat_end);
    }
    write_json(folder, TOKENIZER_CONFIG, &config)?;
    write_json(folder, GENERATION_CONFIG, &json!({ "eos_token_id": ends, "pad_token_id": pad }))
}

/// The files of a target's tokenizer, as they are: a draft must read the same text the same way.
pub(crate) fn copy_tokenizer(
    folder: &RunFolder,
    target: &Path,
    shape: &ModelShape,
    text: &Text,
) -> Result<(), TrainError> {
    write_tokenizer(folder, shape, text)?;
    for name in [TOKENIZER_CONFIG, GENERATION_CONFIG, "chat_template.jinja"] {
        let path = target.join(name);
        match fs::read(&path) {
            Ok(bytes) => folder.write(name, &bytes)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(TrainError::io(&path)(error)),
        }
    }
    Ok(())
}

pub(crate) fn write_json(
    folder: &RunFolder,
    name: &str,
    value: &impl serde::Serialize,
) -> Result<(), TrainError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| TrainError::Checkpoint {
        path: folder.dir().join(name),
        problem: error.to_string(),
    })?;
    folder.write(name, format!("{text}\n").as_bytes())
}

/// What the model card says.
pub(crate) struct Card<'a> {
    pub(crate) shape: &'a ModelShape,
    pub(crate) parameters: usize,
    pub(crate) corpus_dir: &'a Path,
    pub(crate) corpus: CorpusSummary,
    pub(crate) steps: u64,
    pub(crate) tokens: u64,
    pub(crate) bits_per_byte: Option<f64>,
    pub(crate) target: Option<&'a Path>,
    pub(crate) pair: Option<PairReport>,
    pub(crate) command_line: &'a str,
    pub(crate) has_chat: bool,
}

impl Card<'_> {
    /// Writes `README.md`.
    pub(crate) fn write(&self, folder: &RunFolder) -> Result<(), TrainError> {
        let Self { shape, corpus, .. } = self;
        let name = folder.dir().file_name().map_or("model".into(), |name| name.to_string_lossy());
        let mut card = format!("# {name}\n\n");
        card += &match self.target {
            Some(target) => format!(
                "A draft distilled from `{}` for speculative decoding, made by `tandem distill`.\n",
                target.display()
            ),
            None => "A small code model trained from scratch by `tandem train`.\n".to_owned(),
        };
        card += &format!(
            "\n## Model\n\n- {} parameters, tied head; {} layers, width {}, feed-forward {}, {} heads of {} over {} \
             key/value heads\n- vocabulary {}, context {} tokens\n",
            self.parameters,
            shape.layers,
            shape.hidden,
            shape.ffn,
            shape.heads,
            shape.head_dim,
            shape.kv_heads,
            shape.vocab_size,
            shape.max_position_embeddings,
        );
        if self.has_chat {
            card += "- ChatML template; `<|im_end|>` ends an answer\n";
        }
        card += &format!(
            "\n## Training\n\n- data: `{}`, {} files, {} bytes; {} files ({} bytes) held out; {} files skipped\n\
             - {} steps, {} tokens\n",
            self.corpus_dir.display(),
            corpus.train_files,
            corpus.train_bytes,
            corpus.held_out_files,
            corpus.held_out_bytes,
            corpus.skipped_files,
            self.steps,
            self.tokens,
        );
        if !self.command_line.is_empty() {
            card += &format!("\n```\n{}\n```\n", self.command_line);
        }
        card += "\n## Held-out figures\n\n";
        card += &match (&self.pair, self.bits_per_byte) {
            (Some(pair), _) => format!(
                "| | |\n|---|---|\n| target, bits per byte | {:.4} |\n| draft, bits per byte | {:.4} |\n\
                 | greedy agreement | {:.1} % |\n| mean accepted length, 4 drafted | {:.2} |\n\n\
                 Over {} positions; the accepted length counts the target's own token and is an estimate on \
                 given text (both models see the held-out file, not the target's output).\n",
                pair.target_bits_per_byte,
                pair.draft_bits_per_byte,
                pair.greedy_agreement * 100.0,
                pair.mean_accepted_length,
                pair.positions,
            ),
            (None, Some(bits)) => format!("{bits:.4} bits per byte.\n"),
            (None, None) => "Nothing was held out: the corpus has too few files.\n".to_owned(),
        };
        card +=
            "\n## Licence\n\nNot stated by the trainer: it follows from the training data. Name it here.\n";
        folder.write("README.md", card.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use tandem_models::backend::reference::ReferenceBackend;
    use tandem_models::decoder::Decoder as Served;
    use tandem_models::{Checkpoint, ForwardBatch, Model};

    use super::*;
    use crate::RunOptions;
    use crate::corpus::{Corpus, Document};
    use crate::model::Decoder;
    use crate::random::{Purpose, normal, stream};

    fn text() -> Text {
        let document = Document { path: "a.py".into(), text: "def f(x):\n    return x + 1\n".repeat(9) };
        let corpus = Corpus { train: vec![document], held_out: Vec::new(), skipped: 0 };
        Text::train(&corpus, 280).expect("tokenizer")
    }

    /// Logits of the served forward pass, every position of `ids`.
    fn served_logits(dir: &Path, ids: &[u32]) -> Vec<f32> {
        let checkpoint = Checkpoint::open(dir).expect("open");
        let mut model = Served::load(&checkpoint, ReferenceBackend::new(Device::Cpu)).expect("load");
        model.allocate_kv_cache(4, 16).expect("cache");
        let mut batch = ForwardBatch::new();
        batch.push_sequence(ids, 0, &[0, 1, 2, 3], 16, ids.len());
        let mut logits = Vec::new();
        model.forward(&batch, &mut logits).expect("forward");
        logits
    }

    #[test]
    fn the_server_computes_what_the_trainer_does() {
        let text = text();
        for qkv_bias in [false, true] {
            let shape = ModelShape {
                vocab_size: 280,
                hidden: 48,
                layers: 3,
                heads: 4,
                kv_heads: 2,
                head_dim: 16,
                ffn: 80,
                qkv_bias,
                ..Default::default()
            };
            let decoder = Decoder::init(&shape, 3).expect("init");
            for (i, parameter) in decoder.parameters.iter().enumerate() {
                // Fresh norms are ones and biases zeros, which would hide a mix-up.
                let count = parameter.var.elem_count();
                let noise = normal(&mut stream(1, Purpose::Samples, 0, i), count, 0.1);
                let noise = Tensor::from_vec(noise, parameter.var.shape(), &Device::Cpu).expect("noise");
                parameter.var.set(&(parameter.var.as_tensor() + noise).expect("add")).expect("set");
            }
            let dir = tempfile::tempdir().expect("tempdir");
            let folder = RunFolder::open(dir.path(), &RunOptions::default()).expect("folder");
            write_tokenizer(&folder, &shape, &text).expect("tokenizer");
            write_model(&folder, &decoder, &shape, &text, WeightDtype::F32).expect("model");
            let ids: Vec<u32> = (0..50).map(|i| i * 31 % 280).collect();
            let hidden = decoder.hidden(&ids, ids.len()).expect("hidden");
            let ours =
                hidden.matmul(&decoder.head.t().expect("t")).and_then(|t| t.flatten_all()?.to_vec1::<f32>());
            let ours = ours.expect("logits");
            let theirs = served_logits(dir.path(), &ids);
            assert_eq!(ours.len(), theirs.len());
            let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let largest = ours.iter().map(|x| x.abs()).fold(0.0, f32::max);
            assert!(worst < 1e-3 && largest > 0.1, "qkv_bias {qkv_bias}: differ by {worst} of {largest}");

            // And back: the folder as a target for distillation.
            let again = Decoder::load(&Checkpoint::open(dir.path()).expect("open"), 50).expect("load");
            let reread = again.hidden(&ids, ids.len()).and_then(|t| t.to_vec2::<f32>()).expect("hidden");
            assert_eq!(reread, hidden.to_vec2::<f32>().expect("hidden"));
        }
    }

    #[test]
    fn bf16_weights_are_the_rounded_ones() {
        let text = text();
        let shape = ModelShape {
            vocab_size: 280,
            hidden: 16,
            layers: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 16,
            ffn: 32,
            ..Default::default()
        };
        let decoder = Decoder::init(&shape, 3).expect("init");
        let dir = tempfile::tempdir().expect("tempdir");
        let folder = RunFolder::open(dir.path(), &RunOptions::default()).expect("folder");
        write_model(&folder, &decoder, &shape, &text, WeightDtype::Bf16).expect("model");
        let checkpoint = Checkpoint::open(dir.path()).expect("open");
        for parameter in &decoder.parameters {
            let stored = checkpoint.weights.tensor(&parameter.name).expect("tensor").to_f32();
            let exact = parameter.var.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("values");
            assert!(stored.iter().zip(&exact).all(|(&a, &b)| a == bf16::from_f32(b).to_f32()));
        }
    }
}
