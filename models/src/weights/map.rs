//! The one place that maps files into memory.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::ModelError;

/// Maps `path`, which must be a regular file of at least `min_bytes` bytes; `format` names what it
/// should be, for the message.
#[allow(unsafe_code)]
pub(super) fn map_file(path: &Path, min_bytes: u64, format: &str) -> Result<Mmap, ModelError> {
    let file = File::open(path).map_err(|source| ModelError::io(path, source))?;
    let metadata = file.metadata().map_err(|source| ModelError::io(path, source))?;
    if !metadata.is_file() {
        return Err(ModelError::weights(path, "is not a regular file"));
    }
    if metadata.len() < min_bytes {
        return Err(ModelError::weights(
            path,
            format!("is {} bytes long, too short for a {format} header; is it truncated?", metadata.len()),
        ));
    }
    // SAFETY: the mapping is read-only (and shared: `MAP_SHARED`, which copies no page), it is read only as
    // bytes (or as integers and floats of which every bit pattern is valid), and all lengths are taken from the
    // mapping itself, never again from the file. What no reader of a mapped file can rule out is another process that
    // writes to or truncates the file meanwhile: then values change or the process is killed by
    // SIGBUS. As with every mapped-weights server, the documented rule is to replace a checkpoint by
    // renaming a new file over it (which leaves this mapping on the old one), never in place.
    unsafe { Mmap::map(&file) }.map_err(|source| ModelError::io(path, source))
}

/// Takes the pages that were read out of this process. They stay in the system's file cache and come back when
/// they are read again; until then they do not count as this process's memory beside what was made of them.
#[cfg(unix)]
#[allow(unsafe_code)]
pub(super) fn release(map: &Mmap) {
    // SAFETY: there are borrows of the mapping while this runs (the caller's, at least; views of tensors, too), so
    // no byte may change under them, and none does. The mapping is `Mmap::map`'s: of a file, shared and read-only, so
    // that it has no page of its own which could be lost. `MADV_DONTNEED` drops its entries in this process's page
    // table and nothing else; addresses stay mapped, and a later read faults in the same page of the file, with the
    // same bytes as long as nobody modifies the file, which `map_file` relies on anyway.
    // A system that refuses keeps them, which costs nothing but the count.
    let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
}

#[cfg(not(unix))]
pub(super) fn release(_map: &Mmap) {}
