//! `tandem bench NAME`: measurements that a user can repeat. Each starts its own server in this
//! process, on a loopback port, and talks to it over real HTTP, so that what is measured is what a
//! client gets.

mod client;
mod pair;
mod prompts;
mod report;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Subcommand;
use serde::Serialize;
use tandem::http::{ServeOptions, serve};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::terminal;
use crate::runtime::Runtime;

/// The benchmarks there are.
#[derive(Subcommand, Debug)]
pub(super) enum BenchCommand {
    /// What speculation gains: deep with and without it, and fast, in turns
    Pair(pair::PairArgs),
}

pub(super) fn run(command: &BenchCommand) -> anyhow::Result<ExitCode> {
    match command {
        BenchCommand::Pair(args) => pair::run(args),
    }
}

/// Where a measurement was taken.
#[derive(Clone, Debug, Serialize)]
struct Machine {
    cpu: String,
    threads: usize,
    kernels: &'static str,
    tandem: &'static str,
}

impl Machine {
    fn this(threads: usize) -> Self {
        Machine {
            cpu: terminal::cpu_model(),
            threads,
            kernels: tandem_kernels::isa::active().name(),
            tandem: env!("CARGO_PKG_VERSION"),
        }
    }
}

/// A server in this process.
struct LocalServer {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    served: JoinHandle<std::io::Result<()>>,
    engine_thread: std::thread::JoinHandle<()>,
}

impl LocalServer {
    async fn start(runtime: Runtime) -> anyhow::Result<Self> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("no loopback port is free")?;
        let address = listener.local_addr()?;
        let (state, engine_thread) = runtime.into_state(Vec::new(), false);
        let (stop, stopped) = oneshot::channel();
        let served = tokio::spawn(serve(listener, Arc::new(state), ServeOptions::default(), async {
            // A dropped sender means the same as a message.
            let _ = stopped.await;
        }));
        Ok(LocalServer { address, stop, served, engine_thread })
    }

    async fn stop(self) -> anyhow::Result<()> {
        // A server that has ended already says why below.
        let _ = self.stop.send(());
        self.served.await??;
        self.engine_thread.join().map_err(|_| anyhow::anyhow!("the engine's thread panicked"))
    }
}

fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
