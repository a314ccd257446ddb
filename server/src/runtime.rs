//! From settings to a running engine: finds the pair, loads both models side by side, sizes the KV
//! cache, starts the engine's thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tandem::http::lanes::LanePolicy;
use tandem::http::{AppConfig, AppState, LaneModel, Limits};
use tandem::keys::Keyring;
use tandem_engine::{DraftHead, EngineConfig, EngineHandle, KvEvents, Models};
use tandem_kernels::ThreadPool;
use tandem_models::{Dtype, HeadKind, Model, RopeOverride, VocabMap};

use crate::config::Config;

mod kv;
mod pair;

pub(crate) use kv::KvInfo;
pub(crate) use pair::find_demo_pair;
use pair::{Loaded, Opened, OpenedPair};

/// Tokens of one forward pass. A longer prompt takes several, so that sequences which decode wait for
/// at most this much of it.
const MAX_NUM_BATCHED_TOKENS: usize = 512;

/// What is said about a loaded model.
#[derive(Clone, Debug)]
pub(crate) struct ModelInfo {
    /// The name that `/v1/models` lists.
    pub(crate) name: String,
    /// Where it was found.
    pub(crate) dir: PathBuf,
    /// Weights, each counted once.
    pub(crate) num_parameters: u64,
    /// Their bytes, in the types that they were loaded in.
    pub(crate) size_bytes: u64,
    /// The element type that most of them have.
    pub(crate) dtype: Dtype,
    /// The rotary scaling in the place of the files'.
    pub(crate) rope_scaling: Option<RopeOverride>,
}

/// A loaded model as people and the HTTP side see it; the engine has the rest.
pub(crate) type Described = (ModelInfo, LaneModel);

/// A head that drafts for the target.
#[derive(Clone, Debug)]
pub(crate) struct HeadInfo {
    pub(crate) kind: HeadKind,
    pub(crate) info: ModelInfo,
    /// Its outputs are some of the target's tokens, in an order of their own.
    pub(crate) has_own_outputs: bool,
}

/// A running engine and everything that the front needs beside it.
pub(crate) struct Runtime {
    pub(crate) engine: EngineHandle,
    /// Ends after [`EngineHandle::drain`] or [`EngineHandle::shutdown`].
    pub(crate) engine_thread: JoinHandle<()>,
    pub(crate) target: Option<Described>,
    pub(crate) draft: Option<Described>,
    /// What drafts where there is no draft.
    pub(crate) head: Option<HeadInfo>,
    pub(crate) kv: KvInfo,
    pub(crate) max_model_len: usize,
    /// Ids below this are the target's tokens, or both models'.
    pub(crate) num_token_ids: usize,
    /// For a draft of another vocabulary.
    pub(crate) vocab_map: Option<Arc<VocabMap>>,
    pub(crate) threads: usize,
    /// See [`Config::sharing`].
    pub(crate) sharing: bool,
    pub(crate) load_time: Duration,
}

impl Runtime {
    /// What the HTTP side works on, and the engine's thread, which ends after the engine was told to.
    pub(crate) fn into_state(
        self,
        keys: Arc<Keyring>,
        policy: LanePolicy,
        cors: bool,
    ) -> (AppState, JoinHandle<()>) {
        let state = AppState::new(AppConfig {
            engine: self.engine,
            target: self.target.map(|(_, text)| text),
            draft: self.draft.map(|(_, text)| text),
            keys,
            policy,
            cors,
            sharing: self.sharing,
            limits: Limits::default(),
        });
        (state, self.engine_thread)
    }
}

/// Loads the pair and starts the engine.
///
/// # Errors
/// A model that is missing, broken or no match for the other; settings that cannot work with it.
pub(crate) fn start(config: &Config) -> anyhow::Result<Runtime> {
    start_with(config, |models| models)
}

/// As [`start`], with somebody who is told of changes of the prefix cache.
///
/// # Errors
/// As [`start`].
pub(crate) fn start_publishing(config: &Config, kv_events: Option<KvEvents>) -> anyhow::Result<Runtime> {
    out_of_the_way(|| load(config, |models| models, kv_events))
}

/// As [`start`], with models that `adapt` has put something around: for benchmarks.
///
/// # Errors
/// As [`start`].
pub(crate) fn start_with(
    config: &Config,
    adapt: impl FnOnce(Models) -> Models + Send,
) -> anyhow::Result<Runtime> {
    out_of_the_way(|| load(config, adapt, None))
}

/// Loads on a thread of its own: threads inherit their priority from who starts them.
fn out_of_the_way(load: impl FnOnce() -> anyhow::Result<Runtime> + Send) -> anyhow::Result<Runtime> {
    std::thread::scope(|scope| {
        let starting = scope.spawn(|| {
            yield_to_others();
            load()
        });
        starting.join().expect("loading does not panic: this is a bug")
    })
}

/// Priority of the threads that compute, on a scale from 0 to 19: little enough that other programs do not
/// push them aside.
#[cfg(target_os = "linux")]
const COMPUTE_NICENESS: i32 = 5;

/// Lets the threads that compute, which take every CPU there is, give way at once to those that talk to
/// clients: a request is read when it comes, and not when the system next looks whose turn it is.
fn yield_to_others() {
    #[cfg(target_os = "linux")]
    {
        // Without it a request may wait some milliseconds longer.
        let _ = rustix::process::setpriority_process(None, COMPUTE_NICENESS);
    }
}

/// Threads for sockets and parsing, where a server and its clients are in one process; the engine and the pool
/// have threads of their own.
///
/// # Errors
/// If the operating system refuses a thread.
pub(crate) fn async_runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()
}

/// Threads for sockets and parsing of a server. Of several, the one that a token wakes wakes another, to look
/// for more work, which there is not: one thread does with half of the wakeups, and with 15 us a token carries
/// more tokens than any model here gives. What would hold it up, such as long texts to be tokenized, runs on
/// threads apart.
pub(crate) const SERVING_THREADS: usize = 1;

/// The runtime of a server.
///
/// # Errors
/// If the operating system refuses a thread.
pub(crate) fn serving_runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(SERVING_THREADS).enable_all().build()
}

fn load(
    config: &Config,
    adapt: impl FnOnce(Models) -> Models,
    kv_events: Option<KvEvents>,
) -> anyhow::Result<Runtime> {
    let started = Instant::now();
    let threads = config.threads.unwrap_or_else(default_threads);
    let pool = thread_pool(threads)?;
    let OpenedPair { target, draft, vocab_map } = OpenedPair::open(config)?;
    let load = |opened: Opened| opened.load(config.backend, kv::kv_type(config), &pool);
    let (mut target, draft) = pair::side_by_side(target, draft, load)?;

    let (kv, max_model_len) = kv::size_context(config, [&target, &draft])?;
    let num_token_ids = num_token_ids([&target, &draft], vocab_map.as_deref());
    warn_of_useless_draft_head(config, [&target, &draft], vocab_map.is_some(), num_token_ids);
    let engine_config = EngineConfig {
        block_size: kv.block_size,
        num_blocks: kv.num_blocks,
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: MAX_NUM_BATCHED_TOKENS,
        max_waiting: config.max_waiting,
        max_model_len,
        num_token_ids,
        vocab_map: vocab_map.clone(),
        draft_tokens: config.draft_tokens,
        draft_head: config.draft_head,
        prefix_cache: config.prefix_cache,
        hash_key: rand::random(),
        hash_bits: 64,
        lane_isolation: config.lane_isolation,
    };
    let head = target.as_mut().and_then(|loaded| loaded.head.take());
    let (target_model, target) = split(target);
    let (draft_model, draft) = split(draft);
    let models = adapt(Models { target: target_model, draft: draft_model });
    let (engine, engine_thread) = EngineHandle::spawn_with(engine_config, models, kv_events)?;
    Ok(Runtime {
        engine,
        engine_thread,
        target,
        draft,
        head,
        kv,
        max_model_len,
        num_token_ids,
        vocab_map,
        threads,
        sharing: config.sharing,
        load_time: started.elapsed(),
    })
}

/// Says so where `--draft-head` is a number that cannot have an effect.
fn warn_of_useless_draft_head(
    config: &Config,
    [target, draft]: [&Option<Loaded>; 2],
    is_mapped: bool,
    num_token_ids: usize,
) {
    let DraftHead::First(num_tokens) = config.draft_head else { return };
    let head = target.as_ref().and_then(|loaded| loaded.head.as_ref());
    let reason = match (draft, head) {
        (None, None) => "there is no draft; name one with --draft".to_owned(),
        (Some(_), _) if target.is_none() => "there is no target; name one with --target".to_owned(),
        (Some(_), _) if is_mapped => "the draft's vocabulary is not the target's".to_owned(),
        (None, Some(head)) if head.has_own_outputs => {
            format!("{} has outputs of its own, which are few and always computed", head.info.name)
        }
        _ if num_tokens >= num_token_ids => format!("the vocabulary has only {num_token_ids} tokens"),
        _ => return,
    };
    tracing::warn!("--draft-head {num_tokens} has no effect: {reason}");
}

/// Ids below this are the target's tokens, or both models'. Tokenizers may know fewer ids than embeddings have
/// rows, which are padded, but never more.
fn num_token_ids(pair: [&Option<Loaded>; 2], vocab_map: Option<&VocabMap>) -> usize {
    if let Some(map) = vocab_map {
        return map.num_target_ids();
    }
    let loaded = || pair.into_iter().flatten();
    let token_ids = loaded().map(|loaded| loaded.text.tokenizer.vocab_size());
    let rows = loaded().map(|loaded| loaded.model.config().vocab_size);
    token_ids.chain(rows).min().expect("find_pair returns at least one model: this is a bug")
}

fn split(loaded: Option<Loaded>) -> (Option<Box<dyn Model>>, Option<Described>) {
    match loaded {
        Some(Loaded { model, info, text, .. }) => (Some(model), Some((info, text))),
        None => (None, None),
    }
}

/// The threads that compute: shared by both models, which never run at the same time.
///
/// # Errors
/// If `TANDEM_ISA` names an instruction set that is unknown or that this CPU lacks.
pub(crate) fn thread_pool(threads: usize) -> anyhow::Result<Arc<ThreadPool>> {
    let isa = tandem_kernels::isa::detect()?;
    Ok(Arc::new(ThreadPool::with_isa(threads, isa)?))
}

/// One thread a CPU that this process may use.
pub(crate) fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Lets this process open as many files as the system allows it, sockets among them: the limit that it starts with
/// is often 1024, for the sake of programs that use `select`. Returns how many that are.
pub(crate) fn raise_open_files() -> usize {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let limit = getrlimit(Resource::Nofile);
        // What cannot be raised stays as it was.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
        // No limit is more than any number of connections.
        getrlimit(Resource::Nofile).current.map_or(usize::MAX, |most| most as usize)
    }
    #[cfg(not(target_os = "linux"))]
    {
        1024
    }
}
