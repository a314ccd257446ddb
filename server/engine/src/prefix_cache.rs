//! Which blocks hold which tokens, so that equal prefixes are computed once.
//!
//! A full block is known by its tokens and by the block before it, back to the start of the sequence
//! and the tenant's salt. Every registered block has a [`ContentId`] of its own that is never used
//! again; a block is found by (content before it, salt, tokens). The hash only says where to look: all
//! three are compared, so that a collision costs time and is never a wrong answer.
//!
//! One block id is a place in the target's storage *and* in the draft's, and either may be filled or
//! not: an entry notes which. This file knows nothing of who uses a block or when it is evicted; that
//! is [`crate::block_manager`]'s. Finding, inserting and removing cost O(block size).

use hashbrown::HashTable;
use siphasher::sip::SipHasher13;
use std::hash::Hasher;

use crate::api::{CacheSalt, TokenId};
use crate::block_manager::BlockId;
use crate::kv_events::KvEventLog;

/// Names the contents of a registered block, and through its parent the whole prefix up to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ContentId(u64);

impl ContentId {
    /// A running number.
    pub(crate) fn number(self) -> u64 {
        self.0
    }
}

/// What a registered block holds.
#[derive(Clone, Copy, Debug)]
struct Entry {
    content: ContentId,
    parent: Option<ContentId>,
    salt: CacheSalt,
    hash: u64,
    /// Whose keys and values are in it, by [`crate::sequence::ModelRole`].
    computed: [bool; 2],
}

/// A block that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CachedBlock {
    pub(crate) id: BlockId,
    pub(crate) content: ContentId,
    /// Whose keys and values are in it, by [`crate::sequence::ModelRole`].
    pub(crate) computed: [bool; 2],
}

/// How blocks are hashed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HashSettings {
    /// Drawn anew at each start.
    pub(crate) key: [u64; 2],
    /// 1 to 64; fewer than 64 forces collisions in tests.
    pub(crate) bits: u32,
}

/// Finds blocks by what they hold.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    table: HashTable<BlockId>,
    /// `[num_blocks]`
    entries: Vec<Option<Entry>>,
    /// `[num_blocks, block_size]`: the tokens of registered blocks.
    tokens: Vec<TokenId>,
    block_size: usize,
    next_content: u64,
    hashing: HashSettings,
    /// Where changes are noted, if anybody wants to know.
    pub(crate) log: Option<KvEventLog>,
}

impl PrefixCache {
    pub(crate) fn new(num_blocks: usize, block_size: usize, hashing: HashSettings) -> Self {
        PrefixCache {
            table: HashTable::with_capacity(num_blocks),
            entries: vec![None; num_blocks],
            tokens: vec![0; num_blocks * block_size],
            block_size,
            next_content: 0,
            hashing,
            log: None,
        }
    }

    /// The block with these tokens after that content.
    pub(crate) fn find(
        &self,
        salt: CacheSalt,
        parent: Option<ContentId>,
        tokens: &[TokenId],
    ) -> Option<CachedBlock> {
        let hash = self.hash(salt, parent, tokens);
        let id = *self.table.find(hash, |&id| {
            self.entry(id).is_some_and(|e| e.parent == parent && e.salt == salt) && self.tokens(id) == tokens
        })?;
        let entry = self.entry(id)?;
        Some(CachedBlock { id, content: entry.content, computed: entry.computed })
    }

    /// Registers a block that holds `block_size` tokens after `parent` and that no model has filled
    /// yet. The caller knows that [`PrefixCache::find`] does not find any.
    pub(crate) fn insert(
        &mut self,
        id: BlockId,
        salt: CacheSalt,
        parent: Option<ContentId>,
        tokens: &[TokenId],
    ) -> ContentId {
        let hash = self.hash(salt, parent, tokens);
        let content = ContentId(self.next_content);
        self.next_content += 1;
        let start = id as usize * self.block_size;
        self.tokens[start..start + self.block_size].copy_from_slice(tokens);
        self.entries[id as usize] = Some(Entry { content, parent, salt, hash, computed: [false; 2] });
        let entries = &self.entries;
        self.table.insert_unique(hash, id, |&id| entries[id as usize].map_or(0, |e| e.hash));
        content
    }

    /// Forgets what a block holds. Blocks after it cannot be found any more and are evicted in their turn.
    pub(crate) fn remove(&mut self, id: BlockId) {
        let Some(entry) = self.entries[id as usize].take() else { return };
        if let Ok(found) = self.table.find_entry(entry.hash, |&other| other == id) {
            found.remove();
        }
        if let Some(log) = &mut self.log {
            log.removed(entry.computed, entry.content);
        }
    }

    /// True if the block is registered.
    pub(crate) fn contains(&self, id: BlockId) -> bool {
        self.entries[id as usize].is_some()
    }

    /// The block's contents are now in this model's storage too. Blocks that are not registered are
    /// their owner's alone, who knows it.
    pub(crate) fn mark_computed(&mut self, id: BlockId, role: usize) {
        let Some(entry) = &mut self.entries[id as usize] else { return };
        let is_known = std::mem::replace(&mut entry.computed[role], true);
        if let Some(log) = self.log.as_mut().filter(|_| !is_known) {
            let start = id as usize * self.block_size;
            log.stored(role, entry.content, entry.parent, &self.tokens[start..start + self.block_size]);
        }
    }

    /// Registered blocks.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// True if the table and the entries say the same.
    pub(crate) fn is_consistent(&self) -> bool {
        self.entries.iter().flatten().count() == self.table.len()
            && self.table.iter().all(|&id| self.contains(id))
    }

    fn entry(&self, id: BlockId) -> Option<&Entry> {
        self.entries[id as usize].as_ref()
    }

    fn tokens(&self, id: BlockId) -> &[TokenId] {
        let start = id as usize * self.block_size;
        &self.tokens[start..start + self.block_size]
    }

    fn hash(&self, salt: CacheSalt, parent: Option<ContentId>, tokens: &[TokenId]) -> u64 {
        let [key0, key1] = self.hashing.key;
        let mut hasher = SipHasher13::new_with_keys(key0, key1);
        hasher.write_u128(salt.0);
        hasher.write_u64(parent.map_or(u64::MAX, |content| content.0));
        hasher.write(bytemuck::cast_slice(tokens));
        let hash = hasher.finish();
        if self.hashing.bits < u64::BITS { hash & ((1 << self.hashing.bits) - 1) } else { hash }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SALT: CacheSalt = CacheSalt(1);

    fn cache(bits: u32) -> PrefixCache {
        PrefixCache::new(64, 2, HashSettings { key: [3, 4], bits })
    }

    #[test]
    fn tokens_parent_and_salt_all_count() {
        let mut cache = cache(64);
        let root = cache.insert(0, SALT, None, &[1, 2]);
        let next = cache.insert(1, SALT, Some(root), &[3, 4]);
        let found = |salt, parent, tokens: &[TokenId]| cache.find(salt, parent, tokens).map(|b| b.id);
        assert_eq!(found(SALT, None, &[1, 2]), Some(0));
        assert_eq!(found(SALT, Some(root), &[3, 4]), Some(1));
        assert_eq!(found(SALT, None, &[3, 4]), None);
        assert_eq!(found(SALT, Some(next), &[3, 4]), None);
        assert_eq!(found(CacheSalt(2), None, &[1, 2]), None);
        assert_eq!(found(SALT, None, &[2, 1]), None);
    }

    #[test]
    fn contents_are_never_named_twice() {
        let mut cache = cache(64);
        let first = cache.insert(0, SALT, None, &[1, 2]);
        cache.insert(1, SALT, Some(first), &[3, 4]);
        cache.remove(0);
        let again = cache.insert(0, SALT, None, &[1, 2]);
        assert_ne!(first, again);
        assert!(cache.find(SALT, Some(again), &[3, 4]).is_none());
    }

    proptest! {
        #[test]
        fn collisions_never_confuse_blocks(ops in prop::collection::vec((0u32..64, 0u32..6, 0u32..6, any::<bool>()), 1..300)) {
            // One bit: half of all blocks collide.
            let mut cache = cache(1);
            let mut model = std::collections::HashMap::new();
            for (id, a, b, insert) in ops {
                let tokens = [a, b];
                if insert {
                    if cache.find(SALT, None, &tokens).is_none() && !cache.contains(id) {
                        cache.insert(id, SALT, None, &tokens);
                        model.insert(tokens, id);
                    }
                } else {
                    cache.remove(id);
                    model.retain(|_, &mut other| other != id);
                }
                prop_assert!(cache.is_consistent());
                prop_assert_eq!(cache.len(), model.len());
                for (tokens, &id) in &model {
                    prop_assert_eq!(cache.find(SALT, None, tokens).map(|b| b.id), Some(id));
                }
            }
        }
    }
}
