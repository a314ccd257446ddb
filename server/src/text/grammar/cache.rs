//! Compiled grammars, found by their text: the least recently used go when their bytes are too many.

use std::collections::HashMap;
use std::sync::Arc;

use super::compile::Grammar;

/// Bounded by the bytes that its grammars take.
pub(super) struct Cache {
    grammars: HashMap<Arc<str>, Entry>,
    num_bytes: usize,
    max_bytes: usize,
    clock: u64,
}

struct Entry {
    grammar: Arc<Grammar>,
    last_use: u64,
}

impl Cache {
    pub(super) fn new(max_bytes: usize) -> Self {
        Cache { grammars: HashMap::new(), num_bytes: 0, max_bytes, clock: 0 }
    }

    pub(super) fn get(&mut self, text: &str) -> Option<Arc<Grammar>> {
        self.clock += 1;
        let entry = self.grammars.get_mut(text)?;
        entry.last_use = self.clock;
        Some(entry.grammar.clone())
    }

    /// Keeps a grammar if it is not larger than the whole cache; one that is there already stays.
    pub(super) fn insert(&mut self, text: Arc<str>, grammar: Arc<Grammar>) -> Arc<Grammar> {
        if let Some(known) = self.get(&text) {
            return known;
        }
        if grammar.size_bytes() > self.max_bytes {
            return grammar;
        }
        self.num_bytes += grammar.size_bytes();
        self.grammars.insert(text, Entry { grammar: grammar.clone(), last_use: self.clock });
        while self.num_bytes > self.max_bytes {
            let oldest = self.grammars.iter().min_by_key(|(_, entry)| entry.last_use);
            let Some(text) = oldest.map(|(text, _)| text.clone()) else { break };
            if let Some(gone) = self.grammars.remove(&text) {
                self.num_bytes -= gone.grammar.size_bytes();
            }
        }
        grammar
    }
}
