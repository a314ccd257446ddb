//! Who owns which block of the KV cache.
//!
//! One block id stands for the same `block_size` token slots in the target's storage and in the
//! draft's. Invariant: `num_free() + num_used() == num_total()`, and no block has two owners.
//! Allocation and release cost O(blocks moved).

use tandem_models::ForwardBatch;

/// Names one block.
pub(crate) type BlockId = u32;

/// A sequence's blocks, in the order of its positions.
#[derive(Debug, Default)]
pub(crate) struct BlockTable(Vec<BlockId>);

impl BlockTable {
    /// The ids, block `i` holding positions `i * block_size..(i + 1) * block_size`.
    pub(crate) fn ids(&self) -> &[BlockId] {
        &self.0
    }
}

/// Hands out blocks and takes them back.
#[derive(Debug)]
pub(crate) struct BlockManager {
    /// Free ids; the last is handed out first, so recently used memory is used again.
    free: Vec<BlockId>,
    num_total: usize,
    block_size: usize,
}

impl BlockManager {
    /// All `num_blocks` blocks are free.
    pub(crate) fn new(num_blocks: usize, block_size: usize) -> Self {
        BlockManager { free: (0..num_blocks as BlockId).rev().collect(), num_total: num_blocks, block_size }
    }

    /// Blocks that hold `num_tokens` tokens.
    pub(crate) fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    /// Room for `num_tokens` tokens, or `None` (and nothing changed) if too few blocks are free.
    pub(crate) fn allocate(&mut self, num_tokens: usize) -> Option<BlockTable> {
        let rest = self.free.len().checked_sub(self.blocks_for(num_tokens))?;
        Some(BlockTable(self.free.drain(rest..).rev().collect()))
    }

    /// Takes a sequence's blocks back.
    pub(crate) fn release(&mut self, table: BlockTable) {
        self.free.extend(table.0.into_iter().rev());
        debug_assert!(self.free.len() <= self.num_total, "a block was released twice: this is a bug");
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

    /// Blocks without an owner.
    pub(crate) fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that sequences own.
    pub(crate) fn num_used(&self) -> usize {
        self.num_total - self.free.len()
    }

    /// All blocks.
    pub(crate) fn num_total(&self) -> usize {
        self.num_total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_that_does_not_fit_changes_nothing() {
        let mut blocks = BlockManager::new(3, 16);
        assert!(blocks.allocate(49).is_none());
        assert_eq!(blocks.num_free(), 3);
        assert_eq!(blocks.allocate(48).map(|t| t.ids().len()), Some(3));
    }

    proptest! {
        #[test]
        fn every_block_has_at_most_one_owner(ops in prop::collection::vec((any::<bool>(), 1usize..80), 1..200)) {
            let mut blocks = BlockManager::new(16, 4);
            let mut tables: Vec<BlockTable> = Vec::new();
            for (take, n) in ops {
                if take {
                    tables.extend(blocks.allocate(n));
                } else if !tables.is_empty() {
                    blocks.release(tables.swap_remove(n % tables.len()));
                }
                let mut owned: Vec<BlockId> = tables.iter().flat_map(|t| t.ids().to_vec()).collect();
                prop_assert_eq!(owned.len(), blocks.num_used());
                owned.extend(&blocks.free);
                owned.sort_unstable();
                prop_assert_eq!(owned, (0..16).collect::<Vec<_>>());
            }
        }
    }
}
