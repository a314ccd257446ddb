//! A running server over the real engine, with a tiny random pair made in a temporary folder, and a
//! client that speaks plain HTTP/1.1 over TCP.

#![allow(dead_code, reason = "each test file uses its part")]

mod checkpoint;
mod gated;
pub(crate) mod scripted;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tandem::http::lanes::LanePolicy;
use tandem::http::traces::Tracer;
use tandem::http::{AppConfig, AppState, LaneModel, Limits, Listener, ServeOptions, Tls, serve};
use tandem::keys::Keyring;
use tandem_engine::{DraftHead, DraftTokens, EngineConfig, EngineHandle, KvEvents, Models};
use tandem_kernels::ThreadPool;
use tandem_models::{
    BackendKind, ChatTemplate, Checkpoint, FimTokens, KvType, Model, RopeOverride, Tokenizer,
};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub(crate) use checkpoint::CheckpointSpec;
use gated::GatedModel;
use scripted::{Line, Script, ScriptedModel};

/// How the server under test is made.
pub(crate) struct TestOptions {
    pub(crate) serve: ServeOptions,
    pub(crate) limits: Limits,
    pub(crate) api_keys: Vec<String>,
    /// While it is held, the target does nothing.
    pub(crate) gate: Option<Arc<Mutex<()>>>,
    /// In the place of `api_keys`.
    pub(crate) keys: Option<Arc<Keyring>>,
    pub(crate) tls: Option<Arc<Tls>>,
    pub(crate) policy: LanePolicy,
    pub(crate) cors: bool,
    pub(crate) sharing: bool,
    pub(crate) prefix_cache: bool,
    pub(crate) max_waiting: usize,
    pub(crate) max_model_len: usize,
    pub(crate) with_draft: bool,
    pub(crate) checkpoint: CheckpointSpec,
    /// As `--rope-scaling` and `--kv-dtype`.
    pub(crate) rope_scaling: Option<&'static str>,
    pub(crate) kv_type: KvType,
    /// The target says what [`TestServer::say`] asks for.
    pub(crate) scripted: bool,
    /// The shipped pair answers.
    pub(crate) demo: bool,
    /// Is sent spans of requests.
    pub(crate) tracer: Option<Tracer>,
    /// Is told of changes of the prefix cache.
    pub(crate) kv_events: Option<KvEvents>,
}

impl Default for TestOptions {
    fn default() -> Self {
        TestOptions {
            serve: ServeOptions::default(),
            limits: Limits::default(),
            api_keys: vec![],
            gate: None,
            keys: None,
            tls: None,
            policy: LanePolicy::default(),
            cors: false,
            sharing: true,
            prefix_cache: true,
            max_waiting: 64,
            max_model_len: 256,
            with_draft: true,
            checkpoint: CheckpointSpec::default(),
            rope_scaling: None,
            kv_type: KvType::F16,
            scripted: false,
            demo: false,
            tracer: None,
            kv_events: None,
        }
    }
}

pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    pub(crate) engine: EngineHandle,
    pub(crate) state: Arc<AppState>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    script: Script,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<std::io::Result<()>>,
    engine_thread: std::thread::JoinHandle<()>,
    _folder: TempDir,
}

/// A response read to its end.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {:?}", String::from_utf8_lossy(&self.body)))
    }

    /// The `error` object, after checking that it has OpenAI's shape.
    pub(crate) fn error(&self) -> Value {
        assert!(self.status.is_client_error() || self.status.is_server_error(), "status {}", self.status);
        let error = self.json()["error"].clone();
        for field in ["message", "type", "param", "code"] {
            assert!(error.get(field).is_some(), "{field} is missing in {error}");
        }
        assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
        error
    }

    /// The JSON of every `data:` event but the end mark, which must be last.
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, StatusCode::OK, "{:?}", String::from_utf8_lossy(&self.body));
        assert_eq!(self.headers["content-type"], "text/event-stream");
        let text = std::str::from_utf8(&self.body).expect("events are UTF-8");
        let mut events: Vec<&str> = text
            .split("\n\n")
            .filter(|event| !event.is_empty())
            .map(|event| event.strip_prefix("data: ").expect("only data lines are sent"))
            .collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).expect("an event is JSON")).collect()
    }
}

/// Reads a response to its end.
pub(crate) async fn finish(response: http::Response<Incoming>) -> Answer {
    let (parts, body) = response.into_parts();
    let body = body.collect().await.expect("a whole body").to_bytes();
    Answer { status: parts.status, headers: parts.headers, body }
}

impl TestServer {
    pub(crate) async fn start(options: TestOptions) -> TestServer {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut target_dir = folder.path().join("big-model");
        let mut draft_dir = folder.path().join("small-model");
        if options.demo {
            let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
            (target_dir, draft_dir) = (demo.join("target"), demo.join("draft"));
        } else {
            options.checkpoint.write(&target_dir, 2, 7);
            options.checkpoint.write(&draft_dir, 1, 8);
        }
        let pool = Arc::new(ThreadPool::new(1));
        let rope = options.rope_scaling.map(|text| text.parse().expect("a scaling"));
        let load = |dir: &Path| load(dir, rope.as_ref(), options.kv_type, &pool);
        let (mut target_model, target) = load(&target_dir);
        let script = Script::default();
        if options.scripted {
            target_model =
                Box::new(ScriptedModel::new(target_model, target.tokenizer.clone(), script.clone()));
        }
        if let Some(gate) = options.gate {
            target_model = Box::new(GatedModel { inner: target_model, gate });
        }
        let (draft_model, draft) = options.with_draft.then(|| load(&draft_dir)).unzip();
        let tokenizer = target.tokenizer.clone();
        let config = EngineConfig {
            block_size: 16,
            num_blocks: (options.max_model_len / 16) * 8,
            max_num_seqs: 8,
            max_num_batched_tokens: 512,
            max_waiting: options.max_waiting,
            max_model_len: options.max_model_len,
            num_token_ids: target_model.config().vocab_size,
            vocab_map: None,
            draft_tokens: DraftTokens::Fixed(3),
            draft_head: DraftHead::Auto,
            prefix_cache: options.prefix_cache,
            hash_key: [5, 6],
            hash_bits: 64,
            lane_isolation: true,
        };
        let models = Models { target: Some(target_model), draft: draft_model };
        let (engine, engine_thread) =
            EngineHandle::spawn_with(config, models, options.kv_events).expect("the engine starts");
        let state = AppState::new(AppConfig {
            engine: engine.clone(),
            target: Some(target),
            draft,
            keys: options.keys.unwrap_or_else(|| Arc::new(Keyring::new(&options.api_keys, false))),
            policy: options.policy,
            cors: options.cors,
            sharing: options.sharing,
            limits: options.limits,
        });
        let state = Arc::new(match options.tracer {
            Some(tracer) => state.traced(tracer),
            None => state,
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            let _ = stopped.await;
        };
        let listener = Listener { tcp: listener, tls: options.tls };
        let serving = tokio::spawn(serve(listener, state.clone(), options.serve, shutdown));
        TestServer {
            address,
            engine,
            state,
            tokenizer,
            script,
            stop: Some(stop),
            serving,
            engine_thread,
            _folder: folder,
        }
    }

    /// The server as most tests need it.
    pub(crate) async fn plain() -> TestServer {
        TestServer::start(TestOptions::default()).await
    }

    /// The same without a prefix cache, so that equal requests have equal accounts.
    pub(crate) async fn uncached() -> TestServer {
        TestServer::start(TestOptions { prefix_cache: false, ..TestOptions::default() }).await
    }

    /// A server whose only model says what [`TestServer::say`] asks for.
    pub(crate) async fn scripted(chat_template: &'static str, tokens: &'static [&'static str]) -> TestServer {
        let checkpoint =
            CheckpointSpec { chat_template: Some(chat_template), tokens, ..CheckpointSpec::default() };
        let options = TestOptions {
            checkpoint,
            scripted: true,
            with_draft: false,
            max_model_len: 4096,
            ..TestOptions::default()
        };
        TestServer::start(options).await
    }

    /// What a scripted model answers from now on.
    pub(crate) fn say(&self, answer: &str) {
        self.say_when(&[(&[], answer)]);
    }

    /// The same for prompts that hold certain texts; the first that fits counts.
    pub(crate) fn say_when(&self, lines: &[(&[&str], &str)]) {
        let end = self.tokenizer.token_to_id("<|endoftext|>").expect("a special token");
        let line = |&(when, answer): &(&[&str], &str)| {
            let mut tokens = self.tokenizer.encode(answer, false).expect("text has tokens");
            tokens.push(end);
            Line { when: when.iter().map(|text| (*text).to_owned()).collect(), tokens }
        };
        self.script.set(lines.iter().map(line).collect());
    }

    /// Asks the server to stop; returns at once.
    pub(crate) fn begin_shutdown(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    /// Stops the server and waits for it and for the engine to end.
    pub(crate) async fn stop(mut self) {
        self.begin_shutdown();
        self.serving.await.expect("serve does not panic").expect("serve ends well");
        self.engine_thread.join().expect("the engine does not panic");
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("the server accepts")
    }

    /// Posts without waiting for the body; dropping the response closes the connection.
    pub(crate) async fn post_open(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> http::Response<Incoming> {
        let mut request = Request::post(path).header("host", "test");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request.body(Full::new(Bytes::from(body.to_string()))).expect("a request")).await
    }

    /// Sends a request on a connection of its own.
    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> http::Response<Incoming> {
        let io = TokioIo::new(self.connect().await);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.expect("a handshake");
        tokio::spawn(connection);
        sender.send_request(request).await.expect("a response")
    }

    pub(crate) async fn request(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path).header("host", "test");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = Full::new(Bytes::copy_from_slice(body.as_bytes()));
        finish(self.send(request.body(body).expect("a request")).await).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.request(Method::GET, path, &[], "").await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_text(path, &body.to_string()).await
    }

    pub(crate) async fn post_text(&self, path: &str, body: &str) -> Answer {
        self.request(Method::POST, path, &[("content-type", "application/json")], body).await
    }

    /// Waits until `condition` holds of the engine; the bound only ends a test that would hang.
    pub(crate) async fn until(&self, what: &str, condition: impl Fn(&tandem_engine::EngineStats) -> bool) {
        for _ in 0..6000 {
            if condition(&self.engine.stats()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("never happened: {what}; {:?}", self.engine.stats());
    }
}

fn load(
    dir: &Path,
    rope: Option<&RopeOverride>,
    kv_type: KvType,
    pool: &Arc<ThreadPool>,
) -> (Box<dyn Model>, LaneModel) {
    let checkpoint = Checkpoint::open_with(dir, rope).expect("the checkpoint opens");
    let model = tandem_models::load_with(&checkpoint, BackendKind::Cpu, kv_type, pool.clone());
    let model = model.expect("the model loads");
    let tokenizer = Arc::new(Tokenizer::from_dir(dir).expect("the tokenizer loads"));
    let chat_template = ChatTemplate::from_dir(dir, &tokenizer).expect("the template loads").map(Arc::new);
    let fim = FimTokens::from_dir(dir, &tokenizer).expect("the order is known");
    let name = checkpoint.name.clone();
    (model, LaneModel { name, tokenizer, chat_template, fim, generation: checkpoint.generation })
}
