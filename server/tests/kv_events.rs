//! KV events from outside: what a router gets over ZeroMQ while a server answers, with a client of the socket
//! library, and a replay of what it missed; and what hostile peers can do there, who write bytes of their own.

mod support;

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use support::{TestOptions, TestServer};
use tandem::kv_events::{MAX_CONNECTIONS, Publisher, PublisherSettings, Publishing, channel};
use tandem_engine::{KvEvent, KvEvents};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
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

fn bind() -> Publisher {
    let settings = PublisherSettings {
        endpoint: "tcp://127.0.0.1:0".parse().expect("an address"),
        replay_endpoint: Some("tcp://127.0.0.1:0".parse().expect("an address")),
        topic: TOPIC.to_owned(),
    };
    Publisher::bind(&settings).expect("free ports")
}

/// Addresses of batches and of replays, without a scheme.
fn addresses(publisher: &Publisher) -> (String, String) {
    let batches = publisher.address().expect("bound").to_string();
    (batches, publisher.replay_address().expect("bound").to_string())
}

async fn start() -> Setup {
    let publisher = bind();
    let (address, replay) = addresses(&publisher);
    let (kv_events, outgoing) = channel();
    let options = TestOptions { kv_events: Some(kv_events), max_model_len: 512, ..TestOptions::default() };
    let server = TestServer::start(options).await;
    let publishing = publisher.start(outgoing, BLOCK_SIZE).expect("it starts");
    Setup { server, publishing, address: format!("tcp://{address}"), replay: format!("tcp://{replay}") }
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

/// A publisher without a server, and the engine's end of it.
fn start_alone() -> (KvEvents, Publishing, String, String) {
    let publisher = bind();
    let (address, replay) = addresses(&publisher);
    let (kv_events, outgoing) = channel();
    (kv_events, publisher.start(outgoing, BLOCK_SIZE).expect("it starts"), address, replay)
}

const GREETING: [u8; 64] = {
    let mut greeting = [0; 64];
    (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
    (greeting[12], greeting[13], greeting[14], greeting[15]) = (b'N', b'U', b'L', b'L');
    greeting
};

fn ready(socket_type: &str) -> Vec<u8> {
    let body = [&b"\x05READY\x0bSocket-Type\0\0\0"[..], &[socket_type.len() as u8], socket_type.as_bytes()];
    let body = body.concat();
    [&[4, body.len() as u8][..], &body].concat()
}

async fn connect(address: &str, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("it is there");
    stream.write_all(bytes).await.expect("there is room");
    stream
}

/// Waits until the other side has closed; the bound only ends a test that would hang.
async fn closed(stream: &mut TcpStream) {
    let mut bytes = [0; 1024];
    let all = async { while !matches!(stream.read(&mut bytes).await, Ok(0) | Err(_)) {} };
    tokio::time::timeout(Duration::from_secs(60), all).await.expect("it is disconnected");
}

#[tokio::test]
async fn what_breaks_the_protocol_is_disconnected() {
    let (_kv_events, _publishing, batches, replays) = start_alone();
    let frame = |flags: u8, num_bytes: u64| [&[flags][..], &num_bytes.to_be_bytes()].concat();
    let many_frames = b"\x01\x00".repeat(100);
    let long_message = [&b"\x01\xff"[..], &[1; 255]].concat().repeat(5);
    let mut plain = GREETING;
    plain[12..17].copy_from_slice(b"PLAIN");
    let mut old = GREETING;
    old[10] = 1;
    for (address, socket_type, other) in [(&batches, "SUB", "DEALER"), (&replays, "DEALER", "SUB")] {
        let before_ready = [
            b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: one that writes a long line of text\r\n\r\n".to_vec(),
            vec![0xff; 4096],
            plain.to_vec(),
            old.to_vec(),
        ];
        let instead_of_ready =
            [frame(2, i64::MAX as u64), frame(6, 1 << 40), ready(other), b"\x00\x00".to_vec()];
        let after_ready = [
            frame(2, i64::MAX as u64),
            frame(3, u64::MAX),
            frame(6, 1 << 30),
            frame(2, 1025),
            many_frames.clone(),
            long_message.clone(),
            b"\x04\x06\x04PING\x00".to_vec(),
            b"\x08\x00".to_vec(),
        ];
        let greeted = instead_of_ready.map(|bytes| [&GREETING[..], &bytes].concat());
        let shaken = after_ready.map(|bytes| [&GREETING[..], &ready(socket_type), &bytes].concat());
        for bytes in before_ready.into_iter().chain(greeted).chain(shaken) {
            closed(&mut connect(address, &bytes).await).await;
        }
    }
    assert_eq!(replay(&format!("tcp://{replays}"), 0).await.len(), 1);
}

#[tokio::test]
async fn connections_are_bounded_and_half_greetings_end() {
    let (_kv_events, _publishing, _, replays) = start_alone();
    let mut held = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        held.push(connect(&replays, &GREETING[..20]).await);
    }
    closed(&mut connect(&replays, b"").await).await;
    for stream in &mut held {
        closed(stream).await;
    }
    assert_eq!(replay(&format!("tcp://{replays}"), 0).await.len(), 1);
}

#[tokio::test]
async fn a_ping_is_answered_and_subscriptions_are_commands_too() {
    let (mut kv_events, _publishing, batches, _) = start_alone();
    let hello =
        [&GREETING[..], &ready("SUB"), b"\x04\x0c\x09SUBSCRIBEkv", b"\x04\x09\x04PING\0\0ab"].concat();
    let mut stream = connect(&batches, &hello).await;
    let mut answer = [0; 64 + 27 + 9];
    stream.read_exact(&mut answer).await.expect("a greeting, READY and PONG");
    assert_eq!(&answer[64 + 27..], b"\x04\x07\x04PONGab");
    kv_events.sink.publish(vec![KvEvent::Removed { blocks: vec![1] }]);
    let mut frame = vec![0; 2 + TOPIC.len()];
    stream.read_exact(&mut frame).await.expect("a message");
    assert_eq!(frame, [&[1, TOPIC.len() as u8][..], TOPIC.as_bytes()].concat());
}

/// Readers who do not read, and others beside them, which get all.
#[tokio::test]
async fn nobody_holds_another() {
    let (mut kv_events, _publishing, batches, replays) = start_alone();
    let mut subscriber = SubSocket::new();
    subscriber.connect(&format!("tcp://{batches}")).await.expect("it is there");
    subscriber.subscribe("").await.expect("it subscribes");
    let silent = [&GREETING[..], &ready("SUB"), b"\x00\x01\x01"].concat();
    let _silent = connect(&batches, &silent).await;
    // Until the subscriptions have arrived.
    while tokio::time::timeout(Duration::from_millis(20), subscriber.recv()).await.is_err() {
        kv_events.sink.publish(vec![KvEvent::Removed { blocks: vec![1] }]);
    }
    // More than sockets hold.
    for _ in 0..400 {
        kv_events.sink.publish(vec![KvEvent::Removed { blocks: vec![u64::MAX; 10_000] }]);
    }
    let mut num_large = 0;
    while num_large < 400 {
        let frames = subscriber.recv().await.expect("a message").into_vec();
        num_large += usize::from(frames[2].len() > 10_000);
    }
    let request = [&GREETING[..], &ready("DEALER"), &b"\x01\x00\x00\x08"[..], &[0; 8]].concat();
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(connect(&replays, &request).await);
    }
    let all = replay(&format!("tcp://{replays}"), 0).await;
    assert!(all.windows(2).all(|pair| pair[0].0 + 1 == pair[1].0));
    let is_large = |event: &Event| matches!(event, Event::Removed(_, blocks, _) if blocks.len() == 10_000);
    assert_eq!(all.iter().flat_map(|(_, batch)| &batch.1).filter(|event| is_large(event)).count(), 400);
}
