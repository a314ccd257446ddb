//! KV events from outside: what a router gets over ZeroMQ while a server answers, with a client of the socket
//! library, and a replay of what it missed.

mod support;

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use support::{TestOptions, TestServer};
use tandem::kv_events::{Publisher, PublisherSettings, Publishing, channel};
use zeromq::{DealerSocket, Socket as _, SocketRecv as _, SocketSend as _, SubSocket, ZmqMessage};

const TOPIC: &str = "kv@pod@tandem";
const BLOCK_SIZE: usize = 16;

#[derive(Debug, Deserialize)]
struct Batch(f64, Vec<Event>, u32);

#[derive(Debug, Deserialize, PartialEq)]
#[serde(untagged)]
enum Event {
    Stored(String, Vec<u64>, Option<u64>, Vec<u32>, usize, Option<u32>, String, Option<String>),
    Removed(String, Vec<u64>, String),
    Cleared((String,)),
}

/// The blocks that a router knows of.
#[derive(Default)]
struct Router(HashMap<(Option<u64>, Vec<u32>), u64>);

impl Router {
    fn take(&mut self, event: &Event) {
        match event {
            Event::Stored(tag, blocks, parent, tokens, block_size, lora_id, medium, lora_name) => {
                let mut parent = *parent;
                assert_eq!((tag.as_str(), medium.as_str(), *block_size), ("BlockStored", "GPU", BLOCK_SIZE));
                assert!(lora_id.is_none() && lora_name.is_none());
                assert_eq!(tokens.len(), blocks.len() * BLOCK_SIZE);
                for (&block, tokens) in blocks.iter().zip(tokens.chunks(BLOCK_SIZE)) {
                    assert_ne!(block, 0);
                    self.0.insert((parent, tokens.to_vec()), block);
                    parent = Some(block);
                }
            }
            Event::Removed(tag, blocks, _) => {
                assert_eq!(tag, "BlockRemoved");
                self.0.retain(|_, block| !blocks.contains(block));
            }
            Event::Cleared((tag,)) => {
                assert_eq!(tag, "AllBlocksCleared");
                self.0.clear();
            }
        }
    }

    /// Blocks of the longest known prefix.
    fn num_blocks(&self, tokens: &[u32]) -> usize {
        let mut parent = None;
        let is_known = |chunk: &&[u32]| {
            parent = self.0.get(&(parent, chunk.to_vec())).copied();
            parent.is_some()
        };
        tokens.chunks_exact(BLOCK_SIZE).take_while(is_known).count()
    }
}

struct Setup {
    server: TestServer,
    publishing: Publishing,
    address: String,
    replay: String,
}

async fn start() -> Setup {
    let settings = PublisherSettings {
        endpoint: "tcp://127.0.0.1:0".parse().expect("an address"),
        replay_endpoint: Some("tcp://127.0.0.1:0".parse().expect("an address")),
        topic: TOPIC.to_owned(),
    };
    let publisher = Publisher::bind(&settings).expect("free ports");
    let address = format!("tcp://{}", publisher.address().expect("bound"));
    let replay = format!("tcp://{}", publisher.replay_address().expect("bound"));
    let (kv_events, outgoing) = channel();
    let options = TestOptions { kv_events: Some(kv_events), max_model_len: 512, ..TestOptions::default() };
    let server = TestServer::start(options).await;
    let publishing = publisher.start(outgoing, BLOCK_SIZE).await.expect("it starts");
    Setup { server, publishing, address, replay }
}

/// Numbers and batches from this number on, as a replay gives them.
async fn replay(address: &str, start: u64) -> Vec<(u64, Batch)> {
    let mut socket = DealerSocket::new();
    socket.connect(address).await.expect("it is there");
    let frames = vec![Bytes::new(), Bytes::copy_from_slice(&start.to_be_bytes())];
    socket.send(ZmqMessage::try_from(frames).expect("frames")).await.expect("it takes a request");
    let mut batches = Vec::new();
    loop {
        let frames = socket.recv().await.expect("an answer").into_vec();
        let [delimiter, number, batch] = frames.as_slice() else { panic!("{frames:?}") };
        assert!(delimiter.is_empty());
        let number = u64::from_be_bytes(number.as_ref().try_into().expect("eight bytes"));
        if number == u64::MAX {
            assert!(batch.is_empty());
            return batches;
        }
        batches.push((number, rmp_serde::from_slice(batch).expect("a batch")));
    }
}

/// All batches, once they are enough; the bound only ends a test that would hang.
async fn replay_until(address: &str, is_enough: impl Fn(&[(u64, Batch)]) -> bool) -> Vec<(u64, Batch)> {
    for _ in 0..2000 {
        let batches = replay(address, 0).await;
        if is_enough(&batches) {
            return batches;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the batches never came");
}

#[tokio::test]
async fn a_router_learns_which_prompts_are_cached() {
    let Setup { server, publishing, address, replay: replay_address } = start().await;
    let mut subscriber = SubSocket::new();
    subscriber.connect(&address).await.expect("it is there");
    subscriber.subscribe("kv@").await.expect("it subscribes");

    let prompt: Vec<u32> = (0..100).map(|i| 10 + i % 50).collect();
    let body = json!({ "model": "deep", "prompt": [prompt], "max_tokens": 30, "temperature": 0 });
    assert_eq!(server.post("/v1/completions", &body).await.status, 200);
    // A subscription may come too late for the first messages: those are asked for.
    let batches = replay_until(&replay_address, |batches| {
        let mut router = Router::default();
        batches.iter().flat_map(|(_, batch)| &batch.1).for_each(|event| router.take(event));
        router.num_blocks(&prompt) == prompt.len() / BLOCK_SIZE
    });
    let batches = batches.await;
    assert_eq!(batches[0].1.1, [Event::Cleared(("AllBlocksCleared".to_owned(),))]);
    let mut last = batches.last().map(|(number, _)| *number).expect("there are batches");
    let mut router = Router::default();
    batches.iter().flat_map(|(_, batch)| &batch.1).for_each(|event| router.take(event));

    // What runs on the draft alone is not told of.
    let other: Vec<u32> = (0..64).map(|i| 200 + i).collect();
    let body = json!({ "model": "fast", "prompt": [other], "max_tokens": 1 });
    assert_eq!(server.post("/v1/completions", &body).await.status, 200);
    // More prompts than the cache holds: the first is evicted.
    for i in 0..60 {
        let prompt: Vec<u32> = (0..300).map(|j| 10 + (i * 7 + j) % 200).collect();
        let body = json!({ "model": "deep", "prompt": [prompt], "max_tokens": 1 });
        assert_eq!(server.post("/v1/completions", &body).await.status, 200);
    }
    while router.num_blocks(&prompt) > 0 {
        let message = tokio::time::timeout(Duration::from_secs(20), subscriber.recv()).await;
        let frames = message.expect("the first prompt's blocks are evicted").expect("a message").into_vec();
        let [topic, number, batch] = frames.as_slice() else { panic!("{frames:?}") };
        assert_eq!(topic.as_ref(), TOPIC.as_bytes());
        let number = u64::from_be_bytes(number.as_ref().try_into().expect("eight bytes"));
        if number <= last {
            continue;
        }
        assert_eq!(number, last + 1, "none is lost");
        last = number;
        let Batch(timestamp, events, rank) = rmp_serde::from_slice(batch).expect("a batch");
        assert!(timestamp > 1.6e9 && rank == 0);
        events.iter().for_each(|event| router.take(event));
    }
    assert_eq!(router.num_blocks(&other), 0);
    drop(publishing);
    server.stop().await;
}

#[tokio::test]
async fn a_replay_begins_where_it_is_asked_to() {
    let Setup { server, publishing, replay: address, .. } = start().await;
    for start in 0..4u32 {
        let prompt: Vec<u32> = (0..40).map(|i| 10 + start * 40 + i).collect();
        let body = json!({ "model": "deep", "prompt": [prompt], "max_tokens": 1 });
        assert_eq!(server.post("/v1/completions", &body).await.status, 200);
    }
    let all = replay_until(&address, |batches| batches.len() >= 5).await;
    let numbers: Vec<u64> = all.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, (0..numbers.len() as u64).collect::<Vec<_>>());
    let some: Vec<u64> = replay(&address, 3).await.iter().map(|(number, _)| *number).collect();
    assert_eq!(some, numbers[3..]);
    assert!(replay(&address, 1_000_000).await.is_empty());
    drop(publishing);
    server.stop().await;
}
