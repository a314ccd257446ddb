//! What the prefix cache has gained and lost, for routers that send a prompt to where its beginning is.
//!
//! Only blocks of one model are told of: those that the target has computed (the draft, where it is alone), as
//! it is the target's prefill that a router can save. Events stand in the order in which they happened, and
//! come once a step.
//!
//! A block's *name* is a keyed hash of its [`ContentId`], which is a running number: unique, never used again,
//! and it says nothing about the tokens, the tenant's salt, or the key that the cache itself hashes with. Names
//! of two servers do not meet. The tokens themselves are in the events, so whoever reads them reads prompts.

use siphasher::sip::SipHasher13;
use std::hash::Hasher;

use crate::api::TokenId;
use crate::prefix_cache::ContentId;

/// A change of the prefix cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvEvent {
    /// Blocks, each a continuation of the one before, can be used from now on.
    Stored {
        /// Their names; none is 0.
        blocks: Vec<u64>,
        /// The block before the first; `None` if that begins a prompt.
        parent: Option<u64>,
        /// `[blocks.len() * block_size]`: what they hold.
        tokens: Vec<TokenId>,
    },
    /// Blocks are gone.
    Removed {
        /// Their names.
        blocks: Vec<u64>,
    },
}

/// Who is told of [`KvEvent`]s.
pub trait KvEventSink: Send {
    /// Takes a step's events, of which there is at least one. Must not wait.
    fn publish(&mut self, events: Vec<KvEvent>);
}

/// Whom to tell, and how blocks are called.
pub struct KvEvents {
    /// Who is told.
    pub sink: Box<dyn KvEventSink>,
    /// Key of the names; drawn at start, and not that of the cache's hash.
    pub key: [u64; 2],
}

/// The events of a step.
#[derive(Debug)]
pub(crate) struct KvEventLog {
    key: [u64; 2],
    /// The model whose blocks are told of.
    role: usize,
    events: Vec<KvEvent>,
}

impl KvEventLog {
    pub(crate) fn new(key: [u64; 2], role: usize) -> Self {
        KvEventLog { key, role, events: Vec::new() }
    }

    /// Model `role` has computed a block.
    pub(crate) fn stored(
        &mut self,
        role: usize,
        content: ContentId,
        parent: Option<ContentId>,
        block: &[TokenId],
    ) {
        if role != self.role {
            return;
        }
        let (name, parent) = (self.name(content), parent.map(|parent| self.name(parent)));
        if let Some(KvEvent::Stored { blocks, tokens, .. }) = self.events.last_mut()
            && blocks.last().copied() == parent
        {
            blocks.push(name);
            tokens.extend_from_slice(block);
            return;
        }
        self.events.push(KvEvent::Stored { blocks: vec![name], parent, tokens: block.to_vec() });
    }

    /// A block is given to somebody else, which these models had computed.
    pub(crate) fn removed(&mut self, computed: [bool; 2], content: ContentId) {
        if !computed[self.role] {
            return;
        }
        let name = self.name(content);
        match self.events.last_mut() {
            Some(KvEvent::Removed { blocks }) => blocks.push(name),
            _ => self.events.push(KvEvent::Removed { blocks: vec![name] }),
        }
    }

    pub(crate) fn take(&mut self) -> Vec<KvEvent> {
        std::mem::take(&mut self.events)
    }

    fn name(&self, content: ContentId) -> u64 {
        let mut hasher = SipHasher13::new_with_keys(self.key[0], self.key[1]);
        hasher.write_u64(content.number());
        // Readers take 0 for "none".
        hasher.finish().max(1)
    }
}
