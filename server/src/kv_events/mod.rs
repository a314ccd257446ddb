//! The prefix cache's changes over ZeroMQ, as vLLM publishes them, so that routers which know vLLM (llm-d's, the
//! production stack's, Dynamo's) send a prompt to the server that has its beginning.
//!
//! The engine hands over a batch a step and never waits: [`channel`]'s queue is bounded, and a batch that finds
//! it full is lost, which readers see by its missing number. A task of its own encodes and sends
//! ([`Publisher`]).
//!
//! Anybody who can reach the socket reads the tokens of every prompt: it is off by default, and for networks in
//! which everybody may.

mod encode;
mod latest;
mod publisher;
mod zmtp;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tandem_engine::{KvEvent, KvEventSink, KvEvents};
use tokio::sync::mpsc;

pub use publisher::{Endpoint, EndpointError, Publisher, PublisherSettings, Publishing};
pub use zmtp::MAX_CONNECTIONS;

/// Batches on their way from the engine: seconds of the busiest server.
const MAX_QUEUED_BATCHES: usize = 4096;

/// A step's events.
struct Batch {
    /// Running number; those of lost batches are missing.
    number: u64,
    events: Vec<KvEvent>,
}

/// The publisher's end of the queue.
pub struct Outgoing {
    batches: mpsc::Receiver<Batch>,
    num_lost: Arc<AtomicU64>,
}

/// A queue from an engine to a publisher.
pub fn channel() -> (KvEvents, Outgoing) {
    let (sender, batches) = mpsc::channel(MAX_QUEUED_BATCHES);
    let num_lost = Arc::new(AtomicU64::new(0));
    let sink = Box::new(Queue { sender, next_number: 1, num_lost: num_lost.clone() });
    (KvEvents { sink, key: rand::random() }, Outgoing { batches, num_lost })
}

struct Queue {
    sender: mpsc::Sender<Batch>,
    /// 0 is the publisher's own.
    next_number: u64,
    num_lost: Arc<AtomicU64>,
}

impl KvEventSink for Queue {
    fn publish(&mut self, events: Vec<KvEvent>) {
        let batch = Batch { number: self.next_number, events };
        self.next_number += 1;
        if self.sender.try_send(batch).is_err() {
            self.num_lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}
