//! Time as the engine sees it: every reading is later than the one before, by no fixed amount.

use std::cell::Cell;
use std::time::Duration;

use super::rng::Rng;

/// A clock that only its readings move.
#[derive(Debug)]
pub(crate) struct FakeClock {
    now: Cell<Duration>,
    rng: Rng,
    /// A reading takes up to twice this.
    mean: Duration,
    /// One reading in so many takes seconds.
    jump_one_in: usize,
}

impl FakeClock {
    pub(crate) fn new(rng: Rng) -> Self {
        let mean = Duration::from_micros(rng.pick(&[1, 50, 1_000, 20_000]));
        let jump_one_in = rng.pick(&[50, 1_000, usize::MAX]);
        FakeClock { now: Cell::new(Duration::ZERO), rng, mean, jump_one_in }
    }

    /// Reads the clock, which takes time.
    pub(crate) fn read(&self) -> Duration {
        let jump = if self.rng.one_in(self.jump_one_in) { 15_000_000 } else { 0 };
        let micros = self.rng.range(0, 2 * self.mean.as_micros() as usize + jump);
        self.now.set(self.now.get() + Duration::from_micros(micros as u64));
        self.now.get()
    }

    /// The last reading.
    pub(crate) fn now(&self) -> Duration {
        self.now.get()
    }
}
