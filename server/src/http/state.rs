//! What every handler shares: the engine, the models behind the lanes, keys and limits. Built once at
//! start and never changed after, but for the keys and the flags that say how the server is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::HeaderMap;
use tandem_engine::{CacheSalt, EngineHandle, Lane};
use tandem_models::{ChatTemplate, FimTokens, GenerationConfig, Tokenizer};

use super::auth::offered_key;
use super::generation::Flights;
use super::heavy::HeavyWork;
use super::lanes::LanePolicy;
use super::metrics::Metrics;
use super::responses::ResponseStore;
use super::tenant::Tenants;
use super::traces::Tracer;
use crate::keys::Keyring;
use crate::text::answer::{Dialect, ToolFormat};
use crate::text::grammar::Grammars;

/// One of the pair's models, as far as text is concerned.
pub struct LaneModel {
    /// The real name that `/v1/models` lists: a hub id or a folder's name.
    pub name: String,
    /// Its tokenizer. The pair's two have the same vocabulary and may be one and the same.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template; without one `/v1/chat/completions` is refused.
    pub chat_template: Option<Arc<ChatTemplate>>,
    /// Its fill-in-the-middle tokens; without them a `suffix` is refused.
    pub fim: Option<FimTokens>,
    /// Stop tokens and default sampling parameters from its folder.
    pub generation: GenerationConfig,
}

/// Where reading a completion request's prompts stops, whatever [`Limits::max_prompts`] is.
pub const MAX_PROMPTS: usize = 128;

/// Bounds on what one request may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest request body.
    pub max_body_bytes: usize,
    /// From a request's head to the last byte of its body.
    pub body_timeout: Duration,
    /// Most prompts in one completion request; at most [`MAX_PROMPTS`].
    pub max_prompts: usize,
    /// Most choices (`n`) for a prompt.
    pub max_choices: usize,
    /// Most stop strings, and most stop token ids.
    pub max_stops: usize,
    /// Longest stop string.
    pub max_stop_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            // About eight million tokens of text: longer than any context, short of a nuisance.
            max_body_bytes: 32 << 20,
            body_timeout: Duration::from_secs(30),
            max_prompts: MAX_PROMPTS,
            max_choices: 32,
            max_stops: 16,
            max_stop_bytes: 1024,
        }
    }
}

/// Everything needed to build an [`AppState`].
pub struct AppConfig {
    /// The running engine.
    pub engine: EngineHandle,
    /// The target, which answers the `deep` lane.
    pub target: Option<LaneModel>,
    /// The draft, which answers the `fast` lane.
    pub draft: Option<LaneModel>,
    /// Keys that clients must show one of.
    pub keys: Arc<Keyring>,
    /// Lets web pages of any origin call the server.
    pub cors: bool,
    /// Requests may read the output of a sequence that another one started.
    pub sharing: bool,
    /// How `auto` picks a lane.
    pub policy: LanePolicy,
    /// Bounds on requests.
    pub limits: Limits,
}

/// A [`LaneModel`] and what follows from it.
pub struct ServedModel {
    /// The lane it answers.
    pub lane: Lane,
    /// Name, tokenizer, template, defaults.
    pub model: LaneModel,
    /// Tokens that end any answer.
    pub stop_token_ids: Vec<u32>,
    /// Tokens that end a fill-in-the-middle answer besides: another file or another gap begins.
    pub fim_stop_token_ids: Vec<u32>,
    /// How its answers show reasoning and tool calls.
    pub dialect: Arc<Dialect>,
    /// The forms that its answers have been held to.
    pub grammars: Arc<Grammars>,
    /// Bytes of the longest token's spelling. A spelling is not shorter than the text it stands for
    /// (an unknown word's aside), so it bounds the text that a number of tokens can hold.
    pub max_token_bytes: usize,
}

/// Ends of text and of turn that models' own `eos_token_id` often leaves out.
const END_TOKENS: &[&str] = &[
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|end|>",
    "</s>",
];

/// Tokens that start something else after the gap is filled.
const FIM_END_TOKENS: &[&str] = &[
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<fim_prefix>",
    "<fim_suffix>",
    "<fim_middle>",
    "<fim_pad>",
    "<file_sep>",
    "<EOT>",
];

impl ServedModel {
    fn new(lane: Lane, model: LaneModel) -> Self {
        let ids = |names: &[&str]| -> Vec<u32> {
            names.iter().filter_map(|name| model.tokenizer.token_to_id(name)).collect()
        };
        let dialect = Dialect::detect(model.chat_template.as_deref(), &model.tokenizer);
        let mut stop_token_ids = model.generation.eos_token_ids.clone();
        stop_token_ids.extend(ids(END_TOKENS));
        if dialect.format() == Some(ToolFormat::Harmony) {
            // There, an answer has several messages, and `<|end|>` ends each of them.
            let between = model.tokenizer.token_to_id("<|end|>");
            stop_token_ids.retain(|id| Some(*id) != between);
            stop_token_ids.extend(ids(&["<|return|>", "<|call|>"]));
        }
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        let fim_stop_token_ids = ids(FIM_END_TOKENS);
        let spellings =
            (0..model.tokenizer.vocab_size() as u32).filter_map(|id| model.tokenizer.id_to_token(id));
        let max_token_bytes = spellings.map(|token| token.len()).max().unwrap_or(1);
        let tokenizer = model.tokenizer.clone();
        ServedModel {
            lane,
            model,
            stop_token_ids,
            fim_stop_token_ids,
            grammars: Arc::new(Grammars::new(tokenizer, dialect.markers())),
            dialect: Arc::new(dialect),
            max_token_bytes,
        }
    }

    /// True if a request means the same tokens, defaults and ends to both.
    fn reads_like(&self, other: &ServedModel) -> bool {
        let (a, b) = (&self.model, &other.model);
        let same_template = match (&a.chat_template, &b.chat_template) {
            (None, None) => true,
            (Some(a), Some(b)) => a.writes_like(b),
            _ => false,
        };
        same_template
            && a.generation == b.generation
            && a.fim == b.fim
            && self.stop_token_ids == other.stop_token_ids
            && self.fim_stop_token_ids == other.fim_stop_token_ids
            && a.tokenizer.reads_like(&b.tokenizer)
    }
}

/// Shared by all handlers.
pub struct AppState {
    /// The engine.
    pub engine: EngineHandle,
    /// Behind the `deep` lane.
    pub target: Option<ServedModel>,
    /// Behind the `fast` lane.
    pub draft: Option<ServedModel>,
    /// Who is let in.
    pub keys: Arc<Keyring>,
    /// Cross-origin requests are allowed.
    pub cors: bool,
    /// How `auto` picks a lane.
    pub policy: LanePolicy,
    /// Both models make the same of a request: a prompt for one is a prompt for the other. Looked at only if
    /// the policy has use for it.
    pub(super) lanes_read_alike: bool,
    /// Bounds on requests.
    pub limits: Limits,
    /// Counters and histograms.
    pub metrics: Metrics,
    /// Where spans of requests go, if anywhere.
    pub(super) tracer: Option<Tracer>,
    /// Seconds since the epoch at start: the models' `created`.
    pub started_at: u64,
    pub(super) heavy: HeavyWork,
    pub(super) flights: Flights,
    pub(super) responses: ResponseStore,
    tenants: Tenants,
    draining: AtomicBool,
    stalled: AtomicBool,
}

impl AppState {
    /// The state of a server that is about to start.
    ///
    /// # Panics
    /// If there is neither target nor draft.
    pub fn new(config: AppConfig) -> Self {
        assert!(config.target.is_some() || config.draft.is_some(), "a server needs a target or a draft");
        let target = config.target.map(|model| ServedModel::new(Lane::Deep, model));
        let draft = config.draft.map(|model| ServedModel::new(Lane::Fast, model));
        let lanes_read_alike = match (&target, &draft) {
            (Some(target), Some(draft)) if config.policy.escalates() => target.reads_like(draft),
            _ => false,
        };
        if config.policy.escalates() && !lanes_read_alike {
            tracing::warn!(
                "requests are not escalated from fast to deep: that needs two models with the same tokenizer, \
                 chat template, control tokens and generation defaults"
            );
        }
        AppState {
            metrics: Metrics::new(config.engine.clone()),
            engine: config.engine,
            target,
            draft,
            policy: config.policy,
            lanes_read_alike,
            keys: config.keys,
            cors: config.cors,
            limits: config.limits,
            tracer: None,
            started_at: unix_seconds(),
            heavy: HeavyWork::new(),
            flights: Flights::new(config.sharing),
            responses: ResponseStore::default(),
            tenants: Tenants::new(),
            draining: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
        }
    }

    /// The same, with somebody who is sent a span of every request.
    #[must_use]
    pub fn traced(self, tracer: Tracer) -> Self {
        AppState { tracer: Some(tracer), ..self }
    }

    /// The model behind a lane, if that lane is served.
    pub fn served(&self, lane: Lane) -> Option<&ServedModel> {
        match lane {
            Lane::Deep => self.target.as_ref(),
            Lane::Fast => self.draft.as_ref(),
        }
    }

    /// Whose cached work a request may use: that of requests with the same API key and `cache_salt`.
    /// Without keys everybody has the same one.
    pub(super) fn cache_salt(&self, headers: &HeaderMap, cache_salt: Option<&str>) -> CacheSalt {
        let key = if self.keys.is_open() { None } else { offered_key(headers) };
        self.tenants.salt(key, cache_salt)
    }

    /// True from the moment the server was asked to stop.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// True while the engine has work and does not get on with it.
    pub fn is_stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }

    /// Returns what was set before.
    pub(super) fn set_stalled(&self, is_stalled: bool) -> bool {
        self.stalled.swap(is_stalled, Ordering::Relaxed)
    }

    pub(crate) fn start_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }
}

/// Seconds since the epoch.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
