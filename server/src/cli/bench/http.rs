//! `tandem bench http`: what HTTP costs beside the engine.
//!
//! The server's own code, from the socket to the engine's boundary, over a model that does no arithmetic: it
//! asks for one token of a list after the other, at a set pace. Server and clients have threads of their own, so
//! the server's CPU time is told apart from the clients'.

use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};
use tandem::http::lanes::LanePolicy;
use tandem::http::{AppConfig, AppState, LaneModel, Limits, ServeOptions, serve};
use tandem::keys::Keyring;
use tandem_engine::{DraftHead, DraftTokens, EngineConfig, EngineHandle, Models};
use tandem_models::{Checkpoint, Tokenizer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::client::{Client, Completion, Endpoint};
use super::report::{self, Machine};
use super::stats::Percentiles;
use crate::runtime::{SERVING_THREADS, find_demo_pair, raise_open_files};
use scripted::ScriptedModel;

mod scripted;

const LONG_ABOUT: &str = "\
Measure what HTTP costs beside the engine: the server's CPU time for each streamed token, the time to first \
token over the engine's own, and what many idle and half-open connections do to it.

The server of this process serves a model that does no arithmetic and takes --interval-us for each token of all \
streams. Needs no model but the demo pair's tokenizer.

The exit status is 1 if a request failed, or a connection that never sent a whole request was still open after \
30 s.";

/// The name of the server's threads, by which their CPU time is found.
const SERVER_THREAD: &str = "tandem-http";

/// How long connections without a request may stay.
const CLOSED_WITHIN: Duration = Duration::from_secs(30);

/// Arguments of `tandem bench http`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT)]
pub(in crate::cli) struct HttpArgs {
    /// Streams at a time, for the CPU time of a token
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=64))]
    streams: u32,

    /// Tokens of each stream
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..=2000))]
    tokens: u32,

    /// Time that the model takes for a token of all streams
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 2000)]
    interval_us: u64,

    /// Threads of the server, the engine's aside
    #[arg(long, value_name = "N", default_value_t = SERVING_THREADS as u32, value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: u32,

    /// Requests, one after the other, for each figure of the time to first token
    #[arg(long, value_name = "N", default_value_t = 400, value_parser = clap::value_parser!(u32).range(10..))]
    requests: u32,

    /// Connections that never send a whole request; half of them send nothing, half a part of a head
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    connections: usize,

    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Be the other end of the connections: the benchmark starts itself so, because a process may have only so
    /// many files open
    #[arg(long, value_name = "ADDRESS", hide = true)]
    hold: Option<SocketAddr>,
}

#[derive(Serialize)]
struct Figures {
    machine: Machine,
    /// CPU time, in microseconds, of a thread that sleeps for the interval and then sends an event's bytes: what the
    /// system takes for a token of one stream, whatever the server does.
    floor_us: f64,
    /// The same of a thread of the async runtime, whose task another thread wakes: what a token takes before there is
    /// any HTTP.
    task_floor_us: f64,
    /// CPU time of the server's threads for each token, in microseconds, by streams at a time.
    cpu_us_per_token: Vec<(u32, f64)>,
    /// Milliseconds from sending a request to its first token, less what the engine says that it took.
    ttft_over_engine_ms: Percentiles,
    /// The same in all, before, beside and after the idle connections.
    ttft_ms: [Percentiles; 3],
    num_connections: usize,
    /// Seconds until the last of them was closed; `None`: some were open after 30.
    closed_after_s: Option<f64>,
}

pub(super) fn run(args: &HttpArgs) -> anyhow::Result<ExitCode> {
    crate::cli::terminal::init_logging(None, "warn");
    let (most_files, needed) = (raise_open_files(), args.connections + 256);
    if needed > most_files {
        bail!(
            "{} connections need {needed} open files and this process may have {most_files}; raise `ulimit -Hn`",
            args.connections
        );
    }
    let clients = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if let Some(address) = args.hold {
        return clients.block_on(hold(address, args.connections));
    }
    let server = Server::start(args)?;
    let figures = clients.block_on(measure(args, server.address))?;
    server.stop()?;
    print(&figures);
    if let Some(path) = &args.json {
        report::write_json(path, &figures)?;
    }
    Ok(if figures.closed_after_s.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The server under test, on threads of its own.
struct Server {
    address: SocketAddr,
    runtime: tokio::runtime::Runtime,
    stop: oneshot::Sender<()>,
    served: tokio::task::JoinHandle<std::io::Result<()>>,
    engine_thread: std::thread::JoinHandle<()>,
}

impl Server {
    fn start(args: &HttpArgs) -> anyhow::Result<Self> {
        let dir = find_demo_pair()?.join("draft");
        let checkpoint = Checkpoint::open(&dir)?;
        let tokenizer = Arc::new(Tokenizer::from_dir(&dir)?);
        let interval = Duration::from_micros(args.interval_us);
        let model = ScriptedModel::new(checkpoint.config.clone(), &tokenizer, interval);
        let max_model_len = 2048 + 64;
        let config = EngineConfig {
            block_size: 16,
            num_blocks: 64 * (max_model_len / 16),
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            max_waiting: 256,
            max_model_len,
            num_token_ids: tokenizer.vocab_size(),
            vocab_map: None,
            draft_tokens: DraftTokens::Fixed(0),
            draft_head: DraftHead::default(),
            prefix_cache: false,
            hash_key: [1, 2],
            hash_bits: 64,
            lane_isolation: false,
        };
        let models = Models { target: None, draft: Some(Box::new(model)) };
        let (engine, engine_thread) = EngineHandle::spawn(config, models)?;
        let draft = LaneModel {
            name: "scripted".to_owned(),
            tokenizer,
            chat_template: None,
            fim: None,
            generation: checkpoint.generation.clone(),
        };
        let state = AppState::new(AppConfig {
            engine,
            target: None,
            draft: Some(draft),
            keys: Arc::new(Keyring::new(&["key-of-the-benchmark".to_owned()], false)),
            policy: LanePolicy::default(),
            cors: false,
            sharing: false,
            limits: Limits::default(),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(args.threads as usize)
            .thread_name(SERVER_THREAD)
            .enable_all()
            .build()?;
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let options = ServeOptions { max_connections: args.connections + 128, ..ServeOptions::default() };
        let served = runtime.spawn(serve(listener, Arc::new(state), options, async {
            // A dropped sender means the same as a message.
            let _ = stopped.await;
        }));
        Ok(Server { address, runtime, stop, served, engine_thread })
    }

    fn stop(self) -> anyhow::Result<()> {
        // A server that has ended already says why below.
        let _ = self.stop.send(());
        self.runtime.block_on(self.served)??;
        self.engine_thread.join().map_err(|_| anyhow::anyhow!("the engine's thread panicked"))
    }
}

fn client(address: SocketAddr) -> Client {
    Client::new(Endpoint::local(address).with_key("key-of-the-benchmark"))
}

fn body(num_tokens: u32) -> Value {
    json!({
        "model": "fast", "prompt": "fn main() {", "max_tokens": num_tokens, "ignore_eos": true, "stream": true,
        "temperature": 0,
    })
}

async fn measure(args: &HttpArgs, address: SocketAddr) -> anyhow::Result<Figures> {
    // Whatever is made once, is made here.
    times_to_first(address, 20).await?;
    let mut cpu_us_per_token = Vec::new();
    for streams in [1, args.streams] {
        cpu_us_per_token.push((streams, cpu_per_token(address, streams, args.tokens).await?));
    }
    let interval = Duration::from_micros(args.interval_us);
    let floor_us = floor(args.tokens, interval)?;
    // A runtime must not end on a thread of another.
    let beside = std::thread::spawn({
        let tokens = args.tokens;
        move || task_floor(tokens, interval)
    });
    let task_floor_us = beside.join().expect("it does not panic: this is a bug")?;
    let before = times_to_first(address, args.requests).await?;
    let holder = Holder::start(address, args.connections)?;
    let beside = times_to_first(address, args.requests).await?;
    let closed_after_s = holder.closed()?;
    let after = times_to_first(address, args.requests).await?;
    let over = before.iter().map(|one| milliseconds(one.ttft().saturating_sub(one.engine_ttft))).collect();
    let in_all = |completions: &[Completion]| {
        Percentiles::of(completions.iter().map(|one| milliseconds(one.ttft())).collect())
            .expect("there are requests: this is a bug")
    };
    Ok(Figures {
        machine: Machine::this(args.threads as usize),
        floor_us,
        task_floor_us,
        cpu_us_per_token,
        ttft_over_engine_ms: Percentiles::of(over).expect("there are requests: this is a bug"),
        ttft_ms: [in_all(&before), in_all(&beside), in_all(&after)],
        num_connections: args.connections,
        closed_after_s,
    })
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Short answers, one after the other on one connection.
async fn times_to_first(address: SocketAddr, count: u32) -> anyhow::Result<Vec<Completion>> {
    let mut client = client(address);
    let mut completions = Vec::with_capacity(count as usize);
    for _ in 0..count {
        completions.push(client.complete(&body(2)).await?);
    }
    Ok(completions)
}

/// Microseconds of the server's threads for each token.
async fn cpu_per_token(address: SocketAddr, streams: u32, tokens: u32) -> anyhow::Result<f64> {
    let before = cpu_time(SERVER_THREAD)?;
    let mut tasks = JoinSet::new();
    for _ in 0..streams {
        tasks.spawn(async move { client(address).complete(&body(tokens)).await });
    }
    let mut num_tokens = 0;
    while let Some(completion) = tasks.join_next().await {
        num_tokens += completion??.num_output_tokens;
    }
    let spent = cpu_time(SERVER_THREAD)?.saturating_sub(before);
    if num_tokens != u64::from(streams) * u64::from(tokens) {
        bail!("{streams} streams of {tokens} tokens brought {num_tokens}");
    }
    Ok(spent.as_secs_f64() * 1e6 / num_tokens as f64)
}

/// CPU time of the threads of this name so far, as the scheduler counts it.
fn cpu_time(thread: &str) -> anyhow::Result<Duration> {
    let mut sum = Duration::ZERO;
    for task in
        std::fs::read_dir("/proc/self/task").context("CPU time of threads is read from Linux's /proc")?
    {
        let path = task?.path();
        // A thread may be gone by now.
        let Ok(name) = std::fs::read_to_string(path.join("comm")) else { continue };
        if name.trim_end() == thread {
            let text = std::fs::read_to_string(path.join("schedstat"))?;
            let nanoseconds = text.split_whitespace().next().and_then(|text| text.parse().ok());
            sum += Duration::from_nanos(nanoseconds.context("/proc/self/task/*/schedstat has no number")?);
        }
    }
    Ok(sum)
}

/// The process that holds the connections.
struct Holder {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Holder {
    /// Returns when all connections are open. Blocks.
    fn start(address: SocketAddr, count: usize) -> anyhow::Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(["bench", "http", "--hold", &address.to_string(), "--connections", &count.to_string()])
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = process.stdout.take().expect("it was asked for: this is a bug");
        let mut lines = BufReader::new(stdout).lines();
        if lines.next().transpose()?.as_deref() != Some(ALL_OPEN) {
            bail!("not all connections could be opened: {}", process.wait()?);
        }
        Ok(Holder { process, lines })
    }

    /// Seconds until the server had closed all of them; `None` if it did not in time. Blocks.
    fn closed(mut self) -> anyhow::Result<Option<f64>> {
        let seconds = self.lines.next().transpose()?.and_then(|line| line.parse().ok());
        self.process.wait()?;
        Ok(seconds)
    }
}

/// What the holder says when all connections are open.
const ALL_OPEN: &str = "open";

/// Opens connections that send nothing, or a part of a head, and waits until the server has closed them.
async fn hold(address: SocketAddr, count: usize) -> anyhow::Result<ExitCode> {
    let mut connections = Vec::with_capacity(count);
    for i in 0..count {
        let mut stream = TcpStream::connect(address).await.with_context(|| format!("connection {i}"))?;
        if i % 2 == 0 {
            stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: test\r\nx-").await?;
        }
        connections.push(stream);
    }
    let opened = Instant::now();
    println!("{ALL_OPEN}");
    let all = async {
        for mut stream in connections {
            let mut bytes = [0; 256];
            // A reset is a way of closing, too.
            while matches!(stream.read(&mut bytes).await, Ok(size) if size > 0) {}
        }
    };
    match tokio::time::timeout(CLOSED_WITHIN, all).await {
        Ok(()) => println!("{}", opened.elapsed().as_secs_f64()),
        Err(_) => println!("late"),
    }
    Ok(ExitCode::SUCCESS)
}

/// The thread whose CPU time is the [`Figures::floor_us`].
const FLOOR_THREAD: &str = "tandem-floor";

/// The thread whose CPU time is the [`Figures::task_floor_us`].
const TASK_FLOOR_THREAD: &str = "tandem-task";

/// Bytes of an event with a token, chunk and all.
const EVENT_BYTES: usize = 220;

fn floor(count: u32, interval: Duration) -> anyhow::Result<f64> {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut sender = std::net::TcpStream::connect(listener.local_addr()?)?;
    let mut receiver = listener.accept()?.0;
    sender.set_nodelay(true)?;
    let reading = std::thread::spawn(move || std::io::copy(&mut receiver, &mut std::io::sink()));
    let sending = std::thread::Builder::new().name(FLOOR_THREAD.to_owned()).spawn(move || {
        for _ in 0..count {
            std::thread::sleep(interval);
            sender.write_all(&[b'x'; EVENT_BYTES])?;
        }
        cpu_time(FLOOR_THREAD)
    })?;
    let spent = sending.join().expect("it does not panic: this is a bug")?;
    reading.join().expect("it does not panic: this is a bug")?;
    Ok(spent.as_secs_f64() * 1e6 / f64::from(count))
}

fn task_floor(count: u32, interval: Duration) -> anyhow::Result<f64> {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let sender = std::net::TcpStream::connect(listener.local_addr()?)?;
    let mut receiver = listener.accept()?.0;
    sender.set_nodelay(true)?;
    sender.set_nonblocking(true)?;
    let reading = std::thread::spawn(move || std::io::copy(&mut receiver, &mut std::io::sink()));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name(TASK_FLOOR_THREAD)
        .enable_all()
        .build()?;
    let (wake, mut woken) = tokio::sync::mpsc::channel::<()>(1);
    let sending = runtime.spawn(async move {
        let mut sender = TcpStream::from_std(sender)?;
        while woken.recv().await.is_some() {
            sender.write_all(&[b'x'; EVENT_BYTES]).await?;
        }
        std::io::Result::Ok(())
    });
    for _ in 0..count {
        std::thread::sleep(interval);
        wake.blocking_send(())?;
    }
    drop(wake);
    while !sending.is_finished() {
        std::thread::sleep(interval);
    }
    let spent = cpu_time(TASK_FLOOR_THREAD)?;
    reading.join().expect("it does not panic: this is a bug")?;
    Ok(spent.as_secs_f64() * 1e6 / f64::from(count))
}

fn print(figures: &Figures) {
    println!("{}\n", figures.machine);
    println!("CPU to wake a thread and send an event, without any server: {:.1} us", figures.floor_us);
    println!("The same for a task of the async runtime, without HTTP: {:.1} us", figures.task_floor_us);
    for (streams, cpu) in &figures.cpu_us_per_token {
        println!("CPU of a streamed token, {streams} at a time: {cpu:.1} us");
    }
    let [p50, p90, p99] = report::percentile_cells(Some(figures.ttft_over_engine_ms), 3);
    println!("time to first token over the engine's own: {p50} ms (p90 {p90}, p99 {p99})\n");
    let names = ["before", "beside", "after"];
    let rows = names.iter().zip(figures.ttft_ms).map(|(name, times)| {
        let mut row = vec![(*name).to_owned()];
        row.extend(report::percentile_cells(Some(times), 3));
        row
    });
    println!("time to first token, ms, {} idle and half-open connections:", figures.num_connections);
    println!("{}", report::table(&["", "p50", "p90", "p99"], 1, rows));
    match figures.closed_after_s {
        Some(seconds) => println!("all of them closed {seconds:.1} s after the last was opened"),
        None => println!("some of them still open {} s after the last was opened", CLOSED_WITHIN.as_secs()),
    }
}
