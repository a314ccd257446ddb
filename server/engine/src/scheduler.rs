//! Which sequences run, and which tokens each pass computes. Pure bookkeeping: no model, no clock.
//!
//! A pass takes, per sequence, some of the tokens that its model has not computed yet. There is no
//! separate prefill or decode: a sequence with one token to compute decodes, one with more prefills
//! (in chunks, if the budget is short), one with draft tokens verifies. Whoever reaches its last
//! token gets logits. Sequences that decode come first, so prefill never stops the others.
//!
//! Admission is first come, first served, and reserves blocks for prompt and `max_tokens`, so a
//! running sequence never lacks a block.

use std::collections::VecDeque;
use std::time::Duration;

use tandem_models::ForwardBatch;

use crate::api::{Lane, SequenceId};
use crate::block_manager::BlockManager;
use crate::sequence::{ModelRole, Sequence};

/// Limits of one pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SchedulerLimits {
    /// Sequences that run at a time.
    pub(crate) max_num_seqs: usize,
    /// Tokens of one pass; at least `max_num_seqs * MAX_TOKENS_PER_STEP`, so that every sequence
    /// that decodes fits.
    pub(crate) max_num_batched_tokens: usize,
    /// Prompt tokens a sequence with `prompt_logprobs` computes in one pass: each takes a row of logits.
    pub(crate) max_logits_rows: usize,
}

/// One sequence's part of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ScheduledSequence {
    /// Index among the running sequences.
    pub(crate) index: usize,
    /// Tokens computed.
    pub(crate) num_tokens: usize,
    /// Rows of logits it gets: the last `num_logits` of its tokens.
    pub(crate) num_logits: usize,
}

/// One pass: who is in it, and the model's inputs.
#[derive(Debug, Default)]
pub(crate) struct ScheduledBatch {
    pub(crate) sequences: Vec<ScheduledSequence>,
    pub(crate) inputs: ForwardBatch,
}

impl ScheduledBatch {
    fn clear(&mut self) {
        self.sequences.clear();
        self.inputs.clear();
    }
}

/// Waiting and running sequences, and the blocks they own.
pub(crate) struct Scheduler {
    limits: SchedulerLimits,
    pub(crate) blocks: BlockManager,
    waiting: VecDeque<Sequence>,
    pub(crate) running: Vec<Sequence>,
    /// Finished, blocks released, the client still has to take the last events.
    delivering: Vec<Sequence>,
}

impl Scheduler {
    pub(crate) fn new(limits: SchedulerLimits, blocks: BlockManager) -> Self {
        Scheduler {
            limits,
            blocks,
            waiting: VecDeque::new(),
            running: Vec::with_capacity(limits.max_num_seqs),
            delivering: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    pub(crate) fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Nothing to compute.
    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Clients that have not taken their last events.
    pub(crate) fn num_delivering(&self) -> usize {
        self.delivering.len()
    }

    /// Starts waiting sequences while there is room for them.
    pub(crate) fn admit(&mut self, now: Duration) {
        while self.running.len() < self.limits.max_num_seqs
            && let Some(next) = self.waiting.front()
            && let Some(block_table) = self.blocks.allocate(next.max_len())
            && let Some(mut sequence) = self.waiting.pop_front()
        {
            sequence.start(block_table, now);
            self.running.push(sequence);
        }
    }

    /// Plans the draft's pass number `round` of a step. Round 0 takes everything the draft has to
    /// compute; later rounds take one token of each sequence that decodes or proposes.
    pub(crate) fn schedule_draft(&self, round: usize, batch: &mut ScheduledBatch) {
        batch.clear();
        let in_pass = |sequence: &Sequence| match sequence.lane {
            Lane::Fast => true,
            Lane::Deep => sequence.num_planned_draft_tokens > round,
        };
        self.fill(ModelRole::Draft, round > 0, &in_pass, batch);
    }

    /// Plans the target's pass of a step: decode, verification and prefill of the deep lane.
    pub(crate) fn schedule_target(&self, batch: &mut ScheduledBatch) {
        batch.clear();
        self.fill(ModelRole::Target, false, &|sequence| sequence.lane == Lane::Deep, batch);
    }

    fn fill(
        &self,
        role: ModelRole,
        decode_only: bool,
        in_pass: &dyn Fn(&Sequence) -> bool,
        batch: &mut ScheduledBatch,
    ) {
        let mut budget = self.limits.max_num_batched_tokens;
        for prefill in [false, true] {
            if prefill && decode_only {
                break;
            }
            for (index, sequence) in self.running.iter().enumerate() {
                if sequence.finished.is_some() || !in_pass(sequence) {
                    continue;
                }
                let computed = sequence.num_computed(role);
                let uncomputed = sequence.tokens().len() - computed;
                // The last committed token and the draft tokens after it make a decode; the draft
                // may also be one token behind, after a verification in which all its tokens stood.
                let catch_up = usize::from(role == ModelRole::Draft && sequence.lane == Lane::Deep);
                let is_prefill = sequence.num_tokens() > computed + 1 + catch_up;
                if is_prefill != prefill || uncomputed == 0 {
                    continue;
                }
                let scores_prompt = sequence.params.prompt_logprobs.is_some()
                    && role == sequence.lane.answered_by()
                    && computed < sequence.num_prompt_tokens();
                let limit = if scores_prompt { budget.min(self.limits.max_logits_rows) } else { budget };
                let num_tokens = uncomputed.min(limit);
                if num_tokens == 0 {
                    continue;
                }
                let reaches_end = num_tokens == uncomputed;
                let num_logits = match () {
                    () if scores_prompt => num_tokens,
                    () if !reaches_end => 0,
                    () if role == ModelRole::Target => 1 + sequence.draft_tokens().len(),
                    () => 1,
                };
                budget -= num_tokens;
                self.blocks.push_sequence(
                    &mut batch.inputs,
                    &sequence.tokens()[computed..computed + num_tokens],
                    computed,
                    &sequence.block_table,
                    num_logits,
                );
                batch.sequences.push(ScheduledSequence { index, num_tokens, num_logits });
            }
        }
    }

    /// Takes finished sequences out of the running ones and gives their blocks back.
    pub(crate) fn retire(&mut self) -> impl Iterator<Item = &Sequence> {
        let first_new = self.delivering.len();
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].finished.is_some() {
                let mut sequence = self.running.remove(index);
                self.blocks.release(std::mem::take(&mut sequence.block_table));
                self.delivering.push(sequence);
            } else {
                index += 1;
            }
        }
        self.delivering[first_new..].iter()
    }

    /// Offers the finished sequences' last events again and forgets those that took them.
    pub(crate) fn deliver(&mut self) {
        self.delivering.retain_mut(|sequence| sequence.emit().is_ok() && !sequence.is_delivered());
    }

    /// Hands over a finished sequence's last events, now or as soon as its client has room.
    pub(crate) fn deliver_last(&mut self, sequence: Sequence) {
        self.delivering.push(sequence);
        self.deliver();
    }

    /// Takes a sequence that has not finished out of the queue or the running ones, its blocks back.
    pub(crate) fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        if let Some(index) = self.waiting.iter().position(|s| s.id == id) {
            return self.waiting.remove(index);
        }
        if let Some(index) = self.running.iter().position(|s| s.id == id) {
            let mut sequence = self.running.remove(index);
            self.blocks.release(std::mem::take(&mut sequence.block_table));
            return Some(sequence);
        }
        None
    }

    /// Removes every sequence that has not finished.
    pub(crate) fn remove_all(&mut self) -> Vec<Sequence> {
        let mut removed: Vec<Sequence> = self.waiting.drain(..).collect();
        for mut sequence in self.running.drain(..) {
            self.blocks.release(std::mem::take(&mut sequence.block_table));
            removed.push(sequence);
        }
        removed
    }
}
