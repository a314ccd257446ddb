//! The file of keys: an SQLite database that the server and any number of `tandem keys` commands have
//! open at the same time.
//!
//! Invariants: no key is in it, only hashes; nobody but its owner can read it (0600). Write-ahead
//! logging lets readers go on beside a writer; two writers wait for each other.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, OptionalExtension as _, Row, params};
use tandem_engine::Priority;

use super::ring::Used;
use super::rules::{Budget, KeyRules, Lanes};
use super::{KEY_PREFIX, KeyHash, hash, random_key};

/// The layout's number, kept as `user_version`.
const VERSION: i64 = 1;

/// How long a writer waits for another one.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Between two attempts at what SQLite does not wait for.
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// Longest name of a key.
const MAX_NAME_BYTES: usize = 64;

/// Characters of a key that are kept to recognise it by, after its prefix: 24 of its 256 bits.
const HINT_CHARS: usize = 6;

const SCHEMA: &str = "
    CREATE TABLE keys (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL,
        hash BLOB NOT NULL UNIQUE,
        hint TEXT NOT NULL,
        lanes TEXT NOT NULL,
        requests TEXT,
        tokens TEXT,
        priority TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER,
        revoked_at INTEGER
    ) STRICT;
    CREATE UNIQUE INDEX valid_names ON keys (name) WHERE revoked_at IS NULL;
    CREATE TABLE usage (
        key INTEGER PRIMARY KEY REFERENCES keys (id),
        requests_window INTEGER NOT NULL,
        requests INTEGER NOT NULL,
        tokens_window INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        total_requests INTEGER NOT NULL,
        total_tokens INTEGER NOT NULL,
        last_used_at INTEGER NOT NULL
    ) STRICT;
";

/// Why the file of keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be opened or made.
    #[error("the file of keys {} cannot be opened: {reason}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's or SQLite's word.
        reason: String,
    },
    /// Others can read or write it.
    #[error("the file of keys {} has mode {mode:04o}; only its owner may use it: chmod 600 it", path.display())]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It was written by a newer Tandem.
    #[error("the file of keys {} has layout {found}; this Tandem knows {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its layout's number.
        found: i64,
    },
    /// A valid key has the name already.
    #[error("there is a key named {0:?} already; revoke it first or take another name")]
    NameTaken(String),
    /// A name that cannot be used.
    #[error("the name is {0:?}; it must have 1 to {MAX_NAME_BYTES} letters, digits, '.', '-', '_' or '@'")]
    Name(String),
    /// No valid key has the name.
    #[error("there is no valid key named {0:?}; `tandem keys list` shows those there are")]
    Unknown(String),
    /// Another process holds it for too long.
    #[error("the file of keys {} is in use by another process; try again", .0.display())]
    Busy(PathBuf),
    /// What is in it makes no sense.
    #[error("the file of keys {} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
}

/// A key that was just made. The only time that it can be seen.
pub struct NewKey {
    /// What clients send.
    pub key: String,
    /// Its name.
    pub name: String,
}

/// A key as the file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyEntry {
    /// Its number, never given twice.
    pub id: i64,
    /// What people call it; one valid key a name.
    pub name: String,
    /// Its beginning.
    pub hint: String,
    /// What it may do.
    pub rules: KeyRules,
    /// Seconds since the epoch.
    pub created_at: u64,
    /// Seconds since the epoch; `None`: not revoked.
    pub revoked_at: Option<u64>,
    /// What was used of it, as last written.
    pub used: Used,
    pub(super) hash: KeyHash,
}

/// The open file.
pub struct KeyFile {
    path: PathBuf,
    connection: Connection,
    /// Which file it is, whatever it is called.
    identity: Option<Identity>,
}

/// Device and number on it.
type Identity = (u64, u64);

impl KeyFile {
    /// Opens the file; `make`: makes it if there is none.
    ///
    /// # Errors
    /// If it cannot be opened, others may read it, or it is no file of keys.
    pub fn open(path: &Path, make: bool) -> Result<Self, KeyFileError> {
        let fault = |reason: String| KeyFileError::Open { path: path.to_owned(), reason };
        private(path, make)?;
        let connection = Connection::open(path).map_err(|error| fault(error.to_string()))?;
        let mut file = KeyFile { path: path.to_owned(), connection, identity: identity(path) };
        file.prepare_patiently().map_err(|error| match error {
            KeyFileError::Damaged { reason, .. } => fault(reason),
            error => error,
        })?;
        Ok(file)
    }

    /// SQLite does not wait by itself while another process makes the file's log, or takes it away with the
    /// last connection.
    fn prepare_patiently(&mut self) -> Result<(), KeyFileError> {
        let begin = Instant::now();
        loop {
            match self.prepare() {
                Err(KeyFileError::Busy(_)) if begin.elapsed() < BUSY_TIMEOUT => {
                    std::thread::sleep(BUSY_PAUSE);
                }
                outcome => return outcome,
            }
        }
    }

    fn prepare(&mut self) -> Result<(), KeyFileError> {
        self.connection.busy_timeout(BUSY_TIMEOUT).map_err(|error| self.fault(&error))?;
        self.attempt(|connection| {
            connection.pragma_update(None, "journal_mode", "wal")?;
            // In this mode the file stays whole whatever happens; a power cut can cost the latest usage.
            connection.pragma_update(None, "synchronous", "normal")?;
            connection.pragma_update(None, "foreign_keys", true)
        })?;
        let found = self.attempt(|connection| {
            // Of two processes that come to a new file, one makes the tables and one finds them.
            let transaction =
                connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
            let version: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
            if version == 0 {
                transaction.execute_batch(SCHEMA)?;
                transaction.pragma_update(None, "user_version", VERSION)?;
            }
            transaction.commit()?;
            Ok(version)
        })?;
        match found {
            0 | VERSION => Ok(()),
            found => Err(KeyFileError::Version { path: self.path.clone(), found }),
        }
    }

    /// Makes a key. It is returned and never shown again.
    ///
    /// # Errors
    /// If the name is taken or no name, or the file fails.
    pub fn add(&mut self, name: &str, rules: &KeyRules, now: u64) -> Result<NewKey, KeyFileError> {
        let is_name = |c: char| c.is_ascii_alphanumeric() || ".-_@".contains(c);
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.chars().all(is_name) {
            return Err(KeyFileError::Name(name.to_owned()));
        }
        let key = random_key();
        let hint: String = key.chars().take(KEY_PREFIX.len() + HINT_CHARS).collect();
        let insert =
            "INSERT INTO keys (name, hash, hint, lanes, requests, tokens, priority, created_at, expires_at)
                      VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)";
        let result = self.connection.execute(
            insert,
            params![
                name,
                hash(key.as_bytes()).as_slice(),
                hint,
                rules.lanes.to_string(),
                rules.requests.map(|budget| budget.to_string()),
                rules.tokens.map(|budget| budget.to_string()),
                priority_name(rules.priority),
                now as i64,
                rules.expires_at.map(|at| at as i64),
            ],
        );
        match result {
            Ok(_) => Ok(NewKey { key, name: name.to_owned() }),
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => {
                Err(KeyFileError::NameTaken(name.to_owned()))
            }
            Err(error) => Err(self.fault(&error)),
        }
    }

    /// Revokes the valid key of this name; it stays listed.
    ///
    /// # Errors
    /// If there is none, or the file fails.
    pub fn revoke(&mut self, name: &str, now: u64) -> Result<(), KeyFileError> {
        let count = self.attempt(|connection| {
            let update = "UPDATE keys SET revoked_at = ? WHERE name = ? AND revoked_at IS NULL";
            connection.execute(update, params![now as i64, name])
        })?;
        if count == 0 { Err(KeyFileError::Unknown(name.to_owned())) } else { Ok(()) }
    }

    /// Every key, the oldest first.
    ///
    /// # Errors
    /// If the file fails, or what it says of a key makes no sense.
    pub fn entries(&mut self) -> Result<Vec<KeyEntry>, KeyFileError> {
        let rows = self.rows()?;
        let damaged = |reason| KeyFileError::Damaged { path: self.path.clone(), reason };
        rows.into_iter().map(|row| row.map_err(damaged)).collect()
    }

    /// The keys of which everything makes sense. The others open nothing, and do not keep changes of these
    /// from being taken into use.
    ///
    /// # Errors
    /// If the file fails.
    pub(super) fn readable_entries(&mut self) -> Result<Vec<KeyEntry>, KeyFileError> {
        let rows = self.rows()?;
        let said =
            |reason: &String| tracing::warn!("a key in {} opens nothing: {reason}", self.path.display());
        Ok(rows.into_iter().filter_map(|row| row.inspect_err(said).ok()).collect())
    }

    /// True if another file has its name now.
    pub(super) fn is_replaced(&self) -> bool {
        let found = identity(&self.path);
        found.is_some() && found != self.identity
    }

    fn rows(&mut self) -> Result<Vec<Result<KeyEntry, String>>, KeyFileError> {
        self.attempt(|connection| {
            let mut statement = connection.prepare_cached(
                "SELECT id, name, hash, hint, lanes, keys.requests, keys.tokens, priority, created_at, expires_at,
                        revoked_at,
                        requests_window, usage.requests, tokens_window, usage.tokens, total_requests, total_tokens,
                        last_used_at
                 FROM keys LEFT JOIN usage ON usage.key = keys.id ORDER BY id",
            )?;
            statement.query_map([], |row| Ok(entry(row)))?.collect()
        })
    }

    /// A number that changes when another connection has changed the file.
    ///
    /// # Errors
    /// If the file fails.
    pub(super) fn version(&mut self) -> Result<i64, KeyFileError> {
        self.attempt(|connection| connection.pragma_query_value(None, "data_version", |row| row.get(0)))
    }

    /// Writes down what was used of keys.
    ///
    /// # Errors
    /// If the file fails; nothing is written then.
    pub(super) fn write_usage(&mut self, used: &[(i64, Used)]) -> Result<(), KeyFileError> {
        self.attempt(|connection| {
            let transaction =
                connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
            {
                // A row that somebody has deleted must not keep the others from being written.
                let mut statement = transaction.prepare_cached(
                    "INSERT OR REPLACE INTO usage SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8
                     WHERE EXISTS (SELECT 1 FROM keys WHERE id = ?1)",
                )?;
                for (key, used) in used {
                    statement.execute(params![
                        key,
                        used.requests_window as i64,
                        used.requests as i64,
                        used.tokens_window as i64,
                        used.tokens as i64,
                        used.total_requests as i64,
                        used.total_tokens as i64,
                        used.last_used_at as i64,
                    ])?;
                }
            }
            transaction.commit()
        })
    }

    fn attempt<T>(
        &mut self,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>,
    ) -> Result<T, KeyFileError> {
        let result = work(&mut self.connection);
        result.map_err(|error| self.fault(&error))
    }

    fn fault(&self, error: &rusqlite::Error) -> KeyFileError {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                KeyFileError::Busy(self.path.clone())
            }
            _ => KeyFileError::Damaged { path: self.path.clone(), reason: error.to_string() },
        }
    }
}

/// Makes sure that nobody else can read the file, before there is anything in it.
#[cfg(unix)]
fn private(path: &Path, make: bool) -> Result<(), KeyFileError> {
    use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
    let file = std::fs::OpenOptions::new().read(true).write(true).create(make).mode(0o600).open(path);
    let mode = file.and_then(|file| file.metadata()).map_err(|error| KeyFileError::Open {
        path: path.to_owned(),
        reason: match error.kind() {
            std::io::ErrorKind::NotFound if !make => {
                "there is none; `tandem keys add NAME` makes it".to_owned()
            }
            _ => error.to_string(),
        },
    })?;
    match mode.permissions().mode() & 0o777 {
        mode if mode & 0o077 != 0 => Err(KeyFileError::Mode { path: path.to_owned(), mode }),
        _ => Ok(()),
    }
}

#[cfg(not(unix))]
fn private(_path: &Path, _make: bool) -> Result<(), KeyFileError> {
    Ok(())
}

#[cfg(unix)]
fn identity(path: &Path) -> Option<Identity> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

#[cfg(not(unix))]
fn identity(_path: &Path) -> Option<Identity> {
    None
}

fn priority_name(priority: Priority) -> &'static str {
    match priority {
        Priority::Interactive => "interactive",
        Priority::Batch => "batch",
    }
}

fn entry(row: &Row<'_>) -> Result<KeyEntry, String> {
    let read = || -> rusqlite::Result<_> {
        let texts: (String, String, String, String) = (row.get(1)?, row.get(3)?, row.get(4)?, row.get(7)?);
        let budgets: (Option<String>, Option<String>) = (row.get(5)?, row.get(6)?);
        let times: (i64, Option<i64>, Option<i64>) = (row.get(8)?, row.get(9)?, row.get(10)?);
        let count = |column: usize| row.get::<_, Option<i64>>(column).map(|n| n.unwrap_or(0).max(0) as u64);
        let used = Used {
            requests_window: count(11)?,
            requests: count(12)?,
            tokens_window: count(13)?,
            tokens: count(14)?,
            total_requests: count(15)?,
            total_tokens: count(16)?,
            last_used_at: count(17)?,
        };
        Ok((row.get::<_, i64>(0)?, texts, row.get::<_, [u8; 32]>(2)?, budgets, times, used))
    };
    let (id, (name, hint, lanes, priority), hash, (requests, tokens), times, used) =
        read().map_err(|error| error.to_string())?;
    let budget = |text: Option<String>| text.map(|text| text.parse::<Budget>()).transpose();
    let rules = KeyRules {
        lanes: lanes.parse::<Lanes>()?,
        requests: budget(requests)?,
        tokens: budget(tokens)?,
        priority: match priority.as_str() {
            "batch" => Priority::Batch,
            "interactive" => Priority::Interactive,
            other => return Err(format!("the key {name:?} has priority {other:?}")),
        },
        expires_at: times.1.map(|at| at.max(0) as u64),
    };
    let revoked_at = times.2.map(|at| at.max(0) as u64);
    Ok(KeyEntry { id, name, hint, rules, created_at: times.0.max(0) as u64, revoked_at, used, hash })
}

impl KeyFile {
    /// The entry of the valid key with this name, if there is one.
    ///
    /// # Errors
    /// If the file fails.
    pub fn find(&mut self, name: &str) -> Result<Option<KeyEntry>, KeyFileError> {
        let id: Option<i64> = self.attempt(|connection| {
            let select = "SELECT id FROM keys WHERE name = ? AND revoked_at IS NULL";
            connection.query_row(select, [name], |row| row.get(0)).optional()
        })?;
        Ok(self.entries()?.into_iter().find(|entry| Some(entry.id) == id))
    }
}
