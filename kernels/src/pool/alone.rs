//! For how long a pool of two threads does without its worker, which other programs keep from its core.
//!
//! An operation that was held up for `t` is followed by `t` on the caller alone. Where one such wait soon follows
//! another, the factor doubles, and is applied to the new wait: `2 t`, `4 t`, at most `8 t`. So however busy the
//! machine stays, about a ninth of the time goes into such waits, and a wait that was by chance, however long, costs
//! little more than itself.

use std::sync::atomic::{AtomicU64, Ordering};

/// How many times as long as an operation was held up the next ones do without the worker, at most.
const MOST_ALONE_FACTOR: u64 = 8;

/// Until when operations run on the caller alone. Changed only by an operation in flight, of which there is one.
#[derive(Default)]
pub(super) struct Alone {
    /// Nanoseconds from the pool's start.
    until: AtomicU64,
    /// Nanoseconds of the wait that was the cause, and how many times as long the caller stays alone.
    held_up: AtomicU64,
    factor: AtomicU64,
}

impl Alone {
    /// True if operations still run on the caller alone at `now`, in nanoseconds from the pool's start.
    pub(super) fn lasts_at(&self, now: u64) -> bool {
        now < self.until.load(Ordering::Relaxed)
    }

    /// Begins at `now`, an operation having been held up for `held_up`; nanoseconds, as for [`Alone::lasts_at`].
    pub(super) fn extend(&self, now: u64, held_up: u64) {
        let soon = MOST_ALONE_FACTOR * self.held_up.load(Ordering::Relaxed);
        let has_come_soon = now - held_up < self.until.load(Ordering::Relaxed) + soon;
        let last = if has_come_soon { self.factor.load(Ordering::Relaxed) } else { 0 };
        let factor = (2 * last).clamp(1, MOST_ALONE_FACTOR);
        self.factor.store(factor, Ordering::Relaxed);
        self.held_up.store(held_up, Ordering::Relaxed);
        self.until.store(now + factor * held_up, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_that_follow_each_other_are_avoided_for_longer_and_one_by_chance_is_not() {
        let alone = Alone::default();
        let end = || alone.until.load(Ordering::Relaxed);
        alone.extend(1_000_000, 100);
        assert_eq!(end(), 1_000_100, "as long as the wait");
        for factor in [2, 4, 8, 8] {
            let now = end() + 700;
            alone.extend(now, 100);
            assert_eq!(end(), now + 100 * factor);
        }
        let now = end() + 1_500;
        alone.extend(now, 500);
        assert_eq!(end(), now + 500, "long after the last");
    }
}
