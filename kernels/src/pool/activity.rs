//! Whether a pool computes, for threads that would rather not be in its way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts the beginnings and ends of operations: odd while one is in flight. Clones count together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Activity {
    count: Arc<AtomicUsize>,
}

impl Activity {
    /// Notes that an operation begins, and its end when what is returned is dropped.
    pub(super) fn begin(&self) -> InFlight<'_> {
        self.count.fetch_add(1, Ordering::Relaxed);
        InFlight { count: &self.count }
    }

    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

/// An operation in flight.
pub(super) struct InFlight<'a> {
    count: &'a AtomicUsize,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.count.fetch_add(1, Ordering::Relaxed);
    }
}
