//! A server in this process, on a loopback port, that a benchmark talks to over real HTTP.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use tandem::http::lanes::LanePolicy;
use tandem::http::{ServeOptions, serve};
use tandem::keys::Keyring;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::report::{Header, Machine};
use crate::cli::settings::ModelSettings;
use crate::cli::terminal;
use crate::config::{Config, Loaded};
use crate::runtime::Runtime;

/// The settings that were given; logging starts.
///
/// # Errors
/// A setting that breaks its rules.
pub(super) fn configure(settings: &ModelSettings) -> anyhow::Result<Config> {
    let Loaded { config, warnings, .. } = settings.load()?;
    terminal::init_logging(config.log.as_deref(), "warn");
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    Ok(config)
}

impl Header {
    /// # Errors
    /// If one of the pair is missing.
    pub(super) fn of(benchmark: &'static str, runtime: &Runtime) -> anyhow::Result<Self> {
        let (Some((target, _)), Some((draft, _))) = (&runtime.target, &runtime.draft) else {
            bail!("this benchmark measures a pair: name both --target and --draft");
        };
        let [target, draft] = [target, draft]
            .map(|info| format!("{} ({} parameters)", info.name, terminal::count(info.num_parameters)));
        Ok(Header { synthetic: None, benchmark, machine: Machine::this(runtime.threads), target, draft })
    }
}

/// A server in this process.
pub(super) struct LocalServer {
    pub(super) address: SocketAddr,
    stop: oneshot::Sender<()>,
    served: JoinHandle<std::io::Result<()>>,
    engine_thread: std::thread::JoinHandle<()>,
}

impl LocalServer {
    pub(super) async fn start(runtime: Runtime) -> anyhow::Result<Self> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("no loopback port is free")?;
        let address = listener.local_addr()?;
        let (state, engine_thread) =
            runtime.into_state(Arc::new(Keyring::new(&[], false)), LanePolicy::default(), false);
        let (stop, stopped) = oneshot::channel();
        let served = tokio::spawn(serve(listener, Arc::new(state), ServeOptions::default(), async {
            // A dropped sender means the same as a message.
            let _ = stopped.await;
        }));
        Ok(LocalServer { address, stop, served, engine_thread })
    }

    pub(super) async fn stop(self) -> anyhow::Result<()> {
        // A server that has ended already says why below.
        let _ = self.stop.send(());
        self.served.await??;
        self.engine_thread.join().map_err(|_| anyhow::anyhow!("the engine's thread panicked"))
    }
}
