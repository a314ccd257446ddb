//! Responses that clients go on from or ask for again: in memory, the oldest first to go.
//!
//! Bounded in number and in bytes; everything is kept as text, which is what it costs. A response is
//! found by its id under the API key that made it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use tandem_engine::CacheSalt;

/// Most responses kept.
const MAX_RESPONSES: usize = 4096;
/// Most bytes of all of them together.
const MAX_BYTES: usize = 64 << 20;

/// One turn.
#[derive(Debug, Default)]
pub(super) struct Stored {
    /// The response, as JSON.
    pub(super) response: String,
    /// What the client said in it, as a JSON array of items.
    pub(super) input: String,
    /// The turn's own messages in the templates' form, input and answer, as a JSON array.
    pub(super) messages: String,
    /// The turn before it.
    pub(super) previous: Option<String>,
}

impl Stored {
    fn size_bytes(&self) -> usize {
        self.response.len() + self.input.len() + self.messages.len()
    }
}

/// All that is kept.
#[derive(Default)]
pub(in crate::http) struct ResponseStore {
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    turns: HashMap<(CacheSalt, String), Arc<Stored>>,
    /// In the order they came; those that were deleted may still be named.
    order: VecDeque<(CacheSalt, String)>,
    size_bytes: usize,
}

impl Kept {
    fn remove(&mut self, key: &(CacheSalt, String)) -> bool {
        let removed = self.turns.remove(key);
        self.size_bytes -= removed.as_ref().map_or(0, |turn| turn.size_bytes());
        removed.is_some()
    }
}

impl ResponseStore {
    pub(super) fn insert(&self, tenant: CacheSalt, id: String, turn: Stored) {
        let size_bytes = turn.size_bytes();
        if size_bytes > MAX_BYTES {
            return;
        }
        let mut kept = self.kept();
        while kept.order.len() >= MAX_RESPONSES || kept.size_bytes + size_bytes > MAX_BYTES {
            let Some(oldest) = kept.order.pop_front() else { break };
            kept.remove(&oldest);
        }
        kept.size_bytes += size_bytes;
        kept.order.push_back((tenant, id.clone()));
        kept.turns.insert((tenant, id), Arc::new(turn));
    }

    pub(super) fn get(&self, tenant: CacheSalt, id: &str) -> Option<Arc<Stored>> {
        self.kept().turns.get(&(tenant, id.to_owned())).cloned()
    }

    /// False if there was none.
    pub(super) fn remove(&self, tenant: CacheSalt, id: &str) -> bool {
        self.kept().remove(&(tenant, id.to_owned()))
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().expect("no holder of this lock panics: this is a bug")
    }
}

#[cfg(test)]
mod tests {
    use tandem_engine::CacheSalt;

    use super::{MAX_BYTES, MAX_RESPONSES, ResponseStore, Stored};

    fn turn(size_bytes: usize) -> Stored {
        Stored { response: "x".repeat(size_bytes), ..Stored::default() }
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many_or_too_large_ones() {
        let store = ResponseStore::default();
        let tenant = CacheSalt(1);
        for i in 0..=MAX_RESPONSES {
            store.insert(tenant, i.to_string(), turn(1));
        }
        assert!(store.get(tenant, "0").is_none() && store.get(tenant, "1").is_some());
        store.insert(tenant, "large".to_owned(), turn(MAX_BYTES - 1));
        assert!(store.get(tenant, "large").is_some());
        assert!(store.get(tenant, &MAX_RESPONSES.to_string()).is_some(), "one byte was left for the latest");
        assert!(store.get(tenant, "4000").is_none());
        store.insert(tenant, "too large".to_owned(), turn(MAX_BYTES + 1));
        assert!(store.get(tenant, "too large").is_none());
    }

    #[test]
    fn every_tenant_has_its_own_and_can_delete_it() {
        let store = ResponseStore::default();
        let (one, two) = (CacheSalt(1), CacheSalt(2));
        store.insert(one, "a".to_owned(), turn(1));
        assert!(store.get(two, "a").is_none() && !store.remove(two, "a"));
        assert!(store.remove(one, "a") && !store.remove(one, "a"));
        assert!(store.get(one, "a").is_none());
        assert_eq!(store.kept().size_bytes, 0);
    }
}
