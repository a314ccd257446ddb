//! A step of the engine: one pass of the draft, or one layer of the target.
//!
//! Steps go round in two phases:
//!
//! 1. **Draft.** Each deep sequence's draft length is planned. Then come the rounds: each is one pass of
//!    the draft over the fast lane's sequences *and* the deep lane's proposals, so the fast lane gains a
//!    token a round.
//! 2. **Target.** One pass of the target over the deep lane: prefill, decode and verification together.
//!    It is suspended after every layer; fast-lane sequences that have work take passes of the draft in
//!    the gap. When it ends, its tokens are verified, committed and handed to the clients.
//!
//! Between any two steps commands are taken, and waiting sequences start. A fast-lane request therefore
//! waits for at most one pass of the draft and one layer of the target before its own pass. Whoever waits
//! for a first token goes in every gap; others, pass after pass, as long as the fast lane has had less of
//! the time than the target, though for no more than [`LONGEST_TURN`] in one gap. So neither lane can starve
//! the other. None of it changes a bit of any answer.

use std::time::Duration;

use crate::api::{EngineError, FinishReason, Lane};
use crate::batch::PassKind;
use crate::engine::Engine;
use crate::sequence::{ModelRole, Sequence};

/// Time of one gap after which a layer comes, however little the fast lane has had until then: a layer that took
/// long for reasons from outside (the process was stopped, the machine slept) is not made up for at once.
const LONGEST_TURN: Duration = Duration::from_millis(100);

/// Where the engine is between two steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Phase {
    /// The next pass of the draft is this round; before round 0 drafts are planned.
    Draft { round: usize },
    /// The target's pass is under way. Times since it began; and what the fast lane has had since the last layer,
    /// if it went in this gap.
    Target { fast_time: Duration, target_time: Duration, fast_in_gap: Option<Duration> },
}

impl Default for Phase {
    fn default() -> Self {
        Phase::Draft { round: 0 }
    }
}

impl Engine {
    /// One step; see the file's header. `clock` is read a few times.
    ///
    /// # Errors
    /// [`EngineError::Integrity`] if the engine's account of its blocks contradicts itself: then it must
    /// not go on.
    pub fn step(&mut self, clock: &dyn Fn() -> Duration) -> Result<(), EngineError> {
        let now = clock();
        self.scheduler.expire(now);
        self.retire();
        self.scheduler.admit(now);
        // The end of one round and the beginning of the next are one step if the first has no pass left.
        if !self.advance_phase(clock) {
            self.advance_phase(clock);
        }
        if !self.lane_isolation {
            // Off, a step is a whole round of both phases and nobody gets in between.
            while self.phase != Phase::default() {
                self.advance_phase(clock);
            }
        }
        self.scheduler.deliver();
        self.tell_kv_events();
        self.stats.num_steps += 1;
        if cfg!(debug_assertions) || self.is_idle() { self.check_integrity() } else { Ok(()) }
    }

    /// Runs one pass of the draft or one layer of the target. False if this round has none left.
    fn advance_phase(&mut self, clock: &dyn Fn() -> Duration) -> bool {
        if let Phase::Draft { round } = self.phase {
            if self.draft_round(round, clock) {
                self.phase = Phase::Draft { round: round + 1 };
                return true;
            }
            self.phase = Phase::default();
            if !self.begin_target(clock) {
                return false;
            }
        }
        self.advance_target(clock);
        true
    }

    /// Round `round` of the draft phase. False if there is nothing for it.
    fn draft_round(&mut self, round: usize, clock: &dyn Fn() -> Duration) -> bool {
        if round == 0 {
            self.plan_drafts(clock());
        } else if !self.scheduler.running().any(|s| s.num_planned_draft_tokens > round) {
            return false;
        }
        let has_run = self.draft_pass(PassKind::Round(round), clock);
        if has_run {
            self.review_drafts(round);
        }
        has_run
    }

    fn draft_pass(&mut self, kind: PassKind, clock: &dyn Fn() -> Duration) -> bool {
        let start = clock();
        self.draft_batch.schedule(kind, &mut self.scheduler, &self.limits, start);
        if self.draft_batch.sequences.is_empty() {
            return false;
        }
        self.stats.num_draft_passes += 1;
        self.run_pass(ModelRole::Draft, clock);
        self.retire();
        let (num_rows, short_head) =
            (self.draft_batch.inputs.num_tokens(), self.draft_batch.inputs.short_head);
        self.policy.costs_mut().observe_draft(num_rows, short_head, clock().saturating_sub(start));
        true
    }

    /// Schedules the target's pass and begins it. False if there is nothing to compute.
    fn begin_target(&mut self, clock: &dyn Fn() -> Duration) -> bool {
        let start = clock();
        self.target_batch.schedule(PassKind::Target, &mut self.scheduler, &self.limits, start);
        if self.target_batch.sequences.is_empty() {
            return false;
        }
        for scheduled in &self.target_batch.sequences {
            if let Some(sequence) = &mut self.scheduler.seats[scheduled.seat] {
                sequence.in_flight = true;
            }
        }
        self.stats.num_target_passes += 1;
        let has_begun = self.begin_pass(ModelRole::Target);
        let target_time = clock().saturating_sub(start);
        self.phase = Phase::Target { fast_time: Duration::ZERO, target_time, fast_in_gap: None };
        if !has_begun {
            self.end_target(false, clock);
        }
        true
    }

    /// A pass of the fast lane if it is its turn, else one layer of the target; at the end of its pass the
    /// target's tokens.
    fn advance_target(&mut self, clock: &dyn Fn() -> Duration) {
        let Phase::Target { fast_time, target_time, fast_in_gap } = self.phase else { return };
        let start = clock();
        let in_turn = fast_time < target_time && fast_in_gap.is_none_or(|time| time < LONGEST_TURN);
        if self.lane_isolation
            && self.fast_lane_is_due(in_turn, fast_in_gap.is_some())
            && self.draft_pass(PassKind::FastOnly, clock)
        {
            let pass_time = clock().saturating_sub(start);
            let fast_time = fast_time + pass_time;
            let fast_in_gap = Some(fast_in_gap.unwrap_or_default() + pass_time);
            self.phase = Phase::Target { fast_time, target_time, fast_in_gap };
            return;
        }
        let progress = self.advance_pass(ModelRole::Target);
        let target_time = target_time + clock().saturating_sub(start);
        self.phase = Phase::Target { fast_time, target_time, fast_in_gap: None };
        match progress {
            Some(true) => {}
            Some(false) => self.end_target(true, clock),
            None => self.end_target(false, clock),
        }
    }

    fn end_target(&mut self, is_whole: bool, clock: &dyn Fn() -> Duration) {
        let start = clock();
        let phase = std::mem::take(&mut self.phase);
        for sequence in self.scheduler.seats.iter_mut().flatten() {
            sequence.in_flight = false;
        }
        let drawing = self.end_pass(ModelRole::Target, is_whole, clock);
        self.retire();
        if let Phase::Target { fast_time, target_time, .. } = phase {
            self.trials.end(clock(), fast_time, self.stats.num_deep_tokens);
            let inputs = &self.target_batch.inputs;
            let time = target_time + clock().saturating_sub(start);
            let (num_rows, num_logits) = (inputs.num_tokens(), inputs.logits_rows.len());
            self.policy.costs_mut().observe_target(num_rows, num_logits, drawing, time);
        }
    }

    /// True if a fast-lane sequence has something to compute and it is its turn: `in_turn` as long as the lane has
    /// had less time than the target, else whoever waits for a first token, once a gap.
    fn fast_lane_is_due(&self, in_turn: bool, went_in_gap: bool) -> bool {
        // Nobody waits for an embedding's next token: it has the first round of the draft, and no gap.
        let waits = |s: &&Sequence| s.lane == Lane::Fast && s.finished.is_none() && !s.is_embedding();
        let fast = || self.scheduler.running().filter(waits);
        if in_turn {
            fast().next().is_some()
        } else {
            !went_in_gap && fast().any(Sequence::awaits_first_token)
        }
    }

    /// Takes what has finished from its seat.
    fn retire(&mut self) {
        for retired in self.scheduler.retire() {
            if !retired.is_embedding() {
                self.sessions.record(retired.cache_salt, retired.committed_tokens());
            }
            if retired.finished == Some(FinishReason::Aborted) {
                self.stats.num_aborted += 1;
            } else {
                self.stats.num_finished += 1;
                if retired.is_embedding() {
                    self.stats.num_embeddings += 1;
                    self.stats.num_embedding_tokens += retired.num_prompt_tokens() as u64;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::mpsc::{Receiver, sync_channel};

    use super::*;
    use crate::api::{Event, Priority, SamplingParams, SequenceId};
    use crate::common::{clock, config, hash_pair, request};
    use crate::embedding::EmbedRequest;
    use crate::engine::EngineConfig;
    use crate::speculation::DraftTokens;

    const TICK: Duration = Duration::from_millis(1);

    fn submit(engine: &mut Engine, id: u64, lane: Lane) -> Receiver<Event> {
        let params = SamplingParams { max_tokens: 500, ..SamplingParams::default() };
        let (request, events) = request(id, lane, &[1, 2, 3], params, 100);
        engine.submit(request, Duration::ZERO);
        events
    }

    /// An engine in the middle of the target's pass, with a sequence of the fast lane that has its first token, or
    /// waits for it.
    fn in_a_gap(awaits_first_token: bool) -> (Engine, Vec<Receiver<Event>>) {
        let mut engine = Engine::new(&config(DraftTokens::Fixed(0)), hash_pair(1.0)).expect("it starts");
        let mut clients = vec![submit(&mut engine, 1, Lane::Deep)];
        if !awaits_first_token {
            clients.push(submit(&mut engine, 2, Lane::Fast));
        }
        while !matches!(engine.phase, Phase::Target { .. }) {
            engine.step(&|| Duration::ZERO).expect("its account is whole");
        }
        if awaits_first_token {
            clients.push(submit(&mut engine, 2, Lane::Fast));
            engine.scheduler.admit(Duration::ZERO);
        }
        (engine, clients)
    }

    /// Whether the fast lane goes next, the lanes having had so many ticks of the target's pass, and the fast one so
    /// many of the gap.
    fn fast_goes(engine: &mut Engine, fast: u32, target: u32, in_gap: Option<u32>) -> bool {
        engine.phase = Phase::Target {
            fast_time: fast * TICK,
            target_time: target * TICK,
            fast_in_gap: in_gap.map(|ticks| ticks * TICK),
        };
        let before = engine.stats.num_draft_passes;
        engine.advance_target(&|| Duration::ZERO);
        engine.stats.num_draft_passes > before
    }

    #[test]
    fn the_fast_lane_goes_on_in_a_gap_until_it_has_had_as_much_time_as_the_target() {
        let (mut engine, _clients) = in_a_gap(false);
        for (fast, target) in [(0, 3), (1, 3), (2, 3)] {
            assert!(fast_goes(&mut engine, fast, target, (fast > 0).then_some(fast)));
        }
        assert!(!fast_goes(&mut engine, 3, 3, Some(3)), "the lanes are even");
    }

    #[test]
    fn a_layer_that_was_held_up_is_not_made_up_for_in_one_gap() {
        let (mut engine, _clients) = in_a_gap(false);
        assert!(fast_goes(&mut engine, 99, 60_000, Some(99)));
        assert!(!fast_goes(&mut engine, 100, 60_000, Some(100)), "a layer comes between");
        assert!(fast_goes(&mut engine, 100, 60_000, None));
    }

    #[test]
    fn who_waits_for_a_first_token_goes_in_every_gap_and_once() {
        let (mut engine, _clients) = in_a_gap(true);
        assert!(!fast_goes(&mut engine, 9, 3, Some(9)), "a layer comes between");
        assert!(fast_goes(&mut engine, 9, 3, None));
    }

    #[test]
    fn the_targets_pass_ends_while_the_fast_lane_always_has_work() {
        let (mut engine, _clients) = in_a_gap(false);
        let clock = clock();
        for _ in 0..5 {
            let (num_deep_tokens, num_draft_passes) =
                (engine.stats.num_deep_tokens, engine.stats.num_draft_passes);
            let mut num_steps = 0;
            while engine.stats.num_deep_tokens == num_deep_tokens {
                engine.step(&clock).expect("its account is whole");
                num_steps += 1;
                assert!(num_steps < 50, "the target's pass does not end");
            }
            assert!(engine.stats.num_draft_passes > num_draft_passes, "the fast lane goes, too");
        }
    }

    #[test]
    fn who_comes_between_two_passes_of_a_gap_is_in_the_second() {
        let (mut engine, _clients) = in_a_gap(false);
        let (now, tick) = (Cell::new(Duration::ZERO), Cell::new(TICK));
        let clock = || {
            now.set(now.get() + tick.get());
            now.get()
        };
        // A layer that takes long, then passes that do not.
        engine.step(&clock).expect("its account is whole");
        tick.set(TICK / 1000);
        engine.step(&clock).expect("its account is whole");
        let Phase::Target { target_time, fast_in_gap: Some(first_pass), .. } = engine.phase else {
            panic!("no gap in which the fast lane went, but {:?}", engine.phase)
        };
        let events = submit(&mut engine, 3, Lane::Fast);
        engine.step(&clock).expect("its account is whole");
        assert!(matches!(events.try_recv(), Ok(Event::Tokens(_))));
        match engine.phase {
            Phase::Target { target_time: after, fast_in_gap: Some(both), .. } => {
                assert!(after == target_time && both > first_pass, "it is the same gap");
            }
            _ => panic!("the gap is over: {:?}", engine.phase),
        }
    }

    #[test]
    fn a_text_to_embed_has_no_part_of_a_gap_and_is_in_the_next_round() {
        let (mut engine, _clients) = in_a_gap(false);
        let (sender, _events) = sync_channel(4);
        let id = SequenceId(3);
        let request = EmbedRequest {
            id,
            lane: Lane::Fast,
            tokens: [5; 9].into(),
            priority: Priority::default(),
            events: Box::new(sender),
        };
        engine.embed(request, Duration::ZERO);
        engine.scheduler.admit(Duration::ZERO);
        assert!(fast_goes(&mut engine, 0, 3, None));
        assert_eq!(engine.scheduler.find(id).map(|text| text.num_computed(ModelRole::Draft)), Some(0));
        assert!(!fast_goes(&mut engine, 3, 3, Some(3)));
        for _ in 0..10 {
            engine.step(&|| Duration::ZERO).expect("its account is whole");
        }
        assert_eq!(engine.stats.num_embeddings, 1);
    }

    #[test]
    fn time_in_which_the_engine_is_idle_says_nothing_of_its_queue() {
        let late = Duration::from_secs(3600);
        for one_by_one in [false, true] {
            let config = EngineConfig { max_num_seqs: 1, ..config(DraftTokens::Fixed(0)) };
            let mut engine = Engine::new(&config, hash_pair(1.0)).expect("it starts");
            let mut clients = vec![submit(&mut engine, 1, Lane::Deep), submit(&mut engine, 2, Lane::Deep)];
            engine.step(&|| Duration::ZERO).expect("its account is whole");
            match one_by_one {
                true => [1, 2].map(SequenceId).into_iter().for_each(|id| engine.abort(id)),
                false => engine.abort_all(),
            }
            assert!(engine.is_idle());
            // One to run, and then one to wait.
            for id in [3, 4] {
                clients.push(submit(&mut engine, id, Lane::Deep));
                engine.step(&|| late).expect("its account is whole");
            }
            assert_eq!(engine.stats().num_waiting_by_lane, [0, 1]);
            assert_eq!(engine.stats().queue_wait_ms_by_lane, [0, 0]);
        }
    }
}
