//! Reading small untrusted files whole, with a limit.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::ModelError;

/// The content of `path`, which must be UTF-8 and at most `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, ModelError> {
    let io = |source| ModelError::io(path, source);
    let mut text = String::new();
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.is_dir() {
        return Err(io(std::io::ErrorKind::IsADirectory.into()));
    }
    file.take(limit + 1).read_to_string(&mut text).map_err(io)?;
    if text.len() as u64 > limit {
        let message = format!("longer than the {limit} bytes allowed for this file");
        return Err(io(std::io::Error::new(std::io::ErrorKind::FileTooLarge, message)));
    }
    Ok(text)
}

/// The JSON in `path`, which must be at most `limit` bytes.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path, limit: u64) -> Result<T, ModelError> {
    let text = read_text(path, limit)?;
    serde_json::from_str(&text).map_err(|source| ModelError::json(path, source))
}
