//! Whether drafting pays, measured. A plan rests on estimates of costs and chances; where they err together it
//! would cost the user time, and no estimate shows it. So for each kind of batch (how many sequences, drawn
//! or greedy) the engine now and then takes the other way for a window of rounds, plain decoding instead
//! of the plan or the plan instead of plain decoding, and stays with the one that brought more tokens a
//! second. A trial that changes nothing doubles the time to the next one, so the price fades to one or two
//! windows in [`LONGEST_INTERVAL`].
//!
//! One sequence alone is always decoded as planned: what its windows bring differs more from text to text than
//! from one way to the other.
//!
//! A *round* is one plan with its draft passes and the target's pass. Everything here is O(1).

use std::ops::RangeInclusive;
use std::time::Duration;

/// How a round is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arm {
    /// As the policy plans it.
    Planned,
    /// Without drafting or looking for proposals.
    Plain,
}

impl Arm {
    fn other(self) -> Arm {
        match self {
            Arm::Planned => Arm::Plain,
            Arm::Plain => Arm::Planned,
        }
    }

    /// Windows of a trial. A draft has to catch up first with what was decoded without it.
    fn trial_windows(self) -> u32 {
        match self {
            Arm::Planned => 2,
            Arm::Plain => 1,
        }
    }
}

/// Sequences' rounds that are compared as one, and the bounds of a window in rounds: what a few
/// sequences' drafts bring varies much from round to round.
const WINDOW: u32 = 128;
const WINDOW_ROUNDS: RangeInclusive<u32> = 16..=64;

/// Windows before a kind of batch is tried the other way for the first time.
const FIRST_INTERVAL: u32 = 2;

/// Windows after a trial that changed the way, and the most after trials that did not.
const SHORTEST_INTERVAL: u32 = 16;
const LONGEST_INTERVAL: u32 = 512;

/// Rounds with prompts that go on plainly because that was the faster without them, and none between that was
/// measured: then plans are followed again, since the text may have changed and nothing is learned meanwhile.
const MOST_UNMEASURED: u32 = 512;

/// Weight of an arm's past after each window.
const WINDOW_DECAY: f64 = 0.7;

/// By how much the other way must be faster to be taken: windows of an even match differ by chance.
const MARGIN: f64 = 1.03;

/// A round counts for at most so many times the arm's mean: the system may have put it aside.
const MOST_TIMES: f64 = 4.0;

/// Batches of 2, 3 to 4, 5 to 8 and so on are of one kind; the last holds all larger ones.
const NUM_SIZES: usize = 8;

/// Kinds of batch, in which one way is likely to be the faster throughout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BatchKind(usize);

impl BatchKind {
    /// Of `num_sequences` deep sequences that decode, some of them drawn at random or none.
    pub(crate) fn new(num_sequences: usize, samples: bool) -> Self {
        let size = num_sequences.next_power_of_two().trailing_zeros() as usize;
        BatchKind(2 * size.min(NUM_SIZES - 1) + usize::from(samples))
    }

    /// Rounds of a window.
    fn window(self) -> u32 {
        (WINDOW >> (self.0 / 2)).clamp(*WINDOW_ROUNDS.start(), *WINDOW_ROUNDS.end())
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    rounds: f64,
    tokens: f64,
    seconds: f64,
}

impl Measured {
    fn tokens_per_second(&self) -> f64 {
        self.tokens / self.seconds.max(1e-9)
    }

    fn add(&mut self, other: Measured, decay: f64) {
        self.rounds = self.rounds * decay + other.rounds;
        self.tokens = self.tokens * decay + other.tokens;
        self.seconds = self.seconds * decay + other.seconds;
    }
}

/// One kind of batch.
#[derive(Clone, Copy, Debug)]
struct Contest {
    measured: [Measured; 2],
    leader: Arm,
    current: Arm,
    window: Measured,
    /// Windows of the leader before the next trial, and what they started from.
    windows_left: u32,
    interval: u32,
    /// Since the last that was measured.
    unmeasured_rounds: u32,
}

impl Default for Contest {
    fn default() -> Self {
        Contest {
            measured: [Measured::default(); 2],
            leader: Arm::Planned,
            current: Arm::Planned,
            window: Measured::default(),
            windows_left: FIRST_INTERVAL,
            interval: FIRST_INTERVAL,
            unmeasured_rounds: 0,
        }
    }
}

impl Contest {
    fn unmeasured(&mut self) -> Arm {
        if self.leader == Arm::Plain {
            self.unmeasured_rounds += 1;
            if self.unmeasured_rounds > MOST_UNMEASURED {
                *self = Contest::default();
            }
        }
        self.leader
    }

    fn record(&mut self, window: u32, tokens: u64, seconds: f64) {
        self.unmeasured_rounds = 0;
        let past = self.measured[self.current as usize];
        let most = if past.rounds > 0.0 { MOST_TIMES * past.seconds / past.rounds } else { f64::INFINITY };
        self.window.add(Measured { rounds: 1.0, tokens: tokens as f64, seconds: seconds.min(most) }, 1.0);
        let windows = if self.current == self.leader { 1 } else { self.current.trial_windows() };
        if self.window.rounds >= f64::from(windows * window) {
            self.end_window();
        }
    }

    fn end_window(&mut self) {
        let window = std::mem::take(&mut self.window);
        self.measured[self.current as usize].add(window, WINDOW_DECAY);
        if self.current == self.leader {
            self.windows_left = self.windows_left.saturating_sub(1);
            if self.windows_left == 0 {
                self.current = self.leader.other();
            }
            return;
        }
        let rate = |arm: Arm| self.measured[arm as usize].tokens_per_second();
        if rate(self.current) > MARGIN * rate(self.leader) {
            self.leader = self.current;
            self.interval = SHORTEST_INTERVAL;
        } else {
            self.current = self.leader;
            self.interval = (2 * self.interval).min(LONGEST_INTERVAL);
        }
        self.windows_left = self.interval;
    }
}

/// The contests of all kinds of batch, and the round that is under way.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trials {
    contests: [Contest; 2 * NUM_SIZES],
    open: Option<Round>,
}

#[derive(Clone, Copy, Debug)]
struct Round {
    kind: BatchKind,
    began: Duration,
    num_tokens: u64,
}

impl Trials {
    /// Begins a round at time `now`, `num_tokens` having been committed so far.
    pub(crate) fn begin(&mut self, kind: BatchKind, now: Duration, num_tokens: u64) -> Arm {
        self.open = Some(Round { kind, began: now, num_tokens });
        self.contests[kind.0].current
    }

    /// Begins a round that goes as planned whatever was measured, and of which nothing is learned.
    pub(crate) fn begin_uncontested(&mut self) {
        self.open = None;
    }

    /// Begins a round from which nothing can be learned; the way that has been the faster so far.
    pub(crate) fn begin_unmeasured(&mut self, kind: BatchKind) -> Arm {
        self.open = None;
        self.contests[kind.0].unmeasured()
    }

    /// Ends the round at time `now`, of which `other` went to other work.
    pub(crate) fn end(&mut self, now: Duration, other: Duration, num_tokens: u64) {
        let Some(Round { kind, began, num_tokens: before }) = self.open.take() else { return };
        let time = now.saturating_sub(began).saturating_sub(other);
        self.contests[kind.0].record(kind.window(), num_tokens.saturating_sub(before), time.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays rounds in which an arm's tokens take so many microseconds each; the share that was plain.
    fn play(trials: &mut Trials, num_rounds: u32, planned_us: u64, plain_us: u64) -> f64 {
        let kind = BatchKind::new(4, true);
        let mut num_plain = 0;
        for _ in 0..num_rounds {
            let arm = trials.begin(kind, Duration::ZERO, 0);
            num_plain += u32::from(arm == Arm::Plain);
            let time = if arm == Arm::Plain { 4 * plain_us } else { 8 * planned_us };
            trials.end(Duration::from_micros(time), Duration::ZERO, if arm == Arm::Plain { 4 } else { 8 });
        }
        f64::from(num_plain) / f64::from(num_rounds)
    }

    #[test]
    fn the_faster_way_is_taken_and_the_other_hardly_tried() {
        let mut trials = Trials::default();
        play(&mut trials, 2_000, 100, 200);
        assert!(play(&mut trials, 20_000, 100, 200) < 0.01);
        play(&mut trials, 20_000, 200, 100);
        let mut unmeasured = || trials.begin_unmeasured(BatchKind::new(4, true));
        assert!((0..MOST_UNMEASURED).all(|_| unmeasured() == Arm::Plain));
        assert_eq!(unmeasured(), Arm::Planned, "the text may have changed");
        play(&mut trials, 20_000, 200, 100);
        assert!(play(&mut trials, 20_000, 200, 100) > 0.95, "what was faster has become slower");
        play(&mut trials, 40_000, 100, 200);
        assert!(play(&mut trials, 20_000, 100, 200) < 0.05, "and faster again");
    }

    #[test]
    fn rounds_that_must_go_as_planned_take_nothing_from_what_was_learned() {
        let mut trials = Trials::default();
        play(&mut trials, 20_000, 200, 100);
        let kind = BatchKind::new(4, true);
        (0..2 * MOST_UNMEASURED).for_each(|_| trials.begin_uncontested());
        assert_eq!(trials.begin_unmeasured(kind), Arm::Plain);
        assert!(play(&mut trials, 1_000, 200, 100) > 0.9);
    }

    #[test]
    fn an_even_match_stays_with_the_plan() {
        let mut trials = Trials::default();
        assert!(play(&mut trials, 5_000, 100, 100) < 0.1);
    }

    #[test]
    fn one_round_put_aside_decides_nothing() {
        let mut trials = Trials::default();
        let kind = BatchKind::new(1, false);
        for round in 0..4_000u64 {
            let arm = trials.begin(kind, Duration::ZERO, 0);
            // The plan is twice as fast, but every 50th of its rounds takes thirty times as long.
            let time = match arm {
                Arm::Plain => 200,
                Arm::Planned if round % 50 == 0 => 3_000,
                Arm::Planned => 100,
            };
            trials.end(Duration::from_micros(time), Duration::ZERO, 1);
        }
        assert_eq!(trials.contests[BatchKind::new(1, false).0].leader, Arm::Planned);
    }

    #[test]
    fn kinds_tell_sizes_and_sampling_apart_and_unmeasured_rounds_count_for_none() {
        let sizes = [1, 2, 3, 4, 5, 8, 9, 64, 1_000, 100_000].map(|n| BatchKind::new(n, false).0 / 2);
        assert_eq!(sizes, [0, 1, 2, 2, 3, 3, 4, 6, 7, 7]);
        assert_ne!(BatchKind::new(4, false), BatchKind::new(4, true));
        let mut trials = Trials::default();
        trials.begin(BatchKind::new(4, true), Duration::ZERO, 0);
        trials.begin_unmeasured(BatchKind::new(4, true));
        trials.end(Duration::from_secs(1), Duration::ZERO, 100);
        assert!(trials.contests.iter().all(|c| c.window.rounds == 0.0));
    }
}
