//! TLS: the certificate and its key, read from files and read again when they change.
//!
//! Connections that are open keep the certificate that they began with. Files that cannot be used, while a
//! renewal is half done for instance, are said and leave the certificate that is in use as it is.

use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// How often the files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Why TLS cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("the TLS {what} {} cannot be read: {reason}", path.display())]
    Unreadable {
        /// Certificate or key.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's word.
        reason: String,
    },
    /// A file does not hold what it should.
    #[error("the TLS {what} {} holds no {wanted}: {reason}", path.display())]
    Content {
        /// Certificate or key.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What it should hold.
        wanted: &'static str,
        /// What was found.
        reason: String,
    },
    /// Each file is in order by itself.
    #[error("the TLS certificate {} and the key {} cannot be used together: {reason}", cert.display(), key.display())]
    Pair {
        /// The certificate's file.
        cert: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// rustls's word.
        reason: String,
    },
}

/// The certificate in use.
pub struct Tls {
    cert: PathBuf,
    key: PathBuf,
    current: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads the certificate chain and the private key, in PEM files.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn open(cert: &Path, key: &Path) -> Result<Self, TlsError> {
        let current = RwLock::new(Arc::new(load(cert, key)?));
        Ok(Tls { cert: cert.to_owned(), key: key.to_owned(), current })
    }

    /// Reads the files again.
    ///
    /// # Errors
    /// As [`Tls::open`]; the certificate stays what it was then.
    pub fn reload(&self) -> Result<(), TlsError> {
        let new = Arc::new(load(&self.cert, &self.key)?);
        *self.current.write().expect("no holder of this lock panics: this is a bug") = new;
        Ok(())
    }

    /// For one connection, with the certificate of now.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.current.read().expect("no holder of this lock panics: this is a bug").clone().into()
    }

    /// Reads the files again on SIGHUP and when they change, for as long as it is polled.
    pub(super) async fn follow_files(&self) {
        let mut hangup = Hangup::listen();
        let mut seen = self.modified();
        loop {
            let is_asked = tokio::select! {
                () = hangup.next() => true,
                () = tokio::time::sleep(LOOK_INTERVAL) => false,
            };
            let now = self.modified();
            if !is_asked && now == seen {
                continue;
            }
            seen = now;
            match self.reload() {
                Ok(()) => tracing::info!("the TLS certificate {} was read again", self.cert.display()),
                Err(error) => tracing::error!(%error, "the TLS certificate in use stays"),
            }
        }
    }

    fn modified(&self) -> [Option<SystemTime>; 2] {
        // What a link points to counts: renewals change links.
        [&self.cert, &self.key].map(|path| std::fs::metadata(path).and_then(|file| file.modified()).ok())
    }
}

#[cfg(unix)]
struct Hangup(Option<tokio::signal::unix::Signal>);

#[cfg(unix)]
impl Hangup {
    fn listen() -> Self {
        use tokio::signal::unix::{SignalKind, signal};
        Hangup(signal(SignalKind::hangup()).ok())
    }

    async fn next(&mut self) {
        if let Some(signal) = &mut self.0
            && signal.recv().await.is_some()
        {
            return;
        }
        std::future::pending().await
    }
}

#[cfg(not(unix))]
struct Hangup;

#[cfg(not(unix))]
impl Hangup {
    fn listen() -> Self {
        Hangup
    }

    async fn next(&mut self) {
        std::future::pending().await
    }
}

fn load(cert: &Path, key: &Path) -> Result<ServerConfig, TlsError> {
    let chain = read("certificate", cert, "CERTIFICATE section", |text| {
        let chain = CertificateDer::pem_slice_iter(text).collect::<Result<Vec<_>, _>>()?;
        if chain.is_empty() { Err(pem::Error::NoItemsFound) } else { Ok(chain) }
    })?;
    let private = read("key", key, "PRIVATE KEY section", PrivateKeyDer::from_pem_slice)?;
    let pair = |error: rustls::Error| TlsError::Pair {
        cert: cert.to_owned(),
        key: key.to_owned(),
        reason: error.to_string(),
    };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(pair)?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(pair)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn read<T>(
    what: &'static str,
    path: &Path,
    wanted: &'static str,
    parse: impl FnOnce(&[u8]) -> Result<T, pem::Error>,
) -> Result<T, TlsError> {
    let text = std::fs::read(path).map_err(|error| TlsError::Unreadable {
        what,
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    parse(&text).map_err(|error| TlsError::Content {
        what,
        path: path.to_owned(),
        wanted,
        reason: match error {
            pem::Error::NoItemsFound => "there is none in it".to_owned(),
            other => other.to_string(),
        },
    })
}
