//! GGUF, the one-file format of llama.cpp: metadata, tokenizer and tensors. Versions 2 and 3,
//! memory-mapped; a model split over several files is opened by any one of them.
//! Source: the format's specification, ggml's `docs/gguf.md`.
//!
//! The file is untrusted. `header` checks every count, length, shape and offset against the bytes
//! that are there before it believes them, and allocates for what it has read, never for what is
//! claimed. Afterwards a view is a slice of the mapping. Opening costs one walk over the header (the
//! vocabulary in it is a few megabytes); weights are paged in when first read.
//!
//! `candle_core` has a reader too. It multiplies shapes and adds offsets without a check, allocates by
//! the stated counts, copies every tensor, and lacks IQ4_NL, IQ4_XS and MXFP4; so this one is ours.

mod convert;
mod file_type;
mod header;
mod store;
mod types;
mod value;
mod write;

use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::TensorView;
use super::map::{map_file, release};
use crate::ModelError;
pub(crate) use convert::write_as;
pub use convert::{ConvertError, convert};
pub use file_type::{FileType, Place};
use header::Header;
pub use store::{GgufStore, is_later_part, open_first_part};
use value::Stored;
pub use value::{Array, Value, ValueType};
pub use write::{ArrayValues, GgufBuilder, GgufWriter};

/// One mapped and checked file.
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    header: Header,
}

impl GgufFile {
    /// Maps and checks `path`.
    ///
    /// # Errors
    /// If it cannot be read, is no GGUF file of version 2 or 3, or is damaged.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let map = map_file(path, header::MIN_BYTES as u64, "GGUF")?;
        let header = header::parse(&map).map_err(|reason| ModelError::weights(path, reason))?;
        Ok(GgufFile { path: path.to_owned(), map, header })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The format's version.
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// The keys of the metadata, sorted.
    pub fn keys(&self) -> Vec<&str> {
        let mut keys: Vec<&str> = self.header.metadata.keys().map(String::as_str).collect();
        keys.sort_unstable();
        keys
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        self.header.metadata.get(key).map(|stored| stored.read(&self.map))
    }

    /// The bytes of the value at `key` as they lie in the file, with its type and that of its elements (its
    /// own if it is no array); a string without its length, an array without its type and length.
    fn raw(&self, key: &str) -> Option<(ValueType, ValueType, &[u8])> {
        let (kind, element, bytes) = match self.header.metadata.get(key)? {
            Stored::Scalar { kind, bytes } => (*kind, *kind, bytes),
            Stored::String(bytes) => (ValueType::String, ValueType::String, bytes),
            Stored::Array { kind, bytes, .. } => (ValueType::Array, *kind, bytes),
        };
        Some((kind, element, &self.map[bytes.clone()]))
    }

    /// The names of the tensors, sorted.
    pub fn tensor_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.header.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// True if there is a tensor `name`.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.header.tensors.contains_key(name)
    }

    /// A view of tensor `name`, or `None` if there is none.
    ///
    /// # Errors
    /// If it is of a type that is not read.
    pub fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>, ModelError> {
        let Some(entry) = self.header.tensors.get(name) else { return Ok(None) };
        let dtype = entry.kind.dtype().map_err(|found| {
            let supported = types::supported_names();
            self.error(format!("tensor `{name}` has element type {found}; supported are {supported}"))
        })?;
        Ok(Some(TensorView { dtype, shape: entry.shape(), data: &self.map[entry.bytes.clone()] }))
    }

    /// Takes the pages that were read out of this process.
    fn release(&self) {
        release(&self.map);
    }

    /// The string at `key`, if there is one.
    ///
    /// # Errors
    /// If the value is of another type or not UTF-8.
    pub fn string(&self, key: &str) -> Result<Option<&str>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(bytes)) => {
                std::str::from_utf8(bytes).map(Some).map_err(|_| self.wrong(key, "a string in UTF-8"))
            }
            Some(_) => Err(self.wrong(key, "a string")),
        }
    }

    /// The bool at `key`, if there is one.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(self.wrong(key, "a bool")),
        }
    }

    /// The number at `key`, if there is one that fits u64.
    ///
    /// # Errors
    /// If the value is of another type or negative.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Int(value)) if u64::try_from(value).is_ok() => Ok(Some(value as u64)),
            Some(_) => Err(self.wrong(key, "an integer from 0")),
        }
    }

    /// The array at `key`, if there is one, with elements of type `kind`.
    ///
    /// # Errors
    /// If the value is of another type.
    pub fn array(&self, key: &str, kind: ValueType) -> Result<Option<Array<'_>>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) if array.kind() == kind => Ok(Some(array)),
            Some(_) => Err(self.wrong(key, &format!("an array of {}", kind.name()))),
        }
    }

    /// The error that `key` is not `wanted`.
    pub(crate) fn wrong(&self, key: &str, wanted: &str) -> ModelError {
        let found = self.get(key).map_or_else(|| "absent".to_owned(), describe);
        let (key, wanted) = (key.to_owned(), wanted.to_owned());
        ModelError::Config { path: self.path.clone(), key, found, wanted }
    }

    fn error(&self, reason: String) -> ModelError {
        ModelError::weights(&self.path, reason)
    }
}

impl std::fmt::Debug for GgufFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GgufFile")
            .field("path", &self.path)
            .field("version", &self.header.version)
            .field("keys", &self.header.metadata.len())
            .field("tensors", &self.header.tensors.len())
            .finish()
    }
}

/// True if `path` is named like a GGUF file.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// A value for an error message: short, whatever the file holds.
fn describe(value: Value<'_>) -> String {
    const MAX_CHARS: usize = 60;
    match value {
        Value::Int(value) => value.to_string(),
        Value::Float(value) => value.to_string(),
        Value::Bool(value) => value.to_string(),
        Value::String(bytes) => {
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * MAX_CHARS)]);
            let short: String = text.chars().take(MAX_CHARS).collect();
            format!("{short:?}{}", if short.len() < bytes.len() { "..." } else { "" })
        }
        Value::Array(array) => format!("an array of {} {}", array.len(), array.kind().name()),
    }
}
