//! A pass of a model, from its inputs to what its sequences make of the logits; and what happens when
//! it fails.
//!
//! A model that fails or panics takes down the pass, not the engine: the pass is run again sequence by
//! sequence, which writes the same bits to the same slots, and only those that fail alone fail. The same
//! holds for what is done with a sequence's logits.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use tandem_models::VocabMap;

use crate::api::{EngineError, EngineStats, FinishReason, Lane};
use crate::batch::ScheduledSequence;
use crate::engine::Engine;
use crate::rows::{Asked, Row, Rows};
use crate::sampler::{Drawn, Sampler};
use crate::scheduler::Scheduler;
use crate::sequence::{ModelRole, Sequence};
use crate::speculation::{DraftPolicy, HeadPolicy, verify};

/// Turns a panic into an error.
pub(crate) fn guard<T>(work: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(EngineError::Forward(format!("internal error: {}", text.as_deref().unwrap_or("a panic"))))
    })
}

fn forward_error(error: impl std::fmt::Display) -> EngineError {
    EngineError::Forward(error.to_string())
}

impl Engine {
    /// Runs the scheduled pass of a model from beginning to end.
    pub(crate) fn run_pass(&mut self, role: ModelRole, clock: &dyn Fn() -> Duration) {
        let mut is_whole = self.begin_pass(role);
        while is_whole {
            match self.advance_pass(role) {
                Some(true) => {}
                Some(false) => break,
                None => is_whole = false,
            }
        }
        self.end_pass(role, is_whole, clock);
    }

    /// Hands the scheduled pass to its model. False if it failed.
    pub(crate) fn begin_pass(&mut self, role: ModelRole) -> bool {
        let batch = match role {
            ModelRole::Target => &self.target_batch,
            ModelRole::Draft => &self.draft_batch,
        };
        let model = self.models.get(role).expect("a lane has its model: this is a bug");
        guard(|| model.begin(&batch.inputs).map_err(forward_error)).is_ok()
    }

    /// Computes a layer. True if that was not the last; `None` if it failed.
    pub(crate) fn advance_pass(&mut self, role: ModelRole) -> Option<bool> {
        let model = self.models.get(role).expect("a lane has its model: this is a bug");
        guard(|| model.advance().map_err(forward_error)).ok()
    }

    /// Ends the pass and gives every sequence its rows; runs it again one by one if it is not whole.
    /// Returns the time for what the sequences made of their rows.
    pub(crate) fn end_pass(
        &mut self,
        role: ModelRole,
        is_whole: bool,
        clock: &dyn Fn() -> Duration,
    ) -> Duration {
        let sequences = std::mem::take(&mut self.batch_of(role).sequences);
        let drawing = if is_whole { self.hand_out(role, &sequences, clock).ok() } else { None };
        if drawing.is_none() {
            self.run_one_by_one(role, &sequences, clock);
        }
        let batch = self.batch_of(role);
        batch.sequences = sequences;
        // Nobody asks for these rows again, and the masks in it are to be used again.
        batch.inputs.wanted.clear();
        drawing.unwrap_or_default()
    }

    /// Takes from the model what its pass gives, and gives these sequences, which are those of the pass, their
    /// parts. Returns the time for what they made of it.
    ///
    /// # Errors
    /// If the model fails; nobody has been given anything then.
    fn hand_out(
        &mut self,
        role: ModelRole,
        sequences: &[ScheduledSequence],
        clock: &dyn Fn() -> Duration,
    ) -> Result<Duration, EngineError> {
        let Engine { models, draft_batch, target_batch, hidden, .. } = self;
        let inputs = match role {
            ModelRole::Target => &target_batch.inputs,
            ModelRole::Draft => &draft_batch.inputs,
        };
        let model = models.get(role).expect("a lane has its model: this is a bug");
        let (vocab_size, hidden_size) = (model.config().vocab_size, model.config().hidden_size);
        let room = &mut *hidden;
        let outputs = guard(move || {
            if !inputs.hidden_rows.is_empty() {
                model.hidden_states(room).map_err(forward_error)?;
            }
            model.finish().map_err(forward_error)
        })?;
        let now = clock();
        let width = match self.draft_head.current() {
            Some((length, _)) if role == ModelRole::Draft && inputs.short_head => length,
            _ => vocab_size,
        };
        let rows = Rows { wanted: &inputs.wanted, outputs, width };
        let mut rest = Given { rows, hidden };
        let tools = Tools {
            sampler: &mut self.sampler,
            policy: &mut self.policy,
            draft_head: &mut self.draft_head,
            stats: &mut self.stats,
            vocab_map: self.vocab_map.as_deref(),
            has_head: self.has_head,
            translated: &mut self.translated,
            hidden_size,
            now,
        };
        let num_token_ids = self.num_token_ids;
        let mut receivers = Receivers { scheduler: &mut self.scheduler, num_token_ids, tools };
        for scheduled in sequences {
            receivers.give(role, scheduled, &mut rest);
        }
        Ok(clock().saturating_sub(now))
    }

    fn batch_of(&mut self, role: ModelRole) -> &mut crate::batch::ScheduledBatch {
        match role {
            ModelRole::Target => &mut self.target_batch,
            ModelRole::Draft => &mut self.draft_batch,
        }
    }

    fn run_one_by_one(
        &mut self,
        role: ModelRole,
        sequences: &[ScheduledSequence],
        clock: &dyn Fn() -> Duration,
    ) {
        for scheduled in sequences {
            if !self.is_seated(scheduled) {
                continue;
            }
            let mut outcome = self.run_alone(role, *scheduled, clock);
            if outcome.is_err()
                && let Some(plain) = self.without_draft(role, *scheduled)
            {
                // A draft token may have broken it, which plain decoding would never have computed.
                outcome = self.run_alone(role, plain, clock);
            }
            if let Err(error) = outcome {
                self.fail_pass(role, scheduled, error);
            }
        }
    }

    fn run_alone(
        &mut self,
        role: ModelRole,
        scheduled: ScheduledSequence,
        clock: &dyn Fn() -> Duration,
    ) -> Result<(), EngineError> {
        let batch = match role {
            ModelRole::Target => &mut self.target_batch,
            ModelRole::Draft => &mut self.draft_batch,
        };
        batch.retain_only(scheduled, role, &mut self.scheduler);
        let model = self.models.get(role).expect("a lane has its model: this is a bug");
        guard(|| {
            model.begin(&batch.inputs).map_err(forward_error)?;
            while model.advance().map_err(forward_error)? {}
            Ok(())
        })?;
        self.hand_out(role, &[scheduled], clock).map(|_| ())
    }

    /// The sequence's part of the target's pass after its draft tokens are forgotten; `None` if it has
    /// none.
    fn without_draft(&mut self, role: ModelRole, scheduled: ScheduledSequence) -> Option<ScheduledSequence> {
        let sequence = self.scheduler.seats[scheduled.seat].as_mut()?;
        let num_draft_tokens = sequence.draft_tokens().len();
        if role != ModelRole::Target || num_draft_tokens == 0 {
            return None;
        }
        sequence.rollback();
        Some(ScheduledSequence {
            num_tokens: scheduled.num_tokens - num_draft_tokens,
            num_logits: 1,
            ..scheduled
        })
    }

    /// A sequence's own pass failed: a proposal is given up, anything else fails the sequence.
    fn fail_pass(&mut self, role: ModelRole, scheduled: &ScheduledSequence, error: EngineError) {
        let Some(sequence) = &mut self.scheduler.seats[scheduled.seat] else { return };
        if role == sequence.lane.answered_by() {
            fail(&mut self.scheduler, &mut self.stats, scheduled, error);
        } else {
            sequence.num_planned_draft_tokens = 0;
        }
    }

    /// True if the sequence is still where it was when the pass was scheduled.
    fn is_seated(&self, scheduled: &ScheduledSequence) -> bool {
        self.scheduler.seats[scheduled.seat].as_ref().is_some_and(|s| s.id == scheduled.id)
    }
}

fn fail(
    scheduler: &mut Scheduler,
    stats: &mut EngineStats,
    scheduled: &ScheduledSequence,
    error: EngineError,
) {
    if let Some(sequence) = scheduler.remove(scheduled.id) {
        sequence.fail(error);
        stats.num_failed += 1;
    }
}

/// What a pass gives, or the part of it that has not been handed out yet.
struct Given<'a> {
    rows: Rows<'a>,
    hidden: &'a [f32],
}

/// All of the engine but its models, which lend what is handed out.
struct Receivers<'a> {
    scheduler: &'a mut Scheduler,
    num_token_ids: [usize; 2],
    tools: Tools<'a>,
}

/// What a sequence makes something of its rows with.
struct Tools<'a> {
    sampler: &'a mut Sampler,
    policy: &'a mut DraftPolicy,
    draft_head: &'a mut HeadPolicy,
    stats: &'a mut EngineStats,
    vocab_map: Option<&'a VocabMap>,
    /// See [`Engine`].
    has_head: bool,
    translated: &'a mut Vec<f32>,
    hidden_size: usize,
    now: Duration,
}

impl Receivers<'_> {
    /// Gives a sequence the first of what is left.
    fn give(&mut self, role: ModelRole, scheduled: &ScheduledSequence, rest: &mut Given<'_>) {
        let rows = rest.rows.split_off(scheduled.num_logits);
        let num_hidden =
            if scheduled.is_embedding { scheduled.num_tokens * self.tools.hidden_size } else { 0 };
        let (hidden, rest_hidden) = rest.hidden.split_at(num_hidden);
        rest.hidden = rest_hidden;
        // It may have been aborted while the pass was under way.
        let seat = self.scheduler.seats[scheduled.seat].as_mut();
        let Some(sequence) = seat.filter(|sequence| sequence.id == scheduled.id) else { return };
        let num_token_ids = self.num_token_ids[sequence.lane as usize].min(rows.width);
        let mut pass = SequencePass { sequence, tools: &mut self.tools, num_token_ids };
        let outcome = guard(|| match scheduled.is_embedding {
            true => pass.pool(role, scheduled.num_tokens, hidden),
            false => pass.apply(role, scheduled.num_tokens, rows),
        });
        match outcome {
            Ok(()) => {
                if sequence.emit().is_err() {
                    sequence.rollback();
                    sequence.finished = Some(FinishReason::Aborted);
                }
                self.scheduler.register(scheduled.seat);
            }
            Err(error) => fail(self.scheduler, self.tools.stats, scheduled, error),
        }
    }
}

/// One sequence's share of a finished pass.
struct SequencePass<'s, 'a> {
    sequence: &'s mut Sequence,
    tools: &'s mut Tools<'a>,
    /// Logits of a whole row that are those of tokens.
    num_token_ids: usize,
}

impl SequencePass<'_, '_> {
    fn apply(&mut self, role: ModelRole, num_tokens: usize, rows: Rows<'_>) -> Result<(), EngineError> {
        let sequence = &mut *self.sequence;
        let start = sequence.num_computed(role);
        if self.tools.has_head && role == ModelRole::Target {
            sequence.forget_guesses();
        }
        sequence.advance(role, num_tokens);
        let end = start + num_tokens;
        if role != sequence.lane.answered_by() {
            return self.propose(end, rows);
        }
        let num_prompt_tokens = sequence.num_prompt_tokens();
        self.tools.stats.num_prompt_tokens += end.min(num_prompt_tokens).saturating_sub(start) as u64;
        let rows = self.score_prompt(start, rows)?;
        let sequence = &mut *self.sequence;
        if sequence.params.max_tokens == 0 && end >= num_prompt_tokens {
            sequence.finished = Some(FinishReason::Length);
            return Ok(());
        }
        if rows.is_empty() {
            return Ok(());
        }
        if sequence.num_remaining_tokens() == 0 {
            sequence.finished = Some(FinishReason::Length);
            return Ok(());
        }
        self.verify(rows)
    }

    /// Takes hidden states; see [`crate::embedding`].
    fn pool(&mut self, role: ModelRole, num_tokens: usize, rows: &[f32]) -> Result<(), EngineError> {
        let sequence = &mut *self.sequence;
        let start = sequence.num_computed(role);
        sequence.advance(role, num_tokens);
        self.tools.stats.num_prompt_tokens += num_tokens as u64;
        if start + num_tokens >= sequence.num_prompt_tokens() {
            sequence.finished = Some(FinishReason::Length);
        }
        sequence.pool(start, rows, self.tools.hidden_size)
    }

    /// Takes the rows of prompt tokens whose successor is in the prompt too, if they are to be scored;
    /// returns the others. A preempted sequence sees some of them twice.
    ///
    /// # Errors
    /// [`EngineError::NonFiniteLogits`] if a row that is to score a token is not of numbers.
    fn score_prompt<'r>(&mut self, start: usize, mut rows: Rows<'r>) -> Result<Rows<'r>, EngineError> {
        let sequence = &mut *self.sequence;
        let Some(num_top) = sequence.params.prompt_logprobs.filter(|_| sequence.scores_prompt()) else {
            return Ok(rows);
        };
        let mut position = start;
        while position + 1 < sequence.num_prompt_tokens()
            && let Some(row) = rows.next()
        {
            if position >= sequence.num_scored() {
                let next = sequence.tokens()[position + 1];
                let scores =
                    self.tools.sampler.score(&row.logits()[..self.num_token_ids], next, num_top.into())?;
                sequence.push_prompt_logprobs(scores);
            }
            position += 1;
        }
        Ok(rows)
    }

    fn verify(&mut self, rows: Rows<'_>) -> Result<(), EngineError> {
        let sequence = &mut *self.sequence;
        let before = sequence.usage;
        let num_draft_tokens = sequence.draft_tokens().len();
        let rows = rows.map(|row| row.first(self.num_token_ids));
        let outcome = verify(sequence, rows, self.tools.sampler, self.tools.now);
        let after = sequence.usage;
        let new_tokens = u64::from(after.num_output_tokens - before.num_output_tokens);
        match sequence.lane {
            Lane::Fast => self.tools.stats.num_fast_tokens += new_tokens,
            Lane::Deep => {
                self.tools.stats.num_deep_tokens += new_tokens;
                let committed = sequence.committed_tokens();
                self.tools.draft_head.observe(&committed[committed.len() - new_tokens as usize..]);
            }
        }
        let num_accepted_tokens = (after.total_accepted_tokens() - before.total_accepted_tokens()) as usize;
        self.learn(num_draft_tokens, num_accepted_tokens);
        self.tools.stats.num_draft_tokens_at[..num_draft_tokens].iter_mut().for_each(|count| *count += 1);
        self.tools.stats.num_accepted_tokens_at[..num_accepted_tokens]
            .iter_mut()
            .for_each(|count| *count += 1);
        for source in 0..before.num_draft_tokens.len() {
            let new = |after: [u32; 3], before: [u32; 3]| u64::from(after[source] - before[source]);
            self.tools.stats.num_draft_tokens[source] += new(after.num_draft_tokens, before.num_draft_tokens);
            self.tools.stats.num_accepted_tokens[source] +=
                new(after.num_accepted_tokens, before.num_accepted_tokens);
        }
        outcome
    }

    /// Tells the policy what became of the draft.
    fn learn(&mut self, num_draft_tokens: usize, num_accepted_tokens: usize) {
        let sequence = &mut *self.sequence;
        if num_draft_tokens == 0 {
            return;
        }
        let calibration = self.tools.policy.calibration(sequence.params.temperature > 0.0);
        // Tokens after the first that fell were never judged.
        for (index, &confidence) in sequence.drafting.confidences.iter().enumerate() {
            if index < num_draft_tokens && index <= num_accepted_tokens {
                calibration.record(confidence, index < num_accepted_tokens);
            }
        }
        let kind = sequence.drafting.kind;
        self.tools.policy.record(&mut sequence.acceptance, kind, num_draft_tokens, num_accepted_tokens);
    }

    /// Takes a draft token from the draft's row. A draft that gives no usable logits costs its
    /// sequence the speculation of this step, never the sequence.
    fn propose(&mut self, end: usize, mut rows: Rows<'_>) -> Result<(), EngineError> {
        let sequence = &mut *self.sequence;
        let Some(row) = rows.next().filter(|_| end >= sequence.tokens().len()) else {
            sequence.num_planned_draft_tokens = 0;
            return Ok(());
        };
        let row = match self.tools.vocab_map {
            None => row.first(self.num_token_ids),
            Some(map) => {
                map.translate(row.logits(), self.tools.translated);
                Row::Whole(self.tools.translated)
            }
        };
        let num_provisional = sequence.draft_tokens().len();
        let asked = Asked::of(sequence, num_provisional, true);
        let drawn = sequence.draw_after(num_provisional);
        match drawn.and_then(|draw| self.tools.sampler.draw(row, &draw, asked)) {
            Ok(Drawn { id, share, .. }) => {
                sequence.push_draft_token(id);
                sequence.drafting.confidences.extend(asked.share.then_some(share));
                // Nothing follows a stop token, or the end of what was asked for.
                let is_last = sequence.params.stop_token_ids.contains(&id)
                    || sequence.is_complete_after(sequence.draft_tokens().len()).unwrap_or(true);
                if is_last {
                    sequence.num_planned_draft_tokens = 0;
                }
            }
            Err(_) => sequence.num_planned_draft_tokens = 0,
        }
        Ok(())
    }
}
