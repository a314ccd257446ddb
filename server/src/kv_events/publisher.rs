//! The sockets: a PUB that sends every batch as it comes, and a ROUTER at which a reader that missed some asks
//! for them again.
//!
//! A message has three frames: topic, number (eight bytes, big-endian), batch. A request for a replay is an
//! empty frame and the number to begin with; the answer is a message (empty, number, batch) for each batch that
//! is still kept, and one with the number -1 and nothing at the end.
//!
//! Batch 0 says that all blocks are gone: a router may remember what an earlier process at this address had.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs as _};
use std::str::FromStr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::task::JoinHandle;
use zeromq::{PubSocket, RouterSocket, Socket as _, SocketRecv as _, SocketSend as _, ZmqMessage};

use super::{Outgoing, encode};

/// Batches that can be asked for again.
const MAX_KEPT_BATCHES: usize = 10_000;

/// Their bytes, together.
const MAX_KEPT_BYTES: usize = 64 << 20;

/// The number that ends a replay.
const END: [u8; 8] = (-1_i64).to_be_bytes();

/// A reader that takes a message of a replay no sooner is left alone.
const REPLAY_PATIENCE: Duration = Duration::from_secs(5);

/// An address to listen at: `tcp://*:5557`, `tcp://127.0.0.1:5557`, `tcp://[::]:5557`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    host: String,
    port: u16,
}

/// Text that is no [`Endpoint`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address to listen at; it must be like tcp://*:5557 or tcp://127.0.0.1:5557")]
pub struct EndpointError(String);

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let fault = || EndpointError(text.to_owned());
        let (host, port) =
            text.strip_prefix("tcp://").and_then(|rest| rest.rsplit_once(':')).ok_or_else(fault)?;
        let port = port.parse().map_err(|_| fault())?;
        let host = match host {
            "*" => Ipv4Addr::UNSPECIFIED.to_string(),
            host => host.trim_start_matches('[').trim_end_matches(']').to_owned(),
        };
        if host.is_empty() { Err(fault()) } else { Ok(Endpoint { host, port }) }
    }
}

impl Endpoint {
    fn listen(&self) -> io::Result<TcpListener> {
        let named = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("cannot publish KV events on {}:{}: {error}", self.host, self.port),
            )
        };
        let addresses = (self.host.as_str(), self.port).to_socket_addrs().map_err(named)?;
        TcpListener::bind(&*addresses.collect::<Vec<_>>()).map_err(named)
    }
}

/// What a publisher is made with.
#[derive(Clone, Debug)]
pub struct PublisherSettings {
    /// Where batches are sent.
    pub endpoint: Endpoint,
    /// Where missed ones are asked for; `None`: nowhere.
    pub replay_endpoint: Option<Endpoint>,
    /// The first frame of every message.
    pub topic: String,
}

/// Bound sockets.
pub struct Publisher {
    batches: TcpListener,
    replay: Option<TcpListener>,
    topic: Bytes,
}

/// A publisher at work; stops when it is dropped.
pub struct Publishing {
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Publishing {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Publisher {
    /// Binds the sockets.
    ///
    /// # Errors
    /// If an address cannot be had.
    pub fn bind(settings: &PublisherSettings) -> io::Result<Self> {
        Ok(Publisher {
            batches: settings.endpoint.listen()?,
            replay: settings.replay_endpoint.as_ref().map(Endpoint::listen).transpose()?,
            topic: settings.topic.clone().into_bytes().into(),
        })
    }

    /// Where batches are sent.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.batches.local_addr()
    }

    /// Where missed ones are asked for.
    pub fn replay_address(&self) -> Option<SocketAddr> {
        self.replay.as_ref()?.local_addr().ok()
    }

    /// Sends what comes, from now on, of blocks of `block_size` tokens.
    ///
    /// # Errors
    /// If the sockets cannot be used.
    pub async fn start(self, outgoing: Outgoing, block_size: usize) -> io::Result<Publishing> {
        let kept = Arc::new(Mutex::new(Kept::default()));
        let mut batches = PubSocket::new();
        batches.bind_listener(self.batches).await.map_err(io::Error::other)?;
        let mut tasks = Vec::new();
        if let Some(listener) = self.replay {
            let mut replay = RouterSocket::new();
            replay.bind_listener(listener).await.map_err(io::Error::other)?;
            tasks.push(tokio::spawn(answer_replays(replay, kept.clone())));
        }
        tasks.push(tokio::spawn(publish(batches, self.topic, outgoing, block_size, kept)));
        Ok(Publishing { tasks })
    }
}

/// The latest batches.
#[derive(Default)]
struct Kept {
    batches: VecDeque<(u64, Bytes)>,
    size_bytes: usize,
}

impl Kept {
    fn push(&mut self, number: u64, batch: Bytes) {
        self.size_bytes += batch.len();
        self.batches.push_back((number, batch));
        while self.batches.len() > MAX_KEPT_BATCHES || self.size_bytes > MAX_KEPT_BYTES {
            let Some((_, oldest)) = self.batches.pop_front() else { return };
            self.size_bytes -= oldest.len();
        }
    }

    /// The first of them from this number on.
    fn from(&self, number: u64) -> Option<(u64, Bytes)> {
        let index = self.batches.partition_point(|(kept, _)| *kept < number);
        self.batches.get(index).cloned()
    }
}

fn message<const N: usize>(frames: [Bytes; N]) -> ZmqMessage {
    ZmqMessage::try_from(frames.to_vec()).expect("there are frames: this is a bug")
}

fn number_frame(number: u64) -> Bytes {
    Bytes::copy_from_slice(&number.to_be_bytes())
}

async fn publish(
    mut socket: PubSocket,
    topic: Bytes,
    mut outgoing: Outgoing,
    block_size: usize,
    kept: Arc<Mutex<Kept>>,
) {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
    let mut num_lost = 0;
    let mut next = Some((0, encode::cleared(now())));
    while let Some((number, batch)) = next {
        kept.lock().expect("no holder of this lock panics: this is a bug").push(number, batch.clone());
        // A reader that is too slow loses what it cannot take, and asks for it again.
        if let Err(error) = socket.send(message([topic.clone(), number_frame(number), batch])).await {
            tracing::warn!(%error, "a batch of KV events could not be sent");
        }
        let lost = outgoing.num_lost.load(Ordering::Relaxed);
        if lost > num_lost {
            tracing::warn!("{} batches of KV events were lost: they came too fast", lost - num_lost);
            num_lost = lost;
        }
        next = outgoing
            .batches
            .recv()
            .await
            .map(|batch| (batch.number, encode::batch(now(), &batch.events, block_size)));
    }
}

async fn answer_replays(mut socket: RouterSocket, kept: Arc<Mutex<Kept>>) {
    loop {
        let request = match socket.recv().await {
            Ok(request) => request.into_vec(),
            Err(error) => {
                tracing::debug!(%error, "a request for KV events could not be read");
                // It may say so again at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let [reader, delimiter, start] = request.as_slice() else { continue };
        let Ok(start) = <[u8; 8]>::try_from(start.as_ref()) else { continue };
        let answer = async {
            let mut start = u64::from_be_bytes(start);
            loop {
                let batch = kept.lock().expect("no holder of this lock panics: this is a bug").from(start);
                let Some((number, batch)) = batch else { break };
                start = number + 1;
                let frames = [reader.clone(), delimiter.clone(), number_frame(number), batch];
                send_in_time(&mut socket, message(frames)).await?;
            }
            let end = [reader.clone(), delimiter.clone(), Bytes::from_static(&END), Bytes::new()];
            send_in_time(&mut socket, message(end)).await
        };
        if let Err(error) = answer.await {
            tracing::debug!(error, "a reader of KV events left during a replay");
        }
    }
}

async fn send_in_time(socket: &mut RouterSocket, message: ZmqMessage) -> Result<(), String> {
    match tokio::time::timeout(REPLAY_PATIENCE, socket.send(message)).await {
        Ok(sent) => sent.map_err(|error| error.to_string()),
        Err(_) => Err("it takes too long".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_addresses_to_listen_at() {
        let endpoint = |text: &str| text.parse::<Endpoint>();
        let parts = |host: &str, port| Ok(Endpoint { host: host.to_owned(), port });
        assert_eq!(endpoint("tcp://*:5557"), parts("0.0.0.0", 5557));
        assert_eq!(endpoint("tcp://[::1]:0"), parts("::1", 0));
        assert_eq!(endpoint("tcp://localhost:1"), parts("localhost", 1));
        for wrong in ["", "5557", "*:5557", "tcp://:5557", "tcp://*", "tcp://*:70000", "ipc:///tmp/x"] {
            assert!(endpoint(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_latest_batches_are_kept() {
        let mut kept = Kept::default();
        for number in 0..MAX_KEPT_BATCHES as u64 + 5 {
            if number != 8 {
                kept.push(number, Bytes::from_static(b"ab"));
            }
        }
        assert_eq!(kept.batches.len(), MAX_KEPT_BATCHES);
        assert_eq!(kept.size_bytes, 2 * MAX_KEPT_BATCHES);
        let first = |number| kept.from(number).map(|(number, _)| number);
        assert_eq!((first(0), first(8), first(1_000_000)), (Some(4), Some(9), None));
        let mut large = Kept::default();
        for number in 0..3 {
            large.push(number, vec![0; MAX_KEPT_BYTES / 2].into());
        }
        assert_eq!((large.batches.len(), large.from(0).map(|(number, _)| number)), (2, Some(1)));
    }
}
