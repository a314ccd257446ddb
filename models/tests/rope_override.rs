//! A rotary scaling that is asked for when a model is loaded: the model is then the one whose `config.json` says
//! the same, bit for bit, and computes what transformers computes for that one.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Value, json};
use tandem_models::{BackendKind, Checkpoint, ModelError, RopeOverride, RopeScaling};
use tempfile::TempDir;

mod support;

/// As in `golden.rs`: f32 sums in another order.
const TOLERANCE: f32 = 1e-4;

fn golden_dir(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

/// A copy of a golden folder whose `config.json` `change` has changed.
fn changed(case: &str, change: impl FnOnce(&mut Value)) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden_dir(case).join("model.safetensors"), folder.path().join("model.safetensors"))
        .unwrap();
    let text = std::fs::read_to_string(golden_dir(case).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    change(&mut config);
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

fn asked(text: &str) -> RopeOverride {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn golden(case: &str) -> (Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(golden_dir(case).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> { file.tensor(name).unwrap().data().as_chunks().0.to_vec() };
    (
        words("tokens").into_iter().map(u32::from_le_bytes).collect(),
        words("logits").into_iter().map(f32::from_le_bytes).collect(),
    )
}

/// Each case without its scaling, asked for it, is the case.
#[test]
fn what_transformers_computes_with_a_scaling_comes_of_asking_for_it() {
    let cases = [
        ("llama_rope_yarn", 16, "yarn:4"),
        ("llama_rope_llama3", 32, "llama3:8"),
        ("llama_rope_dynamic", 64, "dynamic:3"),
        ("llama_biases", 64, "linear:2.5"),
        (
            "llama_rope_yarn_gains",
            16,
            r#"{"type": "yarn", "factor": 4, "mscale": 0.9, "mscale_all_dim": 0.4, "beta_fast": 20,
                "beta_slow": 2, "truncate": false}"#,
        ),
    ];
    for (case, original, text) in cases {
        let plain = changed(case, |config| {
            let theta = config["rope_parameters"]["rope_theta"].clone();
            config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": theta});
            config["max_position_embeddings"] = json!(original);
        });
        let (tokens, wanted) = golden(case);
        let checkpoint = Checkpoint::open_with(plain.path(), Some(&asked(text))).unwrap();
        let found = support::logits(&checkpoint, BackendKind::Cpu, &tokens);
        let distance = found.iter().zip(&wanted).fold(0.0, |worst: f32, (a, b)| worst.max((a - b).abs()));
        assert!(distance <= TOLERANCE, "{case}: {distance}");
        let without = support::logits(
            &Checkpoint::open(plain.path()).unwrap(),
            BackendKind::Cpu,
            &tokens[..original.min(16)],
        );
        assert!(without.iter().zip(&wanted).any(|(a, b)| (a - b).abs() > 100.0 * TOLERANCE), "{case}");
        // The same bits as of the file that says it.
        let own = Checkpoint::open(&golden_dir(case)).unwrap();
        assert_eq!(checkpoint.config.rope, own.config.rope, "{case}");
        let bits = |logits: &[f32]| logits.iter().map(|logit| logit.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found), bits(&support::logits(&own, BackendKind::Cpu, &tokens)), "{case}");
    }
}

#[test]
fn the_context_grows_by_the_factor() {
    let longest = |case: &str, text: &str| {
        let checkpoint = Checkpoint::open_with(&golden_dir(case), Some(&asked(text))).unwrap();
        checkpoint.config.max_position_embeddings
    };
    for kind in ["linear", "dynamic", "yarn", "llama3"] {
        assert_eq!(longest("llama_plain", &format!("{kind}:4")), 256, "{kind}");
    }
    // In the place of a scaling of the file's own, whose pretraining had 16 tokens.
    assert_eq!(longest("llama_rope_yarn", "yarn:8"), 128);
    assert_eq!(longest("llama_rope_yarn", "none"), 16);
    let original = r#"{"rope_type": "linear", "factor": 3, "original_max_position_embeddings": 10}"#;
    assert_eq!(longest("llama_biases", original), 30);
    // Made for 25 tokens, which its own scaling stretches by 2.5.
    assert_eq!(longest("llama_biases", "none"), 25);
    assert_eq!(longest("phi3_longrope", "yarn:4"), 32);
    // Far more than any model has is no overflow.
    assert_eq!(longest("llama_plain", "yarn:1e30"), 1 << 28);
}

/// Where the words for it stand differs between files, and so must not matter.
#[test]
fn the_file_may_say_its_own_scaling_in_any_way() {
    let yarn = asked("yarn:4");
    let wanted = RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: 1.138_629_4,
        original_max_position_embeddings: 64,
    };
    let old = changed("llama_plain", |config| {
        config.as_object_mut().unwrap().remove("rope_parameters");
        config["rope_scaling"] = Value::Null;
        config["rope_theta"] = json!(5000.0);
    });
    let rope = Checkpoint::open_with(old.path(), Some(&yarn)).unwrap().config.rope;
    assert_eq!((rope.theta, rope.scaling), (5000.0, wanted.clone()));
    let new = changed("llama_plain", |config| {
        config.as_object_mut().unwrap().remove("rope_theta");
        config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 7000.0});
    });
    let rope = Checkpoint::open_with(new.path(), Some(&yarn)).unwrap().config.rope;
    assert_eq!((rope.theta, rope.scaling), (7000.0, wanted));
    // Layers that slide keep a rotation of their own.
    let own = Checkpoint::open(&golden_dir("gemma3")).unwrap().config;
    let gemma = changed("gemma3", |config| {
        config["rope_parameters"]["full_attention"] = json!({"rope_type": "default", "rope_theta": 50000.0});
    });
    let asked = Checkpoint::open_with(gemma.path(), Some(&asked("linear:4"))).unwrap().config;
    assert_eq!((asked.rope, asked.local_rope), (own.rope, own.local_rope));
}

#[test]
fn what_makes_no_sense_is_refused() {
    for text in [
        "",
        "yarn",
        "yarn:",
        "yarn:0.5",
        "yarn:-4",
        "yarn:nan",
        "yarn:inf",
        "spiral:4",
        "longrope:4",
        "[]",
        "{}",
        r#"{"factor": 4}"#,
        r#"{"rope_type": "yarn"}"#,
        r#"{"rope_type": "yarn", "factor": "4"}"#,
        r#"{"rope_type": 4, "factor": 4}"#,
        "{",
    ] {
        assert!(text.parse::<RopeOverride>().is_err(), "{text}");
    }
    let refused = |case: &str, text: &str| -> ModelError {
        Checkpoint::open_with(&golden_dir(case), Some(&asked(text))).unwrap_err()
    };
    for (case, text, wanted) in [
        ("llama_plain", r#"{"rope_type": "yarn", "factor": 4, "spin": 1}"#, "`rope_parameters.spin` is 1"),
        ("llama_plain", r#"{"rope_type": "yarn", "factor": 4, "beta_fast": -1}"#, "a positive number"),
        (
            "llama_plain",
            r#"{"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}"#,
            "more than `low_freq_factor`",
        ),
        (
            "llama_plain",
            r#"{"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0}"#,
            "`rope_parameters.original_max_position_embeddings` is 0",
        ),
        (
            "llama_plain",
            r#"{"rope_type": "longrope", "factor": 4, "short_factor": [1, 1], "long_factor": [1, 1]}"#,
            "4 numbers, not 2",
        ),
        ("llama_biases", "yarn:4", "the context that the model was made for before its own scaling"),
    ] {
        let error = refused(case, text);
        assert!(matches!(error, ModelError::RopeOverride { .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains(wanted), "{text}: {message}");
    }
    // What is wrong without it is not its fault.
    let broken = changed("llama_plain", |config| config["hidden_size"] = json!(-1));
    let error = Checkpoint::open_with(broken.path(), Some(&asked("yarn:4"))).unwrap_err();
    assert!(matches!(error, ModelError::Config { .. }), "{error}");
}
