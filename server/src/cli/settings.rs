//! The settings as flags. Values stay text here: `config.rs` gives the three layers one set of rules
//! and one kind of message.

use std::path::PathBuf;

use clap::Args;

use crate::config::{self, ConfigError, Loaded, RawValue};

/// Settings of every command that runs models.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ModelSettings {
    /// The large model: a folder (config.json, *.safetensors, tokenizer.json), a GGUF file, or a hub id
    /// such as Qwen/Qwen2.5-Coder-7B-Instruct, looked for in the local hub cache first. Without --target and
    /// --draft the demo pair is used; with --target alone there is no fast lane and no speculation
    #[arg(long, value_name = "MODEL", help_heading = "Models")]
    target: Option<String>,

    /// The small model, best of the same vocabulary: answers the fast lane and drafts for the deep lane.
    /// With --draft alone there is no deep lane. Or a head that only drafts, so that there is no fast lane: the
    /// folder or hub id of an EAGLE-3 head, or `mtp` for the target's own multi-token-prediction layer
    #[arg(long, value_name = "MODEL", help_heading = "Models")]
    draft: Option<String>,

    /// Tokens the draft proposes before each verification: a number up to 32, 0 for no speculation, or
    /// auto. Changes speed, never the output [default: auto]
    #[arg(long, value_name = "auto|N", help_heading = "Models")]
    draft_tokens: Option<String>,

    /// Tokens of the vocabulary that the draft chooses among while it proposes, the frequent ones first:
    /// auto (what pays, by measured costs and the text), all, or a number. Changes speed, never the output
    /// [default: all]
    #[arg(long, value_name = "auto|all|N", help_heading = "Models")]
    draft_head: Option<String>,

    /// Scale the rotary embedding of both models, and with it their context, in the place of what their files
    /// say: KIND:FACTOR with linear, dynamic, yarn or llama3 (yarn:4 makes 128K of Qwen2.5-Coder's 32K), the
    /// object of a config.json ({"rope_type": "yarn", ...}), none, or file. Changes the output
    /// [default: file]
    #[arg(long, value_name = "KIND:FACTOR|JSON", help_heading = "Models")]
    rope_scaling: Option<String>,

    /// The same for the draft alone, which may have been made for another context [default: as
    /// --rope-scaling]
    #[arg(long, value_name = "KIND:FACTOR|JSON", help_heading = "Models")]
    draft_rope_scaling: Option<String>,

    /// Longest prompt and output together, in tokens [default: what the models were made for, or were scaled
    /// to]
    #[arg(long, value_name = "TOKENS", help_heading = "Models")]
    max_model_len: Option<String>,

    /// What computes: cpu (Tandem's own kernels) or reference (slow and plain, for comparison)
    /// [default: cpu]
    #[arg(long, value_name = "cpu|reference", help_heading = "Machine")]
    backend: Option<String>,

    /// Threads that compute [default: one a CPU]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    threads: Option<String>,

    /// Memory for keys and values of running sequences, both models together, such as 512MiB or 2GiB
    /// [default: what --max-num-seqs full contexts need, at most a quarter of the free memory]
    #[arg(long, value_name = "SIZE", help_heading = "Machine")]
    kv_memory: Option<String>,

    /// Element type of keys and values: f16, q8 (half the memory of f16, a little less exact) or f32 (as
    /// computed, twice the memory) [default: f16]
    #[arg(long, value_name = "f32|f16|q8", help_heading = "Machine")]
    kv_dtype: Option<String>,

    /// Store matrices that are floats in the file in blocks of fewer bits, as `tandem quantize` would: q8
    /// (Q8_0, hardly a difference), q6_k, q4_k_m, or q4 (Q4_0, fastest to load). Norms, biases and routers
    /// stay as they are, and so does what is quantised already. Both models [default: none]
    #[arg(long, value_name = "q8|q4|FORMAT", help_heading = "Machine")]
    quantize: Option<String>,

    /// Do not keep the keys and values of finished sequences for prompts that begin alike. Changes speed,
    /// never the output [default: false]
    #[arg(
        long,
        value_name = "true|false",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Machine"
    )]
    no_prefix_cache: Option<String>,

    /// Do not suspend the target's pass between layers while the fast lane has work. Changes speed, never
    /// the output [default: false]
    #[arg(
        long,
        value_name = "true|false",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Machine"
    )]
    no_lane_isolation: Option<String>,

    /// TOML file with any of these settings under the same names [env: TANDEM_CONFIG]
    #[arg(long, value_name = "FILE", help_heading = "Settings")]
    config: Option<PathBuf>,

    /// What to log on standard error: error, warn, info, debug, trace, or a filter such as
    /// tandem=debug,warn. RUST_LOG is honoured too [default: info for serve, else warn]
    #[arg(long, value_name = "FILTER", help_heading = "Settings")]
    log: Option<String>,
}

/// Settings of `tandem serve`.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ServeSettings {
    /// Address to listen on; 0.0.0.0 for every interface [default: 127.0.0.1]
    #[arg(long, value_name = "ADDRESS", help_heading = "Network")]
    host: Option<String>,

    /// Port to listen on; 0 takes a free one and prints it [default: 8080]
    #[arg(long, value_name = "PORT", help_heading = "Network")]
    port: Option<String>,

    /// Key that clients must send as `Authorization: Bearer KEY`; repeat it for several. Prefer the
    /// environment (TANDEM_API_KEY=KEY1,KEY2) or the file: flags show in process lists
    #[arg(long, value_name = "KEY", help_heading = "Network")]
    api_key: Vec<String>,

    /// File of keys that `tandem keys add` makes; clients must send one of them. Changes are in use within a second
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    keys: Option<String>,

    /// Certificate chain for HTTPS, in a PEM file; read again when it changes. Needs --tls-key
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    tls_cert: Option<String>,

    /// Private key of the certificate, in a PEM file
    #[arg(long, value_name = "FILE", help_heading = "Network")]
    tls_key: Option<String>,

    /// Tokens of prompt and answer together beyond which `auto` takes the deep lane where a rule says fast
    /// [default: no such bound]
    #[arg(long, value_name = "TOKENS", help_heading = "Machine")]
    fast_context: Option<String>,

    /// Let web pages of any origin call the server [default: false]
    #[arg(
        long,
        value_name = "true|false",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Network"
    )]
    cors: Option<String>,

    /// Run a sequence of its own for every request. Otherwise identical requests that run at the same time
    /// share one, and a request that adds what a running completion has just written to its prompt goes on
    /// with that completion [default: false]
    #[arg(
        long,
        value_name = "true|false",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        help_heading = "Machine"
    )]
    no_sharing: Option<String>,

    /// Publish what the prefix cache gains and loses on this ZeroMQ socket, as vLLM does, for routers: such
    /// as tcp://*:5557. Who can reach it reads the tokens of all prompts [default: not]
    #[arg(long, value_name = "ADDRESS", help_heading = "Network")]
    kv_events_endpoint: Option<String>,

    /// Send missed KV events again to who asks for them here, such as tcp://*:5558 [default: not]
    #[arg(long, value_name = "ADDRESS", help_heading = "Network")]
    kv_events_replay_endpoint: Option<String>,

    /// The first frame of KV events' messages. llm-d wants kv@POD@MODEL [default: empty]
    #[arg(long, value_name = "TOPIC", help_heading = "Network")]
    kv_events_topic: Option<String>,

    /// Send a span of every request to this OpenTelemetry collector, such as
    /// http://localhost:4318/v1/traces; without prompts and answers [default: not]
    #[arg(long, value_name = "URL", help_heading = "Network")]
    otlp_traces_endpoint: Option<String>,

    /// Sequences of each lane that run at the same time; further ones wait [default: 32]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    max_num_seqs: Option<String>,

    /// Sequences of each lane that may wait before its new requests are refused with status 429 [default: 256]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    max_waiting: Option<String>,

    #[command(flatten)]
    pub(crate) model: ModelSettings,
}

impl ModelSettings {
    /// The settings given, by name.
    pub(crate) fn flags(&self) -> Vec<(&'static str, RawValue)> {
        given([
            ("target", &self.target),
            ("draft", &self.draft),
            ("draft-tokens", &self.draft_tokens),
            ("draft-head", &self.draft_head),
            ("rope-scaling", &self.rope_scaling),
            ("draft-rope-scaling", &self.draft_rope_scaling),
            ("max-model-len", &self.max_model_len),
            ("backend", &self.backend),
            ("threads", &self.threads),
            ("kv-memory", &self.kv_memory),
            ("kv-dtype", &self.kv_dtype),
            ("quantize", &self.quantize),
            ("no-prefix-cache", &self.no_prefix_cache),
            ("no-lane-isolation", &self.no_lane_isolation),
            ("log", &self.log),
        ])
    }

    /// Merges the given settings with environment and file.
    pub(crate) fn load(&self) -> Result<Loaded, ConfigError> {
        config::load(&self.flags(), self.config.as_deref(), environment())
    }
}

impl ServeSettings {
    /// The settings given, by name.
    pub(crate) fn flags(&self) -> Vec<(&'static str, RawValue)> {
        let mut flags = given([
            ("host", &self.host),
            ("port", &self.port),
            ("max-num-seqs", &self.max_num_seqs),
            ("max-waiting", &self.max_waiting),
            ("keys", &self.keys),
            ("tls-cert", &self.tls_cert),
            ("tls-key", &self.tls_key),
            ("fast-context", &self.fast_context),
            ("cors", &self.cors),
            ("no-sharing", &self.no_sharing),
            ("kv-events-endpoint", &self.kv_events_endpoint),
            ("kv-events-replay-endpoint", &self.kv_events_replay_endpoint),
            ("kv-events-topic", &self.kv_events_topic),
            ("otlp-traces-endpoint", &self.otlp_traces_endpoint),
        ]);
        if !self.api_key.is_empty() {
            flags.push(("api-key", self.api_key.clone()));
        }
        flags.extend(self.model.flags());
        flags
    }

    /// Merges the given settings with environment and file.
    pub(crate) fn load(&self) -> Result<Loaded, ConfigError> {
        config::load(&self.flags(), self.model.config.as_deref(), environment())
    }
}

fn given<const N: usize>(settings: [(&'static str, &Option<String>); N]) -> Vec<(&'static str, RawValue)> {
    settings.into_iter().filter_map(|(key, value)| Some((key, vec![value.clone()?]))).collect()
}

/// The environment as text; variables that are no Unicode cannot hold a setting.
pub(super) fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}
