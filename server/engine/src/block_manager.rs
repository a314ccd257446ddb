//! Who uses which block of the KV cache, and which blocks are kept for who comes next.
//!
//! One block id stands for the same `block_size` token slots in the target's storage and in the
//! draft's. A block is *used* (by the sequences whose tables name it), *cached* (registered in the
//! [`PrefixCache`] and used by nobody) or *free*.
//!
//! Invariants: `num_free() + num_cached() + num_used() == num_total()`; a block's reference count is
//! the number of tables that name it; a registered block is never written except with the bits it
//! holds. Cached blocks are evicted least recently used first, and a sequence's last block before its
//! first, so that what is left of a prefix can still be found. Every operation costs O(blocks moved).

use tandem_models::ForwardBatch;

use crate::api::{CacheSalt, TokenId};
use crate::kv_events::{KvEvent, KvEventLog};
use crate::prefix_cache::{CachedBlock, ContentId, HashSettings, PrefixCache};
use crate::sequence::ModelRole;

/// Names one block.
pub(crate) type BlockId = u32;

/// A sequence's blocks, in the order of its positions.
#[derive(Debug, Default)]
pub(crate) struct BlockTable {
    ids: Vec<BlockId>,
    /// The first so many blocks are known to the prefix cache (these, or others of the same contents).
    num_registered: usize,
    /// Contents of the last of them.
    content: Option<ContentId>,
    /// The first so many are marked as computed, by model.
    num_marked: [usize; 2],
}

impl BlockTable {
    /// The ids, block `i` holding positions `i * block_size..(i + 1) * block_size`.
    pub(crate) fn ids(&self) -> &[BlockId] {
        &self.ids
    }
}

/// A prefix that was found in the cache.
#[derive(Debug, Default)]
pub(crate) struct CachedPrefix {
    pub(crate) table: BlockTable,
    /// Tokens from the start whose keys and values are there, by model.
    pub(crate) num_computed: [usize; 2],
}

/// A block's neighbours among the cached ones, and its users.
#[derive(Clone, Copy, Debug, Default)]
struct BlockState {
    ref_count: u32,
    older: Option<BlockId>,
    newer: Option<BlockId>,
}

/// Hands out blocks and takes them back.
#[derive(Debug)]
pub(crate) struct BlockManager {
    blocks: Vec<BlockState>,
    /// The last is handed out first, so recently used memory is used again.
    free: Vec<BlockId>,
    oldest: Option<BlockId>,
    newest: Option<BlockId>,
    num_cached: usize,
    num_evictions: u64,
    cache: Option<PrefixCache>,
    block_size: usize,
}

impl BlockManager {
    /// All `num_blocks` blocks are free. Without `hashing` nothing is ever cached.
    pub(crate) fn new(num_blocks: usize, block_size: usize, hashing: Option<HashSettings>) -> Self {
        BlockManager {
            blocks: vec![BlockState::default(); num_blocks],
            free: (0..num_blocks as BlockId).rev().collect(),
            oldest: None,
            newest: None,
            num_cached: 0,
            num_evictions: 0,
            cache: hashing.map(|hashing| PrefixCache::new(num_blocks, block_size, hashing)),
            block_size,
        }
    }

    /// Notes what is registered and evicted from now on, of the blocks of one model.
    pub(crate) fn log_events(&mut self, key: [u64; 2], role: ModelRole) {
        if let Some(cache) = &mut self.cache {
            cache.log = Some(KvEventLog::new(key, role as usize));
        }
    }

    /// What was noted since the last call.
    pub(crate) fn take_events(&mut self) -> Vec<KvEvent> {
        let log = self.cache.as_mut().and_then(|cache| cache.log.as_mut());
        log.map_or_else(Vec::new, KvEventLog::take)
    }

    /// Blocks that hold `num_tokens` tokens.
    pub(crate) fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    /// Makes a table hold `num_tokens` tokens, evicting cached blocks if need be. False (and nothing
    /// changed) if too few are free or cached.
    pub(crate) fn grow(&mut self, table: &mut BlockTable, num_tokens: usize) -> bool {
        let num_new = self.blocks_for(num_tokens).saturating_sub(table.ids.len());
        if num_new > self.num_available() {
            return false;
        }
        for _ in 0..num_new {
            let id = self.take_one().expect("as many blocks as were counted: this is a bug");
            self.blocks[id as usize].ref_count = 1;
            table.ids.push(id);
        }
        true
    }

    /// True if the token at `position` of the table's sequence lies in a block that the prefix cache knows.
    pub(crate) fn is_registered(&self, table: &BlockTable, position: usize) -> bool {
        position / self.block_size < table.num_registered
    }

    /// Tokens of a sequence with this table that a model must have computed for the cache to have `num_more` of them
    /// or more that it has not now, in whole blocks; `None` without a cache.
    pub(crate) fn reach(&self, table: &BlockTable, role: ModelRole, num_more: usize) -> Option<usize> {
        self.cache.as_ref()?;
        Some((table.num_marked[role as usize] + self.blocks_for(num_more)) * self.block_size)
    }

    /// The longest cached prefix of `tokens` in whole blocks; its blocks are used from now on.
    pub(crate) fn acquire_prefix(&mut self, salt: CacheSalt, tokens: &[TokenId]) -> CachedPrefix {
        let mut prefix = CachedPrefix::default();
        let mut unbroken = [true; 2];
        for chunk in tokens.chunks_exact(self.block_size) {
            let Some(found) = self.find(salt, prefix.table.content, chunk) else { break };
            for role in [ModelRole::Target, ModelRole::Draft] {
                unbroken[role as usize] &= found.computed[role as usize];
                if unbroken[role as usize] {
                    prefix.num_computed[role as usize] += self.block_size;
                    prefix.table.num_marked[role as usize] += 1;
                }
            }
            self.acquire(found.id);
            prefix.table.ids.push(found.id);
            prefix.table.content = Some(found.content);
            prefix.table.num_registered += 1;
        }
        prefix
    }

    /// Blocks of the longest cached prefix of `tokens`, and how many of them nobody uses now (which
    /// [`BlockManager::num_available`] therefore counts).
    pub(crate) fn cached_prefix_blocks(&self, salt: CacheSalt, tokens: &[TokenId]) -> (usize, usize) {
        let (mut parent, mut num_found, mut num_unused) = (None, 0, 0);
        for chunk in tokens.chunks_exact(self.block_size) {
            let Some(found) = self.find(salt, parent, chunk) else { break };
            parent = Some(found.content);
            num_found += 1;
            num_unused += usize::from(self.blocks[found.id as usize].ref_count == 0);
        }
        (num_found, num_unused)
    }

    /// Tells the cache what a sequence has computed of its committed `tokens`, `num_computed` by model.
    /// Where another block holds the same already, the table takes that one and gives its own back.
    pub(crate) fn register(
        &mut self,
        table: &mut BlockTable,
        salt: CacheSalt,
        tokens: &[TokenId],
        num_computed: [usize; 2],
    ) {
        if self.cache.is_none() {
            return;
        }
        for role in [ModelRole::Target, ModelRole::Draft] {
            let num_full = num_computed[role as usize].min(tokens.len()) / self.block_size;
            while table.num_marked[role as usize] < num_full {
                let index = table.num_marked[role as usize];
                if index == table.num_registered {
                    self.register_next(table, salt, tokens, num_computed);
                }
                if let Some(cache) = &mut self.cache {
                    cache.mark_computed(table.ids[index], role as usize);
                }
                table.num_marked[role as usize] += 1;
            }
        }
    }

    /// Registers the table's next full block, or adopts the one that is registered with its contents.
    fn register_next(
        &mut self,
        table: &mut BlockTable,
        salt: CacheSalt,
        tokens: &[TokenId],
        num_computed: [usize; 2],
    ) {
        let index = table.num_registered;
        let start = index * self.block_size;
        let chunk = &tokens[start..start + self.block_size];
        let own = table.ids[index];
        let content = match self.find(salt, table.content, chunk) {
            Some(found) => {
                // Not if that would lose what a model has put into our own.
                let loses_nothing = |role: usize| found.computed[role] || num_computed[role] <= start;
                if found.id != own && loses_nothing(0) && loses_nothing(1) {
                    self.acquire(found.id);
                    table.ids[index] = found.id;
                    self.release_one(own);
                }
                found.content
            }
            None => {
                let cache = self.cache.as_mut().expect("checked by register(): this is a bug");
                cache.insert(own, salt, table.content, chunk)
            }
        };
        table.content = Some(content);
        table.num_registered += 1;
    }

    /// Takes a sequence's blocks back; those that are registered stay cached.
    pub(crate) fn release(&mut self, table: BlockTable) {
        // Back to front: the end of a prefix is worth nothing without its beginning.
        for &id in table.ids.iter().rev() {
            self.release_one(id);
        }
    }

    /// Appends a sequence's tokens to a pass; see [`ForwardBatch::push_sequence`].
    pub(crate) fn push_sequence(
        &self,
        batch: &mut ForwardBatch,
        tokens: &[u32],
        start_position: usize,
        table: &BlockTable,
        num_logits: usize,
    ) {
        batch.push_sequence(tokens, start_position, table.ids(), self.block_size, num_logits);
    }

    /// Blocks that hold nothing.
    pub(crate) fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Registered blocks that nobody uses.
    pub(crate) fn num_cached(&self) -> usize {
        self.num_cached
    }

    /// Blocks that can be had: free or evictable.
    pub(crate) fn num_available(&self) -> usize {
        self.free.len() + self.num_cached
    }

    /// Tokens that all blocks hold.
    pub(crate) fn num_slots(&self) -> usize {
        self.blocks.len() * self.block_size
    }

    /// All blocks.
    pub(crate) fn num_total(&self) -> usize {
        self.blocks.len()
    }

    /// Cached blocks that were given to somebody else.
    pub(crate) fn num_evictions(&self) -> u64 {
        self.num_evictions
    }

    /// Makes the account wrong, for tests of what happens then.
    #[cfg(test)]
    pub(crate) fn corrupt(&mut self) {
        let last = self.blocks.last_mut().expect("there are blocks");
        last.ref_count += 1;
    }

    fn find(&self, salt: CacheSalt, parent: Option<ContentId>, tokens: &[TokenId]) -> Option<CachedBlock> {
        self.cache.as_ref()?.find(salt, parent, tokens)
    }

    fn acquire(&mut self, id: BlockId) {
        if self.blocks[id as usize].ref_count == 0 {
            self.unlink(id);
        }
        self.blocks[id as usize].ref_count += 1;
    }

    fn release_one(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        block.ref_count = block.ref_count.checked_sub(1).expect("a block was released twice: this is a bug");
        if block.ref_count > 0 {
            return;
        }
        if self.cache.as_ref().is_some_and(|cache| cache.contains(id)) {
            self.link_newest(id);
        } else {
            self.free.push(id);
        }
    }

    fn take_one(&mut self) -> Option<BlockId> {
        if let Some(id) = self.free.pop() {
            return Some(id);
        }
        let id = self.oldest?;
        self.unlink(id);
        if let Some(cache) = &mut self.cache {
            cache.remove(id);
        }
        self.num_evictions += 1;
        Some(id)
    }

    fn link_newest(&mut self, id: BlockId) {
        let before = self.newest.replace(id);
        self.blocks[id as usize].older = before;
        self.blocks[id as usize].newer = None;
        match before {
            Some(before) => self.blocks[before as usize].newer = Some(id),
            None => self.oldest = Some(id),
        }
        self.num_cached += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let BlockState { older, newer, .. } = self.blocks[id as usize];
        match older {
            Some(older) => self.blocks[older as usize].newer = newer,
            None => self.oldest = newer,
        }
        match newer {
            Some(newer) => self.blocks[newer as usize].older = older,
            None => self.newest = older,
        }
        self.num_cached -= 1;
    }
}

/// The account, checked against itself.
impl BlockManager {
    /// Checks every invariant, given the tables of all sequences that hold blocks. O(blocks).
    ///
    /// # Errors
    /// Says which invariant is violated.
    pub(crate) fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) -> Result<(), String> {
        let mut owners = vec![0u32; self.num_total()];
        for &id in tables.flat_map(BlockTable::ids) {
            owners[id as usize] += 1;
        }
        if let Some(id) = (0..owners.len()).find(|&id| owners[id] != self.blocks[id].ref_count) {
            let counted = self.blocks[id].ref_count;
            return Err(format!("block {id} has {counted} users on record and {} in fact", owners[id]));
        }
        let num_used = owners.iter().filter(|&&count| count > 0).count();
        let (num_free, num_cached, num_total) = (self.num_free(), self.num_cached(), self.num_total());
        if num_free + num_cached + num_used != num_total {
            return Err(format!(
                "{num_free} free, {num_cached} cached and {num_used} used blocks are not {num_total}"
            ));
        }
        let registered = |id: BlockId| self.cache.as_ref().is_some_and(|cache| cache.contains(id));
        if let Some(id) = self.free.iter().find(|&&id| owners[id as usize] > 0 || registered(id)) {
            return Err(format!("block {id} is on the free list and is in use or registered"));
        }
        let mut next = self.oldest;
        let mut num_linked = 0;
        while let Some(id) = next {
            num_linked += 1;
            if owners[id as usize] > 0 || !registered(id) || num_linked > num_cached {
                return Err(format!("block {id} is among the cached blocks and should not be"));
            }
            next = self.blocks[id as usize].newer;
        }
        if num_linked != num_cached || self.cache.as_ref().is_some_and(|cache| !cache.is_consistent()) {
            return Err("the list or the index of cached blocks is broken".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SALT: CacheSalt = CacheSalt(9);

    fn manager(num_blocks: usize, block_size: usize) -> BlockManager {
        BlockManager::new(num_blocks, block_size, Some(HashSettings { key: [1, 2], bits: 64 }))
    }

    fn finish(blocks: &mut BlockManager, tokens: &[TokenId], computed: [usize; 2]) {
        let mut prefix = blocks.acquire_prefix(SALT, tokens);
        assert!(blocks.grow(&mut prefix.table, tokens.len()));
        blocks.register(&mut prefix.table, SALT, tokens, computed);
        blocks.release(prefix.table);
    }

    #[test]
    fn a_request_that_does_not_fit_changes_nothing() {
        let mut blocks = manager(3, 16);
        let mut table = BlockTable::default();
        assert!(!blocks.grow(&mut table, 49));
        assert_eq!((blocks.num_free(), table.ids().len()), (3, 0));
        assert!(blocks.grow(&mut table, 48));
        blocks.check([&table].into_iter()).expect("whole");
    }

    #[test]
    fn a_finished_prefix_is_found_by_the_model_that_computed_it() {
        let mut blocks = manager(8, 2);
        finish(&mut blocks, &[1, 2, 3, 4, 5], [5, 2]);
        assert_eq!((blocks.num_cached(), blocks.num_free()), (2, 6));
        let prefix = blocks.acquire_prefix(SALT, &[1, 2, 3, 4, 9, 9]);
        assert_eq!((prefix.table.ids().len(), prefix.num_computed), (2, [4, 2]));
        assert!(blocks.acquire_prefix(CacheSalt(1), &[1, 2, 3, 4]).table.ids().is_empty());
        blocks.check([&prefix.table].into_iter()).expect("whole");
    }

    #[test]
    fn the_least_recently_used_and_the_end_of_a_prefix_go_first() {
        let mut blocks = manager(4, 1);
        finish(&mut blocks, &[1, 2], [2, 2]);
        finish(&mut blocks, &[5, 6], [2, 2]);
        let mut table = BlockTable::default();
        assert!(blocks.grow(&mut table, 3));
        // Only the first block of the newer prefix is left.
        assert_eq!(blocks.cached_prefix_blocks(SALT, &[1, 2]).0, 0);
        assert_eq!(blocks.cached_prefix_blocks(SALT, &[5, 6]), (1, 1));
        assert_eq!(blocks.num_evictions(), 3);
    }

    #[test]
    fn equal_blocks_computed_side_by_side_become_one() {
        let mut blocks = manager(8, 2);
        let mut tables = [BlockTable::default(), BlockTable::default()];
        for table in &mut tables {
            assert!(blocks.grow(table, 4));
        }
        for table in &mut tables {
            blocks.register(table, SALT, &[1, 2, 3, 4], [4, 0]);
        }
        assert_eq!(tables[0].ids(), tables[1].ids());
        assert_eq!(blocks.num_free(), 6);
        blocks.check(tables.iter()).expect("whole");
    }

    /// What a reader of the events knows: the names of blocks by what is before them and what they hold.
    #[derive(Default)]
    struct Mirror(std::collections::HashMap<(Option<u64>, Vec<TokenId>), u64>);

    impl Mirror {
        fn take(&mut self, event: KvEvent) {
            match event {
                KvEvent::Stored { blocks, mut parent, tokens } => {
                    assert_eq!(tokens.len(), 2 * blocks.len());
                    for (block, tokens) in blocks.into_iter().zip(tokens.chunks(2)) {
                        assert_eq!(self.0.insert((parent, tokens.to_vec()), block), None, "stored twice");
                        parent = Some(block);
                    }
                }
                KvEvent::Removed { blocks } => {
                    let before = self.0.len();
                    self.0.retain(|_, name| !blocks.contains(name));
                    assert_eq!(self.0.len(), before - blocks.len(), "removed what was not there");
                }
            }
        }

        /// Tokens of the longest prefix.
        fn prefix(&self, tokens: &[TokenId]) -> usize {
            let mut parent = None;
            let found = |chunk: &&[TokenId]| {
                parent = self.0.get(&(parent, chunk.to_vec())).copied();
                parent.is_some()
            };
            2 * tokens.chunks_exact(2).take_while(found).count()
        }
    }

    proptest! {
        #[test]
        fn events_tell_what_the_cache_has(
            of_draft in any::<bool>(),
            ops in prop::collection::vec((1usize..12, 0u32..2, 0usize..13, 0usize..13), 1..80),
        ) {
            let role = if of_draft { ModelRole::Draft } else { ModelRole::Target };
            let mut blocks = manager(8, 2);
            blocks.log_events([7, 8], role);
            let mut mirror = Mirror::default();
            for (length, token, first, second) in ops {
                let tokens: Vec<TokenId> = (0..length as u32).map(|i| if i > 5 { token } else { i % 2 }).collect();
                let mut prefix = blocks.acquire_prefix(SALT, &tokens);
                if blocks.grow(&mut prefix.table, length) {
                    let computed = [first.min(length), second.min(length)];
                    blocks.register(&mut prefix.table, SALT, &tokens, computed);
                }
                blocks.release(prefix.table);
                blocks.take_events().into_iter().for_each(|event| mirror.take(event));
                for token in 0..2 {
                    let tokens: Vec<TokenId> = (0..12).map(|i| if i > 5 { token } else { i % 2 }).collect();
                    let found = blocks.acquire_prefix(SALT, &tokens);
                    prop_assert_eq!(mirror.prefix(&tokens), found.num_computed[role as usize]);
                    blocks.release(found.table);
                }
            }
        }

        #[test]
        fn the_account_is_whole_whatever_happens(
            bits in prop_oneof![Just(1u32), Just(64)],
            ops in prop::collection::vec((0u8..4, any::<usize>(), 0u32..3), 1..300),
        ) {
            let mut blocks = BlockManager::new(16, 2, Some(HashSettings { key: [1, 2], bits }));
            let mut live: Vec<(BlockTable, Vec<TokenId>)> = Vec::new();
            for (op, n, token) in ops {
                match op {
                    0 => {
                        let tokens = vec![token; 1 + n % 9];
                        let mut prefix = blocks.acquire_prefix(SALT, &tokens);
                        if blocks.grow(&mut prefix.table, tokens.len()) {
                            live.push((prefix.table, tokens));
                        } else {
                            blocks.release(prefix.table);
                        }
                    }
                    1 if !live.is_empty() => {
                        let index = n % live.len();
                        let (table, tokens) = &mut live[index];
                        blocks.register(table, SALT, tokens, [tokens.len(), n % (tokens.len() + 1)]);
                    }
                    2 if !live.is_empty() => {
                        let index = n % live.len();
                        let (table, tokens) = &mut live[index];
                        if blocks.grow(table, tokens.len() + 1) {
                            tokens.push(token);
                        }
                    }
                    3 if !live.is_empty() => {
                        let (table, _) = live.swap_remove(n % live.len());
                        blocks.release(table);
                    }
                    _ => {}
                }
                prop_assert_eq!(blocks.check(live.iter().map(|(table, _)| table)), Ok(()));
            }
        }
    }
}
