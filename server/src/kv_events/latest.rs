//! The latest batches, which all readers share: one that is slow has a place in them and no queue of its own, so
//! readers cost no memory however many and however slow they are. It loses the oldest batches.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use bytes::Bytes;
use tokio::sync::watch;

/// Batches that can be asked for again.
const MAX_KEPT_BATCHES: usize = 10_000;

/// Their bytes, together.
const MAX_KEPT_BYTES: usize = 64 << 20;

/// The latest batches.
pub(super) struct Latest {
    kept: Mutex<Kept>,
    /// Tells those who wait of a batch.
    changed: watch::Sender<()>,
}

#[derive(Default)]
struct Kept {
    /// With their numbers.
    batches: VecDeque<(u64, Bytes)>,
    size_bytes: usize,
    /// Batches that came before them.
    num_gone: u64,
}

/// A reader's place.
pub(super) struct Place {
    /// Batches before it, of all that ever were.
    index: u64,
    changed: watch::Receiver<()>,
    /// Batches that were gone when it came to them.
    pub(super) num_lost: u64,
}

impl Latest {
    pub(super) fn new() -> Self {
        Latest { kept: Mutex::default(), changed: watch::Sender::new(()) }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().expect("no holder of this lock panics: this is a bug")
    }

    pub(super) fn push(&self, number: u64, batch: Bytes) {
        self.kept().push(number, batch);
        self.changed.send_replace(());
    }

    /// The place of the next batch that comes.
    pub(super) fn end(&self) -> Place {
        let kept = self.kept();
        let index = kept.num_gone + kept.batches.len() as u64;
        Place { index, changed: self.changed.subscribe(), num_lost: 0 }
    }

    /// The place of the first batch from this number on.
    pub(super) fn from(&self, number: u64) -> Place {
        let kept = self.kept();
        let index = kept.num_gone + kept.batches.partition_point(|(kept, _)| *kept < number) as u64;
        Place { index, changed: self.changed.subscribe(), num_lost: 0 }
    }

    /// Number and bytes of the batch at this place or, if that is gone, of the oldest, if there is one; the
    /// place is then the one after it.
    pub(super) fn take(&self, place: &mut Place) -> Option<(u64, Bytes)> {
        let kept = self.kept();
        let num_lost = kept.num_gone.saturating_sub(place.index);
        place.num_lost += num_lost;
        place.index += num_lost;
        let batch = kept.batches.get(usize::try_from(place.index - kept.num_gone).ok()?)?;
        place.index += 1;
        Some(batch.clone())
    }

    /// Waits for it. May be dropped and called again: nothing is lost.
    pub(super) async fn next(&self, place: &mut Place) -> (u64, Bytes) {
        loop {
            if let Some(batch) = self.take(place) {
                return batch;
            }
            place.changed.changed().await.expect("the sender is in self: this is a bug");
        }
    }
}

impl Place {
    /// Whether this one is before the other.
    pub(super) fn is_before(&self, other: &Place) -> bool {
        self.index < other.index
    }

    /// Leaves out all up to the other.
    pub(super) fn skip_to(&mut self, other: &Place) {
        self.index = other.index;
    }
}

impl Kept {
    fn push(&mut self, number: u64, batch: Bytes) {
        self.size_bytes += batch.len();
        self.batches.push_back((number, batch));
        while self.batches.len() > MAX_KEPT_BATCHES || self.size_bytes > MAX_KEPT_BYTES {
            let Some((_, oldest)) = self.batches.pop_front() else { return };
            self.size_bytes -= oldest.len();
            self.num_gone += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_batches_are_kept() {
        let latest = Latest::new();
        for number in 0..MAX_KEPT_BATCHES as u64 + 5 {
            if number != 8 {
                latest.push(number, Bytes::from_static(b"ab"));
            }
        }
        assert_eq!(latest.kept().batches.len(), MAX_KEPT_BATCHES);
        assert_eq!(latest.kept().size_bytes, 2 * MAX_KEPT_BATCHES);
        let first = |number| latest.take(&mut latest.from(number)).map(|(number, _)| number);
        assert_eq!((first(0), first(8), first(1_000_000)), (Some(4), Some(9), None));
        let large = Latest::new();
        for number in 0..3 {
            large.push(number, vec![0; MAX_KEPT_BYTES / 2].into());
        }
        assert_eq!(large.kept().batches.len(), 2);
        assert_eq!(large.take(&mut large.from(0)).map(|(number, _)| number), Some(1));
    }

    #[test]
    fn a_slow_reader_loses_the_oldest_and_knows_how_many() {
        let latest = Latest::new();
        latest.push(0, Bytes::new());
        let mut place = latest.end();
        assert_eq!(latest.take(&mut place), None);
        for number in 1..=MAX_KEPT_BATCHES as u64 + 3 {
            latest.push(number, Bytes::new());
        }
        assert_eq!(latest.take(&mut place).map(|(number, _)| number), Some(4));
        assert_eq!(latest.take(&mut place).map(|(number, _)| number), Some(5));
        assert_eq!(place.num_lost, 3);
        place.skip_to(&latest.end());
        assert!(!place.is_before(&latest.end()) && latest.take(&mut place).is_none());
    }
}
