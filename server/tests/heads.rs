//! A drafting head from the outside: `tandem serve` with one answers as without, says what drafts and counts
//! what stood, and a wrong head is refused by what is wrong with it. The target is a random Llama whose head
//! copies its last hidden state, and so proposes what the target last said once more, which random Llamas say often.

#[path = "support/checkpoint.rs"]
mod checkpoint;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use checkpoint::CheckpointSpec;
use serde_json::{Map, Value, json};

const LAYERS: usize = 3;
/// Of `CheckpointSpec`'s models.
const HIDDEN: usize = 32;

struct Pair {
    _folder: tempfile::TempDir,
    target: PathBuf,
    head: PathBuf,
}

impl Pair {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (target, head) = (folder.path().join("big"), folder.path().join("big-eagle3"));
        CheckpointSpec::default().write(&target, LAYERS, 7);
        let config = std::fs::read(target.join("config.json")).expect("it was written");
        let config: Value = serde_json::from_slice(&config).expect("JSON");
        write_head(&head, &config);
        Pair { _folder: folder, target, head }
    }

    fn change_head(&self, key: &str, value: Value) {
        let path = self.head.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
        config[key] = value;
        std::fs::write(path, config.to_string()).expect("written");
    }
}

/// A head whose layer adds nothing to what it is given, the target's last hidden state.
fn write_head(dir: &Path, target: &Value) {
    let identity: Vec<f32> =
        (0..HIDDEN * HIDDEN).map(|i| f32::from(u8::from(i / HIDDEN == i % HIDDEN))).collect();
    let zeros = |rows: usize, columns: usize| (vec![rows, columns], vec![0.0f32; rows * columns]);
    let ones = || (vec![HIDDEN], vec![1.0; HIDDEN]);
    let tensors = [
        ("fc.weight", (vec![HIDDEN, HIDDEN], identity)),
        ("norm.weight", ones()),
        ("midlayer.input_layernorm.weight", ones()),
        ("midlayer.hidden_norm.weight", ones()),
        ("midlayer.post_attention_layernorm.weight", ones()),
        ("midlayer.self_attn.q_proj.weight", zeros(32, 2 * HIDDEN)),
        ("midlayer.self_attn.k_proj.weight", zeros(16, 2 * HIDDEN)),
        ("midlayer.self_attn.v_proj.weight", zeros(16, 2 * HIDDEN)),
        ("midlayer.self_attn.o_proj.weight", zeros(HIDDEN, 32)),
        ("midlayer.mlp.gate_proj.weight", zeros(64, HIDDEN)),
        ("midlayer.mlp.up_proj.weight", zeros(64, HIDDEN)),
        ("midlayer.mlp.down_proj.weight", zeros(HIDDEN, 64)),
    ];
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, (shape, elements)) in tensors {
        let start = data.len();
        data.extend(elements.into_iter().flat_map(f32::to_le_bytes));
        let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] });
        header.insert(name.to_owned(), entry);
    }
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::create_dir_all(dir).expect("a folder");
    std::fs::write(dir.join("model.safetensors"), file).expect("written");
    let mut config = target.clone();
    config["architectures"] = json!(["LlamaForCausalLMEagle3"]);
    config["num_hidden_layers"] = json!(1);
    config["tie_word_embeddings"] = json!(false);
    config["draft_vocab_size"] = target["vocab_size"].clone();
    config["eagle_aux_hidden_state_layer_ids"] = json!([LAYERS]);
    std::fs::write(dir.join("config.json"), config.to_string()).expect("written");
}

fn tandem(arguments: &[&str], models: &[(&str, &Path)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TANDEM_") {
            command.env_remove(name);
        }
    }
    command.args(arguments);
    for (flag, path) in models {
        command.arg(flag).arg(path);
    }
    command
}

/// A server in a process of its own.
struct Served {
    process: Child,
    address: String,
    greeting: String,
}

impl Served {
    fn start(models: &[(&str, &Path)]) -> Self {
        let arguments =
            ["serve", "--port", "0", "--threads", "1", "--kv-memory", "8MiB", "--draft-tokens", "3"];
        let mut command = tandem(&arguments, models);
        let mut process = command.stdout(Stdio::piped()).spawn().expect("the binary starts");
        let mut lines = BufReader::new(process.stdout.take().expect("a pipe")).lines();
        let mut greeting = String::new();
        while !greeting.contains("Try it:") {
            greeting += &lines.next().expect("the greeting has an end").expect("text");
            greeting.push('\n');
        }
        let address = greeting.split("http://").nth(1).and_then(|rest| rest.split_whitespace().next());
        Served { process, address: address.expect("an address").to_owned(), greeting }
    }

    /// Status and body.
    fn request(&self, head: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).expect("it listens");
        let length = body.len();
        write!(
            stream,
            "{head} HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )
        .expect("it is sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it is answered");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        (head[9..12].parse().expect("a status"), body.to_owned())
    }

    fn complete(&self, body: &Value) -> Value {
        let (status, answer) = self.request("POST /v1/completions", &body.to_string());
        assert_eq!(status, 200, "{answer}");
        serde_json::from_str(&answer).expect("JSON")
    }

    /// Its value once it is not 0.
    fn until_positive(&self, name: &str) -> f64 {
        for _ in 0..600 {
            let value = self.metric(name);
            if value > 0.0 {
                return value;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        panic!("{name} stayed 0");
    }

    fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.request("GET /metrics", "");
        let line =
            text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in {text}"));
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_server_with_a_head_answers_as_without_and_counts_what_stood() {
    let pair = Pair::new();
    let plain = Served::start(&[("--target", &pair.target)]);
    let with_head = Served::start(&[("--target", &pair.target), ("--draft", &pair.head)]);
    let greeting = &with_head.greeting;
    assert!(greeting.contains("EAGLE-3 head: big-eagle3") && greeting.contains("no fast lane"), "{greeting}");
    for temperature in [0.0, 0.7] {
        for prompt in ["def add(a, b):\n", "for item in items:\n    print(", "x"] {
            let body = json!({
                "model": "auto", "prompt": prompt, "max_tokens": 48, "temperature": temperature, "seed": 3,
                "logprobs": 2, "speculative.sources": ["draft"]
            });
            let [found, wanted] =
                [&with_head, &plain].map(|server| server.complete(&body)["choices"].clone());
            assert_eq!(found, wanted, "{prompt:?}, temperature {temperature}");
        }
    }
    // Counts are published after a step, which may be after the answer.
    let stood = "tandem_draft_tokens_accepted_total{source=\"draft\"}";
    let num_stood = with_head.until_positive(stood);
    let drafted = with_head.metric("tandem_draft_tokens_total{source=\"draft\"}");
    assert!(drafted >= num_stood && plain.metric(stood) == 0.0);

    let body = json!({ "model": "fast", "prompt": "x" }).to_string();
    let (status, answer) = with_head.request("POST /v1/completions", &body);
    assert!(
        status == 404 && answer.contains("a drafting head answers nobody by itself"),
        "{status} {answer}"
    );
}

/// A head's positions are stretched as its target's are, unless something else is asked for: seen by what a head
/// that is scaled by itself has no answer to.
#[test]
fn a_head_takes_over_its_targets_rotary_scaling() {
    let pair = Pair::new();
    let scaled = |more: &[&str]| {
        let arguments = [&["generate", "x", "--max-tokens", "1", "--rope-scaling", "yarn:2"], more].concat();
        let models = [("--target", pair.target.as_path()), ("--draft", pair.head.as_path())];
        let Output { status, stderr, .. } = tandem(&arguments, &models).output().expect("the binary starts");
        (status.success(), String::from_utf8_lossy(&stderr).into_owned())
    };
    let (is_fine, stderr) = scaled(&[]);
    assert!(is_fine, "{stderr}");
    pair.change_head("rope_scaling", json!({ "rope_type": "linear", "factor": 2.0 }));
    let (is_fine, stderr) = scaled(&[]);
    assert!(!is_fine && stderr.contains("original_max_position_embeddings"), "{stderr}");
    let (is_fine, stderr) = scaled(&["--draft-rope-scaling", "file"]);
    assert!(is_fine, "{stderr}");
}

#[test]
fn a_scaling_for_a_layer_of_the_target_is_refused() {
    let pair = Pair::new();
    for asked in ["yarn:2", "file"] {
        let arguments = ["generate", "x", "--draft", "mtp", "--draft-rope-scaling", asked];
        let output = tandem(&arguments, &[("--target", &pair.target)]).output().expect("the binary starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains("leave --draft-rope-scaling out"), "{stderr}");
    }
}

#[test]
fn a_head_of_another_target_is_refused_by_what_is_wrong_with_it() {
    let cases: [(&str, Value, &str); 7] = [
        ("vocab_size", json!(128), "made for a target of 128 tokens"),
        ("target_hidden_size", json!(64), "whose hidden states are 64 wide, this one's are 32"),
        ("eagle_aux_hidden_state_layer_ids", json!([1, 9]), "none above 3"),
        ("eagle_aux_hidden_state_layer_ids", Value::Null, "not in a target of 3 layers"),
        ("num_hidden_layers", json!(2), "a head of several layers is not supported"),
        ("architectures", json!(["LlamaForCausalLMEagle"]), "wanted an EAGLE-3 head"),
        ("draft_vocab_size", json!(20), "no tensor `d2t`"),
    ];
    for (key, value, reason) in cases {
        let pair = Pair::new();
        pair.change_head(key, value);
        let Output { status, stderr, .. } =
            tandem(&["generate", "x"], &[("--target", &pair.target), ("--draft", &pair.head)])
                .output()
                .expect("the binary starts");
        let stderr = String::from_utf8_lossy(&stderr);
        assert!(!status.success() && stderr.contains(reason), "{key}: {stderr}");
        let explained = tandem(&["pair"], &[]).args([&pair.target, &pair.head]).output().expect("it starts");
        let text = String::from_utf8_lossy(&explained.stdout) + String::from_utf8_lossy(&explained.stderr);
        assert!(!explained.status.success() && text.contains(reason), "{key}: {text}");
    }
    let pair = Pair::new();
    for (models, reason) in [
        (vec![("--draft", pair.head.as_path())], "name its target with --target"),
        (
            vec![("--target", pair.target.as_path()), ("--draft", Path::new("mtp"))],
            "it carries no layer for multi-token prediction",
        ),
    ] {
        let output = tandem(&["generate", "x"], &models).output().expect("the binary starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains(reason), "{stderr}");
    }
}

#[test]
fn a_pair_with_a_head_is_explained() {
    let pair = Pair::new();
    let mut command = tandem(&["pair", "--threads", "1", "--max-tokens", "16"], &[]);
    let output = command.args([&pair.target, &pair.head]).output().expect("the binary starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text} {}", String::from_utf8_lossy(&output.stderr));
    for wanted in [
        "EAGLE-3 head that reads the target's hidden states after layers 3",
        "deep only",
        "tried",
        "estimate",
    ] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
}
