//! Batches in vLLM's encoding (`vllm/distributed/kv_events.py`): MessagePack, structs as arrays, and before the
//! fields of an event its name.
//!
//! ```text
//! [timestamp, [event, ...], data_parallel_rank]
//! ["BlockStored", [hash, ...], parent hash or nil, [token id, ...], block size, lora id, medium, lora name]
//! ["BlockRemoved", [hash, ...], medium]
//! ["AllBlocksCleared"]
//! ```
//!
//! Hashes are unsigned integers, which readers take as well as vLLM's bytes. What is not said here (LoRA
//! adapters) is nil, and fields that newer readers know are left out, as vLLM leaves out defaults.

use bytes::Bytes;
use serde::Serialize;
use tandem_engine::KvEvent;

/// The memory that sequences compute on, whatever it is made of: what is not named so counts as slower.
const MEDIUM: &str = "GPU";

/// There is one server to an address.
const DATA_PARALLEL_RANK: u32 = 0;

#[derive(Serialize)]
#[serde(untagged)]
enum Event<'a> {
    Stored(&'static str, &'a [u64], Option<u64>, &'a [u32], usize, (), &'static str, ()),
    Removed(&'static str, &'a [u64], &'static str),
    Cleared((&'static str,)),
}

/// What the engine tells of.
pub(super) fn batch(timestamp: f64, events: &[KvEvent], block_size: usize) -> Bytes {
    encode(timestamp, &events.iter().map(|event| Event::of(event, block_size)).collect::<Vec<_>>())
}

impl<'a> Event<'a> {
    fn of(event: &'a KvEvent, block_size: usize) -> Self {
        match event {
            KvEvent::Stored { blocks, parent, tokens } => {
                Event::Stored("BlockStored", blocks, *parent, tokens, block_size, (), MEDIUM, ())
            }
            KvEvent::Removed { blocks } => Event::Removed("BlockRemoved", blocks, MEDIUM),
        }
    }
}

/// That there is nothing any more of what an earlier process at this address has stored.
pub(super) fn cleared(timestamp: f64) -> Bytes {
    encode(timestamp, &[Event::Cleared(("AllBlocksCleared",))])
}

fn encode(timestamp: f64, events: &[Event<'_>]) -> Bytes {
    let bytes = rmp_serde::to_vec(&(timestamp, events, DATA_PARALLEL_RANK));
    bytes.expect("plain data always serialises: this is a bug").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_format() {
        let stored =
            KvEvent::Stored { blocks: vec![5, u64::MAX], parent: Some(300), tokens: vec![1, 70_000] };
        let first = KvEvent::Stored { blocks: vec![5], parent: None, tokens: vec![1] };
        let events = [stored, first, KvEvent::Removed { blocks: vec![5] }];
        let mut wanted = vec![0x93, 0xcb, 0x3f, 0xf8, 0, 0, 0, 0, 0, 0, 0x93];
        wanted.extend(b"\x98\xabBlockStored\x92\x05\xcf\xff\xff\xff\xff\xff\xff\xff\xff");
        wanted.extend(b"\xcd\x01\x2c\x92\x01\xce\x00\x01\x11\x70\x01\xc0\xa3GPU\xc0");
        wanted.extend(b"\x98\xabBlockStored\x91\x05\xc0\x91\x01\x01\xc0\xa3GPU\xc0");
        wanted.extend(b"\x93\xacBlockRemoved\x91\x05\xa3GPU");
        wanted.push(0);
        assert_eq!(batch(1.5, &events, 1), wanted);
        let mut wanted = vec![0x93, 0xcb, 0x3f, 0xf8, 0, 0, 0, 0, 0, 0, 0x91];
        wanted.extend(b"\x91\xb0AllBlocksCleared");
        wanted.push(0);
        assert_eq!(cleared(1.5), wanted);
    }
}
