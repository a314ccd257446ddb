//! The binary from the outside: help, and what it says when it is told something wrong. Nothing here
//! has a model answer.

use std::path::Path;
use std::process::{Command, Output};

fn tandem(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.args(arguments);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TANDEM_") {
            command.env_remove(name);
        }
    }
    command.env("HF_HUB_OFFLINE", "1");
    command
}

fn fails(command: &mut Command, code: i32) -> String {
    let Output { status, stdout, stderr } = command.output().expect("the binary starts");
    let stderr = String::from_utf8(stderr).expect("UTF-8");
    assert_eq!(status.code(), Some(code), "{stderr}");
    assert_eq!(String::from_utf8_lossy(&stdout), "", "errors belong on standard error");
    stderr
}

fn succeeds(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().expect("the binary starts");
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).expect("UTF-8")
}

#[test]
fn help_teaches_by_example() {
    for command in ["serve", "generate", "train", "distill", "verify", "pair", "bench pair", "bench deep", ""]
    {
        let command: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let help = succeeds(&mut tandem(&command));
        assert!(help.contains("Examples:\n"), "{command:?}: {help}");
    }
    assert!(succeeds(&mut tandem(&["--version"])).starts_with("tandem "));
}

#[test]
fn a_wrong_setting_exits_with_2_and_names_its_place() {
    let message = fails(&mut tandem(&["serve", "--port", "http"]), 2);
    assert_eq!(message, "tandem: the flag --port is \"http\"; it must be a port from 0 to 65535\n");
    let message = fails(tandem(&["serve"]).env("TANDEM_DRAFT_TOKENS", "many"), 2);
    assert!(message.contains("TANDEM_DRAFT_TOKENS is \"many\""), "{message}");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tandem.toml");
    std::fs::write(&file, "thread = 2\n").expect("writing");
    let message = fails(&mut tandem(&["--config", &file.display().to_string()]), 2);
    assert!(message.ends_with("unknown key `thread`; did you mean `threads`?\n"), "{message}");
    assert!(fails(&mut tandem(&["serve", "--prot", "1"]), 2).contains("--port"));
}

#[test]
fn a_model_that_is_not_there_is_named() {
    let message = fails(&mut tandem(&["serve", "--port", "0", "--target", "/no/such/model"]), 1);
    assert!(message.contains("/no/such/model"), "{message}");
    let empty = tempfile::tempdir().expect("a folder");
    let folder = empty.path().display().to_string();
    let message = fails(&mut tandem(&["generate", "x", "--draft", &folder]), 1);
    assert!(message.contains(&folder) && message.contains("config.json"), "{message}");
    let message = fails(&mut tandem(&["verify", &folder]), 1);
    assert!(message.contains("config.json"), "{message}");
}

#[test]
fn a_rotary_scaling_that_makes_no_sense_is_explained() {
    let message = fails(&mut tandem(&["serve", "--rope-scaling", "yarn"]), 2);
    assert!(message.contains("--rope-scaling is \"yarn\"") && message.contains("`yarn:4`"), "{message}");
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/draft").display().to_string();
    let asked = r#"{"rope_type": "yarn", "factor": 4, "spin": 1}"#;
    let draft_alone = ["generate", "x", "--draft", &demo, "--draft-rope-scaling", asked];
    let message = fails(&mut tandem(&draft_alone), 1);
    assert!(message.contains(asked) && message.contains("spin"), "{message}");
    let too_long = ["generate", "x", "--draft", &demo, "--max-model-len", "8192"];
    assert!(fails(&mut tandem(&too_long), 1).contains("--rope-scaling can stretch it"));
}

/// A folder that holds a configuration only: what is not known is said before anything else is looked at.
#[test]
fn an_unknown_architecture_says_which_are_known_and_what_was_not_understood() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = r#"{"architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 64,
        "num_attention_heads": 4, "vocab_size": 96, "intermediate_size": 128, "num_hidden_layers": 2,
        "max_position_embeddings": 64, "state_size": 16, "conv_kernel": 4, "use_cache": true}"#;
    std::fs::write(folder.path().join("config.json"), config).expect("writing");
    let path = folder.path().display().to_string();
    for command in [&["serve", "--port", "0", "--target", &path][..], &["generate", "x", "--target", &path]] {
        let message = fails(&mut tandem(command), 1);
        for part in ["`model_type` is \"mamba\"", "llama, qwen2", "gpt_oss", "`conv_kernel`", "`state_size`"]
        {
            assert!(message.contains(part), "{message} lacks {part}");
        }
        assert!(!message.contains("use_cache"), "{message}");
    }
    let known = config.replace("mamba", "llama").replace("Mamba", "Llama");
    std::fs::write(folder.path().join("config.json"), known).expect("writing");
    let message = fails(&mut tandem(&["generate", "x", "--target", &path]), 1);
    assert!(
        message.contains("`conv_kernel` is 4; wanted absent")
            || message.contains("`state_size` is 16; wanted absent"),
        "{message}"
    );
}

#[test]
fn a_port_in_use_is_said_before_any_model_is_loaded() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let message = fails(&mut tandem(&["serve", "--port", &port, "--target", "/no/such/model"]), 1);
    assert!(message.contains(&format!("cannot listen on 127.0.0.1:{port}")), "{message}");
}

#[test]
fn an_empty_corpus_is_an_error_of_the_trainer_and_not_a_panic() {
    let corpus = tempfile::tempdir().expect("a folder");
    let out = corpus.path().join("out");
    let path = |path: &Path| path.display().to_string();
    let message =
        fails(&mut tandem(&["train", "--quiet", "--corpus", &path(corpus.path()), "--out", &path(&out)]), 1);
    assert!(message.contains("no training text"), "{message}");
}

#[test]
fn keys_are_made_listed_and_revoked() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keys.db").display().to_string();
    let key = succeeds(
        tandem(&["keys", "add", "ci", "--tokens", "2M/day", "--lanes", "fast"]).env("TANDEM_KEYS", &file),
    );
    assert!(key.starts_with("tdm_") && key.ends_with('\n') && key.lines().count() == 1, "the key alone");
    let list = succeeds(&mut tandem(&["keys", "list", "--keys", &file]));
    for part in ["ci", &key[..10], "fast", "0 of 2000000/day", "valid"] {
        assert!(list.contains(part), "{part} is not in\n{list}");
    }
    assert!(!list.contains(key.trim_end()));
    let message = fails(&mut tandem(&["keys", "add", "ci", "--keys", &file]), 1);
    assert!(message.contains("a key named \"ci\" already"), "{message}");
    succeeds(&mut tandem(&["keys", "revoke", "ci", "--keys", &file]));
    assert!(!succeeds(&mut tandem(&["keys", "list", "--keys", &file])).contains("ci"));
    assert!(succeeds(&mut tandem(&["keys", "list", "--all", "--keys", &file])).contains("revoked"));
    let message = fails(&mut tandem(&["keys", "list"]), 1);
    assert!(message.contains("--keys FILE"), "{message}");
    let message = fails(&mut tandem(&["keys", "add", "x", "--keys", &file, "--requests", "60/fortnight"]), 2);
    assert!(message.contains("60/min"), "{message}");
}

#[test]
fn rules_for_lanes_are_shown_and_explained() {
    let text = succeeds(&mut tandem(&["lanes"]));
    assert!(text.contains("short-completion") && text.contains("otherwise"), "{text}");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tandem.toml");
    let path = file.display().to_string();
    std::fs::write(
        &file,
        "[[lane-rule]]\nname = \"tools\"\ntools = true\nlane = \"fast\"\nescalate-below = 0.5\n",
    )
    .expect("writing");
    let request = ["lanes", "--config", &path, "--endpoint", "/v1/chat/completions"];
    assert_eq!(succeeds(&mut tandem(&request)), "deep, because no rule matches\n");
    let text = succeeds(tandem(&request).arg("--tools"));
    assert!(text.contains("by the rule \"tools\"") && text.contains("below 0.5"), "{text}");
    std::fs::write(&file, "[[lane-rule]]\nname = \"x\"\nlane = \"slow\"\n").expect("writing");
    let message = fails(&mut tandem(&["serve", "--config", &path]), 2);
    assert!(message.contains("lane-rule 1 \"x\": `lane` is \"slow\""), "{message}");
}

#[test]
fn a_wrong_certificate_is_said_before_any_model_is_loaded() {
    let folder = tempfile::tempdir().expect("a folder");
    let cert = folder.path().join("cert.pem");
    std::fs::write(&cert, "nothing").expect("writing");
    let cert = cert.display().to_string();
    let serve = ["serve", "--port", "0", "--target", "/no/such/model", "--tls-cert", &cert];
    let message = fails(tandem(&serve).args(["--tls-key", &cert]), 1);
    assert!(message.contains(&cert) && message.contains("no CERTIFICATE"), "{message}");
    let message = fails(&mut tandem(&serve), 2);
    assert!(message.contains("tls-cert is set and tls-key is not"), "{message}");
}
