//! What each deep sequence drafts in a step: who proposes, and how many tokens.
//!
//! Proposers that need no forward pass (n-gram, prediction) put their tokens down at once; the draft
//! model's come in the rounds that follow, and after each the policy decides who goes on. Every draft
//! token needs a slot for its keys and values, for which nobody is preempted: where blocks are short
//! drafts are.

use std::time::Duration;

use crate::api::{DraftSource, Lane, MAX_DRAFT_TOKENS};
use crate::engine::Engine;
use crate::scheduler::Scheduler;
use crate::sequence::{DraftState, ModelRole, Sequence};
use crate::speculation::{
    Arm, BatchKind, Candidate, Drafting, MAX_MODEL_DRAFT_TOKENS, Offer, ProposalKind, StepLoad,
};

/// However many sequences verify together, a draft may be this long.
const MIN_DRAFT_TOKENS: usize = 4;

/// Scratch of a plan.
#[derive(Debug, Default)]
pub(crate) struct PlanScratch {
    /// Seats of the sequences that can draft, and what they can draft from.
    seats: Vec<usize>,
    candidates: Vec<Candidate>,
    choices: Vec<Option<(DraftSource, usize)>>,
    drafting: Vec<Drafting>,
    /// Steps for which the last plan, to draft nothing, stands.
    num_settled_steps: u32,
}

/// So many steps nothing is drafted after a plan to draft nothing: looking for proposals costs a few per
/// cent of a small model's step.
const SETTLED_STEPS: u32 = 3;

/// A sequence that can verify draft tokens in the next pass of the target.
fn decodes_deep(sequence: &Sequence) -> bool {
    let decodes = sequence.lane == Lane::Deep && !sequence.is_prefilling() && !sequence.is_embedding();
    decodes && sequence.finished.is_none()
}

impl Engine {
    /// Plans the drafts of the deep sequences that decode.
    pub(crate) fn plan_drafts(&mut self, now: Duration) {
        // A head that cannot be had is no reason to stop: the one before still works.
        if self.draft_head.review(&self.policy) && self.take_draft_head().is_err() {
            self.limits.short_head = false;
        }
        let mut plan = std::mem::take(&mut self.plan);
        plan.seats.clear();
        plan.candidates.clear();
        let mut must_plan = self.policy.is_fixed();
        let mut samples = false;
        for seat in 0..self.scheduler.seats.len() {
            let Some(sequence) = &mut self.scheduler.seats[seat] else { continue };
            sequence.num_planned_draft_tokens = 0;
            if decodes_deep(sequence) {
                plan.seats.push(seat);
                must_plan |= sequence.speculation.max_draft_tokens.is_some()
                    || !sequence.speculation.prediction.is_empty();
                samples |= sequence.params.temperature > 0.0;
            }
        }
        let load = self.step_load();
        let kind = BatchKind::new(plan.seats.len(), samples);
        let arm = if must_plan || plan.seats.len() < 2 {
            self.trials.begin_uncontested();
            Arm::Planned
        } else if load.num_prefill_rows > 0 {
            // How long a round with prompts takes says more about them.
            self.trials.begin_unmeasured(kind)
        } else {
            self.trials.begin(kind, now, self.stats.num_deep_tokens)
        };
        if arm == Arm::Plain || (plan.num_settled_steps > 0 && !must_plan) {
            plan.num_settled_steps = plan.num_settled_steps.saturating_sub(1);
            self.plan = plan;
            return;
        }
        for &seat in &plan.seats {
            plan.candidates.extend(self.candidate(seat));
        }
        if !plan.seats.is_empty() {
            self.policy.plan(&plan.candidates, &load, &mut plan.choices);
            let drafts_nothing = plan.choices.iter().all(Option::is_none);
            plan.num_settled_steps = if drafts_nothing { SETTLED_STEPS } else { 0 };
            let most = self.most_draft_tokens(plan.seats.len());
            for (index, &seat) in plan.seats.iter().enumerate() {
                if let Some((source, length)) = plan.choices[index] {
                    let offer = plan.candidates[index].offers[source as usize];
                    self.place(seat, source, length, offer, most);
                }
            }
        }
        self.plan = plan;
    }

    /// What a sequence can draft from now, after its proposers have seen what was committed.
    fn candidate(&mut self, seat: usize) -> Option<Candidate> {
        let has_draft = self.models.get(ModelRole::Draft).is_some();
        let has_head = self.has_head;
        let Scheduler { seats, blocks, .. } = &mut self.scheduler;
        let sequence = seats[seat].as_mut()?;
        let mut offers = [Offer::default(); 3];
        if let Some(mut proposers) = sequence.proposers.take() {
            proposers.observe(sequence.committed_tokens(), self.sessions.get(sequence.cache_salt));
            offers = DraftSource::ALL.map(|source| proposers.offer(source));
            sequence.proposers = Some(proposers);
        }
        // A head leaves its guess where the last token's hidden state will be. In a block that others share the
        // target writes first.
        let is_shared = || blocks.is_registered(&sequence.block_table, sequence.num_tokens() - 1);
        let can_draft = has_draft && (!has_head || (sequence.has_hidden_states() && !is_shared()));
        if can_draft && sequence.speculation.sources.contains(DraftSource::Draft) {
            offers[DraftSource::Draft as usize].num_tokens = MAX_MODEL_DRAFT_TOKENS;
        }
        Some(Candidate {
            acceptance: sequence.acceptance,
            fixed: sequence.speculation.max_draft_tokens,
            offers,
            catch_up: (sequence.num_tokens() - 1).saturating_sub(sequence.num_computed(ModelRole::Draft)),
            remaining: sequence.num_remaining_tokens(),
        })
    }

    fn step_load(&self) -> StepLoad {
        // Of prompts, and of texts to embed: each has a limit of its own.
        let mut rows = [0; 2];
        let of_bulk = |s: &&Sequence| s.lane == Lane::Deep && s.is_prefilling() && s.finished.is_none();
        for sequence in self.scheduler.running().filter(of_bulk) {
            let computed = sequence.num_computed(ModelRole::Target);
            let limit = self.limits.of_bulk(sequence, ModelRole::Target);
            let wanted = (sequence.num_tokens() - computed).min(limit.tokens(limit.num_tokens, computed));
            let rows = &mut rows[usize::from(sequence.is_embedding())];
            *rows = (*rows + wanted).min(limit.num_tokens);
        }
        StepLoad { num_fast: self.num_fast(), num_prefill_rows: rows[0].max(rows[1]) }
    }

    fn num_fast(&self) -> usize {
        self.scheduler.running().filter(|s| s.lane == Lane::Fast && !s.is_embedding()).count()
    }

    /// Draft tokens a sequence, if the policy chooses: together they should not make the fast lane wait
    /// for longer layers than a prompt would.
    fn most_draft_tokens(&self, num_sequences: usize) -> usize {
        let rows = self.limits.deep_prefill[ModelRole::Target as usize].num_tokens;
        (rows / num_sequences.max(1)).max(MIN_DRAFT_TOKENS)
    }

    /// Gives a sequence's draft its slots, at most `most` if the policy chose; a text proposer's tokens
    /// are put down at once.
    fn place(&mut self, seat: usize, source: DraftSource, length: usize, offer: Offer, most: usize) {
        let is_fixed = self.policy.is_fixed();
        let Some(sequence) = &self.scheduler.seats[seat] else { return };
        let is_free = !is_fixed && sequence.speculation.max_draft_tokens.is_none();
        let is_adaptive = is_free && source == DraftSource::Draft;
        let length = match () {
            () if is_adaptive => MAX_MODEL_DRAFT_TOKENS.min(most),
            () if is_free => length.min(most),
            () => length,
        };
        // The target adds a token of its own, so a draft as long as the rest would be wasted.
        let wanted = length.min(sequence.num_remaining_tokens().saturating_sub(1)).min(MAX_DRAFT_TOKENS);
        let num_tokens = sequence.num_tokens();
        let room = self.scheduler.grow_if_free(seat, num_tokens + wanted).saturating_sub(num_tokens);
        let Some(sequence) = &mut self.scheduler.seats[seat] else { return };
        sequence.drafting = DraftState {
            source,
            kind: ProposalKind::new(source, offer),
            is_adaptive,
            ..DraftState::default()
        };
        if source == DraftSource::Draft {
            sequence.num_planned_draft_tokens = room;
        } else if let Some(proposers) = sequence.proposers.take() {
            sequence.push_draft_text(proposers.propose(source, room));
            sequence.proposers = Some(proposers);
            if sequence.draft_tokens().is_empty() && room > 0 {
                // Its form forbids what was proposed: as good as a proposal that fell.
                let kind = sequence.drafting.kind;
                self.policy.record(&mut sequence.acceptance, kind, 1, 0);
            }
        }
    }

    /// After a draft round: gives up tokens that are not worth verifying, and decides who drafts another.
    pub(crate) fn review_drafts(&mut self, round: usize) {
        let rows_of = |s: &Sequence| 1 + s.draft_tokens().len();
        let deep_rows: usize = self.scheduler.running().filter(|s| decodes_deep(s)).map(rows_of).sum();
        let mut num_target_rows = self.step_load().num_prefill_rows + deep_rows;
        let mut num_paid_rows = self.num_fast();
        let mut plan = std::mem::take(&mut self.plan);
        plan.seats.clear();
        plan.drafting.clear();
        for (seat, occupant) in self.scheduler.seats.iter_mut().enumerate() {
            let Some(sequence) = occupant else { continue };
            let drafted = sequence.draft_tokens().len();
            if sequence.num_planned_draft_tokens <= round || drafted != round + 1 {
                continue;
            }
            if !sequence.drafting.is_adaptive {
                num_paid_rows += usize::from(sequence.num_planned_draft_tokens > drafted);
                continue;
            }
            let Some(&confidence) = sequence.drafting.confidences.last() else { continue };
            let calibration = self.policy.calibration(sequence.params.temperature > 0.0);
            sequence.drafting.standing *= calibration.acceptance_given(confidence);
            let standing = sequence.drafting.standing;
            if !self.policy.is_worth_verifying(standing, num_target_rows - 1) {
                num_target_rows -= 1;
                sequence.pop_draft_token();
                sequence.num_planned_draft_tokens = 0;
                if drafted == 1 {
                    self.policy.record_dropped(&mut sequence.acceptance, standing);
                }
            } else if sequence.num_planned_draft_tokens > drafted {
                let later = self.policy.later_standing(&sequence.acceptance);
                plan.seats.push(seat);
                plan.drafting.push(Drafting { standing, later, goes_on: true });
            }
        }
        self.policy.next_round(&mut plan.drafting, num_paid_rows, num_target_rows);
        for (&seat, drafting) in plan.seats.iter().zip(&plan.drafting) {
            if let Some(sequence) = &mut self.scheduler.seats[seat]
                && !drafting.goes_on
            {
                sequence.num_planned_draft_tokens = 0;
            }
        }
        self.plan = plan;
    }
}
