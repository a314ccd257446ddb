//! From settings to a running engine: finds the pair, loads both models side by side, sizes the KV
//! cache, starts the engine's thread.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tandem::http::lanes::LanePolicy;
use tandem::http::{AppConfig, AppState, LaneModel, Limits};
use tandem::keys::Keyring;
use tandem_engine::{EngineConfig, EngineHandle, KvEvents, Models};
use tandem_kernels::ThreadPool;
use tandem_models::{
    BackendKind, ChatTemplate, Checkpoint, Dtype, FileType, FimTokens, Head, HeadKind, HubOptions, KvType,
    Model, RopeOverride, Tokenizer, VocabMap, WeightMemory,
};

use crate::config::Config;
use crate::drafter::{Drafter, HeadPlace};

/// Tokens a block of the KV cache holds: small enough that a short completion wastes little, large
/// enough that block tables stay short.
const BLOCK_SIZE: usize = 16;

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
}

/// Storage for keys and values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvInfo {
    pub(crate) num_blocks: usize,
    pub(crate) block_size: usize,
    pub(crate) size_bytes: u64,
    pub(crate) kv_type: KvType,
}

impl KvInfo {
    /// Tokens that fit, of all sequences together.
    pub(crate) fn num_tokens(&self) -> usize {
        self.num_blocks * self.block_size
    }

    /// What a sequence of so many tokens takes of it.
    pub(crate) fn bytes_of(&self, num_tokens: usize) -> u64 {
        num_tokens.div_ceil(self.block_size) as u64 * (self.size_bytes / self.num_blocks as u64)
    }
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
    let (target_dir, drafter) = find_pair(config)?;
    let (draft_dir, head) = match drafter {
        None => (None, None),
        Some(Drafter::Model(dir)) => (Some(dir), None),
        Some(Drafter::Head(place)) => (None, Some(place)),
    };
    if head == Some(HeadPlace::Target) && config.draft_rope_scaling.is_some() {
        bail!(MTP_SCALED);
    }
    let threads = config.threads.unwrap_or_else(default_threads);
    let pool = thread_pool(threads)?;

    let target = target_dir.map(|dir| (dir, config.rope_scaling.as_ref()));
    let draft_scaling = config.draft_rope_scaling.as_ref().unwrap_or(&config.rope_scaling);
    let draft = draft_dir.map(|dir| (dir, draft_scaling.as_ref()));
    let open = |(dir, rope): (PathBuf, Option<&RopeOverride>)| Opened::open(&dir, config.quantize, rope);
    let (mut target, draft) = side_by_side(target, draft, open)?;
    if let Some(place) = head {
        target.as_mut().context(HEAD_ALONE)?.add_head(&place, draft_scaling.as_ref())?;
    }
    let mut vocab_map = None;
    if let (Some(target), Some(draft)) = (&target, &draft) {
        // Before the weights: a wrong pair should not cost the minutes that large ones take.
        vocab_map = tandem_models::check_pair(
            (&target.checkpoint, &target.text.tokenizer),
            (&draft.checkpoint, &draft.text.tokenizer),
        )?
        .map(Arc::new);
    }
    if let Some(map) = &vocab_map {
        tracing::warn!(
            "target and draft have different vocabularies: the draft proposes the {} of its {} tokens that the \
             target has too, and each lane reads and writes its own model's; `tandem pair` says more",
            map.num_shared(),
            map.num_draft_ids()
        );
    }
    let kv_type = kv_type(config);
    let load = |opened: Opened| opened.load(config.backend, kv_type, &pool);
    let (mut target, draft) = side_by_side(target, draft, load)?;

    let loaded = || target.iter().chain(&draft);
    let bytes_per_token: usize = loaded().map(|loaded| loaded.model.kv_bytes_per_token()).sum();
    let wanted_len = context_len(config.max_model_len, loaded())?;
    let kv = size_kv_cache(config, bytes_per_token, wanted_len)?;
    let max_model_len = wanted_len.min(kv.num_tokens());
    if max_model_len < wanted_len {
        tracing::warn!(
            "the KV cache holds {max_model_len} tokens, so the context is limited to that instead of \
             {wanted_len}; --kv-memory raises it"
        );
    }

    // Tokenizers may know fewer ids than embeddings have rows, which are padded, but never more.
    let num_token_ids = match &vocab_map {
        Some(map) => map.num_target_ids(),
        None => {
            let token_ids = loaded().map(|loaded| loaded.text.tokenizer.vocab_size());
            let rows = loaded().map(|loaded| loaded.model.config().vocab_size);
            token_ids.chain(rows).min().expect("find_pair returns at least one model: this is a bug")
        }
    };
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

/// The context of the shorter-sighted model, or the part of it that was asked for.
fn context_len<'a>(asked: Option<usize>, loaded: impl Iterator<Item = &'a Loaded>) -> anyhow::Result<usize> {
    let longest =
        loaded.map(|loaded| (loaded.model.config().max_position_embeddings, &loaded.info.name)).min();
    let (longest, name) = longest.expect("find_pair returns at least one model: this is a bug");
    match asked {
        Some(len) if len > longest => {
            bail!(
                "--max-model-len is {len}; {name} holds at most {longest} tokens of context; --rope-scaling \
                 can stretch it"
            )
        }
        asked => Ok(asked.unwrap_or(longest)),
    }
}

/// One model, loaded.
struct Loaded {
    model: Box<dyn Model>,
    info: ModelInfo,
    head: Option<HeadInfo>,
    text: LaneModel,
}

const HEAD_ALONE: &str = "--draft names a head, which drafts from the hidden states of a target and answers nobody by \
                          itself; name its target with --target";

const MTP_SCALED: &str = "--draft-rope-scaling is set and --draft is mtp, a layer of the target, which has the target's \
                          rotary scaling; set --rope-scaling for both and leave --draft-rope-scaling out";

fn split(loaded: Option<Loaded>) -> (Option<Box<dyn Model>>, Option<Described>) {
    match loaded {
        Some(Loaded { model, info, text, .. }) => (Some(model), Some((info, text))),
        None => (None, None),
    }
}

/// Runs `work` for both models at the same time.
fn side_by_side<T: Send, U: Send>(
    target: Option<T>,
    draft: Option<T>,
    work: impl Fn(T) -> anyhow::Result<U> + Sync,
) -> anyhow::Result<(Option<U>, Option<U>)> {
    std::thread::scope(|scope| {
        let draft = draft.map(|draft| scope.spawn(|| work(draft)));
        let target = target.map(&work).transpose();
        let draft =
            draft.map(|thread| thread.join().expect("loading does not panic: this is a bug")).transpose();
        Ok((target?, draft?))
    })
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

/// A model folder read as far as text goes; the weights are mapped and not yet loaded.
struct Opened {
    checkpoint: Checkpoint,
    /// What is to draft from its hidden states.
    head: Option<Head>,
    text: LaneModel,
    rope_scaling: Option<RopeOverride>,
}

impl Opened {
    fn open(dir: &Path, quantize: Option<FileType>, rope: Option<&RopeOverride>) -> anyhow::Result<Self> {
        let mut checkpoint = Checkpoint::open_with(dir, rope)?;
        checkpoint.quantize = quantize;
        checkpoint.name = display_name(&checkpoint);
        let tokenizer = Arc::new(Tokenizer::from_dir(dir)?);
        let chat_template = ChatTemplate::from_dir(dir, &tokenizer)?.map(Arc::new);
        let fim = FimTokens::from_dir(dir, &tokenizer)?;
        let text = LaneModel {
            name: checkpoint.name.clone(),
            tokenizer,
            chat_template,
            fim,
            generation: checkpoint.generation.clone(),
        };
        Ok(Opened { checkpoint, head: None, text, rope_scaling: rope.cloned() })
    }

    /// Before the weights: a wrong head should not cost the minutes that large ones take.
    fn add_head(&mut self, place: &HeadPlace, rope: Option<&RopeOverride>) -> anyhow::Result<()> {
        self.head = Some(place.open(&self.checkpoint, rope)?);
        Ok(())
    }

    fn load(self, backend: BackendKind, kv_type: KvType, pool: &Arc<ThreadPool>) -> anyhow::Result<Loaded> {
        let pool = Arc::clone(pool);
        let mut model = match &self.head {
            None => tandem_models::load_with(&self.checkpoint, backend, kv_type, pool),
            Some(head) => tandem_models::load_with_head(&self.checkpoint, head, backend, kv_type, pool),
        }
        .with_context(|| format!("cannot load {}", self.checkpoint.name))?;
        let memory = model.weight_memory();
        if let Some(note) = self.checkpoint.repacking(&memory) {
            tracing::info!("{}: {note}", self.checkpoint.name);
        }
        let info = ModelInfo { rope_scaling: self.rope_scaling, ..describe(&self.checkpoint, &memory) };
        let head = self.head.as_ref().zip(model.drafting_head()).map(|(head, model)| HeadInfo {
            kind: head.kind,
            info: describe(&head.checkpoint, &model.weight_memory()),
        });
        Ok(Loaded { model, info, head, text: self.text })
    }
}

/// The checkpoint's own name, with its parent's where that says more: pairs often lie in
/// `NAME/target` and `NAME/draft`.
fn display_name(checkpoint: &Checkpoint) -> String {
    let parent = || {
        let full = std::path::absolute(&checkpoint.dir).ok()?;
        Some(full.parent()?.file_name()?.to_str()?.to_owned())
    };
    match (checkpoint.name.as_str(), parent()) {
        ("target" | "draft", Some(parent)) => format!("{parent}/{}", checkpoint.name),
        (name, _) => name.to_owned(),
    }
}

fn describe(checkpoint: &Checkpoint, memory: &WeightMemory) -> ModelInfo {
    ModelInfo {
        name: checkpoint.name.clone(),
        dir: checkpoint.dir.clone(),
        num_parameters: memory.num_parameters(),
        size_bytes: memory.size_bytes(),
        dtype: memory.main_type().unwrap_or(Dtype::F32),
        rope_scaling: None,
    }
}

/// The target's folder, and what drafts; at least one is there.
fn find_pair(config: &Config) -> anyhow::Result<(Option<PathBuf>, Option<Drafter>)> {
    if config.target.is_none() && config.draft.is_none() {
        let demo = find_demo_pair()?;
        return Ok((Some(demo.join("target")), Some(Drafter::Model(demo.join("draft")))));
    }
    let options = HubOptions::from_env();
    let target = config.target.as_deref().map(|spec| tandem_models::resolve(spec, &options)).transpose()?;
    let drafter = config.draft.as_deref().map(|spec| Drafter::find(spec, &options)).transpose()?;
    Ok((target, drafter))
}

/// The folder of the pair that is shipped with Tandem.
///
/// # Errors
/// Names the folders that were looked at and says how to name models.
pub(crate) fn find_demo_pair() -> anyhow::Result<PathBuf> {
    let candidates = demo_candidates(std::env::current_exe().ok().as_deref());
    match candidates.iter().find(|folder| is_pair(folder)) {
        Some(folder) => Ok(folder.clone()),
        None => {
            let looked_at: String =
                candidates.iter().map(|folder| format!("\n  {}", folder.display())).collect();
            bail!(
                "no model was named and the demo pair is in none of these folders:{looked_at}\n\
                 Name a pair with --target FOLDER --draft FOLDER (or hub ids such as \
                 Qwen/Qwen2.5-Coder-7B-Instruct), or one model alone with either of the two."
            )
        }
    }
}

fn is_pair(folder: &Path) -> bool {
    ["target", "draft"].iter().all(|role| folder.join(role).join("config.json").is_file())
}

/// Where the demo pair may lie: the working directory, beside the binary, where packages put it, and
/// the source tree that the binary was built from.
fn demo_candidates(executable: Option<&Path>) -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from("models/demo")];
    if let Some(beside) = executable.and_then(Path::parent) {
        folders.push(beside.join("models/demo"));
        folders.push(beside.join("../share/tandem/demo"));
    }
    folders.extend(Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(|tree| tree.join("models/demo")));
    folders
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

/// What keys and values are stored as: the reference backend has f32 only.
fn kv_type(config: &Config) -> KvType {
    match config.backend {
        BackendKind::Cpu => config.kv_dtype,
        BackendKind::Reference => KvType::F32,
    }
}

/// Decides how many blocks there are.
fn size_kv_cache(config: &Config, bytes_per_token: usize, max_model_len: usize) -> anyhow::Result<KvInfo> {
    let block_bytes = (bytes_per_token * BLOCK_SIZE) as u64;
    let budget = match config.kv_memory {
        Some(budget) => budget,
        None => {
            // A full context for every sequence, within a quarter of what is free.
            let blocks = config.max_num_seqs as u64 * max_model_len.div_ceil(BLOCK_SIZE) as u64;
            (blocks * block_bytes).min(available_memory() / 4).max(block_bytes)
        }
    };
    let num_blocks = budget / block_bytes;
    if num_blocks == 0 {
        bail!(
            "--kv-memory is {budget} bytes; one block of {BLOCK_SIZE} tokens takes {block_bytes} bytes with \
             these models"
        );
    }
    // Slots are counted in u32.
    let num_blocks = num_blocks.min(u64::from(u32::MAX) / BLOCK_SIZE as u64) as usize;
    let size_bytes = num_blocks as u64 * block_bytes;
    Ok(KvInfo { num_blocks, block_size: BLOCK_SIZE, size_bytes, kv_type: kv_type(config) })
}

/// Bytes that can be used without swapping: the system's word, bounded by the container's limit.
fn available_memory() -> u64 {
    // Where the system says nothing, assume a small machine.
    const UNKNOWN: u64 = 2 << 30;
    let system = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
    });
    let read = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let container = read("/sys/fs/cgroup/memory.max")
        .map(|limit| limit.saturating_sub(read("/sys/fs/cgroup/memory.current").unwrap_or(0)));
    system.unwrap_or(UNKNOWN).min(container.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kv_memory_becomes_whole_blocks() {
        let config = Config { kv_memory: Some(1 << 20), ..Config::default() };
        let kv = size_kv_cache(&config, 1000, 2048).expect("fits");
        assert_eq!((kv.num_blocks, kv.num_tokens()), (65, 65 * 16));
        assert_eq!(kv.size_bytes, 65 * 16_000);
    }

    #[test]
    fn too_little_kv_memory_is_refused_with_both_numbers() {
        let config = Config { kv_memory: Some(15_999), ..Config::default() };
        let message = size_kv_cache(&config, 1000, 2048).unwrap_err().to_string();
        assert!(message.contains("15999 bytes") && message.contains("16000 bytes"), "{message}");
    }

    #[test]
    fn without_kv_memory_every_sequence_gets_a_full_context_if_the_machine_can() {
        let config = Config { max_num_seqs: 2, ..Config::default() };
        let kv = size_kv_cache(&config, 4, 100).expect("fits");
        assert_eq!(kv.num_blocks, 2 * 7);
        let config = Config { max_num_seqs: 4096, ..Config::default() };
        let kv = size_kv_cache(&config, 1 << 20, 1 << 20).expect("fits");
        assert!(kv.size_bytes <= available_memory().max(4 << 30), "{}", kv.size_bytes);
    }

    #[test]
    fn the_demo_pair_is_looked_for_where_it_may_lie() {
        let folders = demo_candidates(Some(Path::new("/opt/tandem/bin/tandem")));
        assert_eq!(folders[0], Path::new("models/demo"));
        assert_eq!(folders[1], Path::new("/opt/tandem/bin/models/demo"));
        assert_eq!(folders[2], Path::new("/opt/tandem/bin/../share/tandem/demo"));
        assert!(folders[3].is_absolute() && folders[3].ends_with("models/demo"));
    }
}
