//! Opening a checkpoint folder: what is accepted, and that damaged or lying files are refused with a
//! message that names the fault.

use std::path::Path;

use serde_json::{Value, json};
use tandem_models::weights::SafetensorsStore;
use tandem_models::{Checkpoint, Dtype, ModelError, RopeScaling, Tokenizer, WeightStore, check_pair};

mod checkpoint_support;
use checkpoint_support::{llama_config, safetensors_bytes, write_checkpoint};

/// A safetensors file with this header and this much data.
fn lying_file(header: &str, data_len: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + data_len, 0);
    file
}

fn weights_error(file: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, file).unwrap();
    let Err(error) = SafetensorsStore::open(dir.path()) else { panic!("the file was accepted") };
    let message = error.to_string();
    assert!(
        matches!(error, ModelError::Weights { .. }) && message.contains("model.safetensors"),
        "{message}"
    );
    message
}

#[test]
fn damaged_weight_files_are_refused() {
    let good = safetensors_bytes(&[("a", &[2, 3]), ("b", &[4])]);
    let header_len = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let mut absurd = good.clone();
    absurd[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut long = good.clone();
    long.push(0);
    let tensor = |shape: &str, offsets: &str| {
        format!(r#"{{"t":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let two = |first: &str, second: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{first}}},
                "b":{{"dtype":"F32","shape":[2],"data_offsets":{second}}}}}"#
        )
    };
    let half = usize::MAX / 2;
    for (file, wanted) in [
        (vec![], "0 bytes long"),
        (vec![0; 8], "8 bytes long"),
        (vec![0x55; 64], "says its header is"),
        (absurd, "says its header is 18446744073709551615"),
        (good[..header_len].to_vec(), "says its header is"),
        (good[..good.len() - 1].to_vec(), "truncated"),
        (long, "belong to none"),
        (lying_file("{not json", 0), "damaged header"),
        (lying_file(r#"{"t":{"dtype":"F77","shape":[1],"data_offsets":[0,4]}}"#, 4), "damaged header"),
        (lying_file(&tensor("[-1]", "[0,4]"), 4), "damaged header"),
        (lying_file(&tensor("[2]", "[0,8]"), 4), "tensor `t` is said to lie at 0..8"),
        (lying_file(&tensor("[2]", "[8,0]"), 8), "tensor `t` is said to lie at 8..0"),
        (lying_file(&tensor("[1]", "[4,8]"), 8), "tensor `t` leaves a gap"),
        (lying_file(&tensor("[3]", "[0,8]"), 8), "needs 12 bytes, but 8"),
        (lying_file(&tensor(&format!("[{half},{half}]"), "[0,8]"), 8), "overflows"),
        (lying_file(&tensor("[4611686018427387904]", "[0,8]"), 8), "overflows"),
        (lying_file(&tensor("[1]", &format!("[0,{}]", usize::MAX)), 8), "is said to lie at"),
        (lying_file(&two("[0,8]", "[4,12]"), 12), "tensor `b` overlaps"),
        (lying_file(&two("[0,8]", "[0,8]"), 8), "overlaps"),
        (lying_file(&two("[0,8]", "[12,20]"), 20), "tensor `b` leaves a gap"),
    ] {
        let message = weights_error(&file);
        assert!(message.contains(wanted), "wanted {wanted:?} in {message:?}");
    }
}

#[test]
fn tensors_of_three_types_are_read_and_others_are_named() {
    let header = r#"{"__metadata__":{"format":"pt"},
        "f":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
        "h":{"dtype":"F16","shape":[2],"data_offsets":[4,8]},
        "b":{"dtype":"BF16","shape":[2,1],"data_offsets":[8,12]},
        "i":{"dtype":"I64","shape":[1],"data_offsets":[12,20]},
        "e":{"dtype":"F32","shape":[0,5],"data_offsets":[20,20]}}"#;
    let mut file = lying_file(header, 0);
    file.extend(1.5f32.to_le_bytes());
    file.extend([0x00, 0x3C, 0x00, 0xC0]); // 1, -2
    file.extend([0x80, 0x3F, 0x40, 0xC0]); // 1, -3
    file.extend([0; 8]);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let store = SafetensorsStore::open(dir.path()).unwrap();
    assert_eq!(store.tensor("f").unwrap().to_f32(), [1.5]);
    assert_eq!(store.tensor("h").unwrap().to_f32(), [1.0, -2.0]);
    let bf16 = store.tensor("b").unwrap();
    assert_eq!((bf16.dtype, bf16.shape, bf16.num_elements()), (Dtype::Bf16, &[2, 1][..], 2));
    assert_eq!(bf16.to_f32(), [1.0, -3.0]);
    assert_eq!(bf16.bits16().unwrap()[..], [0x3F80, 0xC040]);
    assert_eq!(store.tensor("f").unwrap().bits16(), None);
    assert_eq!(store.tensor("e").unwrap().num_elements(), 0);
    assert_eq!(store.names(), ["b", "e", "f", "h", "i"]);
    let error = store.tensor("i").unwrap_err().to_string();
    assert!(error.contains("`i` has element type I64"), "{error}");
    let error = store.tensor("x").unwrap_err().to_string();
    assert!(error.contains("no tensor `x` among its 5 tensors"), "{error}");
}

fn sharded(index: &Value, files: &[(&str, &[u8])]) -> Result<SafetensorsStore, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    for (name, content) in files {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    SafetensorsStore::open(dir.path())
}

#[test]
fn shards_are_one_store() {
    let first = safetensors_bytes(&[("a", &[2])]);
    let second = safetensors_bytes(&[("b", &[3])]);
    let files: [(&str, &[u8]); 2] = [("1.safetensors", &first), ("2.safetensors", &second)];
    let index = json!({"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}});
    let store = sharded(&index, &files).unwrap();
    assert_eq!(store.names(), ["a", "b"]);
    assert!(store.contains("b"));
    assert_eq!(store.tensor("b").unwrap().num_elements(), 3);
}

#[test]
fn an_index_that_lies_is_refused() {
    let file = safetensors_bytes(&[("a", &[2])]);
    for (weight_map, wanted) in [
        (json!({"a": "../outside.safetensors"}), "in the same folder"),
        (json!({"a": "/etc/outside.safetensors"}), "in the same folder"),
        (json!({"a": "sub/outside.safetensors"}), "in the same folder"),
        (json!({"a": "..\\outside.safetensors"}), "in the same folder"),
        (json!({"a": "..", "b": "x"}), "in the same folder"),
        (json!({"a": "passwd"}), "in the same folder"),
        (json!({}), "empty `weight_map`"),
        (
            json!({"a": "1.safetensors", "b": "1.safetensors"}),
            "tensor `b` is in 1.safetensors, but it is not",
        ),
        (json!({"a": "1.safetensors", "b": "2.safetensors"}), "tensor `a` is also in"),
        (json!({"a": "absent.safetensors"}), "absent.safetensors"),
        (json!({"a": 3}), "not valid JSON of the expected form"),
    ] {
        let index = json!({"weight_map": weight_map});
        let Err(error) = sharded(&index, &[("1.safetensors", &file), ("2.safetensors", &file)]) else {
            panic!("{index} was accepted")
        };
        assert!(error.to_string().contains(wanted), "wanted {wanted:?} in {error}");
    }
}

fn open_with(change: &[(&str, Value)]) -> Result<Checkpoint, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), 300, &["<|endoftext|>"]);
    let mut config = llama_config(300);
    for (key, value) in change {
        config[*key] = value.clone();
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    Checkpoint::open(dir.path())
}

fn error_with(change: &[(&str, Value)]) -> String {
    match open_with(change) {
        Ok(checkpoint) => panic!("{change:?} was accepted: {:?}", checkpoint.config),
        Err(error) => error.to_string(),
    }
}

#[test]
fn llama_defaults_are_those_of_transformers() {
    let config = open_with(&[]).unwrap().config;
    assert_eq!((config.head_dim, config.num_kv_heads, config.rope.theta), (4, 1, 10_000.0));
    assert_eq!(config.rope.scaling, RopeScaling::None);
    assert!(!config.qkv_bias && !config.o_bias && !config.mlp_bias && config.tie_word_embeddings);
    let config = open_with(&[
        ("num_key_value_heads", Value::Null),
        ("head_dim", json!(6)),
        ("tie_word_embeddings", Value::Null),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("rms_norm_eps", Value::Null),
    ])
    .unwrap()
    .config;
    assert_eq!((config.head_dim, config.num_kv_heads, config.norm_eps), (6, 2, 1e-6));
    assert!(config.qkv_bias && config.o_bias && config.mlp_bias && !config.tie_word_embeddings);
}

#[test]
fn qwen2_has_biases_and_an_unused_sliding_window() {
    let qwen = [
        ("model_type", json!("qwen2")),
        ("architectures", json!(["Qwen2ForCausalLM"])),
        ("sliding_window", json!(4096)),
        ("use_sliding_window", json!(false)),
        ("layer_types", json!(["full_attention"])),
    ];
    let config = open_with(&qwen).unwrap().config;
    assert!(config.qkv_bias && !config.o_bias && !config.mlp_bias);
    assert_eq!(config.layer(0).window, None);
    let change = [("use_sliding_window", json!(true)), ("layer_types", json!(["sliding_attention"]))];
    let used: Vec<_> = qwen.iter().cloned().chain(change).collect();
    assert_eq!(open_with(&used).unwrap().config.layer(0).window, Some(4096));
    let contradiction: Vec<_> = qwen.iter().cloned().chain(used[6..].iter().cloned()).collect();
    assert!(error_with(&contradiction).contains("`use_sliding_window` is false; wanted true"));
}

#[test]
fn rope_is_read_in_the_old_and_the_new_form() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 32});
    let wanted = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 32,
    };
    let config =
        open_with(&[("rope_scaling", llama3.clone()), ("rope_theta", json!(500000.0))]).unwrap().config;
    assert_eq!((config.rope.scaling, config.rope.theta), (wanted.clone(), 500_000.0));
    let mut parameters = llama3;
    parameters["rope_theta"] = json!(500000);
    let config = open_with(&[("rope_parameters", parameters)]).unwrap().config;
    assert_eq!((config.rope.scaling, config.rope.theta), (wanted.clone(), 500_000.0));
    let config = open_with(&[("rope_scaling", json!({"type": "linear", "factor": 2}))]).unwrap().config;
    assert_eq!(config.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    for none in [json!(null), json!({"rope_type": "default"}), json!({"rope_theta": 10000.0})] {
        assert_eq!(open_with(&[("rope_parameters", none)]).unwrap().config.rope.scaling, RopeScaling::None);
    }
}

#[test]
fn options_that_are_not_supported_are_named() {
    for (key, value, wanted) in [
        (
            "model_type",
            json!("mamba"),
            "`model_type` is \"mamba\"; wanted one of the supported: llama, qwen2, qwen3",
        ),
        ("architectures", json!(["LlamaForSequenceClassification"]), "wanted LlamaForCausalLM"),
        ("quantization_config", json!({"bits": 4}), "`quantization_config.quant_method` is absent"),
        ("hidden_act", json!("gelu"), "`hidden_act` is \"gelu\"; wanted \"silu\""),
        ("partial_rotary_factor", json!(0.3), "`partial_rotary_factor` is 0.3"),
        ("layer_types", json!(["sliding_attention"]), "`sliding_window` is absent"),
        ("layer_types", json!(["linear_attention"]), "`layer_types`"),
        ("rope_scaling", json!({"type": "ntk", "factor": 4.0}), "`rope_scaling.type` is \"ntk\""),
        ("rope_scaling", json!({"type": "linear", "factor": 4.0, "mscale": 1}), "`rope_scaling.mscale` is 1"),
        ("final_logit_softcapping", json!(30.0), "`final_logit_softcapping` is 30.0; wanted absent"),
        ("num_experts", json!(8), "`num_experts` is 8; wanted absent"),
        ("rope_scaling", json!({"factor": 4.0}), "`rope_scaling.rope_type` is absent"),
        ("rope_scaling", json!({"type": "linear"}), "`rope_scaling.factor` is absent"),
        ("rope_scaling", json!({"type": "linear", "factor": 0}), "wanted a positive number"),
        ("rope_scaling", json!("linear"), "wanted an object or null"),
        ("rope_parameters", json!({"full_attention": {"rope_type": "default"}}), "rope_parameters.rope_type"),
    ] {
        let error = error_with(&[(key, value)]);
        assert!(error.contains(wanted) && error.contains("config.json"), "wanted {wanted:?} in {error:?}");
    }
    let error = error_with(&[("model_type", Value::Null), ("architectures", json!(["MambaForCausalLM"]))]);
    assert!(error.contains("LlamaForCausalLM, Qwen2ForCausalLM"), "{error}");
}

#[test]
fn impossible_sizes_are_refused() {
    for (key, value, wanted) in [
        ("vocab_size", json!(0), "an integer from 1 to"),
        ("vocab_size", json!(u64::MAX), "an integer from 1 to"),
        ("hidden_size", json!(-8), "an integer from 1 to"),
        ("hidden_size", json!(1e9), "an integer from 1 to"),
        ("hidden_size", json!("8"), "`hidden_size` is \"8\""),
        ("hidden_size", json!(9), "a multiple of `num_attention_heads`, which is 2"),
        ("hidden_size", Value::Null, "`hidden_size` is absent"),
        ("intermediate_size", json!(0), "an integer from 1 to"),
        ("num_hidden_layers", json!(0), "an integer from 1 to"),
        ("num_hidden_layers", json!(1_000_000), "an integer from 1 to"),
        ("num_attention_heads", json!(0), "an integer from 1 to"),
        ("num_key_value_heads", json!(0), "an integer from 1 to"),
        ("num_key_value_heads", json!(3), "a divisor of `num_attention_heads`"),
        ("head_dim", json!(3), "even"),
        ("head_dim", json!(0), "an integer from 1 to"),
        ("max_position_embeddings", json!(0), "an integer from 1 to"),
        ("rms_norm_eps", json!(-1e-5), "a positive number"),
        ("rope_theta", json!(1e300), "a positive number"),
        ("tie_word_embeddings", json!("yes"), "true or false"),
    ] {
        let error = error_with(&[(key, value)]);
        assert!(error.contains(wanted), "wanted {wanted:?} in {error:?}");
    }
}

#[test]
fn end_tokens_come_from_the_generation_config_or_else_the_config() {
    let checkpoint = open_with(&[("eos_token_id", json!(7)), ("bos_token_id", json!(1))]).unwrap();
    assert_eq!((checkpoint.generation.eos_token_ids, checkpoint.generation.bos_token_id), (vec![7], Some(1)));
    assert!(open_with(&[]).unwrap().generation.eos_token_ids.is_empty());
    assert!(error_with(&[("eos_token_id", json!(300))]).contains("below `vocab_size`, which is 300"));
    assert!(error_with(&[("eos_token_id", json!([1, -1]))]).contains("`eos_token_id` is [1,-1]"));

    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), 300, &[]);
    let path = dir.path().join("generation_config.json");
    std::fs::write(&path, r#"{"eos_token_id": [3, 5], "temperature": 0.7, "top_k": 20, "top_p": 0.8}"#)
        .unwrap();
    let generation = Checkpoint::open(dir.path()).unwrap().generation;
    assert_eq!(generation.eos_token_ids, [3, 5]);
    assert_eq!(
        (generation.temperature, generation.top_k, generation.top_p),
        (Some(0.7), Some(20), Some(0.8))
    );
    std::fs::write(&path, "{").unwrap();
    assert!(Checkpoint::open(dir.path()).unwrap_err().to_string().contains("generation_config.json"));
}

#[test]
fn checkpoints_are_named_after_their_folder_or_hub_id() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("my-model");
    write_checkpoint(&plain, 300, &[]);
    assert_eq!(Checkpoint::open(&plain).unwrap().name, "my-model");
    let cached = dir.path().join("models--org--some-name/snapshots/0123abcd");
    write_checkpoint(&cached, 300, &[]);
    assert_eq!(Checkpoint::open(&cached).unwrap().name, "org/some-name");
}

#[test]
fn a_folder_without_weights_says_so() {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), 300, &[]);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors") && error.contains("converted"), "{error}");
    let error = Checkpoint::open(Path::new("/no/such/folder")).unwrap_err().to_string();
    assert!(error.contains("/no/such/folder/config.json"), "{error}");
}

fn pair_member(dir: &Path, vocab_size: usize, special: &[&str]) -> (Checkpoint, Tokenizer) {
    write_checkpoint(dir, vocab_size, special);
    (Checkpoint::open(dir).unwrap(), Tokenizer::from_dir(dir).unwrap())
}

#[test]
fn a_pair_shares_its_vocabulary_but_not_its_padding() {
    let dir = tempfile::tempdir().unwrap();
    let target = pair_member(&dir.path().join("target"), 304, &["<eos>"]);
    let padded = pair_member(&dir.path().join("draft"), 320, &["<eos>"]);
    assert!(check_pair((&target.0, &target.1), (&padded.0, &padded.1)).unwrap().is_none());

    // The same bytes under other ids, and a special token that only has the role in common.
    let other = pair_member(&dir.path().join("other"), 301, &["<pad>", "<eos>"]);
    let map = check_pair((&target.0, &target.1), (&other.0, &other.1)).unwrap().expect("ids differ");
    assert_eq!((map.num_target_ids(), map.num_draft_ids()), (target.1.vocab_size(), other.1.vocab_size()));
    // Room for one more special token is room for one merge less.
    assert_eq!(map.num_shared(), target.1.vocab_size() - 1);
    let is_same = |&id: &u32| target.1.id_to_token(id) == other.1.id_to_token(map.to_draft(id));
    let different: Vec<u32> = (0..map.num_target_ids() as u32).filter(|id| !is_same(id)).collect();
    assert_eq!(different, [target.1.vocab_size() as u32 - 1]);
    let stand_in = other.1.token_bytes(map.to_draft(different[0]));
    assert!(target.1.token_bytes(different[0]).ends_with(&stand_in), "{stand_in:?}");
    let (mut logits, mut row) = (vec![0.0; map.num_draft_ids()], Vec::new());
    let end = other.1.token_to_id("<eos>").expect("it has one");
    logits[end as usize] = 1.0;
    map.translate(&logits, &mut row);
    assert_eq!(row.len(), map.num_target_ids());
    assert_eq!(row.iter().position(|&logit| logit == 1.0), Some(0));

    let short = pair_member(&dir.path().join("short"), 299, &["<eos>"]);
    let error = check_pair((&target.0, &target.1), (&short.0, &short.1)).unwrap_err().to_string();
    assert!(error.contains("draft's `vocab_size` is 299, less than the 300 tokens"), "{error}");
}
