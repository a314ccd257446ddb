//! What crosses the engine's boundary: token ids and their parameters ([`crate::params`]) in,
//! tokens and usage out. No text, no HTTP, no JSON.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

use arrayvec::ArrayVec;
use bytemuck::{Pod, Zeroable};

use crate::constraint::Constraint;
use crate::embedding::EmbedRequest;
pub use crate::params::{DraftSource, DraftSources, MAX_LOGPROBS, SamplingParams, SpeculationParams};

/// A token id in the vocabulary that target and draft share.
pub type TokenId = u32;

/// Which model answers a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// The draft model alone.
    Fast,
    /// The target model, accelerated by speculation with the draft.
    Deep,
}

/// One generation to run.
pub struct SubmitRequest {
    /// Chosen by the caller, unique among the live ones; names the sequence in [`Command::Abort`].
    pub id: SequenceId,
    /// Which model answers.
    pub lane: Lane,
    /// The prompt; at least one token, all inside the vocabulary. Shared, so that `n` sequences of
    /// one request hold one copy.
    pub prompt: Arc<[TokenId]>,
    /// How to sample.
    pub params: SamplingParams,
    /// Who goes first when there is not room for all.
    pub priority: Priority,
    /// Whose cached blocks and session text the sequence may share.
    pub cache_salt: CacheSalt,
    /// Longest time from the first output token to the last; what is there then is the answer
    /// ([`FinishReason::Deadline`]).
    pub max_predict_time: Option<Duration>,
    /// How to speculate. Never changes the output.
    pub speculation: SpeculationParams,
    /// The form that the output is to have; `None`: any.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Where the events go.
    pub events: Box<dyn EventSink>,
}

/// Who goes first when there is not room for all. Within a priority the oldest goes first, and a
/// batch sequence that has waited [`BATCH_PATIENCE`] counts as interactive, so nobody starves. (A text to
/// embed does where seats and blocks are given out; in a pass it still comes after what somebody reads.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody is waiting for it.
    #[default]
    Interactive,
    /// Gives way: starts after, and is preempted before, interactive work.
    Batch,
}

/// How long batch work gives way.
pub const BATCH_PATIENCE: Duration = Duration::from_secs(10);

/// Separates tenants: sequences with different salts share neither cached blocks nor session text, so
/// nobody can tell from timing what another one has sent. The caller makes it unguessable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CacheSalt(pub u128);

/// Names a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// Everything that can be asked of the engine thread.
pub enum Command {
    /// Starts a sequence.
    Submit(SubmitRequest),
    /// Starts a sequence that gives an embedding.
    Embed(EmbedRequest),
    /// Ends a sequence with [`FinishReason::Aborted`]; its blocks are free when the current step ends.
    /// Unknown ids are ignored.
    Abort(SequenceId),
    /// Raises a sequence's `max_tokens` (a lower value changes nothing), because somebody else reads
    /// its output too and wants more. Unknown ids are ignored.
    Extend(SequenceId, u32),
    /// Finishes what runs, refuses what is new, then the engine thread ends.
    Drain,
    /// Ends every sequence with [`FinishReason::Aborted`], then the engine thread ends.
    Shutdown,
}

/// Where a sequence's events go: the sending half of a bounded channel.
///
/// The engine never blocks on it. After `Full` the same tokens are offered again at the next step;
/// `Closed` aborts the sequence.
pub trait EventSink: Send {
    /// Hands one event over.
    ///
    /// # Errors
    /// Gives the event back if the channel is full; [`SinkError::Closed`] if nobody listens.
    #[expect(clippy::result_large_err, reason = "an event that is not taken comes back as it is")]
    fn try_send(&mut self, event: Event) -> Result<(), SinkError>;
}

impl EventSink for SyncSender<Event> {
    fn try_send(&mut self, event: Event) -> Result<(), SinkError> {
        SyncSender::try_send(self, event).map_err(|error| match error {
            TrySendError::Full(event) => SinkError::Full(event),
            TrySendError::Disconnected(_) => SinkError::Closed,
        })
    }
}

/// Why an event was not taken.
#[expect(clippy::large_enum_variant, reason = "an event that is not taken comes back as it is")]
#[derive(Debug)]
pub enum SinkError {
    /// No room now; the event comes back.
    Full(Event),
    /// The receiver is gone.
    Closed,
}

/// The most tokens of one event, and of one verification: the longest draft and the bonus token. Tokens to which
/// an output's form leaves no alternative come in addition.
pub const MAX_TOKENS_PER_STEP: usize = MAX_DRAFT_TOKENS + 1;

/// The longest draft that one verification takes.
pub const MAX_DRAFT_TOKENS: usize = 32;

/// Tokens that became final in one step.
#[derive(Debug, Clone, Default)]
pub struct TokenChunk {
    /// In order; never empty.
    pub tokens: ArrayVec<OutputToken, MAX_TOKENS_PER_STEP>,
    /// One entry a token if `logprobs` was asked for, else empty.
    pub logprobs: Vec<TokenLogprobs>,
    /// How sure the model was of the first `num_margins` tokens: the greatest logit less the next one, which
    /// is the logarithm of how many times likelier the best token was than any other. None of tokens to which the
    /// output's form left no alternative.
    pub margins: Vec<f32>,
    /// The account so far, for who listens no longer than this.
    pub usage: Usage,
}

/// One output token and who found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutputToken {
    /// The token.
    pub id: TokenId,
    /// True if it was a draft token that the target accepted.
    pub drafted: bool,
}

/// Log-probabilities at one position, natural logarithm, of the model's own distribution
/// (before temperature, penalties and truncation).
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that stands at this position.
    pub logprob: f32,
    /// The likeliest tokens, most likely first (ties: lower id first).
    pub top: Vec<(TokenId, f32)>,
}

/// What the engine says about a sequence, in this order: `PromptLogprobs` if asked for, any number
/// of `Tokens` (of an [`EmbedRequest`]: one `Embedding`), then one `Finished` or `Failed`.
#[expect(clippy::large_enum_variant, reason = "nearly every event is the large one")]
#[derive(Debug, Clone)]
pub enum Event {
    /// One entry a prompt token; the first has no distribution to be judged by.
    PromptLogprobs(Vec<Option<TokenLogprobs>>),
    /// Tokens became final.
    Tokens(TokenChunk),
    /// The mean of the last hidden states of all tokens, `[hidden_size]`; not normalised.
    Embedding(Vec<f32>),
    /// The sequence ended. Nothing follows.
    Finished(Finished),
    /// The sequence could not be run (to the end). Nothing follows.
    Failed(EngineError),
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token came up.
    Stop(TokenId),
    /// The output is whole by its [`SubmitRequest::constraint`], and nothing can follow.
    Complete,
    /// `max_tokens` were produced, or the context is full.
    Length,
    /// [`SubmitRequest::max_predict_time`] is over.
    Deadline,
    /// Aborted by the caller.
    Aborted,
}

/// The closing account of a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Finished {
    /// Why it ended.
    pub reason: FinishReason,
    /// What it used.
    pub usage: Usage,
}

/// Counts and times of one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub num_prompt_tokens: u32,
    /// Prompt tokens whose keys and values the answering model found in the prefix cache.
    pub num_cached_tokens: u32,
    /// Tokens of the output.
    pub num_output_tokens: u32,
    /// Draft tokens offered to the target, by [`DraftSource`].
    pub num_draft_tokens: [u32; 3],
    /// Of those, accepted.
    pub num_accepted_tokens: [u32; 3],
    /// Forward passes of the answering model after the one that gave the first token.
    pub num_decode_steps: u32,
    /// From submission to the first forward pass.
    pub queue_time: Duration,
    /// From there to the first output token.
    pub prefill_time: Duration,
    /// From there to the last output token.
    pub decode_time: Duration,
}

/// What can go wrong with a sequence or with the engine as a whole.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EngineError {
    /// A sampling parameter is out of its range.
    #[error("{name} is {value}; it must be {wanted}")]
    InvalidParameter {
        /// The parameter.
        name: &'static str,
        /// What was given.
        value: String,
        /// What would be right.
        wanted: &'static str,
    },
    /// The prompt holds no token.
    #[error("the prompt is empty; at least one token is needed")]
    EmptyPrompt,
    /// A prompt token is not in the vocabulary.
    #[error("prompt token {id} is outside the vocabulary of {vocab_size} tokens")]
    TokenOutOfRange {
        /// The offending id.
        id: TokenId,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// The prompt leaves no room for output.
    #[error(
        "the prompt has {num_prompt_tokens} tokens and the context holds {max_model_len}: at most {} fit before an \
         answer",
        max_model_len.saturating_sub(1)
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        num_prompt_tokens: usize,
        /// Tokens of the context.
        max_model_len: usize,
    },
    /// The sequence can never fit the KV cache.
    #[error(
        "prompt and max_tokens need {needed_blocks} blocks of KV cache and there are {total_blocks}; \
         ask for fewer tokens or start the server with more --kv-memory"
    )]
    KvCacheTooSmall {
        /// Blocks it would take.
        needed_blocks: usize,
        /// Blocks there are.
        total_blocks: usize,
    },
    /// A model does not know every token.
    #[error(
        "the vocabulary has {num_token_ids} tokens and a model's embedding {vocab_size} rows; it needs one a token"
    )]
    VocabularyTooSmall {
        /// Tokens of the vocabulary.
        num_token_ids: usize,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// The model of this lane is not loaded.
    #[error("no model is loaded for the {} lane", match .0 { Lane::Fast => "fast", Lane::Deep => "deep" })]
    LaneUnavailable(Lane),
    /// Too many sequences wait.
    #[error("the server is busy: {waiting} sequences are waiting")]
    QueueFull {
        /// Sequences in the queue.
        waiting: usize,
        /// When there will be room, by the measured rate at which waiting sequences start.
        retry_after: Duration,
    },
    /// The engine is draining or has ended.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The model gave logits that are not numbers.
    #[error("the model produced logits that are not finite for this request")]
    NonFiniteLogits,
    /// The form that was asked for cannot be kept any further.
    #[error("the answer's grammar cannot be followed: {0}")]
    Constraint(String),
    /// A forward pass failed.
    #[error("the forward pass failed: {0}")]
    Forward(String),
    /// Something in the engine contradicts itself; it does not go on.
    #[error("the engine stopped: {0}")]
    Integrity(String),
}

/// Counters and gauges, copied out by the engine after each step for `/metrics` and `/health`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct EngineStats {
    /// Sequences waiting for room.
    pub num_waiting: u64,
    /// Sequences running.
    pub num_running: u64,
    /// Sequences waiting, by [`Lane`].
    pub num_waiting_by_lane: [u64; 2],
    /// Sequences running, by [`Lane`].
    pub num_running_by_lane: [u64; 2],
    /// Blocks of the KV cache, in all.
    pub num_total_blocks: u64,
    /// Blocks that hold nothing.
    pub num_free_blocks: u64,
    /// Blocks of the prefix cache that no sequence uses; they are evicted when room is needed.
    pub num_cached_blocks: u64,
    /// Engine steps so far.
    pub num_steps: u64,
    /// Forward passes of the target.
    pub num_target_passes: u64,
    /// Forward passes of the draft.
    pub num_draft_passes: u64,
    /// Prompt tokens computed.
    pub num_prompt_tokens: u64,
    /// Prompt tokens found in the prefix cache.
    pub num_cached_tokens: u64,
    /// Embeddings that were given.
    pub num_embeddings: u64,
    /// Their tokens, which `num_prompt_tokens` counts too.
    pub num_embedding_tokens: u64,
    /// Running sequences that had to give up their blocks and compute them again later.
    pub num_preemptions: u64,
    /// Cached blocks given to somebody else.
    pub num_evictions: u64,
    /// Output tokens of the fast lane.
    pub num_fast_tokens: u64,
    /// Output tokens of the deep lane.
    pub num_deep_tokens: u64,
    /// Draft tokens offered to the target, by [`DraftSource`].
    pub num_draft_tokens: [u64; 3],
    /// Of those, accepted.
    pub num_accepted_tokens: [u64; 3],
    /// Draft tokens offered to the target, by their position in the draft.
    pub num_draft_tokens_at: [u64; MAX_DRAFT_TOKENS],
    /// Of those, accepted.
    pub num_accepted_tokens_at: [u64; MAX_DRAFT_TOKENS],
    /// Milliseconds until a sequence that starts to wait now would run, by [`Lane`], from the measured rate at
    /// which waiting ones start; 0 while nobody waits.
    pub queue_wait_ms_by_lane: [u64; 2],
    /// Sequences that finished by themselves.
    pub num_finished: u64,
    /// Sequences aborted by their client.
    pub num_aborted: u64,
    /// Sequences that failed.
    pub num_failed: u64,
}

impl EngineStats {
    /// When a sequence that a lane refuses now should be tried again: a second at least, a minute at most.
    pub fn retry_after(&self, lane: Lane) -> Duration {
        Duration::from_millis(self.queue_wait_ms_by_lane[lane as usize])
            .clamp(Duration::from_secs(1), Duration::from_secs(60))
    }
}

impl Usage {
    /// Draft tokens offered to the target, whoever proposed them.
    pub fn total_draft_tokens(&self) -> u32 {
        self.num_draft_tokens.iter().sum()
    }

    /// Draft tokens accepted, whoever proposed them.
    pub fn total_accepted_tokens(&self) -> u32 {
        self.num_accepted_tokens.iter().sum()
    }
}
