//! What the engine tells of its prefix cache, added up: after each step it must be what is in the cache.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tandem_engine::{KvEvent, KvEventSink, KvEvents, TokenId};

/// Everybody who knows of the mirror of a cache.
#[derive(Clone, Debug)]
pub(crate) struct SharedMirror(Arc<Mutex<Mirror>>);

/// The blocks that are there, by all that was told.
#[derive(Debug)]
pub(crate) struct Mirror {
    block_size: usize,
    /// By name.
    blocks: HashMap<u64, Block>,
    pub(crate) num_events: u64,
    wrong: Option<String>,
}

#[derive(Debug)]
struct Block {
    parent: Option<u64>,
    tokens: Vec<TokenId>,
}

impl SharedMirror {
    pub(crate) fn new(block_size: usize) -> Self {
        let mirror = Mirror { block_size, blocks: HashMap::new(), num_events: 0, wrong: None };
        SharedMirror(Arc::new(Mutex::new(mirror)))
    }

    pub(crate) fn events(&self, key: [u64; 2]) -> KvEvents {
        KvEvents { sink: Box::new(self.clone()), key }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Mirror> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KvEventSink for SharedMirror {
    fn publish(&mut self, events: Vec<KvEvent>) {
        let mut mirror = self.lock();
        if events.is_empty() {
            mirror.wrong.get_or_insert_with(|| "no events were told of".to_owned());
        }
        for event in events {
            mirror.num_events += 1;
            if let Err(wrong) = mirror.take(&event) {
                mirror.wrong.get_or_insert_with(|| format!("{wrong}: {event:?}"));
            }
        }
    }
}

impl Mirror {
    fn take(&mut self, event: &KvEvent) -> Result<(), String> {
        match event {
            KvEvent::Stored { blocks, parent, tokens } => {
                if blocks.is_empty() || tokens.len() != blocks.len() * self.block_size {
                    return Err("its tokens do not fill its blocks".to_owned());
                }
                let mut parent = *parent;
                for (&name, tokens) in blocks.iter().zip(tokens.chunks_exact(self.block_size)) {
                    let block = Block { parent, tokens: tokens.to_vec() };
                    if name == 0 || self.blocks.insert(name, block).is_some() {
                        return Err(format!("block {name} was there already"));
                    }
                    parent = Some(name);
                }
            }
            KvEvent::Removed { blocks } => {
                if blocks.is_empty() {
                    return Err("nothing was removed".to_owned());
                }
                if let Some(name) = blocks.iter().find(|name| self.blocks.remove(name).is_none()) {
                    return Err(format!("block {name} was not there"));
                }
            }
        }
        Ok(())
    }

    /// Blocks that are there.
    pub(crate) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// # Errors
    /// The first event that contradicts those before it.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.wrong.clone().map_or(Ok(()), Err)
    }

    /// Tokens of the longest beginning of `text` whose blocks are there; of one tenant.
    pub(crate) fn longest_prefix(&self, text: &[TokenId]) -> usize {
        let mut parent = None;
        let mut length = 0;
        for tokens in text.chunks_exact(self.block_size) {
            let next = self.blocks.iter().find(|(_, block)| block.parent == parent && block.tokens == tokens);
            let Some((&name, _)) = next else { break };
            parent = Some(name);
            length += self.block_size;
        }
        length
    }
}
