//! Random numbers that a seed repeats on every machine: SplitMix64 (Steele, Lea, Flood 2014).

use std::cell::Cell;

/// A stream of random numbers. Shared references draw too, so that a clock can own one.
#[derive(Debug)]
pub(crate) struct Rng(Cell<u64>);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Rng(Cell::new(seed))
    }

    /// A stream of its own, which what is drawn here later does not change.
    pub(crate) fn fork(&self) -> Rng {
        Rng::new(self.next())
    }

    pub(crate) fn next(&self) -> u64 {
        self.0.set(self.0.get().wrapping_add(0x9E37_79B9_7F4A_7C15));
        let mut z = self.0.get();
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From `low` to `high`, both included.
    pub(crate) fn range(&self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&self, n: usize) -> bool {
        self.range(1, n) == 1
    }

    /// True in `percent` of all cases.
    pub(crate) fn percent(&self, percent: usize) -> bool {
        self.range(0, 99) < percent
    }

    /// One of `choices`.
    pub(crate) fn pick<T: Copy>(&self, choices: &[T]) -> T {
        choices[self.range(0, choices.len() - 1)]
    }
}
