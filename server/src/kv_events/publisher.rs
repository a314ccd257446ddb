//! The sockets: a PUB that sends every batch as it comes, and a ROUTER at which a reader that missed some asks
//! for them again.
//!
//! A message has three frames: topic, number (eight bytes, big-endian), batch. A request for a replay is an
//! empty frame and the number to begin with; the answer is a message (empty, number, batch) for each batch that
//! is still kept, and one with the number -1 and nothing at the end.
//!
//! Every reader has a task of its own and a place in the latest batches ([`Latest`]), so that none of them waits
//! for another, and the engine for none.
//!
//! Batch 0 says that all blocks are gone: a router may remember what an earlier process at this address had.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs as _};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::latest::Latest;
use super::zmtp::{self, Peer, Received, SocketType};
use super::{Outgoing, encode};

/// The number that ends a replay.
const END: [u8; 8] = (-1_i64).to_be_bytes();

/// A reader that has not taken a whole replay by then is disconnected.
const REPLAY_TIME: Duration = Duration::from_secs(60);

/// So is one that asks for nothing: its machine may be gone.
const REPLAY_IDLE_TIME: Duration = Duration::from_secs(3600);

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
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn start(self, outgoing: Outgoing, block_size: usize) -> io::Result<Publishing> {
        let latest = Arc::new(Latest::new());
        let listener = listener_of(self.batches)?;
        let replay = self.replay.map(listener_of).transpose()?;
        let mut tasks = Vec::new();
        let shared = latest.clone();
        let topic = self.topic;
        let subscriber = move |stream| serve_subscriber(stream, topic.clone(), shared.clone());
        tasks.push(tokio::spawn(zmtp::serve(listener, subscriber)));
        if let Some(listener) = replay {
            let shared = latest.clone();
            let replayer = move |stream| answer_replays(stream, shared.clone());
            tasks.push(tokio::spawn(zmtp::serve(listener, replayer)));
        }
        tasks.push(tokio::spawn(publish(outgoing, block_size, latest)));
        Ok(Publishing { tasks })
    }
}

fn listener_of(listener: TcpListener) -> io::Result<tokio::net::TcpListener> {
    listener.set_nonblocking(true)?;
    tokio::net::TcpListener::from_std(listener)
}

async fn publish(mut outgoing: Outgoing, block_size: usize, latest: Arc<Latest>) {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
    let mut num_lost = 0;
    latest.push(0, encode::cleared(now()));
    while let Some(batch) = outgoing.batches.recv().await {
        latest.push(batch.number, encode::batch(now(), &batch.events, block_size));
        let lost = outgoing.num_lost.load(Ordering::Relaxed);
        if lost > num_lost {
            tracing::warn!("{} batches of KV events were lost: they came too fast", lost - num_lost);
            num_lost = lost;
        }
    }
}

/// Sends what comes from a subscription on. One that is too slow loses the oldest, which it sees by the numbers.
async fn serve_subscriber(stream: TcpStream, topic: Bytes, latest: Arc<Latest>) -> io::Result<()> {
    let mut peer = Peer::accept(stream, SocketType::Pub).await?;
    // There is one topic: of what may be subscribed to, only its own beginnings matter. These are few, whatever
    // a peer sends.
    let mut prefixes = BTreeSet::new();
    let mut place = latest.end();
    let mut num_lost = 0;
    loop {
        let (is_subscription, prefix) = tokio::select! {
            received = peer.receive() => match received? {
                Received::Subscribe(prefix) => (true, prefix),
                Received::Cancel(prefix) => (false, prefix),
                Received::Message(frames) => match frames.as_slice() {
                    [frame] if frame.first() == Some(&1) => (true, frame[1..].to_vec()),
                    [frame] if frame.first() == Some(&0) => (false, frame[1..].to_vec()),
                    _ => continue,
                },
                Received::Ping(context) => {
                    peer.pong(&context).await?;
                    continue;
                }
                Received::Other => continue,
            },
            (number, batch) = latest.next(&mut place), if !prefixes.is_empty() => {
                // Told of as it doubles: it may go on at every message.
                if place.num_lost > 2 * num_lost {
                    num_lost = place.num_lost;
                    tracing::warn!("a reader of KV events is slow: it has lost {num_lost} batches");
                }
                peer.send(&[&topic, &number.to_be_bytes()], batch).await?;
                continue;
            }
        };
        if !topic.starts_with(&prefix) {
            continue;
        }
        if !is_subscription {
            prefixes.remove(&prefix.len());
        } else if prefixes.is_empty() {
            place.skip_to(&latest.end());
            prefixes.insert(prefix.len());
        } else {
            prefixes.insert(prefix.len());
        }
    }
}

/// Answers one reader's requests, one after the other.
async fn answer_replays(stream: TcpStream, latest: Arc<Latest>) -> io::Result<()> {
    let mut peer = Peer::accept(stream, SocketType::Router).await?;
    loop {
        match timeout(REPLAY_IDLE_TIME, peer.receive()).await?? {
            Received::Message(request) => {
                timeout(REPLAY_TIME, replay(&mut peer, &request, &latest)).await??;
            }
            Received::Ping(context) => peer.pong(&context).await?,
            Received::Subscribe(_) | Received::Cancel(_) | Received::Other => {}
        }
    }
}

/// Sends what is kept from the number on that is asked for, up to what there was at the time of the request:
/// what comes after it is published too.
async fn replay(peer: &mut Peer, request: &[Vec<u8>], latest: &Latest) -> io::Result<()> {
    let [delimiter, start] = request else { return Ok(()) };
    let Ok(start) = <[u8; 8]>::try_from(start.as_slice()) else { return Ok(()) };
    let end = latest.end();
    let mut place = latest.from(u64::from_be_bytes(start));
    while place.is_before(&end) {
        let Some((number, batch)) = latest.take(&mut place) else { break };
        peer.send(&[delimiter, &number.to_be_bytes()], batch).await?;
    }
    peer.send(&[delimiter, &END], Bytes::new()).await
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
}
