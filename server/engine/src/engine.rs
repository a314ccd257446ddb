//! The engine and what can be asked of it. A step's phases are in [`crate::step`].
//!
//! [`Engine`] owns everything by value and is driven by one thread; the time is passed in. Buffers are
//! sized at start or grow to the largest pass seen; a steady step does not allocate.

use std::sync::Arc;
use std::time::Duration;

use tandem_models::{Model, VocabMap};

use crate::api::{
    EngineError, EngineStats, FinishReason, Lane, MAX_TOKENS_PER_STEP, SequenceId, SubmitRequest,
};
use crate::batch::{PassLimits, ScheduledBatch};
use crate::block_manager::BlockManager;
use crate::embedding::{EmbedRequest, Pooling};
use crate::kv_events::{KvEventSink, KvEvents};
use crate::plan::PlanScratch;
use crate::prefill::PrefillLimit;
use crate::prefix_cache::HashSettings;
use crate::sampler::Sampler;
use crate::scheduler::Scheduler;
use crate::sequence::{ModelRole, Sequence};
use crate::speculation::{DraftHead, DraftPolicy, DraftTokens, HeadPolicy, Sessions, StepCosts, Trials};
use crate::step::Phase;

/// What the engine is made with.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Tokens a block of the KV cache holds.
    pub block_size: usize,
    /// Blocks of the KV cache.
    pub num_blocks: usize,
    /// Sequences of a lane that run at a time; more wait.
    pub max_num_seqs: usize,
    /// Tokens of one pass (raised if all running sequences could not verify in one).
    pub max_num_batched_tokens: usize,
    /// Sequences of a lane that wait at a time; more are refused.
    pub max_waiting: usize,
    /// Longest prompt plus output, in tokens.
    pub max_model_len: usize,
    /// Ids below this are tokens. Rows of the embedding beyond are padding, of which target and draft
    /// may have different amounts: they are never sampled, so each model knows the other's tokens.
    pub num_token_ids: usize,
    /// For a draft of another vocabulary: how its tokens translate. Then `num_token_ids` are the target's,
    /// and the fast lane's are all that the map knows of the draft.
    pub vocab_map: Option<Arc<VocabMap>>,
    /// How many tokens to draft.
    pub draft_tokens: DraftTokens,
    /// Of how many tokens the draft model chooses while it proposes.
    pub draft_head: DraftHead,
    /// Keep the blocks of finished sequences and share those of equal prefixes.
    pub prefix_cache: bool,
    /// Key of the prefix cache's hash. Drawn anew at each start, so that nobody can choose prompts
    /// whose hashes collide. (A collision costs time and is never a wrong answer.)
    pub hash_key: [u64; 2],
    /// Bits of that hash that are used, 1 to 64. Fewer than 64 is for tests of collisions.
    pub hash_bits: u32,
    /// Suspend the target's pass between layers while the fast lane has work.
    pub lane_isolation: bool,
}

impl EngineConfig {
    /// Ids below these are tokens, by [`Lane`].
    pub(crate) fn num_token_ids_by_lane(&self) -> [usize; 2] {
        [self.vocab_map.as_ref().map_or(self.num_token_ids, |map| map.num_draft_ids()), self.num_token_ids]
    }
}

/// Salt of what the fast lane caches where its ids mean other tokens than the deep lane's.
const OTHER_VOCABULARY: u128 = 0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835;

/// Most rows of prompt logits in one pass, so that scoring a long prompt over a large vocabulary
/// does not take gigabytes (64 rows of 152,064 f32 are 39 MB).
const MAX_PROMPT_LOGITS_ROWS: usize = 64;

/// The pair. At least one is there.
pub struct Models {
    /// Answers the deep lane. Its [`Model::drafting_head`], if it has one, proposes where there is no draft.
    pub target: Option<Box<dyn Model>>,
    /// Answers the fast lane and proposes for the deep one.
    pub draft: Option<Box<dyn Model>>,
}

impl Models {
    pub(crate) fn get(&mut self, role: ModelRole) -> Option<&mut dyn Model> {
        match (role, &mut self.draft, &mut self.target) {
            (ModelRole::Target, _, Some(target)) => Some(&mut **target),
            (ModelRole::Draft, Some(draft), _) => Some(&mut **draft),
            (ModelRole::Draft, None, Some(target)) => target.drafting_head(),
            _ => None,
        }
    }

    /// True if what proposes is a head: it goes along with the target's passes, and answers no lane.
    fn drafts_by_head(&mut self) -> bool {
        self.draft.is_none() && self.get(ModelRole::Draft).is_some()
    }

    pub(crate) fn has(&self, lane: Lane) -> bool {
        match lane {
            Lane::Fast => self.draft.is_some(),
            Lane::Deep => self.target.is_some(),
        }
    }
}

/// The synchronous engine. Most callers want [`crate::EngineHandle`], which gives it a thread.
pub struct Engine {
    pub(crate) scheduler: Scheduler,
    pub(crate) models: Models,
    pub(crate) limits: PassLimits,
    pub(crate) policy: DraftPolicy,
    pub(crate) draft_head: HeadPolicy,
    pub(crate) draft_head_setting: DraftHead,
    pub(crate) trials: Trials,
    pub(crate) sessions: Sessions,
    pub(crate) plan: PlanScratch,
    pub(crate) sampler: Sampler,
    pub(crate) phase: Phase,
    /// The draft's pass of the moment.
    pub(crate) draft_batch: ScheduledBatch,
    /// The target's pass, which may be under way while the draft runs.
    pub(crate) target_batch: ScheduledBatch,
    /// The hidden states of a pass, of those that want them.
    pub(crate) hidden: Vec<f32>,
    /// By [`Lane`].
    pub(crate) num_token_ids: [usize; 2],
    pub(crate) vocab_map: Option<Arc<VocabMap>>,
    /// What proposes is a head of the target: see [`Model::drafting_head`].
    pub(crate) has_head: bool,
    /// A row of the draft's logits in the target's vocabulary.
    pub(crate) translated: Vec<f32>,
    pub(crate) lane_isolation: bool,
    pub(crate) stats: EngineStats,
    kv_events: Option<Box<dyn KvEventSink>>,
    pub(crate) max_model_len: usize,
}

impl Engine {
    /// Allocates the KV caches.
    ///
    /// # Errors
    /// If a model cannot allocate its cache.
    pub fn new(config: &EngineConfig, mut models: Models) -> Result<Self, EngineError> {
        let num_token_ids = config.num_token_ids_by_lane();
        for (model, num_token_ids) in
            [(&mut models.draft, num_token_ids[0]), (&mut models.target, num_token_ids[1])]
        {
            let Some(model) = model else { continue };
            let vocab_size = model.config().vocab_size;
            if num_token_ids == 0 || num_token_ids > vocab_size {
                return Err(EngineError::VocabularyTooSmall { num_token_ids, vocab_size });
            }
            model
                .allocate_kv_cache(config.num_blocks, config.block_size)
                .map_err(|error| EngineError::Forward(error.to_string()))?;
        }
        let max_num_batched_tokens =
            config.max_num_batched_tokens.max(2 * config.max_num_seqs * MAX_TOKENS_PER_STEP);
        let has_head = models.drafts_by_head();
        let limits = PassLimits {
            max_num_batched_tokens,
            deep_prefill: [PrefillLimit::flat(config.max_num_batched_tokens.max(1)); 2],
            embedding: [PrefillLimit::flat(config.max_num_batched_tokens.max(1)); 2],
            max_logits_rows: MAX_PROMPT_LOGITS_ROWS,
            draft_catch_up: if has_head { MAX_TOKENS_PER_STEP } else { 1 },
            short_head: false,
        };
        let hashing = HashSettings { key: config.hash_key, bits: config.hash_bits.clamp(1, u64::BITS) };
        let blocks =
            BlockManager::new(config.num_blocks, config.block_size, config.prefix_cache.then_some(hashing));
        let mut engine = Engine {
            scheduler: Scheduler::new(config.max_num_seqs, blocks),
            models,
            limits,
            policy: DraftPolicy::new(config.draft_tokens, StepCosts::default()),
            draft_head: HeadPolicy::default(),
            draft_head_setting: config.draft_head,
            trials: Trials::default(),
            sessions: Sessions::default(),
            plan: PlanScratch::default(),
            sampler: Sampler::default(),
            phase: Phase::default(),
            draft_batch: ScheduledBatch::new(num_token_ids[0], config.vocab_map.clone()),
            vocab_map: config.vocab_map.clone(),
            has_head,
            translated: Vec::new(),
            target_batch: ScheduledBatch::new(num_token_ids[1], None),
            hidden: Vec::new(),
            num_token_ids,
            lane_isolation: config.lane_isolation,
            stats: EngineStats { num_total_blocks: config.num_blocks as u64, ..EngineStats::default() },
            kv_events: None,
            max_model_len: config.max_model_len,
        };
        if let DraftHead::First(_) = config.draft_head {
            engine.fix_draft_head()?;
        }
        Ok(engine)
    }

    /// Tells of every change of the prefix cache from now on.
    pub fn publish_kv_events(&mut self, KvEvents { sink, key }: KvEvents) {
        let role = if self.models.target.is_some() { ModelRole::Target } else { ModelRole::Draft };
        self.scheduler.blocks.log_events(key, role);
        self.kv_events = Some(sink);
    }

    /// Hands over what has changed since the last call.
    pub(crate) fn tell_kv_events(&mut self) {
        let Some(sink) = &mut self.kv_events else { return };
        let events = self.scheduler.blocks.take_events();
        if !events.is_empty() {
            sink.publish(events);
        }
    }

    /// Queues a sequence. The caller has checked it against the models' limits.
    pub fn submit(&mut self, mut request: SubmitRequest, now: Duration) {
        if self.vocab_map.is_some() && request.lane == Lane::Fast {
            request.cache_salt.0 ^= OTHER_VOCABULARY;
        }
        let num_token_ids = self.num_token_ids[request.lane as usize];
        self.scheduler.add(Box::new(Sequence::new(request, num_token_ids, now)));
    }

    /// Queues a text to embed, checked as a sequence is.
    pub fn embed(&mut self, request: EmbedRequest, now: Duration) {
        let num_token_ids = self.num_token_ids[request.lane as usize];
        let mut sequence = Sequence::new(request.into_submit(), num_token_ids, now);
        sequence.pooling = Some(Pooling::default());
        self.scheduler.add(Box::new(sequence));
    }

    /// Ends a sequence; its client is given the closing account, if it still listens.
    pub fn abort(&mut self, id: SequenceId) {
        if let Some(sequence) = self.scheduler.remove(id) {
            self.end_aborted(sequence);
        }
    }

    /// Raises a sequence's `max_tokens`, at most to what context and KV cache hold.
    pub fn extend(&mut self, id: SequenceId, max_tokens: u32) {
        let most_slots = self.scheduler.blocks.num_slots();
        let most = self.max_model_len.min(most_slots);
        if let Some(sequence) = self.scheduler.find(id) {
            let room = most.saturating_sub(sequence.num_prompt_tokens());
            sequence.extend(max_tokens.min(u32::try_from(room).unwrap_or(u32::MAX)));
        }
    }

    /// Ends every sequence, as [`Engine::abort`] does.
    pub fn abort_all(&mut self) {
        for sequence in self.scheduler.remove_all() {
            self.end_aborted(sequence);
        }
    }

    fn end_aborted(&mut self, mut sequence: Box<Sequence>) {
        sequence.rollback();
        sequence.finished = Some(FinishReason::Aborted);
        self.scheduler.deliver_last(sequence);
        self.stats.num_aborted += 1;
    }

    /// Fails every sequence: something is wrong with the engine itself.
    pub fn fail_all(&mut self, error: &EngineError) {
        for sequence in self.scheduler.remove_all() {
            sequence.fail(error.clone());
            self.stats.num_failed += 1;
        }
    }

    /// Offers finished sequences' last events to their clients again; a step does it too.
    pub fn deliver(&mut self) {
        self.scheduler.deliver();
    }

    /// Nothing to compute (clients may still have to take their last events).
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// The target's pass is suspended between two layers.
    pub(crate) fn is_in_target_pass(&self) -> bool {
        matches!(self.phase, Phase::Target { .. })
    }

    /// Every finished sequence's client has taken all events.
    pub fn is_delivered(&self) -> bool {
        self.scheduler.num_delivering() == 0
    }

    /// Checks that every block is free, cached or used by as many sequences as its count says. O(blocks).
    ///
    /// # Errors
    /// [`EngineError::Integrity`]: the engine must not go on.
    pub fn check_integrity(&self) -> Result<(), EngineError> {
        self.scheduler.check().map_err(EngineError::Integrity)
    }

    /// Counters, and gauges as of now.
    pub fn stats(&self) -> EngineStats {
        let blocks = &self.scheduler.blocks;
        let running_in = |lane| self.scheduler.running().filter(|s| s.lane == lane).count() as u64;
        EngineStats {
            num_waiting: self.scheduler.num_waiting() as u64,
            num_running: self.scheduler.running().count() as u64,
            num_waiting_by_lane: self.scheduler.num_waiting_by_lane().map(|count| count as u64),
            num_running_by_lane: [Lane::Fast, Lane::Deep].map(running_in),
            num_free_blocks: blocks.num_free() as u64,
            num_cached_blocks: blocks.num_cached() as u64,
            num_preemptions: self.scheduler.num_preemptions(),
            num_cached_tokens: self.scheduler.num_cached_tokens(),
            num_evictions: blocks.num_evictions(),
            queue_wait_ms_by_lane: self.scheduler.queue_wait_by_lane().map(|wait| wait.as_millis() as u64),
            ..self.stats
        }
    }
}
