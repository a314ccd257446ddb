//! `tandem serve`: settings, models, listener, and the lines that tell a newcomer what to do next.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tandem::http::traces::Tracer;
use tandem::http::{Listener, ServeOptions, Tls, serve, shutdown_signal};
use tandem::keys::{Keeper, Keyring};
use tandem::kv_events::{self, Publisher};
use tandem_engine::{DraftTokens, EngineHandle};
use tokio::net::TcpListener;

use super::settings::ServeSettings;
use super::terminal;
use crate::config::{Config, Loaded};
use crate::runtime::{self, ModelInfo, Runtime};

pub(super) const LONG_ABOUT: &str = "\
Serve a pair of models over HTTP, as OpenAI's, Anthropic's, llama.cpp's, Mistral's, Ollama's and Tabby's clients \
speak it.

Prints the address, the pair and a request to try, and serves until Ctrl-C, which lets running answers \
finish. OpenAI: /v1/completions (with `suffix` for fill-in-the-middle), /v1/chat/completions, /v1/responses, \
/v1/embeddings, /v1/models. Anthropic: /v1/messages. llama.cpp: /infill, /completion, /tokenize, /detokenize, \
/apply-template, /props, /slots. Mistral: /v1/fim/completions. Ollama: /api/generate, /api/chat, /api/tags, \
/api/show. Tabby: /v1/completions with `segments`, /v1/health. And /health and /metrics.";

pub(super) const EXAMPLES: &str = "\
Examples:
  tandem serve                                                   the demo pair
  tandem serve --target ./big --draft ./small --rope-scaling yarn:4    four times their context
  tandem serve --target ./big --draft ./small --kv-memory 4GiB
  tandem serve --target ./big                                    no fast lane, no speculation
  tandem serve --target big-q4_k_m.gguf --draft small-q8_0.gguf
  tandem serve --target ./big --draft ./big-eagle3               a head drafts; no fast lane
  TANDEM_API_KEY=KEY1,KEY2 tandem serve --host 0.0.0.0
  tandem serve --keys keys.db --tls-cert chain.pem --tls-key key.pem --host 0.0.0.0
  tandem serve --config tandem.toml

tandem.toml, every key a flag's name:
  target = \"/models/big\"
  draft = \"/models/small\"
  threads = 16
  kv-memory = \"8GiB\"
  api-key = [\"KEY1\", \"KEY2\"]";

pub(super) fn run(settings: &ServeSettings) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let Loaded { config, file, warnings } = settings.load()?;
    terminal::init_logging(config.log.as_deref(), "info");
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    if let Some(file) = file {
        tracing::info!("settings read from {}", file.display());
    }
    let most_files = runtime::raise_open_files();
    runtime::serving_runtime()?.block_on(async {
        // Bound before the models are loaded: a port in use is said at once.
        let listener = TcpListener::bind((config.host.as_str(), config.port))
            .await
            .with_context(|| format!("cannot listen on {}:{}", config.host, config.port))?;
        let address = listener.local_addr()?;
        // So that a wrong file is said before the models take their time.
        let keys = Arc::new(Keyring::new(&config.api_keys, config.keys.is_some()));
        let keeper = config.keys.as_deref().map(|path| Keeper::start(path, keys.clone())).transpose()?;
        let tls = match (&config.tls_cert, &config.tls_key) {
            (Some(cert), Some(key)) => Some(Arc::new(Tls::open(cert, key)?)),
            _ => None,
        };
        let publisher = config.kv_events().map(|settings| Publisher::bind(&settings)).transpose()?;
        let (kv_events, outgoing) = publisher.is_some().then(kv_events::channel).unzip();
        let runtime = {
            let config = config.clone();
            tokio::task::spawn_blocking(move || runtime::start_publishing(&config, kv_events)).await??
        };
        let _publishing = match publisher.zip(outgoing) {
            Some((publisher, outgoing)) => Some(publisher.start(outgoing, runtime.kv.block_size)?),
            None => None,
        };
        print(&greeting(&config, &runtime, address, started.elapsed()));
        let listener = Listener { tcp: listener, tls };

        let (state, engine_thread) = runtime.into_state(keys, config.lane_policy, config.cors);
        let mut options = ServeOptions::default();
        // Some files are not sockets.
        options.max_connections = options.max_connections.min(most_files.saturating_sub(128).max(64));
        let (state, exporting) = match config.otlp_traces_endpoint {
            Some(url) => {
                let (tracer, exporting) = Tracer::start(url, service_name());
                (state.traced(tracer), Some(exporting))
            }
            None => (state, None),
        };
        let engine = state.engine.clone();
        serve(listener, Arc::new(state), options, async {
            tokio::select! {
                () = shutdown_signal() => {}
                () = failure_of(&engine) => {
                    tracing::error!("the engine stopped after an internal error");
                    return;
                }
            }
            eprintln!(
                "stopping: no new requests; running answers have {} seconds to finish (Ctrl-C again: at once)",
                options.grace_period.as_secs()
            );
        })
        .await?;
        if let Some(exporting) = exporting {
            exporting.finish().await;
        }
        // The last of what was used of the keys is written down.
        drop(keeper);
        if engine_thread.join().is_err() {
            anyhow::bail!("the engine's thread panicked");
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// What traces call this server, by OpenTelemetry's own variable.
fn service_name() -> String {
    std::env::var("OTEL_SERVICE_NAME").ok().filter(|name| !name.is_empty()).unwrap_or("tandem".to_owned())
}

/// Resolves once the engine is no longer healthy; the process then ends, so that whoever supervises it
/// starts it again.
async fn failure_of(engine: &EngineHandle) {
    while engine.is_healthy() {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Written at once: scripts wait for these lines.
fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    // Somebody who closed our standard output still wants the server.
    let _ = stdout.write_all(text.as_bytes());
    let _ = stdout.flush();
}

fn greeting(config: &Config, runtime: &Runtime, address: SocketAddr, ready: Duration) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<8} {value}");
    };
    let target = runtime.target.as_ref().map(|(info, _)| info);
    let draft = runtime.draft.as_ref().map(|(info, _)| info);
    if let Some(info) = target {
        line("target", describe(info));
    }
    if let Some(info) = draft {
        line("draft", describe(info));
    }
    if let Some(head) = &runtime.head {
        line("head", format!("{}: {}", head.kind.name(), describe(&head.info)));
    }
    line("lanes", lanes(target, draft, runtime.head.is_some(), config.draft_tokens));
    line(
        "context",
        format!(
            "{} tokens a sequence, {} if it is full; KV cache {} in {} = {} blocks of {} tokens ({} tokens)",
            runtime.max_model_len,
            terminal::bytes(runtime.kv.bytes_of(runtime.max_model_len)),
            terminal::bytes(runtime.kv.size_bytes),
            runtime.kv.kv_type.name(),
            runtime.kv.num_blocks,
            runtime.kv.block_size,
            runtime.kv.num_tokens()
        ),
    );
    line("machine", format!("{} threads, {} kernels", runtime.threads, tandem_kernels::isa::active().name()));
    line(
        "ready",
        format!("after {:.2} s (models {:.2} s)", ready.as_secs_f64(), runtime.load_time.as_secs_f64()),
    );
    let url = url(address, config.tls_cert.is_some());
    format!("tandem {} on {url}\n{text}\nTry it:\n{}", env!("CARGO_PKG_VERSION"), curl(&url, config))
}

fn describe(info: &ModelInfo) -> String {
    let scaling =
        info.rope_scaling.as_ref().map_or_else(String::new, |rope| format!(", rope scaling {rope}"));
    format!(
        "{}  {} parameters, {}, {}{scaling}  ({})",
        info.name,
        terminal::count(info.num_parameters),
        terminal::bytes(info.size_bytes),
        info.dtype.name().to_lowercase(),
        info.dir.display()
    )
}

fn lanes(
    target: Option<&ModelInfo>,
    draft: Option<&ModelInfo>,
    has_head: bool,
    draft_tokens: DraftTokens,
) -> String {
    let speculation = match draft_tokens {
        _ if draft.is_none() && !has_head => "no draft, so no speculation".to_owned(),
        DraftTokens::Fixed(0) => "speculation off".to_owned(),
        DraftTokens::Fixed(1) => "1 draft token a verification".to_owned(),
        DraftTokens::Fixed(count) => format!("{count} draft tokens a verification"),
        DraftTokens::Auto => "draft tokens chosen as it runs".to_owned(),
    };
    match (target, draft) {
        (Some(_), None) if has_head => {
            format!(
                "deep = target ({speculation}); auto = deep; no fast lane, as a head answers nobody by itself"
            )
        }
        (Some(_), Some(_)) => format!("fast = draft; deep = target ({speculation}); auto"),
        (Some(_), None) => format!("deep = target ({speculation}); auto = deep"),
        _ => "fast = draft; auto = fast (no target, so no deep lane)".to_owned(),
    }
}

/// The address as a client on this machine would write it.
fn url(address: SocketAddr, is_tls: bool) -> String {
    let scheme = if is_tls { "https" } else { "http" };
    if address.ip().is_unspecified() {
        format!("{scheme}://127.0.0.1:{}", address.port())
    } else {
        format!("{scheme}://{address}")
    }
}

fn curl(url: &str, config: &Config) -> String {
    let is_open = config.api_keys.is_empty() && config.keys.is_none();
    let key = if is_open { "" } else { " -H \"Authorization: Bearer $TANDEM_KEY\"" };
    format!(
        "  curl -N {url}/v1/completions -H 'Content-Type: application/json'{key} \\\n    \
         -d '{{\"model\": \"auto\", \"prompt\": \"def fibonacci(n):\\n\", \"max_tokens\": 96, \"stream\": true}}'\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_can_be_pasted() {
        let url = |address: &str, is_tls| url(address.parse().expect("an address"), is_tls);
        assert_eq!(url("0.0.0.0:80", false), "http://127.0.0.1:80");
        assert_eq!(url("10.0.0.1:8080", true), "https://10.0.0.1:8080");
        assert_eq!(url("[::1]:8080", false), "http://[::1]:8080");
    }

    #[test]
    fn the_curl_line_holds_json_and_no_key() {
        let config = Config { api_keys: vec!["secret".to_owned()], ..Config::default() };
        let text = curl("http://h:1", &config);
        let body = text.split("-d '").nth(1).and_then(|rest| rest.rsplit_once('\'')).expect("a body").0;
        let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
        assert_eq!(body["prompt"], "def fibonacci(n):\n");
        assert!(text.contains("$TANDEM_KEY") && !text.contains("secret"));
    }
}
