//! What a pass computes: some of the tokens that its model has not computed yet, of some of the
//! running sequences.
//!
//! There is no separate prefill or decode: a sequence with one token to compute decodes, one with more
//! prefills (in chunks, if the budget is short), one with draft tokens verifies. Whoever reaches its
//! last token gets logits, or the one token that is chosen of them. Sequences that decode come first, so
//! prefill never stops the others.

use std::sync::Arc;
use std::time::Duration;

use tandem_models::{ForwardBatch, VocabMap};

use crate::api::{Lane, SequenceId};
use crate::prefill::PrefillLimit;
use crate::rows::wanted;
use crate::scheduler::Scheduler;
use crate::sequence::{ModelRole, Sequence};

/// Limits of one pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PassLimits {
    /// Tokens of one pass; enough for every seat to verify its longest draft.
    pub(crate) max_num_batched_tokens: usize,
    /// Of a pass in which the deep lane's prompts have a part, by model. Prompts get what verification leaves of it,
    /// but never nothing.
    pub(crate) deep_prefill: [PrefillLimit; 2],
    /// The same where texts to embed do, for which prompts may leave nothing: nobody watches them, so they are to hold
    /// up nobody, even where prompts may.
    pub(crate) embedding: [PrefillLimit; 2],
    /// Prompt tokens a sequence with `prompt_logprobs` computes in one pass: each takes a row of logits.
    pub(crate) max_logits_rows: usize,
    /// Tokens that what drafts for a decoding sequence may lack beside the last: one, after a verification in
    /// which all stood, or all of a step, of which a head had only guesses of its own.
    pub(crate) draft_catch_up: usize,
    /// The draft's passes that only propose take its short head.
    pub(crate) short_head: bool,
}

impl PassLimits {
    /// Tokens that one sequence can have of a pass.
    fn most(&self, want: &Want, sequence: &Sequence, role: ModelRole) -> usize {
        if want.is_prefill && sequence.is_bulk() {
            let limit = self.of_bulk(sequence, role);
            limit.tokens(limit.num_tokens, want.computed)
        } else {
            self.max_num_batched_tokens
        }
    }

    /// What bounds a prompt's or a text's part of a pass.
    pub(crate) fn of_bulk(&self, sequence: &Sequence, role: ModelRole) -> &PrefillLimit {
        if sequence.is_embedding() {
            &self.embedding[role as usize]
        } else {
            &self.deep_prefill[role as usize]
        }
    }
}

/// What is left of a pass for work that is computed in chunks.
#[derive(Clone, Copy, Debug)]
struct BulkBudget {
    deep_prefill: usize,
    embedding: usize,
}

impl BulkBudget {
    /// Beside `num_tokens` that are decoded.
    fn beside(num_tokens: usize, limits: &PassLimits, role: ModelRole) -> Self {
        BulkBudget {
            deep_prefill: limits.deep_prefill[role as usize].beside(num_tokens),
            embedding: limits.embedding[role as usize].beside(num_tokens),
        }
    }

    /// Of `num_tokens`, those that the sequence gets. Whatever anybody gets, both have less.
    fn take(
        &mut self,
        num_tokens: usize,
        want: &Want,
        sequence: &Sequence,
        (limits, role): (&PassLimits, ModelRole),
    ) -> usize {
        let own = if sequence.is_embedding() { self.embedding } else { self.deep_prefill };
        let num_tokens = num_tokens.min(limits.of_bulk(sequence, role).tokens(own, want.computed));
        for (rest, limit) in [
            (&mut self.deep_prefill, &limits.deep_prefill[role as usize]),
            (&mut self.embedding, &limits.embedding[role as usize]),
        ] {
            *rest = limit.rest(*rest, num_tokens, want.computed);
        }
        num_tokens
    }
}

/// One sequence's part of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ScheduledSequence {
    /// Where it sits.
    pub(crate) seat: usize,
    /// Who sits there; somebody else may when the pass ends.
    pub(crate) id: SequenceId,
    /// Tokens computed.
    pub(crate) num_tokens: usize,
    /// Rows of logits it gets: the last `num_logits` of its tokens.
    pub(crate) num_logits: usize,
    /// It gets the hidden states of all its tokens.
    pub(crate) is_embedding: bool,
}

/// One pass: who is in it, and the model's inputs.
#[derive(Debug, Default)]
pub(crate) struct ScheduledBatch {
    pub(crate) sequences: Vec<ScheduledSequence>,
    pub(crate) inputs: ForwardBatch,
    num_token_ids: usize,
    /// Of the draft's passes, if it has another vocabulary than the deep lane's sequences.
    vocab_map: Option<Arc<VocabMap>>,
    /// Scratch: who may be in it, most urgent first.
    seats: Vec<usize>,
}

/// Which pass to build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PassKind {
    /// The draft: the fast lane, and the deep sequences that still propose. Round 0 also takes what
    /// the draft has not seen yet of the deep sequences that propose.
    Round(usize),
    /// The draft: the fast lane alone, between two layers of the target. Without its texts to embed, or their chunks
    /// would go into each pass of a gap and take the lane's time from those that somebody reads; they have round 0,
    /// which comes whatever the deep lane has to do.
    FastOnly,
    /// The target: decode, verification and prefill of the deep lane.
    Target,
}

impl PassKind {
    pub(crate) fn role(self) -> ModelRole {
        match self {
            PassKind::Round(_) | PassKind::FastOnly => ModelRole::Draft,
            PassKind::Target => ModelRole::Target,
        }
    }

    fn takes(self, sequence: &Sequence) -> bool {
        let in_lane = match (self, sequence.lane) {
            // The rounds after the first should be short: the deep lane waits for its drafts.
            (PassKind::Round(round), Lane::Fast) => round == 0 || !sequence.is_embedding(),
            (PassKind::FastOnly, Lane::Fast) => !sequence.is_embedding(),
            (PassKind::Round(round), Lane::Deep) => sequence.num_planned_draft_tokens > round,
            (PassKind::FastOnly, Lane::Deep) | (PassKind::Target, Lane::Fast) => false,
            (PassKind::Target, Lane::Deep) => true,
        };
        in_lane && sequence.finished.is_none()
    }
}

/// What one sequence wants of a pass.
struct Want {
    computed: usize,
    uncomputed: usize,
    is_prefill: bool,
    scores_prompt: bool,
}

impl Want {
    fn of(sequence: &Sequence, role: ModelRole, limits: &PassLimits) -> Self {
        let computed = sequence.num_computed(role);
        // The last committed token and the draft tokens after it make a decode; the draft may also be a
        // little behind.
        let proposes = role == ModelRole::Draft && sequence.lane == Lane::Deep;
        let catch_up = if proposes { limits.draft_catch_up } else { 0 };
        Want {
            computed,
            uncomputed: sequence.tokens().len() - computed,
            is_prefill: sequence.num_tokens() > computed + 1 + catch_up + sequence.num_jumped_tokens(),
            scores_prompt: sequence.scores_prompt() && role == sequence.lane.answered_by(),
        }
    }
}

impl ScheduledBatch {
    /// For passes of a model of whose vocabulary the first `num_token_ids` are tokens.
    pub(crate) fn new(num_token_ids: usize, vocab_map: Option<Arc<VocabMap>>) -> Self {
        ScheduledBatch { num_token_ids, vocab_map, ..ScheduledBatch::default() }
    }

    fn clear(&mut self) {
        self.sequences.clear();
        self.inputs.clear();
        self.inputs.num_token_ids = self.num_token_ids;
    }

    /// Builds the pass. Makes sure of the blocks first, most urgent sequence first; others may be
    /// preempted for it.
    pub(crate) fn schedule(
        &mut self,
        kind: PassKind,
        scheduler: &mut Scheduler,
        limits: &PassLimits,
        now: Duration,
    ) {
        self.clear();
        let role = kind.role();
        let mut seats = std::mem::take(&mut self.seats);
        seats.clear();
        seats.extend((0..scheduler.seats.len()).filter(|&seat| {
            let sequence = scheduler.seats[seat].as_ref();
            sequence.is_some_and(|s| kind.takes(s) && s.tokens().len() > s.num_computed(role))
        }));
        seats.sort_unstable_by_key(|&seat| scheduler.seats[seat].as_ref().map(|s| s.urgency(now)));
        seats.retain(|&seat| {
            let Some(sequence) = &scheduler.seats[seat] else { return false };
            let want = Want::of(sequence, role, limits);
            scheduler.grow(seat, want.computed + want.uncomputed.min(limits.most(&want, sequence, role)), now)
        });
        self.fill(role, &seats, scheduler, limits);
        // Whoever answers with the draft has all of its head, and so has a form: its few tokens may be rare.
        let only_proposes = |s: &ScheduledSequence| {
            let takes_short = |s: &Sequence| s.lane == Lane::Deep && !s.is_constrained();
            s.num_logits == 0 || scheduler.seats[s.seat].as_deref().is_none_or(takes_short)
        };
        self.inputs.short_head =
            limits.short_head && role == ModelRole::Draft && self.sequences.iter().all(only_proposes);
        self.seats = seats;
    }

    fn fill(&mut self, role: ModelRole, seats: &[usize], scheduler: &mut Scheduler, limits: &PassLimits) {
        let mut budget = limits.max_num_batched_tokens;
        for prefill in [false, true] {
            let mut bulk = BulkBudget::beside(limits.max_num_batched_tokens - budget, limits, role);
            for &seat in seats {
                // Somebody more urgent may have preempted it for its blocks.
                let Some(sequence) = &scheduler.seats[seat] else { continue };
                let want = Want::of(sequence, role, limits);
                if want.is_prefill != prefill || want.uncomputed == 0 {
                    continue;
                }
                let mut num_tokens = want.uncomputed.min(budget);
                if want.scores_prompt {
                    num_tokens = num_tokens.min(limits.max_logits_rows);
                }
                if prefill && sequence.is_bulk() {
                    num_tokens = bulk.take(num_tokens, &want, sequence, (limits, role));
                }
                if num_tokens == 0 {
                    continue;
                }
                budget -= num_tokens;
                let num_logits = match () {
                    () if sequence.is_embedding() => 0,
                    () if want.scores_prompt => num_tokens,
                    () if num_tokens < want.uncomputed => 0,
                    () if role == ModelRole::Target => 1 + sequence.draft_tokens().len(),
                    () => 1,
                };
                self.push(role, seat, scheduler, want.computed, num_tokens, num_logits);
            }
        }
    }

    fn push(
        &mut self,
        role: ModelRole,
        seat: usize,
        scheduler: &mut Scheduler,
        start: usize,
        num_tokens: usize,
        num_logits: usize,
    ) {
        let Some(sequence) = &mut scheduler.seats[seat] else { return };
        scheduler.blocks.push_sequence(
            &mut self.inputs,
            &sequence.tokens()[start..start + num_tokens],
            start,
            &sequence.block_table,
            num_logits,
        );
        if sequence.is_embedding() {
            self.inputs.want_hidden_states();
        }
        if let Some(map) = &self.vocab_map
            && sequence.lane == Lane::Deep
        {
            let first = self.inputs.num_tokens() - num_tokens;
            for id in &mut self.inputs.token_ids[first..] {
                *id = map.to_draft(*id);
            }
        } else {
            // (Rows of another vocabulary are translated before a token is drawn.)
            let proposes = role != sequence.lane.answered_by();
            let num_provisional = if proposes { sequence.draft_tokens().len() } else { 0 };
            let rows = num_provisional..num_provisional + num_logits;
            self.inputs.want(rows.map(|after| wanted(sequence, after, proposes)));
        }
        let is_embedding = sequence.is_embedding();
        self.sequences.push(ScheduledSequence {
            seat,
            id: sequence.id,
            num_tokens,
            num_logits,
            is_embedding,
        });
    }

    /// Makes the pass that of one of its sequences alone.
    pub(crate) fn retain_only(
        &mut self,
        scheduled: ScheduledSequence,
        role: ModelRole,
        scheduler: &mut Scheduler,
    ) {
        self.clear();
        if let Some(sequence) = &scheduler.seats[scheduled.seat] {
            let start = sequence.num_computed(role);
            self.push(role, scheduled.seat, scheduler, start, scheduled.num_tokens, scheduled.num_logits);
        }
    }
}
