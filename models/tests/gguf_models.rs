//! Models in GGUF files: a converted checkpoint computes the same bits as the one it was made of, and
//! every block format gives the same logits on the CPU backend as on the reference backend, within what
//! activations of eight bits allow.

use std::path::Path;
use std::sync::Arc;

use half::f16;
use tandem_kernels::ThreadPool;
use tandem_kernels::quant::BlockFormat;
use tandem_models::config::Activation;
use tandem_models::weights::gguf::{FileType, GgufBuilder, convert};
use tandem_models::weights::quantize::{WRITABLE, encode};
use tandem_models::{BackendKind, Checkpoint, Dtype, ForwardBatch, RopeScaling, load};

const TOKENS: [u32; 9] = [3, 1, 4, 1, 5, 9, 2, 6, 5];

/// `[tokens, vocab_size]` of a prompt in two passes.
fn logits(path: &Path, kind: BackendKind) -> Vec<f32> {
    logits_of(path, kind, None)
}

/// The same with float matrices quantised as they are loaded.
fn logits_of(path: &Path, kind: BackendKind, quantize: Option<FileType>) -> Vec<f32> {
    let mut checkpoint = Checkpoint::open(path).unwrap_or_else(|error| panic!("{error}"));
    checkpoint.quantize = quantize;
    let mut model =
        load(&checkpoint, kind, Arc::new(ThreadPool::new(2))).unwrap_or_else(|error| panic!("{error}"));
    model.allocate_kv_cache(4, 4).unwrap();
    let (mut all, mut logits) = (Vec::new(), Vec::new());
    for (start, tokens) in [(0, &TOKENS[..6]), (6, &TOKENS[6..])] {
        let mut batch = ForwardBatch::new();
        batch.push_sequence(tokens, start, &[2, 0, 1], 4, tokens.len());
        model.forward(&batch, &mut logits).unwrap();
        all.extend_from_slice(&logits);
    }
    all
}

/// A tensor to write.
type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

fn write(path: &Path, mut file: GgufBuilder, tensors: &[Tensor]) {
    for (name, dtype, shape, _) in tensors {
        file.tensor(name, *dtype, shape);
    }
    let mut writer = file.begin(Vec::new()).unwrap();
    for (.., bytes) in tensors {
        writer.write(bytes).unwrap();
    }
    std::fs::write(path, writer.finish().unwrap()).unwrap();
}

/// What the metadata say of a model.
struct Shape {
    architecture: &'static str,
    num_layers: usize,
    hidden: usize,
    ffn: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    theta: f32,
    eps: f32,
}

fn describe(shape: &Shape) -> GgufBuilder {
    let mut file = GgufBuilder::new();
    let key = |name: &str| format!("{}.{name}", shape.architecture);
    file.string("general.architecture", shape.architecture)
        .u32(&key("block_count"), shape.num_layers as u32)
        .u32(&key("context_length"), 64)
        .u32(&key("embedding_length"), shape.hidden as u32)
        .u32(&key("feed_forward_length"), shape.ffn as u32)
        .u32(&key("attention.head_count"), shape.num_heads as u32)
        .u32(&key("attention.head_count_kv"), shape.num_kv_heads as u32)
        .u32(&key("attention.key_length"), shape.head_dim as u32)
        .u32(&key("rope.dimension_count"), shape.head_dim as u32)
        .f32(&key("rope.freq_base"), shape.theta)
        .f32(&key("attention.layer_norm_rms_epsilon"), shape.eps);
    file
}

/// The rows of each head in the order that llama.cpp's rotation of neighbouring pairs wants.
fn permute(bytes: &[u8], num_heads: usize, head_dim: usize) -> Vec<u8> {
    let row_bytes = bytes.len() / (num_heads * head_dim);
    let row = |index: usize| &bytes[index * row_bytes..(index + 1) * row_bytes];
    let rows = (0..num_heads * head_dim).map(|index| {
        let (head, channel) = (index / head_dim, index % head_dim);
        row(head * head_dim + channel % 2 * head_dim / 2 + channel / 2)
    });
    rows.flatten().copied().collect()
}

/// Writes the Hugging Face checkpoint in `folder` as llama.cpp's converter would.
fn convert_folder(folder: &Path, architecture: &'static str, to: &Path) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let config = &checkpoint.config;
    let shape = Shape {
        architecture,
        num_layers: config.num_layers,
        hidden: config.hidden_size,
        ffn: config.intermediate_size,
        num_heads: config.num_heads,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        theta: config.rope.theta,
        eps: config.norm_eps,
    };
    let renamed = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let tensors: Vec<Tensor> = checkpoint
        .weights
        .names()
        .iter()
        .filter(|name| !(config.tie_word_embeddings && name.starts_with("lm_head")))
        .map(|name| {
            let view = checkpoint.weights.tensor(name).unwrap();
            let new_name = renamed.iter().fold(name.clone(), |name, (from, to)| name.replace(from, to));
            let bytes = match architecture {
                "llama" if name.contains("q_proj") => permute(view.data, config.num_heads, config.head_dim),
                "llama" if name.contains("k_proj") => {
                    permute(view.data, config.num_kv_heads, config.head_dim)
                }
                _ => view.data.to_vec(),
            };
            (new_name, view.dtype, view.shape.to_vec(), bytes)
        })
        .collect();
    let mut file = describe(&shape);
    if let RopeScaling::Linear { factor } = config.rope.scaling {
        let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
        file.string(&key("type"), "linear").f32(&key("factor"), factor);
    }
    write(to, file, &tensors);
}

#[test]
fn a_converted_checkpoint_computes_the_same_bits() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let out = tempfile::tempdir().unwrap();
    for (name, architecture) in [
        ("llama_plain", "llama"),
        ("llama_biases", "llama"),
        ("llama_head_dim", "llama"),
        ("qwen2_tied", "qwen2"),
        ("qwen2_untied", "qwen2"),
    ] {
        let folder = golden.join(name);
        let file = out.path().join(format!("{name}.gguf"));
        convert_folder(&folder, architecture, &file);
        assert_eq!(Checkpoint::open(&file).unwrap().name, name);
        for kind in [BackendKind::Cpu, BackendKind::Reference] {
            assert_eq!(logits(&file, kind), logits(&folder, kind), "{name} {kind:?}");
        }
    }
}

/// As llama.cpp's converter writes StarCoder2 and Phi-4: no word on the nonlinearity, a window of 0.
#[test]
fn what_converters_leave_out_is_what_the_models_have() {
    let out = tempfile::tempdir().unwrap();
    let open = |architecture: &'static str, more: fn(&mut GgufBuilder)| {
        let path = out.path().join(format!("{architecture}.gguf"));
        let mut file = describe(&Shape { architecture, ..SMALL });
        more(&mut file);
        let embedding = vec![0; 16 * SMALL.hidden * 4];
        write(
            &path,
            file,
            &[("token_embd.weight".to_owned(), Dtype::F32, vec![16, SMALL.hidden], embedding)],
        );
        Checkpoint::open(&path).unwrap_or_else(|error| panic!("{error}")).config
    };
    let starcoder = open("starcoder2", |file| {
        file.f32("starcoder2.attention.layer_norm_epsilon", 1e-5);
    });
    assert_eq!((starcoder.activation, starcoder.gated), (Activation::GeluTanh, false));
    let phi = open("phi3", |file| {
        file.u32("phi3.attention.sliding_window", 0);
    });
    assert!((0..phi.num_layers).all(|layer| phi.layer(layer).window.is_none()));
}

const SMALL: Shape = Shape {
    architecture: "qwen2",
    num_layers: 2,
    hidden: 256,
    ffn: 512,
    num_heads: 4,
    num_kv_heads: 2,
    head_dim: 64,
    theta: 1e4,
    eps: 1e-6,
};
const VOCAB_SIZE: usize = 96;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn weight(&mut self) -> f32 {
        (0..3).map(|_| self.next() as f32 / (1u64 << 31) as f32 - 0.5).sum::<f32>() * 0.12
    }
}

/// Weights of about the same size in any format: encoded where we can, else random codes under scales
/// that were worked out by hand.
fn weights(dtype: Dtype, len: usize, random: &mut Random) -> Vec<u8> {
    if WRITABLE.contains(&dtype) {
        let elements: Vec<f32> = (0..len).map(|_| random.weight()).collect();
        let mut bytes = Vec::new();
        assert!(encode(dtype, &elements, &mut bytes));
        return bytes;
    }
    let Dtype::Quantized(format) = dtype else { unreachable!("plain types are writable") };
    let mut bytes: Vec<u8> = (0..format.bytes_for(len).unwrap()).map(|_| random.next() as u8).collect();
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        let mut put = |at: usize, x: f32| block[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
        match format {
            // scale * code + minimum, around 0
            BlockFormat::Q4_1 => {
                put(0, 0.013);
                put(2, -0.013 * 7.5);
            }
            BlockFormat::Q5_1 => {
                put(0, 0.0065);
                put(2, -0.0065 * 15.5);
            }
            BlockFormat::Iq4Nl => put(0, 0.0009),
            BlockFormat::Iq4Xs => put(0, 0.000_05),
            BlockFormat::Q3K => put(108, 0.0015),
            BlockFormat::Q2K => {
                put(80, 0.006);
                put(82, 0.006);
                block[..16].fill(12 << 4 | 8);
            }
            BlockFormat::Q5K => {
                put(0, 0.0002);
                put(2, 0.0002 * 15.5);
                // Scales and minima of 32.
                block[4..12].fill(160);
                block[12..16].fill(0);
            }
            BlockFormat::Mxfp4 => block[0] = 127 - 6,
            other => unreachable!("{other:?} is writable"),
        }
    }
    bytes
}

fn write_small(path: &Path, dtype: Dtype) {
    let mut random = Random(11);
    let (hidden, kv) = (SMALL.hidden, SMALL.num_kv_heads * SMALL.head_dim);
    let mut tensors: Vec<Tensor> = Vec::new();
    let mut add = |name: String, dtype: Dtype, shape: &[usize]| {
        let len = shape.iter().product();
        let bytes = match name.ends_with("norm.weight") {
            true => (0..len).flat_map(|_| 1.0f32.to_le_bytes()).collect(),
            false => weights(dtype, len, &mut random),
        };
        tensors.push((name, dtype, shape.to_vec(), bytes));
    };
    add("token_embd.weight".to_owned(), dtype, &[VOCAB_SIZE, hidden]);
    add("output_norm.weight".to_owned(), Dtype::F32, &[hidden]);
    for layer in 0..SMALL.num_layers {
        let name = |role: &str| format!("blk.{layer}.{role}");
        add(name("attn_norm.weight"), Dtype::F32, &[hidden]);
        add(name("ffn_norm.weight"), Dtype::F32, &[hidden]);
        for (role, width) in [("attn_q", hidden), ("attn_k", kv), ("attn_v", kv)] {
            add(name(&format!("{role}.weight")), dtype, &[width, hidden]);
            add(name(&format!("{role}.bias")), Dtype::F32, &[width]);
        }
        add(name("attn_output.weight"), dtype, &[hidden, hidden]);
        add(name("ffn_gate.weight"), dtype, &[SMALL.ffn, hidden]);
        add(name("ffn_up.weight"), dtype, &[SMALL.ffn, hidden]);
        add(name("ffn_down.weight"), dtype, &[hidden, SMALL.ffn]);
    }
    write(path, describe(&SMALL), &tensors);
}

/// The largest difference of two logits, relative to the largest logit.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    let largest = b.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    assert!(largest > 0.1 && largest.is_finite(), "logits of size {largest} prove nothing");
    a.iter().zip(b).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs())) / largest
}

/// The reference dequantises and computes in f32. The CPU backend rounds the activations of a quantised
/// product to eight bits with a scale for 32 of them: an error of at most 1/254 of a block's largest, which
/// averages out over a row and adds up over the products of two layers.
#[test]
fn every_format_agrees_with_its_dequantised_self() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.gguf");
    let plain = [Dtype::F32, Dtype::F16, Dtype::Bf16].map(|dtype| (dtype, 1e-4));
    let blocks = BlockFormat::ALL.map(|format| (Dtype::Quantized(format), 0.03));
    for (dtype, tolerance) in plain.into_iter().chain(blocks) {
        write_small(&path, dtype);
        let distance = distance(&logits(&path, BackendKind::Cpu), &logits(&path, BackendKind::Reference));
        println!("{}: {distance:.5}", dtype.name());
        assert!(distance <= tolerance, "{}: {distance}", dtype.name());
    }
}

/// How much each kind of file may differ from the f32 file it was made of: the error of its weights.
#[test]
fn quantised_files_stay_near_the_original() {
    let folder = tempfile::tempdir().unwrap();
    let original = folder.path().join("original.gguf");
    write_small(&original, Dtype::F32);
    let wanted = logits(&original, BackendKind::Reference);
    for (kind, tolerance) in [
        (FileType::F32, 0.0),
        (FileType::F16, 0.002),
        (FileType::Bf16, 0.02),
        (FileType::Q8_0, 0.03),
        (FileType::Q6K, 0.08),
        (FileType::Q4KM, 0.3),
        (FileType::Q4_0, 0.4),
    ] {
        let path = folder.path().join("converted.gguf");
        convert(&original, kind, std::fs::File::create(&path).unwrap()).unwrap();
        let converted = logits(&path, BackendKind::Reference);
        if kind.is_quantized() {
            // Quantising as it is loaded makes the same blocks.
            let bits = |logits: Vec<f32>| logits.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            for backend in [BackendKind::Cpu, BackendKind::Reference] {
                let loaded = bits(logits_of(&original, backend, Some(kind)));
                assert_eq!(loaded, bits(logits(&path, backend)), "{kind:?} {backend:?}");
            }
        }
        let distance = distance(&converted, &wanted);
        println!("{kind:?}: {distance:.5}");
        assert!(distance <= tolerance, "{kind:?}: {distance}");
    }
    // What is quantised is not quantised again.
    let (once, twice) = (folder.path().join("converted.gguf"), folder.path().join("twice.gguf"));
    let error =
        convert(&once, FileType::Q8_0, std::fs::File::create(twice).unwrap()).unwrap_err().to_string();
    assert!(error.contains("already") && error.contains("F32, F16 or BF16"), "{error}");
}

/// The kibibytes of `path`'s mapping that this process holds.
#[cfg(target_os = "linux")]
fn resident_kib(path: &Path) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    let (_, after) = maps.split_once(name).expect("the file is mapped");
    let resident = after.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    resident.trim().trim_end_matches(" kB").parse().unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn a_loaded_file_does_not_lie_in_memory_beside_its_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("given-back.gguf");
    write_small(&path, Dtype::F32);
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(resident_kib(&path) > 0, "what was read is resident");
    let model = load(&checkpoint, BackendKind::Cpu, Arc::new(ThreadPool::new(1))).unwrap();
    assert_eq!(resident_kib(&path), 0);
    // It is still there for who reads it again.
    let again = load(&checkpoint, BackendKind::Cpu, Arc::new(ThreadPool::new(1))).unwrap();
    assert_eq!(again.weight_memory().num_parameters(), model.weight_memory().num_parameters());
}
