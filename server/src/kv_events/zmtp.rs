//! As much of ZMTP 3.1 (<https://rfc.zeromq.org/spec/37/>) as a publisher needs: the accepting side of a TCP
//! connection, with the mechanism NULL. Peers of 3.0 are served too.
//!
//! Whoever reaches the port may send anything, so nothing is reserved by what a peer claims, and all that it can
//! cost is bounded, each bound a constant here: connections, the time of a handshake, the bytes and frames of
//! what it sends, and the time in which it takes a message. A peer that passes one is disconnected, as is one
//! that breaks the protocol; libraries connect again by themselves.

use std::io;
use std::time::Duration;

use bytes::{Buf, BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Readers of a socket; one more is disconnected at once. They are few: routers, not clients.
pub const MAX_CONNECTIONS: usize = 32;

/// From the connection to the end of the handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);

/// A peer that takes a message no sooner is disconnected.
const SEND_TIME: Duration = Duration::from_secs(30);

/// Bytes of a command, or of a message's frames together, that a peer may send: subscriptions, requests for
/// replays, and at the handshake an identity (255 bytes).
const MAX_RECEIVED_BYTES: usize = 1024;

/// Frames of such a message.
const MAX_RECEIVED_FRAMES: usize = 8;

/// What is read at once.
const READ_BYTES: usize = 1024;

/// Of PING, that PONG sends back.
const MAX_PING_CONTEXT_BYTES: usize = 16;

const GREETING_BYTES: usize = 64;

/// Flags of a frame.
const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// What a socket is to its peers.
#[derive(Clone, Copy, Debug)]
pub(super) enum SocketType {
    Pub,
    Router,
}

impl SocketType {
    fn name(self) -> &'static [u8] {
        match self {
            SocketType::Pub => b"PUB",
            SocketType::Router => b"ROUTER",
        }
    }

    fn talks_to(self, peer: &[u8]) -> bool {
        match self {
            SocketType::Pub => [&b"SUB"[..], b"XSUB"].contains(&peer),
            SocketType::Router => [&b"REQ"[..], b"DEALER", b"ROUTER"].contains(&peer),
        }
    }
}

/// What a peer sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    Message(Vec<Vec<u8>>),
    Subscribe(Vec<u8>),
    Cancel(Vec<u8>),
    /// The context to answer it with.
    Ping(Vec<u8>),
    /// A command that asks for nothing.
    Other,
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not what ZMTP 3 says: {what}"))
}

/// Serves each connection in a task of its own, for ever; drop it and all of them end.
pub(super) async fn serve<F>(listener: TcpListener, handle: impl Fn(TcpStream) -> F)
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((_, address)) if connections.len() >= MAX_CONNECTIONS => {
                tracing::warn!(%address, "refused: KV events have {MAX_CONNECTIONS} readers");
            }
            Ok((stream, address)) => {
                let connection = handle(stream);
                connections.spawn(async move {
                    if let Err(error) = connection.await {
                        tracing::debug!(%address, %error, "a reader of KV events is disconnected");
                    }
                });
            }
            Err(error) => {
                tracing::debug!(%error, "a reader of KV events could not connect");
                // It may say so again at once, as when there are too many open files.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// A connection after its handshake.
pub(super) struct Peer {
    stream: TcpStream,
    /// Read and not yet taken: less than a frame, and what one read brought.
    buffer: BytesMut,
    /// Of a message whose end is still to come.
    frames: Vec<Vec<u8>>,
}

impl Peer {
    /// Shakes hands.
    ///
    /// # Errors
    /// If the peer is gone, too slow, of another protocol, or no socket that this one talks to.
    pub(super) async fn accept(stream: TcpStream, socket_type: SocketType) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let mut peer = Peer { stream, buffer: BytesMut::new(), frames: Vec::new() };
        timeout(HANDSHAKE_TIME, peer.shake_hands(socket_type)).await??;
        Ok(peer)
    }

    async fn shake_hands(&mut self, socket_type: SocketType) -> io::Result<()> {
        self.stream.write_all(&greeting()).await?;
        let mut theirs = [0; GREETING_BYTES];
        self.stream.read_exact(&mut theirs).await?;
        check_greeting(&theirs)?;

        let mut ready = BytesMut::new();
        ready.put_slice(b"\x0bSocket-Type");
        ready.put_u32(socket_type.name().len() as u32);
        ready.put_slice(socket_type.name());
        self.send_command(b"READY", &ready).await?;
        let (flags, frame) = self.next_frame().await?;
        let properties = command_body(&frame, b"READY").filter(|_| flags & COMMAND != 0);
        let properties = properties.ok_or_else(|| malformed("no READY"))?;
        match property(properties, b"Socket-Type") {
            Some(theirs) if socket_type.talks_to(theirs) => Ok(()),
            _ => Err(malformed("the peer's socket type")),
        }
    }

    /// The next thing that the peer says. May be dropped and called again: nothing is lost.
    ///
    /// # Errors
    /// If the peer is gone, or what it sends is malformed or too long.
    pub(super) async fn receive(&mut self) -> io::Result<Received> {
        loop {
            let (flags, frame) = self.next_frame().await?;
            if flags & COMMAND != 0 {
                return command(&frame);
            }
            let num_bytes = frame.len() + self.frames.iter().map(Vec::len).sum::<usize>();
            if num_bytes > MAX_RECEIVED_BYTES || self.frames.len() == MAX_RECEIVED_FRAMES {
                return Err(malformed("a message too long"));
            }
            self.frames.push(frame);
            if flags & MORE == 0 {
                return Ok(Received::Message(std::mem::take(&mut self.frames)));
            }
        }
    }

    async fn next_frame(&mut self) -> io::Result<(u8, Vec<u8>)> {
        loop {
            if let Some(frame) = take_frame(&mut self.buffer)? {
                return Ok(frame);
            }
            self.buffer.reserve(READ_BYTES);
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Sends a message: some small frames and the last one.
    ///
    /// # Errors
    /// If the peer is gone, or does not take it in time. The connection cannot be used any more.
    pub(super) async fn send(&mut self, frames: &[&[u8]], last: Bytes) -> io::Result<()> {
        let mut head = BytesMut::new();
        for frame in frames {
            put_frame_head(&mut head, MORE, frame.len());
            head.put_slice(frame);
        }
        put_frame_head(&mut head, 0, last.len());
        self.write(head.chain(last)).await
    }

    /// Answers a [`Received::Ping`].
    ///
    /// # Errors
    /// Those of [`Self::send`].
    pub(super) async fn pong(&mut self, context: &[u8]) -> io::Result<()> {
        self.send_command(b"PONG", context).await
    }

    async fn send_command(&mut self, name: &[u8], body: &[u8]) -> io::Result<()> {
        let mut bytes = BytesMut::new();
        put_frame_head(&mut bytes, COMMAND, 1 + name.len() + body.len());
        bytes.put_u8(name.len() as u8);
        bytes.put_slice(name);
        bytes.put_slice(body);
        self.write(bytes).await
    }

    async fn write(&mut self, mut bytes: impl Buf) -> io::Result<()> {
        timeout(SEND_TIME, self.stream.write_all_buf(&mut bytes)).await?
    }
}

/// Signature, version 3.1, mechanism NULL, no server of a mechanism.
fn greeting() -> [u8; GREETING_BYTES] {
    let mut greeting = [0; GREETING_BYTES];
    (greeting[0], greeting[8], greeting[9]) = (0xff, 1, 0x7f);
    (greeting[10], greeting[11]) = (3, 1);
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

fn check_greeting(theirs: &[u8; GREETING_BYTES]) -> io::Result<()> {
    if theirs[0] != 0xff || theirs[9] & 1 == 0 {
        return Err(malformed("no greeting"));
    }
    if theirs[10] < 3 {
        return Err(malformed("a version before 3"));
    }
    if theirs[12..32] != greeting()[12..32] {
        return Err(malformed("a mechanism that is not NULL"));
    }
    Ok(())
}

/// Takes a frame, with its flags, if all of it is there; one that will be too long is an error by its head.
fn take_frame(buffer: &mut BytesMut) -> io::Result<Option<(u8, Vec<u8>)>> {
    let Some((&flags, rest)) = buffer.split_first() else { return Ok(None) };
    if flags > (MORE | LONG | COMMAND) || flags & (COMMAND | MORE) == COMMAND | MORE {
        return Err(malformed("a frame's flags"));
    }
    let (num_head_bytes, num_bytes) = if flags & LONG == 0 {
        let Some(&num_bytes) = rest.first() else { return Ok(None) };
        (2, u64::from(num_bytes))
    } else {
        let Some(&num_bytes) = rest.first_chunk() else { return Ok(None) };
        (9, u64::from_be_bytes(num_bytes))
    };
    if num_bytes > MAX_RECEIVED_BYTES as u64 {
        return Err(malformed("a frame too long"));
    }
    let end = num_head_bytes + num_bytes as usize;
    let Some(frame) = buffer.get(num_head_bytes..end) else { return Ok(None) };
    let frame = frame.to_vec();
    buffer.advance(end);
    Ok(Some((flags, frame)))
}

fn put_frame_head(bytes: &mut BytesMut, flags: u8, num_bytes: usize) {
    match u8::try_from(num_bytes) {
        Ok(num_bytes) => bytes.put_slice(&[flags, num_bytes]),
        Err(_) => {
            bytes.put_u8(flags | LONG);
            bytes.put_u64(num_bytes as u64);
        }
    }
}

/// What follows a command's name, if it has this one.
fn command_body<'a>(frame: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (&num_bytes, rest) = frame.split_first()?;
    if usize::from(num_bytes) == name.len() { rest.strip_prefix(name) } else { None }
}

fn command(frame: &[u8]) -> io::Result<Received> {
    if let Some(topic) = command_body(frame, b"SUBSCRIBE") {
        return Ok(Received::Subscribe(topic.to_vec()));
    }
    if let Some(topic) = command_body(frame, b"CANCEL") {
        return Ok(Received::Cancel(topic.to_vec()));
    }
    if let Some(ping) = command_body(frame, b"PING") {
        // Two bytes say for how long the connection counts as alive; a message's own deadline does that here.
        let context = ping.get(2..).filter(|context| context.len() <= MAX_PING_CONTEXT_BYTES);
        return Ok(Received::Ping(context.ok_or_else(|| malformed("PING"))?.to_vec()));
    }
    match command_body(frame, b"ERROR") {
        Some(_) => Err(malformed("the peer found an error")),
        None => Ok(Received::Other),
    }
}

/// A property's value among those of READY: names and values after their lengths of one and four bytes.
fn property<'a>(mut properties: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    loop {
        let (&num_bytes, rest) = properties.split_first()?;
        let (name, rest) = rest.split_at_checked(usize::from(num_bytes))?;
        let (&num_bytes, rest) = rest.split_first_chunk()?;
        let (value, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(num_bytes)).ok()?)?;
        if name.eq_ignore_ascii_case(wanted) {
            return Some(value);
        }
        properties = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(bytes: &[u8]) -> io::Result<Option<(u8, Vec<u8>)>> {
        take_frame(&mut bytes.into())
    }

    #[test]
    fn frames_are_taken_whole() {
        let frames =
            [&b"\x00\x00"[..], b"\x01\x03abc", b"\x02\x00\x00\x00\x00\x00\x00\x00\x01x", b"\x04\x01y"];
        let wanted: [(u8, &[u8]); 4] = [(0, b""), (1, b"abc"), (2, b"x"), (4, b"y")];
        let mut buffer = BytesMut::new();
        let mut found = Vec::new();
        for byte in frames.concat() {
            buffer.put_u8(byte);
            found.extend(take_frame(&mut buffer).expect("frames"));
        }
        assert!(buffer.is_empty());
        assert_eq!(found, wanted.map(|(flags, frame)| (flags, frame.to_vec())));
    }

    #[test]
    fn a_frame_too_long_is_known_by_its_head() {
        for num_bytes in [MAX_RECEIVED_BYTES as u64 + 1, 1 << 40, i64::MAX as u64, u64::MAX] {
            for flags in [LONG, LONG | MORE, LONG | COMMAND] {
                let head = [&[flags][..], &num_bytes.to_be_bytes()].concat();
                assert!(taken(&head).is_err(), "{num_bytes}");
                assert!(taken(&head[..8]).expect("no frame yet").is_none());
            }
        }
        for flags in [COMMAND | MORE, 8, 0xff] {
            assert!(taken(&[flags, 0]).is_err(), "{flags}");
        }
    }

    #[test]
    fn heads_are_as_short_as_they_can_be() {
        for (num_bytes, num_head_bytes) in [(0, 2), (255, 2), (256, 9), (MAX_RECEIVED_BYTES, 9)] {
            let mut bytes = BytesMut::new();
            put_frame_head(&mut bytes, 0, num_bytes);
            assert_eq!(bytes.len(), num_head_bytes);
            bytes.put_bytes(7, num_bytes);
            let (_, frame) = take_frame(&mut bytes).expect("a frame").expect("all of it");
            assert_eq!(frame, vec![7; num_bytes]);
        }
    }

    #[test]
    fn commands_are_read_and_broken_ones_refused() {
        let read = |frame: &[u8]| command(frame).ok();
        assert_eq!(read(b"\x09SUBSCRIBEkv"), Some(Received::Subscribe(b"kv".to_vec())));
        assert_eq!(read(b"\x06CANCEL"), Some(Received::Cancel(Vec::new())));
        assert_eq!(read(b"\x04PING\x00\x01abc"), Some(Received::Ping(b"abc".to_vec())));
        assert_eq!(read(b"\x04PING\x00"), None);
        assert_eq!(read(b"\x04PING\x00\x010123456789abcdefg"), None);
        assert_eq!(read(b"\x05ERROR\x00"), None);
        for other in [&b""[..], b"\xff", b"\x09SUB", b"\x04PONGabc"] {
            assert_eq!(read(other), Some(Received::Other));
        }
        let ready = b"\x08Identity\x00\x00\x00\x02ab\x0bsocket-type\x00\x00\x00\x03SUB";
        assert_eq!(property(ready, b"Socket-Type"), Some(&b"SUB"[..]));
        assert_eq!(property(b"\x0bSocket-Type\xff\xff\xff\xffSUB", b"Socket-Type"), None);
        assert_eq!(property(b"\x08Identity\x00\x00", b"Socket-Type"), None);
    }
}
