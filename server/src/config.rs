//! The settings, and where they come from: flags, `TANDEM_*` environment variables and one TOML file.
//!
//! One table, [`SETTINGS`], names every setting once; flag `--draft-tokens`, variable
//! `TANDEM_DRAFT_TOKENS` and file key `draft-tokens` are derived from its name, so the three cannot
//! drift apart. Layers are applied weakest first (default, file, environment, flag) and every layer's
//! values are checked, also those that a stronger layer replaces: a wrong value is reported where it
//! stands instead of on the day the stronger layer goes away.

use std::fmt;
use std::path::{Path, PathBuf};

mod lane_rules;
mod parse;

use tandem::http::lanes::{LanePolicy, LaneRule};
use tandem::http::traces::CollectorUrl;
use tandem::kv_events::{Endpoint, PublisherSettings};
use tandem_engine::{DraftHead, DraftTokens, MAX_DRAFT_TOKENS};
use tandem_models::{BackendKind, FileType, KvType, RopeOverride};

/// Every setting, with its default value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    /// Address or host name to listen on.
    pub(crate) host: String,
    /// Port to listen on; 0 lets the system choose.
    pub(crate) port: u16,
    /// The large model: a folder or a hub id.
    pub(crate) target: Option<String>,
    /// What drafts: the small model or a head, by folder or hub id, or `mtp`.
    pub(crate) draft: Option<String>,
    /// Draft tokens a verification.
    pub(crate) draft_tokens: DraftTokens,
    /// Of how many tokens the draft chooses while it proposes.
    pub(crate) draft_head: DraftHead,
    /// Which implementation computes.
    pub(crate) backend: BackendKind,
    /// Threads that compute; `None` is one a logical core.
    pub(crate) threads: Option<usize>,
    /// Bytes of KV cache, both models together; `None` is computed when the models are known.
    pub(crate) kv_memory: Option<u64>,
    /// Element type of keys and values.
    pub(crate) kv_dtype: KvType,
    /// What loading makes of weights that are floats in the file; `None` leaves them.
    pub(crate) quantize: Option<FileType>,
    /// Sequences of each lane that run at the same time.
    pub(crate) max_num_seqs: usize,
    /// The rotary scaling of both models in the place of their files'; `None` leaves those.
    pub(crate) rope_scaling: Option<RopeOverride>,
    /// That of the draft; `None` is [`Config::rope_scaling`].
    pub(crate) draft_rope_scaling: Option<Option<RopeOverride>>,
    /// Longest prompt and output together, in tokens; `None` is the model's own limit.
    pub(crate) max_model_len: Option<usize>,
    /// Requests that may wait for room before new ones are refused.
    pub(crate) max_waiting: usize,
    /// Keys that clients must show; empty lets everybody in.
    pub(crate) api_keys: Vec<String>,
    /// The file of keys, if there is one.
    pub(crate) keys: Option<PathBuf>,
    /// Certificate chain and private key, in PEM files; both or neither.
    pub(crate) tls_cert: Option<PathBuf>,
    pub(crate) tls_key: Option<PathBuf>,
    /// How `auto` picks a lane. Only the file can have rules.
    pub(crate) lane_policy: LanePolicy,
    /// Web pages of any origin may call.
    pub(crate) cors: bool,
    /// The blocks of finished sequences are kept and shared.
    pub(crate) prefix_cache: bool,
    /// The target's pass makes room for the fast lane between layers.
    pub(crate) lane_isolation: bool,
    /// Requests may read the output of a sequence that another one started.
    pub(crate) sharing: bool,
    /// Where changes of the prefix cache are published; `None`: nowhere.
    pub(crate) kv_events_endpoint: Option<Endpoint>,
    /// Where missed ones can be asked for.
    pub(crate) kv_events_replay_endpoint: Option<Endpoint>,
    /// What their messages begin with.
    pub(crate) kv_events_topic: String,
    /// The collector that gets a span of every request; `None`: nobody.
    pub(crate) otlp_traces_endpoint: Option<CollectorUrl>,
    /// What is logged, in `RUST_LOG` syntax; `None` leaves it to `RUST_LOG`, then to the command.
    pub(crate) log: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            host: "127.0.0.1".to_owned(),
            port: 8080,
            target: None,
            draft: None,
            draft_tokens: DraftTokens::Auto,
            draft_head: DraftHead::Whole,
            backend: BackendKind::Cpu,
            threads: None,
            kv_memory: None,
            kv_dtype: KvType::F16,
            quantize: None,
            max_num_seqs: 32,
            rope_scaling: None,
            draft_rope_scaling: None,
            max_model_len: None,
            max_waiting: 256,
            api_keys: Vec::new(),
            keys: None,
            tls_cert: None,
            tls_key: None,
            lane_policy: LanePolicy::default(),
            cors: false,
            prefix_cache: true,
            lane_isolation: true,
            sharing: true,
            kv_events_endpoint: None,
            kv_events_replay_endpoint: None,
            kv_events_topic: String::new(),
            otlp_traces_endpoint: None,
            log: None,
        }
    }
}

impl Config {
    /// How to publish KV events, if that is wanted.
    pub(crate) fn kv_events(&self) -> Option<PublisherSettings> {
        Some(PublisherSettings {
            endpoint: self.kv_events_endpoint.clone()?,
            replay_endpoint: self.kv_events_replay_endpoint.clone(),
            topic: self.kv_events_topic.clone(),
        })
    }
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A command-line flag.
    Flag,
    /// An environment variable.
    Env,
    /// The configuration file.
    File(PathBuf),
}

/// A value as its layer gives it, before the setting's own rules are applied.
pub(crate) type RawValue = Vec<String>;

/// Puts a value where it belongs; false if it breaks the setting's rules.
type Setter = fn(&mut Config, &RawValue) -> bool;

/// What a setting takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    /// One value.
    One,
    /// A list: a repeated flag, commas in the environment, an array in the file.
    Many,
    /// One value; in the file also a table, which is the same as its JSON in a string.
    Table,
}

/// One setting: its name, what its values look like, and where they go.
struct Setting {
    key: &'static str,
    wanted: &'static str,
    takes: Takes,
    set: Setter,
}

const fn one(key: &'static str, wanted: &'static str, set: Setter) -> Setting {
    Setting { key, wanted, takes: Takes::One, set }
}

const fn many(key: &'static str, wanted: &'static str, set: Setter) -> Setting {
    Setting { key, wanted, takes: Takes::Many, set }
}

const fn table(key: &'static str, wanted: &'static str, set: Setter) -> Setting {
    Setting { key, wanted, takes: Takes::Table, set }
}

const SETTINGS: &[Setting] = &[
    one("host", "an address or host name", |c, v| put(&mut c.host, parse::text(v))),
    one("port", "a port from 0 to 65535", |c, v| put(&mut c.port, parse::number(v, 0, u16::MAX))),
    one("target", "a model folder or hub id", |c, v| put(&mut c.target, parse::optional_text(v))),
    one("draft", "a folder or hub id of a model or an EAGLE-3 head, or `mtp`", |c, v| {
        put(&mut c.draft, parse::optional_text(v))
    }),
    one("draft-tokens", "`auto` or a number from 0 to 32", |c, v| {
        put(&mut c.draft_tokens, parse::draft_tokens(v, MAX_DRAFT_TOKENS as u8))
    }),
    one("draft-head", "`auto`, `all` or a number of tokens from 1 up", |c, v| {
        put(&mut c.draft_head, parse::draft_head(v))
    }),
    one("backend", "`cpu` or `reference`", |c, v| put(&mut c.backend, parse::backend(v))),
    one("threads", "a number from 1 to 1024", |c, v| {
        put(&mut c.threads, parse::number(v, 1, 1024).map(Some))
    }),
    one("kv-memory", "a size such as 512MiB or 2GiB", |c, v| {
        put(&mut c.kv_memory, parse::size_bytes(v).map(Some))
    }),
    one("kv-dtype", "`f32`, `f16` or `q8`", |c, v| put(&mut c.kv_dtype, parse::kv_dtype(v))),
    one("quantize", "`q8`, `q4`, `q6_k`, `q4_k_m` or `none`", |c, v| {
        put(&mut c.quantize, parse::quantize(v))
    }),
    table("rope-scaling", ROPE_SCALING, |c, v| put(&mut c.rope_scaling, parse::rope_scaling(v))),
    table("draft-rope-scaling", ROPE_SCALING, |c, v| {
        put(&mut c.draft_rope_scaling, parse::rope_scaling(v).map(Some))
    }),
    one("max-num-seqs", "a number from 1 to 4096", |c, v| {
        put(&mut c.max_num_seqs, parse::number(v, 1, 4096))
    }),
    one("max-model-len", "a number of tokens from 2 up", |c, v| {
        put(&mut c.max_model_len, parse::number(v, 2, usize::MAX).map(Some))
    }),
    one("max-waiting", "a number from 1 to 1000000", |c, v| {
        put(&mut c.max_waiting, parse::number(v, 1, 1_000_000))
    }),
    many("api-key", "one or more keys, none of them empty", |c, v| put(&mut c.api_keys, parse::texts(v))),
    one("keys", "a file of keys, which `tandem keys add` makes", |c, v| put(&mut c.keys, parse::path(v))),
    one("tls-cert", "a PEM file with a certificate chain", |c, v| put(&mut c.tls_cert, parse::path(v))),
    one("tls-key", "a PEM file with a private key", |c, v| put(&mut c.tls_key, parse::path(v))),
    one("fast-context", "a number of tokens from 2 up", |c, v| {
        put(&mut c.lane_policy.fast_context, parse::number(v, 2, usize::MAX).map(Some))
    }),
    one("cors", "true or false", |c, v| put(&mut c.cors, parse::boolean(v))),
    one("no-prefix-cache", "true or false", |c, v| put(&mut c.prefix_cache, parse::boolean(v).map(|no| !no))),
    one("no-lane-isolation", "true or false", |c, v| {
        put(&mut c.lane_isolation, parse::boolean(v).map(|no| !no))
    }),
    one("no-sharing", "true or false", |c, v| put(&mut c.sharing, parse::boolean(v).map(|no| !no))),
    one("kv-events-endpoint", "an address to listen at, such as tcp://*:5557", |c, v| {
        put(&mut c.kv_events_endpoint, parse::parsed(v))
    }),
    one("kv-events-replay-endpoint", "an address to listen at, such as tcp://*:5558", |c, v| {
        put(&mut c.kv_events_replay_endpoint, parse::parsed(v))
    }),
    one("kv-events-topic", "text", |c, v| {
        put(&mut c.kv_events_topic, parse::optional_text(v).map(Option::unwrap_or_default))
    }),
    one("otlp-traces-endpoint", TRACES_ENDPOINT, |c, v| put(&mut c.otlp_traces_endpoint, parse::parsed(v))),
    one("log", "a filter such as info, debug or tandem=debug,warn", |c, v| {
        put(&mut c.log, parse::log_filter(v).map(Some))
    }),
];

const TRACES_ENDPOINT: &str = "a collector's address without a user or password, and with a port from 1 to 65535 if it \
     has one, such as http://localhost:4318/v1/traces";

const ROPE_SCALING: &str = "`file`, `none`, a kind and its factor such as `yarn:4` (linear, dynamic, yarn or \
     llama3, and a number from 1 up), or an object as in config.json: {\"rope_type\": \"yarn\", \"factor\": 4}";

/// False if there is no value to put.
fn put<T>(slot: &mut T, value: Option<T>) -> bool {
    value.map(|value| *slot = value).is_some()
}

/// The variable that names the configuration file when `--config` does not.
const CONFIG_VARIABLE: &str = "TANDEM_CONFIG";

/// Variables that belong to Tandem and are no settings.
const OTHER_VARIABLES: &[&str] = &[CONFIG_VARIABLE, "TANDEM_ISA"];

/// Why the settings cannot be used.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum ConfigError {
    /// A value breaks its setting's rules.
    #[error("{place} is {value:?}; it must be {wanted}")]
    Value { place: String, value: String, wanted: &'static str },
    /// The file holds a key that is no setting.
    #[error("{}: unknown key `{key}`{}", path.display(), did_you_mean(nearest.as_deref()))]
    UnknownKey { path: PathBuf, key: String, nearest: Option<String> },
    /// A rule for lanes cannot be used.
    #[error("{}: {rule}: {reason}", path.display())]
    LaneRule { path: PathBuf, rule: String, reason: String },
    /// One of two settings that belong together is missing.
    #[error("{given} is set and {missing} is not; it needs both")]
    Half { given: &'static str, missing: &'static str },
    /// One of two settings is in vain with the other.
    #[error("{given} is set and so is {other}: {reason}; leave one of them out")]
    Clash { given: &'static str, other: &'static str, reason: &'static str },
    /// The file cannot be read.
    #[error("the configuration file {} cannot be read: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    /// The file is not TOML.
    #[error("the configuration file {} is not valid TOML: {reason}", path.display())]
    NotToml { path: PathBuf, reason: String },
}

fn did_you_mean(nearest: Option<&str>) -> String {
    match nearest {
        Some(key) => format!("; did you mean `{key}`?"),
        None => format!("; the keys are {}", SETTINGS.iter().map(|s| s.key).collect::<Vec<_>>().join(", ")),
    }
}

/// The settings and what should be said about how they were found.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// The merged settings.
    pub(crate) config: Config,
    /// The file that was read.
    pub(crate) file: Option<PathBuf>,
    /// `TANDEM_*` variables that are not settings: probably misspelt ones.
    pub(crate) warnings: Vec<String>,
}

/// Merges the three layers.
///
/// `flags` are the settings given on the command line; `file` is `--config`; `env` is the
/// environment (passed in, so that tests need not change the process's own).
///
/// # Errors
/// The first value that breaks its rules, or an unreadable or unknown part of the file.
pub(crate) fn load(
    flags: &[(&'static str, RawValue)],
    file: Option<&Path>,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<Loaded, ConfigError> {
    let env: Vec<(String, String)> =
        env.into_iter().filter(|(name, _)| name.starts_with("TANDEM_")).collect();
    let file = file.map(Path::to_owned).or_else(|| {
        env.iter().find(|(name, value)| name == CONFIG_VARIABLE && !value.is_empty()).map(|(_, v)| v.into())
    });

    let mut config = Config::default();
    if let Some(path) = &file {
        let File { values, lane_rules } = read_file(path)?;
        if let Some(rules) = lane_rules {
            config.lane_policy.rules = rules;
        }
        for (key, value) in values {
            apply(
                &mut config,
                find(&key).expect("read_file returns known keys"),
                &value,
                &Origin::File(path.clone()),
            )?;
        }
    }
    let mut warnings = Vec::new();
    for (name, value) in &env {
        let Some(setting) = SETTINGS.iter().find(|s| env_name(s.key) == *name) else {
            if !OTHER_VARIABLES.contains(&name.as_str()) {
                warnings.push(unknown_variable(name));
            }
            continue;
        };
        // An empty variable is how shells and service managers spell "not set".
        if !value.is_empty() {
            let values = if setting.takes == Takes::Many {
                value.split(',').map(|v| v.trim().to_owned()).collect()
            } else {
                vec![value.clone()]
            };
            apply(&mut config, setting, &values, &Origin::Env)?;
        }
    }
    for (key, value) in flags {
        apply(&mut config, find(key).expect("every flag is a setting: this is a bug"), value, &Origin::Flag)?;
    }
    check_together(&config)?;
    Ok(Loaded { config, file, warnings })
}

/// Whether the settings have what they need of each other.
fn check_together(config: &Config) -> Result<(), ConfigError> {
    let publishes = config.kv_events_endpoint.is_some();
    let needs = [
        ("tls-cert", config.tls_cert.is_some(), "tls-key", config.tls_key.is_some()),
        ("tls-key", config.tls_key.is_some(), "tls-cert", config.tls_cert.is_some()),
        (
            "kv-events-replay-endpoint",
            config.kv_events_replay_endpoint.is_some(),
            "kv-events-endpoint",
            publishes,
        ),
        ("kv-events-topic", !config.kv_events_topic.is_empty(), "kv-events-endpoint", publishes),
    ];
    for (given, is_given, missing, is_there) in needs {
        if is_given && !is_there {
            return Err(ConfigError::Half { given, missing });
        }
    }
    if publishes && !config.prefix_cache {
        let (given, other) = ("kv-events-endpoint", "no-prefix-cache");
        let reason = "without a prefix cache there is nothing to publish";
        return Err(ConfigError::Clash { given, other, reason });
    }
    Ok(())
}

/// The names of all settings.
#[cfg(test)]
pub(crate) fn keys() -> impl Iterator<Item = &'static str> {
    SETTINGS.iter().map(|setting| setting.key)
}

fn find(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

/// `draft-tokens` as `TANDEM_DRAFT_TOKENS`.
fn env_name(key: &str) -> String {
    format!("TANDEM_{}", key.to_uppercase().replace('-', "_"))
}

fn apply(
    config: &mut Config,
    setting: &Setting,
    value: &RawValue,
    origin: &Origin,
) -> Result<(), ConfigError> {
    if (setting.set)(config, value) {
        return Ok(());
    }
    let value = value.join(",");
    // A key is a secret, and so is an address's password: the message goes to logs and terminals.
    let is_secret =
        setting.key == "api-key" || (setting.key == "otlp-traces-endpoint" && value.contains('@'));
    Err(ConfigError::Value {
        place: place(setting.key, origin),
        value: if is_secret { "(hidden)".to_owned() } else { value },
        wanted: setting.wanted,
    })
}

/// How a message names the spot that a value came from.
fn place(key: &str, origin: &Origin) -> String {
    struct Spot<'a>(&'a str, &'a Origin);
    impl fmt::Display for Spot<'_> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self.1 {
                Origin::Flag => write!(f, "the flag --{}", self.0),
                Origin::Env => write!(f, "the environment variable {}", env_name(self.0)),
                Origin::File(path) => write!(f, "`{}` in {}", self.0, path.display()),
            }
        }
    }
    Spot(key, origin).to_string()
}

fn unknown_variable(name: &str) -> String {
    let key = name.trim_start_matches("TANDEM_").to_lowercase().replace('_', "-");
    match nearest(&key) {
        Some(key) => {
            format!("the environment variable {name} is no setting; did you mean {}?", env_name(&key))
        }
        None => format!("the environment variable {name} is no setting and is ignored"),
    }
}

/// The known key that `key` is most likely meant to be; `None` if none is close.
fn nearest(key: &str) -> Option<String> {
    let similarity = |known: &str| strsim::jaro_winkler(known, key);
    SETTINGS
        .iter()
        .map(|setting| setting.key)
        .max_by(|a, b| similarity(a).total_cmp(&similarity(b)))
        // Below this, suggestions for short unrelated words begin to look like jokes.
        .filter(|known| similarity(known) > 0.75)
        .map(str::to_owned)
}

/// What the configuration file holds.
struct File {
    /// (key, value) pairs, all keys known.
    values: Vec<(String, RawValue)>,
    /// The tables called `lane-rule`, if there are any.
    lane_rules: Option<Vec<LaneRule>>,
}

fn read_file(path: &Path) -> Result<File, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| ConfigError::Unreadable { path: path.to_owned(), reason: error.to_string() })?;
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| ConfigError::NotToml {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    let (mut values, mut lane_rules) = (Vec::new(), None);
    for (written, value) in table {
        // Both spellings are natural in TOML; the dashed one is the flag's.
        let key = written.replace('_', "-");
        if key == lane_rules::KEY {
            lane_rules = Some(lane_rules::read(path, value)?);
            continue;
        }
        let Some(setting) = find(&key) else {
            return Err(ConfigError::UnknownKey {
                path: path.to_owned(),
                nearest: nearest(&key),
                key: written,
            });
        };
        let raw = raw_value(&value, setting.takes).ok_or_else(|| ConfigError::Value {
            place: place(&key, &Origin::File(path.to_owned())),
            value: if key == "api-key" { "(hidden)".to_owned() } else { value.to_string() },
            wanted: setting.wanted,
        })?;
        values.push((key, raw));
    }
    Ok(File { values, lane_rules })
}

/// A TOML value as text; `None` for dates, and for tables and arrays where one value is wanted.
fn raw_value(value: &toml::Value, takes: Takes) -> Option<RawValue> {
    let scalar = |value: &toml::Value| match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(truth) => Some(truth.to_string()),
        _ => None,
    };
    match value {
        toml::Value::Array(items) if takes == Takes::Many => items.iter().map(scalar).collect(),
        toml::Value::Table(_) if takes == Takes::Table => Some(vec![serde_json::to_string(value).ok()?]),
        value => Some(vec![scalar(value)?]),
    }
}

#[cfg(test)]
mod tests;
