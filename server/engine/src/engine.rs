//! The step loop's body: schedule, draft, verify, emit.
//!
//! [`Engine`] owns everything by value and is driven by one thread; the time is passed in. A step:
//!
//! 1. admit waiting sequences, and plan each deep sequence's draft length;
//! 2. draft rounds: each is one pass of the draft over the fast lane's sequences *and* the deep
//!    lane's proposals, so the fast lane gains a token a round;
//! 3. one pass of the target over the deep lane: prefill, decode and verification together;
//! 4. verify and commit, hand events to the clients, retire what finished.
//!
//! Buffers are sized at start or grow to the largest pass seen; a steady step does not allocate.

use std::time::Duration;

use tandem_models::Model;

use crate::api::{
    EngineError, EngineStats, FinishReason, Lane, MAX_TOKENS_PER_STEP, SequenceId, SubmitRequest,
};
use crate::block_manager::BlockManager;
use crate::sampler::{Draw, LogprobScratch, Sampler};
use crate::scheduler::{ScheduledBatch, Scheduler, SchedulerLimits};
use crate::sequence::{ModelRole, Sequence};
use crate::speculation::{DraftPolicy, DraftTokens, StepCosts, verify};

/// What the engine is made with.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Tokens a block of the KV cache holds.
    pub block_size: usize,
    /// Blocks of the KV cache.
    pub num_blocks: usize,
    /// Sequences that run at a time; more wait.
    pub max_num_seqs: usize,
    /// Tokens of one pass (raised if `max_num_seqs` sequences could not all verify in one).
    pub max_num_batched_tokens: usize,
    /// Sequences that wait at a time; more are refused.
    pub max_waiting: usize,
    /// Longest prompt plus output, in tokens.
    pub max_model_len: usize,
    /// Ids below this are tokens. Rows of the embedding beyond are padding, of which target and draft
    /// may have different amounts: they are never sampled, so each model knows the other's tokens.
    pub num_token_ids: usize,
    /// How many tokens to draft.
    pub draft_tokens: DraftTokens,
}

/// Most rows of prompt logits in one pass, so that scoring a long prompt over a large vocabulary
/// does not take gigabytes (64 rows of 152,064 f32 are 39 MB).
const MAX_PROMPT_LOGITS_ROWS: usize = 64;

/// The pair. At least one is there.
pub struct Models {
    /// Answers the deep lane.
    pub target: Option<Box<dyn Model>>,
    /// Answers the fast lane and proposes for the deep one.
    pub draft: Option<Box<dyn Model>>,
}

impl Models {
    fn get(&mut self, role: ModelRole) -> &mut Option<Box<dyn Model>> {
        match role {
            ModelRole::Target => &mut self.target,
            ModelRole::Draft => &mut self.draft,
        }
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
    scheduler: Scheduler,
    models: Models,
    policy: DraftPolicy,
    sampler: Sampler,
    logprobs: LogprobScratch,
    batch: ScheduledBatch,
    logits: Vec<f32>,
    num_token_ids: usize,
    stats: EngineStats,
}

impl Engine {
    /// Allocates the KV caches.
    ///
    /// # Errors
    /// If a model cannot allocate its cache.
    pub fn new(config: &EngineConfig, mut models: Models) -> Result<Self, EngineError> {
        for model in models.target.iter_mut().chain(&mut models.draft) {
            let vocab_size = model.config().vocab_size;
            if config.num_token_ids == 0 || config.num_token_ids > vocab_size {
                return Err(EngineError::VocabularyTooSmall {
                    num_token_ids: config.num_token_ids,
                    vocab_size,
                });
            }
            model
                .allocate_kv_cache(config.num_blocks, config.block_size)
                .map_err(|error| EngineError::Forward(error.to_string()))?;
        }
        let limits = SchedulerLimits {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config
                .max_num_batched_tokens
                .max(config.max_num_seqs * MAX_TOKENS_PER_STEP),
            max_logits_rows: MAX_PROMPT_LOGITS_ROWS,
        };
        Ok(Engine {
            scheduler: Scheduler::new(limits, BlockManager::new(config.num_blocks, config.block_size)),
            models,
            policy: DraftPolicy::new(config.draft_tokens, StepCosts::default()),
            sampler: Sampler::new(config.num_token_ids),
            num_token_ids: config.num_token_ids,
            logprobs: LogprobScratch::default(),
            batch: ScheduledBatch::default(),
            logits: Vec::new(),
            stats: EngineStats { num_total_blocks: config.num_blocks as u64, ..EngineStats::default() },
        })
    }

    /// Measures what passes cost, for the draft-length policy. Takes some tens of passes; must run
    /// before the first sequence, because it writes to the KV cache.
    ///
    /// # Errors
    /// If a pass fails.
    pub fn profile(&mut self, setting: DraftTokens, clock: &dyn Fn() -> Duration) -> Result<(), EngineError> {
        assert!(self.scheduler.is_idle(), "the profile would overwrite live sequences: this is a bug");
        let mut costs = [Vec::new(), Vec::new()];
        for role in [ModelRole::Target, ModelRole::Draft] {
            for rows in crate::speculation::PROFILED_ROWS {
                if let Some(time) = self.time_pass(role, rows, clock)? {
                    costs[role as usize].push((rows, time));
                }
            }
        }
        let [target, draft] = costs;
        self.policy = DraftPolicy::new(setting, StepCosts::from_measured(target, draft));
        Ok(())
    }

    /// The fastest of a few passes over one sequence of `rows` rows after some context.
    fn time_pass(
        &mut self,
        role: ModelRole,
        rows: usize,
        clock: &dyn Fn() -> Duration,
    ) -> Result<Option<Duration>, EngineError> {
        const CONTEXT: usize = 64;
        const PASSES: usize = 3;
        let blocks = &mut self.scheduler.blocks;
        let Some(model) = self.models.get(role) else { return Ok(None) };
        let Some(table) = blocks.allocate(CONTEXT + rows) else { return Ok(None) };
        let mut best = None;
        let mut outcome = Ok(());
        for pass in 0..=PASSES {
            self.batch.inputs.clear();
            let (start, num_tokens, num_logits) =
                if pass == 0 { (0, CONTEXT, 1) } else { (CONTEXT, rows, rows) };
            blocks.push_sequence(&mut self.batch.inputs, &vec![0; num_tokens], start, &table, num_logits);
            let before = clock();
            outcome = model.forward(&self.batch.inputs, &mut self.logits);
            let time = clock().saturating_sub(before);
            if pass > 0 {
                best = Some(best.map_or(time, |b: Duration| b.min(time)));
            }
            if outcome.is_err() {
                break;
            }
        }
        blocks.release(table);
        outcome.map_err(|error| EngineError::Forward(error.to_string()))?;
        Ok(best)
    }

    /// Queues a sequence. The caller has checked it against the models' limits.
    pub fn submit(&mut self, request: SubmitRequest, now: Duration) {
        self.scheduler.add(Sequence::new(request, now));
    }

    /// Ends a sequence; its client is given the closing account, if it still listens.
    pub fn abort(&mut self, id: SequenceId) {
        if let Some(sequence) = self.scheduler.remove(id) {
            self.end_aborted(sequence);
        }
    }

    /// Ends every sequence, as [`Engine::abort`] does.
    pub fn abort_all(&mut self) {
        for sequence in self.scheduler.remove_all() {
            self.end_aborted(sequence);
        }
    }

    fn end_aborted(&mut self, mut sequence: Sequence) {
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

    /// Every finished sequence's client has taken all events.
    pub fn is_delivered(&self) -> bool {
        self.scheduler.num_delivering() == 0
    }

    /// Counters, and gauges as of now.
    pub fn stats(&self) -> EngineStats {
        EngineStats {
            num_waiting: self.scheduler.num_waiting() as u64,
            num_running: self.scheduler.running.len() as u64,
            num_free_blocks: self.scheduler.blocks.num_free() as u64,
            ..self.stats
        }
    }

    /// One step; see the file's header. `clock` is read a few times a step.
    pub fn step(&mut self, clock: &dyn Fn() -> Duration) {
        self.scheduler.admit(clock());
        let rounds = self.plan_drafts();
        for round in 0..rounds {
            self.scheduler.schedule_draft(round, &mut self.batch);
            if !self.pass(ModelRole::Draft, clock) {
                break;
            }
        }
        self.scheduler.schedule_target(&mut self.batch);
        self.pass(ModelRole::Target, clock);
        for retired in self.scheduler.retire() {
            if retired.finished == Some(FinishReason::Aborted) {
                self.stats.num_aborted += 1;
            } else {
                self.stats.num_finished += 1;
            }
        }
        self.scheduler.deliver();
        self.stats.num_steps += 1;
        let blocks = &self.scheduler.blocks;
        debug_assert_eq!(blocks.num_free() + blocks.num_used(), blocks.num_total());
    }

    /// Sets each deep sequence's draft length and returns the number of draft rounds.
    fn plan_drafts(&mut self) -> usize {
        let can_speculate = self.models.target.is_some() && self.models.draft.is_some();
        let decodes_deep = |s: &Sequence| s.lane == Lane::Deep && !s.is_prefilling();
        let num_deep = self.scheduler.running.iter().filter(|s| decodes_deep(s)).count();
        let num_fast = self.scheduler.running.iter().filter(|s| s.lane == Lane::Fast).count();
        let mut rounds = usize::from(num_fast > 0);
        for sequence in &mut self.scheduler.running {
            sequence.num_planned_draft_tokens = 0;
            if !can_speculate || !decodes_deep(sequence) {
                continue;
            }
            let chosen = match sequence.max_draft_tokens {
                Some(length) => usize::from(length).min(MAX_TOKENS_PER_STEP - 1),
                None => self.policy.choose(&sequence.acceptance, num_deep, num_fast),
            };
            // The target adds a token of its own, so a draft as long as the rest would be wasted.
            sequence.num_planned_draft_tokens = chosen.min(sequence.num_remaining_tokens().saturating_sub(1));
            rounds = rounds.max(sequence.num_planned_draft_tokens);
        }
        rounds
    }

    /// Runs the scheduled pass and gives every sequence its logits. False if there was nothing to do.
    fn pass(&mut self, role: ModelRole, clock: &dyn Fn() -> Duration) -> bool {
        if self.batch.sequences.is_empty() {
            return false;
        }
        let model =
            self.models.get(role).as_mut().expect("a lane without its model was admitted: this is a bug");
        let vocab_size = model.config().vocab_size;
        let outcome = model.forward(&self.batch.inputs, &mut self.logits);
        match role {
            ModelRole::Target => self.stats.num_target_passes += 1,
            ModelRole::Draft => self.stats.num_draft_passes += 1,
        }
        if let Err(error) = outcome {
            self.fail_batch(&EngineError::Forward(error.to_string()));
            return true;
        }
        let now = clock();
        let mut logits = self.logits.as_slice();
        let mut failed = false;
        for scheduled in &self.batch.sequences {
            let (rows, rest) = logits.split_at(scheduled.num_logits * vocab_size);
            logits = rest;
            let sequence = &mut self.scheduler.running[scheduled.index];
            let mut pass = SequencePass {
                sequence,
                sampler: &mut self.sampler,
                logprobs: &mut self.logprobs,
                stats: &mut self.stats,
                row_width: vocab_size,
                num_token_ids: self.num_token_ids,
                now,
            };
            if let Err(error) = pass.apply(role, scheduled.num_tokens, rows) {
                sequence.finished = Some(FinishReason::Aborted);
                sequence.error = Some(error);
                failed = true;
            } else if sequence.emit().is_err() {
                sequence.rollback();
                sequence.finished = Some(FinishReason::Aborted);
            }
        }
        if failed {
            self.fail_marked();
        }
        true
    }

    /// Fails the sequences of the scheduled pass.
    fn fail_batch(&mut self, error: &EngineError) {
        for scheduled in &self.batch.sequences {
            self.scheduler.running[scheduled.index].error = Some(error.clone());
        }
        self.fail_marked();
    }

    /// Ends the sequences that carry an error.
    fn fail_marked(&mut self) {
        while let Some((id, error)) =
            self.scheduler.running.iter_mut().find_map(|s| Some((s.id, s.error.take()?)))
        {
            if let Some(sequence) = self.scheduler.remove(id) {
                sequence.fail(error);
                self.stats.num_failed += 1;
            }
        }
    }
}

/// One sequence's share of a finished pass.
struct SequencePass<'a> {
    sequence: &'a mut Sequence,
    sampler: &'a mut Sampler,
    logprobs: &'a mut LogprobScratch,
    stats: &'a mut EngineStats,
    /// Logits of a row; those of `num_token_ids` tokens, then padding.
    row_width: usize,
    num_token_ids: usize,
    now: Duration,
}

impl SequencePass<'_> {
    fn apply(&mut self, role: ModelRole, num_tokens: usize, rows: &[f32]) -> Result<(), EngineError> {
        let sequence = &mut *self.sequence;
        let start = sequence.num_computed(role);
        sequence.advance(role, num_tokens);
        let end = start + num_tokens;
        if role != sequence.lane.answered_by() {
            return self.propose(end, rows);
        }
        let num_prompt_tokens = sequence.num_prompt_tokens();
        self.stats.num_prompt_tokens += end.min(num_prompt_tokens).saturating_sub(start) as u64;
        let mut rows = rows;
        if let Some(num_top) = sequence.params.prompt_logprobs
            && start < num_prompt_tokens
        {
            let mut scored = start;
            while scored + 1 < num_prompt_tokens && !rows.is_empty() {
                let (row, rest) = rows.split_at(self.row_width);
                let next = sequence.tokens()[scored + 1];
                sequence.push_prompt_logprobs(self.logprobs.compute(
                    &row[..self.num_token_ids],
                    next,
                    num_top.into(),
                ));
                rows = rest;
                scored += 1;
            }
            if sequence.params.max_tokens == 0 && end == num_prompt_tokens {
                sequence.finished = Some(FinishReason::Length);
                return Ok(());
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        if sequence.num_remaining_tokens() == 0 {
            sequence.finished = Some(FinishReason::Length);
            return Ok(());
        }
        let before = sequence.usage;
        let rows = rows.chunks_exact(self.row_width).map(|row| &row[..self.num_token_ids]);
        let outcome = verify(sequence, rows, self.sampler, self.logprobs, self.now);
        let after = sequence.usage;
        let new_tokens = u64::from(after.num_output_tokens - before.num_output_tokens);
        match sequence.lane {
            Lane::Fast => self.stats.num_fast_tokens += new_tokens,
            Lane::Deep => self.stats.num_deep_tokens += new_tokens,
        }
        self.stats.num_draft_tokens += u64::from(after.num_draft_tokens - before.num_draft_tokens);
        self.stats.num_accepted_tokens += u64::from(after.num_accepted_tokens - before.num_accepted_tokens);
        outcome
    }

    /// Takes a draft token from the draft's logits. A draft that gives no usable logits costs its
    /// sequence the speculation of this step, never the sequence.
    fn propose(&mut self, end: usize, rows: &[f32]) -> Result<(), EngineError> {
        let sequence = &mut *self.sequence;
        if rows.is_empty() || end < sequence.tokens().len() {
            sequence.num_planned_draft_tokens = 0;
            return Ok(());
        }
        let draw = Draw {
            params: &sequence.params,
            counts: sequence.counts.as_ref(),
            provisional: sequence.draft_tokens(),
            position: sequence.tokens().len(),
            num_output_tokens: sequence.num_output_tokens() + sequence.draft_tokens().len(),
        };
        match self.sampler.draw(&rows[..self.num_token_ids], &draw) {
            Ok(id) => {
                sequence.push_draft_token(id);
                // Nothing follows a stop token.
                if sequence.params.stop_token_ids.contains(&id) {
                    sequence.num_planned_draft_tokens = 0;
                }
            }
            Err(_) => sequence.num_planned_draft_tokens = 0,
        }
        Ok(())
    }
}
