//! DeepSeek's GGUF files as they were before latent attention was computed in its absorbed form: keys and
//! values of all heads in one tensor, head sizes those of whole keys and values. They are the same models.

use std::path::Path;

use safetensors::SafeTensors;
use tandem_models::weights::gguf::GgufBuilder;
use tandem_models::weights::quantize::encode;
use tandem_models::{BackendKind, Checkpoint, Dtype, FileType};

mod support;

const CASE: &str = "deepseek_v2";
/// As in `golden.rs`: f32 sums in another order.
const TOLERANCE: f32 = 1e-4;

/// What the files of before call the tensors of a layer, and what transformers calls them.
const LAYER: [(&str, &str); 20] = [
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_q_a.weight", "self_attn.q_a_proj.weight"),
    ("attn_q_a.bias", "self_attn.q_a_proj.bias"),
    ("attn_q_a_norm.weight", "self_attn.q_a_layernorm.weight"),
    ("attn_q_b.weight", "self_attn.q_b_proj.weight"),
    ("attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight"),
    ("attn_kv_a_mqa.bias", "self_attn.kv_a_proj_with_mqa.bias"),
    ("attn_kv_a_norm.weight", "self_attn.kv_a_layernorm.weight"),
    ("attn_kv_b.weight", "self_attn.kv_b_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("attn_output.bias", "self_attn.o_proj.bias"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_gate.", "mlp.gate_proj."),
    ("ffn_up.", "mlp.up_proj."),
    ("ffn_down.", "mlp.down_proj."),
    ("ffn_gate_inp.weight", "mlp.gate.weight"),
    ("ffn_gate_shexp.", "mlp.shared_experts.gate_proj."),
    ("ffn_up_shexp.", "mlp.shared_experts.up_proj."),
    ("ffn_down_shexp.", "mlp.shared_experts.down_proj."),
    ("", "mlp.experts."),
];

/// A tensor's name, shape and elements.
type Tensor = (String, Vec<usize>, Vec<f32>);

/// The tensors of `checkpoint` under their old names, experts in one.
fn tensors(checkpoint: &Checkpoint) -> Vec<Tensor> {
    let read = |name: &str| {
        let tensor = checkpoint.weights.read(name).unwrap();
        (tensor.shape.clone(), tensor.view().to_f32())
    };
    let mut all = Vec::new();
    let experts = checkpoint.config.experts.unwrap().num_experts;
    for name in checkpoint.weights.names() {
        let renamed = match name.as_str() {
            "model.embed_tokens.weight" => "token_embd.weight".to_owned(),
            "model.norm.weight" => "output_norm.weight".to_owned(),
            "lm_head.weight" => "output.weight".to_owned(),
            name => {
                let (layer, rest) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
                let (to, from) = LAYER.iter().find(|(_, from)| rest.starts_with(from)).expect(name);
                if to.is_empty() {
                    continue;
                }
                format!("blk.{layer}.{to}{}", &rest[from.len()..])
            }
        };
        let (shape, elements) = read(&name);
        all.push((renamed, shape, elements));
    }
    for layer in (0..checkpoint.config.num_layers).filter(|&layer| !checkpoint.config.layer(layer).dense) {
        for kind in ["gate", "up", "down"] {
            let of = |expert: usize| {
                read(&format!("model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight"))
            };
            let shape = [vec![experts], of(0).0].concat();
            let elements = (0..experts).flat_map(|expert| of(expert).1).collect();
            all.push((format!("blk.{layer}.ffn_{kind}_exps.weight"), shape, elements));
        }
    }
    all
}

/// Writes them with the metadata of before, matrices that fit as `dtype`.
fn write(checkpoint: &Checkpoint, dtype: Dtype, to: &Path) {
    let (config, latent) = (&checkpoint.config, checkpoint.config.latent.unwrap());
    let experts = config.experts.unwrap();
    let groups = experts.groups.unwrap();
    let mut file = GgufBuilder::new();
    file.string("general.architecture", "deepseek2");
    for (key, value) in [
        ("block_count", config.num_layers),
        ("context_length", 64),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_heads),
        ("attention.head_count_kv", config.num_heads),
        ("attention.key_length", latent.content_dim + config.rope.dim),
        ("attention.value_length", latent.value_dim),
        ("attention.q_lora_rank", latent.q_rank.unwrap()),
        ("attention.kv_lora_rank", latent.kv_rank),
        ("rope.dimension_count", config.rope.dim),
        ("leading_dense_block_count", 1),
        ("expert_count", experts.num_experts),
        ("expert_used_count", experts.num_experts_per_token),
        ("expert_shared_count", 1),
        ("expert_feed_forward_length", experts.intermediate_size),
        ("expert_group_count", groups.num_groups),
        ("expert_group_used_count", groups.num_picked),
    ] {
        file.u32(&format!("deepseek2.{key}"), value as u32);
    }
    file.f32("deepseek2.rope.freq_base", config.rope.theta)
        .f32("deepseek2.attention.layer_norm_rms_epsilon", config.norm_eps)
        .f32("deepseek2.expert_weights_scale", experts.weight_scale);
    let tensors: Vec<(Tensor, Dtype)> = tensors(checkpoint)
        .into_iter()
        .map(|tensor| {
            let fits = tensor.1.len() > 1 && tensor.1.last().unwrap().is_multiple_of(32);
            (tensor, if fits { dtype } else { Dtype::F32 })
        })
        .collect();
    for ((name, shape, _), dtype) in &tensors {
        file.tensor(name, *dtype, shape);
    }
    let mut writer = file.begin(Vec::new()).unwrap();
    for ((.., elements), dtype) in &tensors {
        let mut bytes = Vec::new();
        assert!(encode(*dtype, elements, &mut bytes));
        writer.write(&bytes).unwrap();
    }
    std::fs::write(to, writer.finish().unwrap()).unwrap();
}

fn distances(a: &[f32], b: &[f32]) -> Vec<f32> {
    assert_eq!(a.len(), b.len());
    let mut distances: Vec<f32> = a.iter().zip(b).map(|(a, b)| (a - b).abs()).collect();
    distances.sort_by(f32::total_cmp);
    distances
}

#[test]
fn files_of_before_the_absorbed_form_are_the_same_models() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(CASE);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| golden.tensor(name).unwrap().data().as_chunks().0.to_vec();
    let tokens: Vec<u32> = words("tokens").into_iter().map(u32::from_le_bytes).collect();
    let wanted: Vec<f32> = words("logits").into_iter().map(f32::from_le_bytes).collect();
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("model.gguf");

    write(&checkpoint, Dtype::F32, &path);
    let opened = Checkpoint::open(&path).unwrap();
    assert_eq!(opened.config, checkpoint.config);
    for kind in [BackendKind::Cpu, BackendKind::Reference] {
        let worst = distances(&support::logits(&opened, kind, &tokens), &wanted).pop().unwrap();
        assert!(worst <= TOLERANCE, "{kind:?}: {worst}");
    }

    // Quantised: as far from the golden as eight bits of weights, and of activations, take it. Another expert
    // for a token is another answer, so most logits count, not all.
    let mut quantized = checkpoint;
    quantized.quantize = Some(FileType::Q8_0);
    for kind in [BackendKind::Cpu, BackendKind::Reference] {
        let distances = distances(&support::logits(&quantized, kind, &tokens), &wanted);
        let most = distances[distances.len() * 9 / 10];
        assert!(most <= 0.5 && most > 0.0, "{kind:?}: {most}");
    }
}
