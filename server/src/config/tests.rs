use std::io::Write as _;

use super::*;

fn flags(pairs: &[(&'static str, &str)]) -> Vec<(&'static str, RawValue)> {
    pairs.iter().map(|(key, value)| (*key, vec![(*value).to_owned()])).collect()
}

fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(text.as_bytes()).expect("writing it");
    file
}

#[test]
fn without_layers_every_setting_has_its_default() {
    let loaded = load(&[], None, env(&[("PATH", "/bin"), ("HOST", "ignored")])).expect("valid");
    assert_eq!(loaded.config, Config::default());
    assert!(loaded.warnings.is_empty());
}

#[test]
fn flag_beats_environment_beats_file_beats_default() {
    let file = file("port = 1001\nthreads = 1\nmax-num-seqs = 7\nhost = \"0.0.0.0\"\n");
    let loaded = load(
        &flags(&[("port", "1003")]),
        Some(file.path()),
        env(&[("TANDEM_PORT", "1002"), ("TANDEM_THREADS", "2")]),
    )
    .expect("valid");
    assert_eq!(loaded.config.port, 1003);
    assert_eq!(loaded.config.threads, Some(2));
    assert_eq!(loaded.config.max_num_seqs, 7);
    assert_eq!(loaded.config.host, "0.0.0.0");
    assert_eq!(loaded.config.max_waiting, Config::default().max_waiting);
    assert_eq!(loaded.file.as_deref(), Some(file.path()));
}

#[test]
fn every_setting_can_be_set_in_the_file_and_in_the_environment() {
    let mut values = [
        ("host", "0.0.0.0"),
        ("port", "0"),
        ("target", "./t"),
        ("draft", "./d"),
        ("draft-tokens", "4"),
        ("draft-head", "32768"),
        ("backend", "reference"),
        ("threads", "3"),
        ("kv-memory", "512MiB"),
        ("kv-dtype", "q8"),
        ("quantize", "q4"),
        ("rope-scaling", "yarn:4"),
        ("draft-rope-scaling", "file"),
        ("max-num-seqs", "5"),
        ("max-model-len", "100"),
        ("max-waiting", "9"),
        ("api-key", "k1"),
        ("keys", "/k.db"),
        ("tls-cert", "c.pem"),
        ("tls-key", "k.pem"),
        ("fast-context", "50"),
        ("cors", "true"),
        ("no-prefix-cache", "true"),
        ("no-lane-isolation", "true"),
        ("no-sharing", "true"),
        ("kv-events-endpoint", "tcp://*:5557"),
        ("kv-events-replay-endpoint", "tcp://127.0.0.1:5558"),
        ("kv-events-topic", "kv@pod@model"),
        ("otlp-traces-endpoint", "http://localhost:4318"),
        ("log", "debug"),
    ];
    assert_eq!(values.map(|(key, _)| key).to_vec(), SETTINGS.iter().map(|s| s.key).collect::<Vec<_>>());
    let mut expected = Config {
        host: "0.0.0.0".to_owned(),
        port: 0,
        target: Some("./t".to_owned()),
        draft: Some("./d".to_owned()),
        draft_tokens: DraftTokens::Fixed(4),
        draft_head: DraftHead::First(32_768),
        backend: BackendKind::Reference,
        threads: Some(3),
        kv_memory: Some(512 << 20),
        kv_dtype: KvType::Q8,
        quantize: Some(FileType::Q4_0),
        rope_scaling: Some("yarn:4".parse().expect("a scaling")),
        draft_rope_scaling: Some(None),
        max_num_seqs: 5,
        max_model_len: Some(100),
        max_waiting: 9,
        api_keys: vec!["k1".to_owned()],
        keys: Some("/k.db".into()),
        tls_cert: Some("c.pem".into()),
        tls_key: Some("k.pem".into()),
        lane_policy: LanePolicy { fast_context: Some(50), ..LanePolicy::default() },
        cors: true,
        prefix_cache: false,
        lane_isolation: false,
        sharing: false,
        kv_events_endpoint: Some("tcp://*:5557".parse().expect("an address")),
        kv_events_replay_endpoint: Some("tcp://127.0.0.1:5558".parse().expect("an address")),
        kv_events_topic: "kv@pod@model".to_owned(),
        otlp_traces_endpoint: Some("http://localhost:4318".parse().expect("an address")),
        log: Some("debug".to_owned()),
    };
    // Publishing and no prefix cache exclude each other: first without the former, then without the latter.
    let events = |key: &str| key.starts_with("kv-events");
    let without_events = Config {
        kv_events_endpoint: None,
        kv_events_replay_endpoint: None,
        kv_events_topic: String::new(),
        ..expected.clone()
    };
    is_set_everywhere(values.iter().copied().filter(|(key, _)| !events(key)), &without_events);
    values.iter_mut().filter(|(key, _)| *key == "no-prefix-cache").for_each(|(_, value)| *value = "false");
    expected.prefix_cache = true;
    is_set_everywhere(values.into_iter(), &expected);
}

/// Holds the file, the environment and the flags to it that these values make that of the settings.
fn is_set_everywhere(values: impl Iterator<Item = (&'static str, &'static str)>, expected: &Config) {
    let values: Vec<_> = values.collect();
    let text: String = values.iter().map(|(key, value)| format!("{key} = \"{value}\"\n")).collect();
    let file = file(&text);
    let from_env = values.iter().map(|(key, value)| (env_name(key), (*value).to_owned()));
    assert_eq!(&load(&[], Some(file.path()), env(&[])).expect("file").config, expected);
    assert_eq!(&load(&[], None, from_env).expect("environment").config, expected);
    assert_eq!(&load(&flags(&values), None, env(&[])).expect("flags").config, expected);
}

#[test]
fn settings_that_would_be_in_vain_are_refused() {
    let message =
        |pairs: &[(&'static str, &str)]| load(&flags(pairs), None, env(&[])).map_err(|e| e.to_string());
    let endpoint = ("kv-events-endpoint", "tcp://*:5557");
    for alone in [("kv-events-topic", "kv@pod@model"), ("kv-events-replay-endpoint", "tcp://*:5558")] {
        let found = message(&[alone]).map(|loaded| loaded.config).unwrap_err();
        assert_eq!(found, format!("{} is set and kv-events-endpoint is not; it needs both", alone.0));
        assert!(message(&[alone, endpoint]).is_ok());
    }
    let found = message(&[endpoint, ("no-prefix-cache", "true")]).map(|loaded| loaded.config).unwrap_err();
    assert!(found.starts_with("kv-events-endpoint is set and so is no-prefix-cache: "), "{found}");
    assert!(message(&[endpoint, ("no-prefix-cache", "false")]).is_ok());
}

#[test]
fn lists_come_as_arrays_commas_and_repeated_flags_and_replace_the_weaker_layer() {
    let file = file("api_key = [\"a\", \"b\"]\n");
    let keys = |flags: &[(&'static str, RawValue)], vars: &[(&str, &str)]| {
        load(flags, Some(file.path()), env(vars)).expect("valid").config.api_keys
    };
    assert_eq!(keys(&[], &[]), ["a", "b"]);
    assert_eq!(keys(&[], &[("TANDEM_API_KEY", "c, d")]), ["c", "d"]);
    let repeated = [("api-key", vec!["e".to_owned(), "f".to_owned()])];
    assert_eq!(keys(&repeated, &[("TANDEM_API_KEY", "c")]), ["e", "f"]);
}

#[test]
fn a_stronger_layer_can_take_the_draft_away() {
    let file = file("target = \"t\"\ndraft = \"d\"\n");
    let config = load(&flags(&[("draft", "")]), Some(file.path()), env(&[])).expect("valid").config;
    assert_eq!((config.target.as_deref(), config.draft), (Some("t"), None));
}

#[test]
fn a_wrong_value_names_key_value_and_place() {
    let file = file("port = 70000\n");
    let message = load(&[], Some(file.path()), env(&[])).unwrap_err().to_string();
    assert_eq!(
        message,
        format!("`port` in {} is \"70000\"; it must be a port from 0 to 65535", file.path().display())
    );
    let message = load(&[], None, env(&[("TANDEM_KV_MEMORY", "lots")])).unwrap_err().to_string();
    assert_eq!(
        message,
        "the environment variable TANDEM_KV_MEMORY is \"lots\"; it must be a size such as 512MiB or 2GiB"
    );
    let message = load(&flags(&[("draft-tokens", "33")]), None, env(&[])).unwrap_err().to_string();
    assert_eq!(message, "the flag --draft-tokens is \"33\"; it must be `auto` or a number from 0 to 32");
}

#[test]
fn a_wrong_value_is_reported_even_if_a_stronger_layer_replaces_it() {
    let error = load(&flags(&[("port", "1")]), None, env(&[("TANDEM_PORT", "x")])).unwrap_err();
    assert!(error.to_string().contains("TANDEM_PORT"), "{error}");
}

#[test]
fn a_wrong_api_key_is_not_printed() {
    let file = file("api-key = [\"secret\", \"\"]\n");
    let message = load(&[], Some(file.path()), env(&[])).unwrap_err().to_string();
    assert!(message.contains("api-key") && !message.contains("secret"), "{message}");
}

#[test]
fn a_collectors_address_says_what_would_be_right_and_hides_a_password() {
    let message =
        |url: &str| load(&flags(&[("otlp-traces-endpoint", url)]), None, env(&[])).unwrap_err().to_string();
    let found = message("http://c:99999/v1/traces");
    assert!(found.contains("http://c:99999/v1/traces") && found.contains("from 1 to 65535"), "{found}");
    let found = message("http://user:secret@c:4318/v1/traces");
    assert!(found.contains("without a user") && !found.contains("secret"), "{found}");
}

#[test]
fn an_unknown_key_names_the_nearest_known_one() {
    let file = file("draft-token = 4\n");
    let message = load(&[], Some(file.path()), env(&[])).unwrap_err().to_string();
    assert!(message.ends_with("unknown key `draft-token`; did you mean `draft-tokens`?"), "{message}");
    let file = self::file("zzz = 4\n");
    let message = load(&[], Some(file.path()), env(&[])).unwrap_err().to_string();
    assert!(message.contains("unknown key `zzz`; the keys are host, port"), "{message}");
}

#[test]
fn an_unknown_variable_is_warned_about_and_ignored() {
    let loaded = load(&[], None, env(&[("TANDEM_THREAD", "2"), ("TANDEM_ISA", "scalar")])).expect("valid");
    assert_eq!(loaded.config, Config::default());
    assert_eq!(
        loaded.warnings,
        ["the environment variable TANDEM_THREAD is no setting; did you mean TANDEM_THREADS?"]
    );
}

#[test]
fn a_table_or_an_array_in_the_place_of_one_value_is_refused() {
    for text in ["port = [1, 2]\n", "port = { a = 1 }\n", "threads = 1.5\n", "cors = 2\n", "host = [\"a\"]\n"]
    {
        let file = file(text);
        let error = load(&[], Some(file.path()), env(&[])).unwrap_err();
        assert!(matches!(error, ConfigError::Value { .. }), "{text}: {error}");
    }
}

#[test]
fn a_rotary_scaling_is_text_or_json_or_a_table() {
    let file = file("rope-scaling = { rope_type = \"yarn\", factor = 4.0, beta_fast = 16.0 }\n");
    let from_file = load(&[], Some(file.path()), env(&[])).expect("valid").config.rope_scaling;
    let json = r#"{"factor": 4.0, "type": "yarn", "beta_fast": 16.0}"#;
    let from_env = load(&[], None, env(&[("TANDEM_ROPE_SCALING", json)])).expect("valid").config.rope_scaling;
    // They differ in how they are shown only.
    assert_eq!(from_file.map(|scaling| scaling.scaling().clone()), from_env.map(|s| s.scaling().clone()));
    let message = load(&flags(&[("rope-scaling", "yarn")]), None, env(&[])).unwrap_err().to_string();
    assert!(message.starts_with("the flag --rope-scaling is \"yarn\"; it must be `file`, `none`, a kind"));
}

#[test]
fn the_environment_can_name_the_file_and_the_flag_wins() {
    let first = file("port = 1\n");
    let second = file("port = 2\n");
    let variable = [(CONFIG_VARIABLE.to_owned(), first.path().display().to_string())];
    assert_eq!(load(&[], None, variable.clone()).expect("valid").config.port, 1);
    assert_eq!(load(&[], Some(second.path()), variable).expect("valid").config.port, 2);
}

#[test]
fn a_missing_or_broken_file_is_named() {
    let missing = Path::new("/nonexistent/tandem.toml");
    let message = load(&[], Some(missing), env(&[])).unwrap_err().to_string();
    assert!(message.contains("/nonexistent/tandem.toml cannot be read"), "{message}");
    let file = file("port = \n");
    let message = load(&[], Some(file.path()), env(&[])).unwrap_err().to_string();
    assert!(message.contains("is not valid TOML"), "{message}");
}

#[test]
fn sizes_have_units() {
    let size = |text: &str| parse::size_bytes(&vec![text.to_owned()]);
    assert_eq!(size("512MiB"), Some(512 << 20));
    assert_eq!(size("2GiB"), Some(2 << 30));
    assert_eq!(size("2 gb"), Some(2_000_000_000));
    assert_eq!(size("1.5k"), Some(1536));
    assert_eq!(size("4096"), Some(4096));
    for wrong in ["", "GiB", "0", "-1GiB", "1.2.3M", "12 parsecs", "1e300", "99999999TiB"] {
        assert_eq!(size(wrong), None, "{wrong}");
    }
}

#[test]
fn rules_for_lanes_come_from_the_file() {
    let file = file("port = 1\n[[lane-rule]]\nname = \"all\"\nlane = \"fast\"\n");
    let policy = load(&[], Some(file.path()), env(&[])).expect("valid").config.lane_policy;
    assert_eq!(policy.rules.len(), 1);
    assert_eq!(&*policy.rules[0].name, "all");
}

#[test]
fn a_certificate_without_its_key_is_refused() {
    let error = load(&flags(&[("tls-cert", "c.pem")]), None, env(&[])).unwrap_err().to_string();
    assert!(error.contains("tls-cert is set and tls-key is not"), "{error}");
    let error = load(&flags(&[("tls-key", "k.pem")]), None, env(&[])).unwrap_err().to_string();
    assert!(error.contains("tls-key is set and tls-cert is not"), "{error}");
}
