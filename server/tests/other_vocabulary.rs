//! A draft of another vocabulary, from the outside: it loads with a word of warning, the deep lane's answers
//! stay the target's, and the fast lane speaks the draft's own tokens. The draft is the demo pair's with
//! its tokens under other ids, so its answers are known.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn demo(role: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo").join(role)
}

/// The first special token's id; it and those after it keep theirs.
fn first_special(tokenizer: &Value) -> u64 {
    let added = tokenizer["added_tokens"].as_array().expect("a list");
    added.iter().map(|token| token["id"].as_u64().expect("an id")).min().expect("special tokens")
}

/// The demo draft with its regular tokens in reverse order, in the tokenizer and in the weights.
fn reversed_draft(dir: &Path) {
    let read =
        |name: &str| std::fs::read(demo("draft").join(name)).expect("the demo pair is in the repository");
    for name in ["config.json", "generation_config.json", "tokenizer_config.json"] {
        if demo("draft").join(name).exists() {
            std::fs::write(dir.join(name), read(name)).expect("written");
        }
    }
    let mut tokenizer: Value = serde_json::from_slice(&read("tokenizer.json")).expect("JSON");
    let end = first_special(&tokenizer);
    for id in tokenizer["model"]["vocab"].as_object_mut().expect("a table").values_mut() {
        let old = id.as_u64().expect("an id");
        if old < end {
            *id = (end - 1 - old).into();
        }
    }
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).expect("written");

    let mut weights = read("model.safetensors");
    let (length, rest) = weights.split_first_chunk_mut::<8>().expect("a header");
    let (header, data) = rest.split_at_mut(u64::from_le_bytes(*length) as usize);
    let header: Value = serde_json::from_slice(header).expect("JSON");
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        let Some(tensor) = header.get(name) else { continue };
        let number = |value: &Value| value.as_u64().expect("a number") as usize;
        let (start, stop) = (number(&tensor["data_offsets"][0]), number(&tensor["data_offsets"][1]));
        let row_bytes = (stop - start) / number(&tensor["shape"][0]);
        let rows = &mut data[start..start + end as usize * row_bytes];
        let reversed: Vec<u8> = rows.chunks_exact(row_bytes).rev().flatten().copied().collect();
        rows.copy_from_slice(&reversed);
    }
    std::fs::write(dir.join("model.safetensors"), weights).expect("written");
}

/// What `tandem generate` writes, and what it says beside it.
fn generate(draft: &Path, arguments: &[&str]) -> (String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TANDEM_") {
            command.env_remove(name);
        }
    }
    command.arg("generate").arg("def read_lines(path):\n").args(["--max-tokens", "40", "--threads", "1"]);
    command.arg("--target").arg(demo("target")).arg("--draft").arg(draft).args(arguments);
    let output = command.output().expect("the binary starts");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    (String::from_utf8(output.stdout).expect("UTF-8"), stderr)
}

#[test]
fn a_draft_of_another_vocabulary_changes_no_answer() {
    let dir = tempfile::tempdir().expect("a folder");
    reversed_draft(dir.path());
    for temperature in ["0", "0.8"] {
        let arguments =
            ["--lane", "deep", "--temperature", temperature, "--seed", "3", "--draft-tokens", "3"];
        let (wanted, quiet) = generate(&demo("draft"), &arguments);
        let (found, warned) = generate(dir.path(), &arguments);
        assert_eq!(found, wanted, "temperature {temperature}");
        assert!(warned.contains("different vocabularies") && !quiet.contains("different vocabularies"));
        // The same model under other ids is as good a draft.
        assert!(warned.contains("accepted") == quiet.contains("accepted"), "{warned}");
    }
    let arguments = ["--lane", "fast", "--temperature", "0"];
    assert_eq!(generate(dir.path(), &arguments).0, generate(&demo("draft"), &arguments).0);
}

#[test]
fn the_verdict_is_explained() {
    let dir = tempfile::tempdir().expect("a folder");
    reversed_draft(dir.path());
    let pair = |draft: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
        command.arg("pair").arg(demo("target")).arg(draft).args(["--threads", "1", "--max-tokens", "16"]);
        let output = command.output().expect("the binary starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let same = pair(&demo("draft"));
    assert!(same.contains("vocabulary the same") && same.contains("estimate"), "{same}");
    let other = pair(dir.path());
    assert!(
        other.contains("vocabulary different") && other.contains("can propose 4096 of its 4096"),
        "{other}"
    );
}
