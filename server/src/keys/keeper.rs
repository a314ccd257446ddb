//! The thread between the ring and the file: takes changes of the file into use, and writes down what was
//! used. Requests never wait for it.
//!
//! Costs one look at the file's change counter every [`LOOK_INTERVAL`], and a transaction every
//! [`WRITE_INTERVAL`] while keys are in use. A crash loses at most that much of the account.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::file::{KeyFile, KeyFileError};
use super::ring::Keyring;

/// How soon a change of the file is in use.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// How often usage is written down.
const WRITE_INTERVAL: Duration = Duration::from_secs(2);

/// Keeps a ring and a file together until it is dropped, and then writes down what is left to write.
pub struct Keeper {
    /// Dropped to stop the thread.
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Reads the file into `ring` and starts the thread. A file that is not there is made.
    ///
    /// # Errors
    /// If the file cannot be used.
    pub fn start(path: &Path, ring: Arc<Keyring>) -> Result<Self, KeyFileError> {
        let mut file = KeyFile::open(path, true)?;
        let version = file.version()?;
        let entries = file.readable_entries()?;
        if entries.iter().all(|entry| entry.revoked_at.is_some()) {
            tracing::warn!(
                "there is no valid key in {}; `tandem keys add NAME` makes one, which is in use at once",
                path.display()
            );
        }
        ring.replace(&entries);
        let (stop, stopped) = sync_channel(0);
        let mut work = Work { file, ring, version, written: Instant::now(), is_orphaned: false };
        let thread = std::thread::Builder::new()
            .name("tandem-keys".into())
            .spawn(move || {
                while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(LOOK_INTERVAL) {
                    work.look();
                }
                work.write();
            })
            .map_err(|error| KeyFileError::Open {
                path: path.to_owned(),
                reason: format!("its thread did not start: {error}"),
            })?;
        Ok(Keeper { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the file of keys panicked");
        }
    }
}

struct Work {
    file: KeyFile,
    ring: Arc<Keyring>,
    version: i64,
    written: Instant,
    /// The open file has lost its name.
    is_orphaned: bool,
}

impl Work {
    /// Trouble with the file is said and tried again; the keys that are known stay in use.
    fn look(&mut self) {
        if let Err(error) = self.take_changes() {
            tracing::warn!(%error, "changes of the keys are not in use yet; trying again");
        }
        if self.written.elapsed() >= WRITE_INTERVAL {
            self.write();
        }
    }

    fn take_changes(&mut self) -> Result<(), KeyFileError> {
        if self.file.is_replaced() && !std::mem::replace(&mut self.is_orphaned, true) {
            // What SQLite keeps beside a file that is in use would be taken for the new file's.
            tracing::error!(
                "another file has taken the place of the file of keys and is not in use: stop the server, remove \
                 the files that end with -wal and -shm, and start it again"
            );
        }
        let version = self.file.version()?;
        if version != self.version {
            // The account of a key that is gone would be, too.
            self.write();
            self.ring.replace(&self.file.readable_entries()?);
            self.version = version;
        }
        Ok(())
    }

    fn write(&mut self) {
        self.written = Instant::now();
        let used = self.ring.take_used();
        if used.is_empty() {
            return;
        }
        if let Err(error) = self.file.write_usage(&used) {
            self.ring.give_back(&used);
            tracing::warn!(%error, "what was used of the keys is not written down yet; trying again");
        }
    }
}
