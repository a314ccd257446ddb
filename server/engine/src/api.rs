//! What crosses the engine's boundary: token ids and sampling parameters in,
//! tokens and usage out. No text, no HTTP, no JSON.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

use arrayvec::ArrayVec;
use bytemuck::{Pod, Zeroable};

use crate::constraint::Constraint;
use crate::embedding::EmbedRequest;

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

/// How the next token is chosen from the logits.
///
/// Validated by [`SamplingParams::validate`]; the engine refuses values outside the stated ranges.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy (plain argmax); otherwise logits are divided by it. Finite, `0.0..=100.0`.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probability reaches this; `0.0 < top_p <= 1.0`.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the likeliest; `0.0..=1.0`.
    pub min_p: f32,
    /// Divides positive (multiplies negative) logits of tokens seen in prompt or output; 1 is off. `0.01..=100.0`.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of every token in the output so far; `-2.0..=2.0`.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output so far; `-2.0..=2.0`.
    pub frequency_penalty: f32,
    /// Added to the logits of the named tokens, before everything else; finite, `-100.0..=100.0`.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Seed of the noise. The caller draws one when its client named none.
    pub seed: u64,
    /// Report the log-probability of each output token and of this many most likely alternatives.
    pub logprobs: Option<u8>,
    /// The same for the prompt's tokens, reported once before the first output token.
    pub prompt_logprobs: Option<u8>,
    /// Output tokens, from the first on, whose margin is reported ([`TokenChunk::margins`]).
    pub num_margins: u32,
    /// Tokens that end the sequence; they are not part of the output.
    pub stop_token_ids: Vec<TokenId>,
    /// At least this many tokens before a stop token may end the sequence
    /// (stop tokens are masked out of the logits until then).
    pub min_tokens: u32,
    /// At most this many output tokens; 0 only scores the prompt (`prompt_logprobs`).
    pub max_tokens: u32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
            num_margins: 0,
            stop_token_ids: Vec::new(),
            min_tokens: 0,
            max_tokens: 16,
        }
    }
}

/// The most alternatives that `logprobs` may ask for.
pub const MAX_LOGPROBS: u8 = 20;

impl SamplingParams {
    /// Checks every range.
    ///
    /// # Errors
    /// Names the first parameter that is outside its range, its value and the range.
    pub fn validate(&self, vocab_size: usize) -> Result<(), EngineError> {
        let fault = |name: &'static str, value: String, wanted: &'static str| {
            Err(EngineError::InvalidParameter { name, value, wanted })
        };
        if !(0.0..=100.0).contains(&self.temperature) {
            return fault("temperature", self.temperature.to_string(), "a number from 0 to 100");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return fault("top_p", self.top_p.to_string(), "a number above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return fault("min_p", self.min_p.to_string(), "a number from 0 to 1");
        }
        if !(0.01..=100.0).contains(&self.repetition_penalty) {
            return fault(
                "repetition_penalty",
                self.repetition_penalty.to_string(),
                "a number from 0.01 to 100",
            );
        }
        for (name, value) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            if !(-2.0..=2.0).contains(&value) {
                return fault(name, value.to_string(), "a number from -2 to 2");
            }
        }
        for &(id, bias) in &self.logit_bias {
            if !(-100.0..=100.0).contains(&bias) {
                return fault("logit_bias", bias.to_string(), "values from -100 to 100");
            }
            if id as usize >= vocab_size {
                return fault("logit_bias", id.to_string(), "token ids inside the vocabulary");
            }
        }
        for (name, count) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if count.is_some_and(|count| count > MAX_LOGPROBS) {
                return fault(name, count.unwrap_or(0).to_string(), "at most 20");
            }
        }
        Ok(())
    }
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

/// Who proposes draft tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DraftSource {
    /// The draft model, or the head that drafts in its place.
    Draft,
    /// A continuation found in the sequence's own text or its session's.
    Ngram,
    /// The text that the client expects.
    Prediction,
}

impl DraftSource {
    /// All of them.
    pub const ALL: [DraftSource; 3] = [DraftSource::Draft, DraftSource::Ngram, DraftSource::Prediction];
}

/// A set of [`DraftSource`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftSources(u8);

impl DraftSources {
    /// No source: plain decoding.
    pub const NONE: DraftSources = DraftSources(0);
    /// Every source.
    pub const ALL: DraftSources = DraftSources(0b111);

    /// The set with `source` in it.
    #[must_use]
    pub fn with(self, source: DraftSource) -> DraftSources {
        DraftSources(self.0 | 1 << source as u8)
    }

    /// True if `source` is in the set.
    pub fn contains(self, source: DraftSource) -> bool {
        self.0 & 1 << source as u8 != 0
    }
}

impl Default for DraftSources {
    fn default() -> Self {
        DraftSources::ALL
    }
}

/// How a sequence speculates.
#[derive(Clone, Debug, Default)]
pub struct SpeculationParams {
    /// `None`: the engine's policy chooses source and length. A number: always as many draft tokens as
    /// that, from the first of prediction, draft model and n-gram that may and can; 0 is none.
    pub max_draft_tokens: Option<u8>,
    /// Who may propose.
    pub sources: DraftSources,
    /// The output that the client expects (OpenAI's Predicted Outputs); empty: none.
    pub prediction: Arc<[TokenId]>,
}

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
