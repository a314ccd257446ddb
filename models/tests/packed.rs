//! Packed safetensors (fp8, GPTQ, AWQ, compressed-tensors, MXFP4) against checkpoints, matrices and logits that
//! `golden/make_packed.py` wrote with other people's code.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use tandem_kernels::ThreadPool;
use tandem_kernels::quant::BlockFormat;
use tandem_models::{BackendKind, Checkpoint, Dtype, FileType, ForwardBatch, Model, load};

/// The reference backend computes with the unpacked matrices in f32.
const FLOAT_TOLERANCE: f32 = 1e-4;
/// Of the largest logit: activations of eight bits, see `gguf_models.rs`.
const QUANTIZED_TOLERANCE: f32 = 0.03;
/// Of the largest logit: weights rounded to Q8_0 on top of that.
const Q8_TOLERANCE: f32 = 0.06;

/// Each case, and what its matrices are kept as.
const CASES: [(&str, Dtype); 18] = [
    ("gptq_sym", Dtype::Quantized(BlockFormat::Q4_0)),
    ("gptq_asym", Dtype::Quantized(BlockFormat::Q5_0)),
    // Stretches of 16 inputs are half a block.
    ("gptq_asym_v2", Dtype::F16),
    ("gptq_act_order", Dtype::F16),
    ("gptq_int8", Dtype::Quantized(BlockFormat::Q8_0)),
    ("awq", Dtype::Quantized(BlockFormat::Q5_0)),
    ("fp8_block", Dtype::Bf16),
    ("fp8_cut_block", Dtype::Bf16),
    ("fp8_tensor", Dtype::Bf16),
    ("ct_int4", Dtype::Quantized(BlockFormat::Q4_0)),
    ("ct_int4_asym", Dtype::Quantized(BlockFormat::Q5_0)),
    ("ct_int8", Dtype::Quantized(BlockFormat::Q8_0)),
    ("ct_fp8", Dtype::Bf16),
    ("ct_pack8", Dtype::Quantized(BlockFormat::Q8_0)),
    // Codes less their zero points take nine bits; groups lie apart.
    ("ct_int8_asym", Dtype::Bf16),
    ("ct_int4_act_order", Dtype::Bf16),
    ("fp8_row", Dtype::Bf16),
    ("mxfp4", Dtype::Quantized(BlockFormat::Mxfp4)),
];

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/packed").join(case)
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    file.tensor(name).unwrap().data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn logits(model: &mut dyn Model, tokens: &[u32]) -> Vec<f32> {
    model.allocate_kv_cache(tokens.len().div_ceil(4), 4).unwrap();
    let block_table: Vec<u32> = (0..tokens.len().div_ceil(4) as u32).collect();
    let (mut batch, mut logits) = (ForwardBatch::new(), Vec::new());
    batch.push_sequence(tokens, 0, &block_table, 4, tokens.len());
    model.forward(&batch, &mut logits).unwrap();
    logits
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |worst: f32, (a, b)| worst.max((a - b).abs()))
}

#[test]
fn matrices_are_those_that_the_formats_own_code_gives() {
    for (case, dtype) in CASES {
        let bytes = std::fs::read(folder(case).join("golden.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let checkpoint = Checkpoint::open(&folder(case)).unwrap_or_else(|error| panic!("{case}: {error}"));
        let shown: Vec<&str> =
            golden.names().into_iter().filter_map(|name| name.strip_prefix("shown.")).collect();
        assert!(!shown.is_empty());
        for name in shown {
            let tensor = checkpoint.weights.read(name).unwrap_or_else(|error| panic!("{case}: {error}"));
            assert_eq!(tensor.dtype, dtype, "{case} {name}");
            let (elements, width) = (tensor.view().to_f32(), *tensor.shape.last().unwrap());
            let rows: Vec<f32> = elements.chunks(width).step_by(8).flatten().copied().collect();
            let wanted = floats(&golden, &format!("shown.{name}"));
            // Where blocks are exact the script's product is, too; f32 holds the digits of both.
            assert_eq!(rows, if dtype == Dtype::F16 { halves(&wanted) } else { wanted }, "{case} {name}");
        }
    }
}

/// What a matrix of f16 can hold of `wanted`.
fn halves(wanted: &[f32]) -> Vec<f32> {
    wanted.iter().map(|x| half::f16::from_f32(*x).to_f32()).collect()
}

#[test]
fn logits_are_those_of_transformers() {
    for (case, dtype) in CASES {
        let bytes = std::fs::read(folder(case).join("golden.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let tokens = golden.tensor("tokens").unwrap().data().as_chunks().0;
        let tokens: Vec<u32> = tokens.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
        let wanted = floats(&golden, "logits");
        let largest = wanted.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let mut checkpoint = Checkpoint::open(&folder(case)).unwrap();
        let quantized = matches!(dtype, Dtype::Quantized(_));
        // f16 rounds what the script has in f32.
        let float_tolerance = if case == "gptq_asym_v2" { 1e-3 * largest } else { FLOAT_TOLERANCE };
        for (kind, quantize, tolerance) in [
            (BackendKind::Reference, None, float_tolerance),
            (BackendKind::Cpu, None, if quantized { QUANTIZED_TOLERANCE * largest } else { float_tolerance }),
            (BackendKind::Cpu, Some(FileType::Q8_0), Q8_TOLERANCE * largest),
        ] {
            checkpoint.quantize = quantize;
            let mut model = load(&checkpoint, kind, Arc::new(ThreadPool::new(2)))
                .unwrap_or_else(|error| panic!("{case}: {error}"));
            let distance = distance(&logits(model.as_mut(), &tokens), &wanted);
            println!("{case} {kind:?} {quantize:?}: {distance:.6} of {tolerance:.6}");
            assert!(distance <= tolerance, "{case} {kind:?} {quantize:?}: {distance}, allowed {tolerance}");
        }
    }
}

#[test]
fn the_log_says_what_became_of_the_weights() {
    let mut checkpoint = Checkpoint::open(&folder("gptq_sym")).unwrap();
    let memory = load(&checkpoint, BackendKind::Cpu, Arc::new(ThreadPool::new(1))).unwrap().weight_memory();
    let note = checkpoint.repacking(&memory).unwrap();
    assert!(note.contains("GPTQ int4 in the file") && note.contains("GiB Q4_0"), "{note}");
    checkpoint.quantize = Some(FileType::Q8_0);
    let memory = load(&checkpoint, BackendKind::Cpu, Arc::new(ThreadPool::new(1))).unwrap().weight_memory();
    let note = checkpoint.repacking(&memory).unwrap();
    // What was quantised already stays, the rest does not.
    assert!(note.contains("quantised to q8_0") && note.contains("Q4_0") && note.contains("Q8_0"), "{note}");
}

/// A copy of a case with one tensor left out or the configuration changed.
fn damaged(case: &str, tensor: Option<&str>, change: impl Fn(&mut serde_json::Value)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder(case).join("config.json")).unwrap()).unwrap();
    change(&mut config["quantization_config"]);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let bytes = std::fs::read(folder(case).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let kept: Vec<_> = file.tensors().into_iter().filter(|(name, _)| Some(name.as_str()) != tensor).collect();
    std::fs::write(dir.path().join("model.safetensors"), safetensors::serialize(kept, None).unwrap())
        .unwrap();
    let checkpoint = match Checkpoint::open(dir.path()) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return error.to_string(),
    };
    load(&checkpoint, BackendKind::Cpu, Arc::new(ThreadPool::new(1))).err().expect("damaged").to_string()
}

#[test]
fn what_does_not_fit_together_is_named() {
    let q = "model.layers.0.self_attn.q_proj";
    for (case, ending, parts) in [
        ("gptq_sym", "scales", ["q_proj.scales", "missing"]),
        ("gptq_sym", "qzeros", ["q_proj.qzeros", "missing"]),
        ("awq", "qweight", ["q_proj.weight", "no tensor"]),
        ("fp8_block", "weight_scale_inv", ["q_proj.weight_scale_inv", "missing"]),
        ("ct_int4", "weight_shape", ["q_proj.weight_shape", "missing"]),
        ("ct_int8", "weight_scale", ["q_proj.weight_scale", "missing"]),
    ] {
        let error = damaged(case, Some(&format!("{q}.{ending}")), |_| {});
        assert!(parts.iter().all(|part| error.contains(part)), "{case}: {error}");
    }
    // Bits and block extents are the configuration's word against the tensors'.
    let error = damaged("gptq_sym", None, |section| section["bits"] = 8.into());
    assert!(error.contains("q_proj") && error.contains("wanted"), "{error}");
    let error =
        damaged("fp8_block", None, |section| section["weight_block_size"] = serde_json::json!([16, 16]));
    assert!(error.contains("weight_scale_inv") && error.contains("16x16"), "{error}");
    let error = damaged("awq", None, |section| section["quant_method"] = "hqq".into());
    assert!(error.contains("quantization_config.quant_method") && error.contains("hqq"), "{error}");
}
