//! Parses a GGUF header: the metadata and the tensor table. Everything in it is a claim: a count is
//! held against the bytes that are left before it is believed, a length before it is skipped, a
//! tensor's extent against the file's before it gets an entry. Tables grow as entries are read, never
//! by a stated count.

use std::collections::HashMap;
use std::ops::Range;

use super::types::TensorType;
use super::value::{Stored, ValueType};

pub(super) const MAGIC: &[u8; 4] = b"GGUF";
/// Magic, version, two counts.
pub(super) const MIN_BYTES: usize = 4 + 4 + 8 + 8;
pub(super) const DEFAULT_ALIGNMENT: usize = 32;
pub(super) const ALIGNMENT_KEY: &str = "general.alignment";

/// Several times the largest published file's: 60 to 100 keys; about 1,100 tensors (DeepSeek-V3).
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 16;
/// The format's own limit.
const MAX_KEY_BYTES: usize = (1 << 16) - 1;
/// The format allows 64; files with somewhat longer names are in use.
const MAX_NAME_BYTES: usize = 1 << 10;
const MAX_DIMS: u32 = 4;
const MAX_ALIGNMENT: usize = 1 << 20;

/// A parsed header. All ranges lie within the file.
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) metadata: HashMap<String, Stored>,
    pub(super) tensors: HashMap<String, Entry>,
}

/// A tensor's place and form.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) kind: TensorType,
    shape: [usize; MAX_DIMS as usize],
    num_dims: usize,
    /// Where its bytes lie; for a type that we cannot read, where they start and the file ends.
    pub(super) bytes: Range<usize>,
}

impl Entry {
    /// Extents, outermost first (a file has them innermost first).
    pub(super) fn shape(&self) -> &[usize] {
        &self.shape[..self.num_dims]
    }
}

/// Parses the header of `file`. The error says what is wrong, without the file's name.
pub(super) fn parse(file: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor { file, at: 0 };
    let version = read_version(&mut cursor)?;
    let num_tensors = cursor.u64("the number of tensors")?;
    let num_keys = cursor.u64("the number of metadata keys")?;
    for (what, count, max) in [("metadata keys", num_keys, MAX_KEYS), ("tensors", num_tensors, MAX_TENSORS)] {
        if count > max {
            return Err(format!("says it has {count} {what}; wanted at most {max}; it is damaged"));
        }
    }
    let mut metadata = HashMap::new();
    for _ in 0..num_keys {
        let key = cursor.name("a metadata key", MAX_KEY_BYTES)?;
        let value = read_value(&mut cursor, &key)?;
        if metadata.contains_key(&key) {
            return Err(format!("has the metadata key `{key}` twice"));
        }
        metadata.insert(key, value);
    }
    let alignment = read_alignment(file, &metadata)?;
    let mut infos = Vec::new();
    for _ in 0..num_tensors {
        infos.push(read_info(&mut cursor)?);
    }
    let data_start = cursor
        .at
        .checked_next_multiple_of(alignment)
        .filter(|start| *start <= file.len() || infos.is_empty())
        .ok_or_else(|| "ends before its tensor data begins; it is truncated".to_owned())?;
    let mut tensors = HashMap::new();
    for info in infos {
        let name = info.name.clone();
        let entry = place(info, data_start, alignment, file.len())?;
        if tensors.contains_key(&name) {
            return Err(format!("has the tensor `{name}` twice"));
        }
        tensors.insert(name, entry);
    }
    Ok(Header { version, metadata, tensors })
}

fn read_version(cursor: &mut Cursor<'_>) -> Result<u32, String> {
    let magic = cursor.take(4, "its magic number")?;
    if magic != MAGIC {
        return Err(format!("begins with {magic:02X?}; wanted {MAGIC:02X?} (\"GGUF\"): it is no GGUF file"));
    }
    match cursor.u32("its version")? {
        version @ (2 | 3) => Ok(version),
        version if matches!(version.swap_bytes(), 1..=3) => {
            Err("is a big-endian GGUF file; wanted a little-endian one".to_owned())
        }
        version => Err(format!("is GGUF version {version}; wanted 2 or 3: convert the model again")),
    }
}

fn read_value(cursor: &mut Cursor<'_>, key: &str) -> Result<Stored, String> {
    let kind = read_kind(cursor, key)?;
    let what = || format!("the value of `{key}`");
    Ok(match kind {
        ValueType::String => Stored::String(cursor.string(&what())?),
        ValueType::Array => {
            let element = read_kind(cursor, key)?;
            let claimed = cursor.u64(&what())?;
            let start = cursor.at;
            let too_long =
                || format!("says that `{key}` has {claimed} elements, more than the file can hold");
            // An element has at least one byte, so this bounds the loop below too.
            let len =
                usize::try_from(claimed).ok().filter(|len| *len <= cursor.left()).ok_or_else(too_long)?;
            match element.size_bytes() {
                Some(size) => {
                    cursor.take(len.checked_mul(size).ok_or_else(too_long)?, &what())?;
                }
                None if element == ValueType::Array => {
                    return Err(format!("has arrays of arrays in `{key}`; wanted scalars or strings"));
                }
                None => {
                    for _ in 0..len {
                        cursor.string(&what())?;
                    }
                }
            }
            Stored::Array { kind: element, len, bytes: start..cursor.at }
        }
        scalar => {
            let start = cursor.at;
            cursor.take(scalar.size_bytes().unwrap_or(0), &what())?;
            Stored::Scalar { kind: scalar, bytes: start..cursor.at }
        }
    })
}

fn read_kind(cursor: &mut Cursor<'_>, key: &str) -> Result<ValueType, String> {
    let id = cursor.u32(&format!("the type of `{key}`"))?;
    ValueType::from_id(id).ok_or_else(|| format!("gives `{key}` the type {id}; wanted 0 to 12"))
}

fn read_alignment(file: &[u8], metadata: &HashMap<String, Stored>) -> Result<usize, String> {
    let Some(stored) = metadata.get(ALIGNMENT_KEY) else { return Ok(DEFAULT_ALIGNMENT) };
    match stored.read(file) {
        super::Value::Int(value) => usize::try_from(value).ok(),
        _ => None,
    }
    .filter(|alignment| alignment.is_power_of_two() && *alignment <= MAX_ALIGNMENT)
    .ok_or_else(|| format!("has a bad `{ALIGNMENT_KEY}`; wanted a power of two up to {MAX_ALIGNMENT}"))
}

/// A tensor as the table describes it.
struct Info {
    name: String,
    /// Innermost first.
    extents: [u64; MAX_DIMS as usize],
    num_dims: usize,
    type_id: u32,
    offset: u64,
}

fn read_info(cursor: &mut Cursor<'_>) -> Result<Info, String> {
    let name = cursor.name("a tensor's name", MAX_NAME_BYTES)?;
    let what = format!("tensor `{name}`");
    let num_dims = cursor.u32(&what)?;
    if num_dims > MAX_DIMS {
        return Err(format!("gives {what} {num_dims} dimensions; wanted at most {MAX_DIMS}"));
    }
    let mut extents = [0; MAX_DIMS as usize];
    for extent in &mut extents[..num_dims as usize] {
        *extent = cursor.u64(&what)?;
    }
    let type_id = cursor.u32(&what)?;
    let offset = cursor.u64(&what)?;
    Ok(Info { name, extents, num_dims: num_dims as usize, type_id, offset })
}

/// Checks that the tensor lies in the file with the bytes its shape and type need.
fn place(info: Info, data_start: usize, alignment: usize, file_len: usize) -> Result<Entry, String> {
    let name = &info.name;
    let extents = &info.extents[..info.num_dims];
    let overflow = || format!("gives tensor `{name}` the shape {extents:?}, whose size overflows");
    let num_elements = extents
        .iter()
        .try_fold(1usize, |product, &extent| product.checked_mul(usize::try_from(extent).ok()?))
        .ok_or_else(overflow)?;
    if num_elements == 0 {
        return Err(format!("gives tensor `{name}` the shape {extents:?}; wanted no extent of 0"));
    }
    if !info.offset.is_multiple_of(alignment as u64) {
        return Err(format!(
            "places tensor `{name}` at offset {}; wanted a multiple of the alignment {alignment}",
            info.offset
        ));
    }
    let kind = TensorType::from_id(info.type_id);
    let row = extents.first().map_or(1, |&extent| extent as usize);
    let size_bytes = match kind.bytes_for(row, num_elements) {
        None if kind.dtype().is_ok() && row.is_multiple_of(kind.block_len()) => return Err(overflow()),
        None if kind.dtype().is_ok() => {
            return Err(format!(
                "gives tensor `{name}` of type {} rows of {row} elements; wanted whole blocks of {}",
                kind.name(),
                kind.block_len()
            ));
        }
        size => size.unwrap_or(0),
    };
    let start = usize::try_from(info.offset).ok().and_then(|offset| data_start.checked_add(offset));
    let end = start.and_then(|start| start.checked_add(size_bytes)).filter(|end| *end <= file_len);
    let (Some(start), Some(end)) = (start, end) else {
        return Err(format!(
            "places the {size_bytes} bytes of tensor `{name}` at offset {} of its data, beyond the end of \
             the file ({file_len} bytes, data from {data_start}); it is truncated or damaged",
            info.offset
        ));
    };
    let mut shape = [0; MAX_DIMS as usize];
    for (to, &from) in shape.iter_mut().zip(extents.iter().rev()) {
        *to = from as usize;
    }
    Ok(Entry { kind, shape, num_dims: info.num_dims, bytes: start..end })
}

/// A position in the file. Every read is checked; errors say what was being read.
struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], String> {
        let bytes = self.file[self.at..].get(..len).ok_or_else(|| {
            format!(
                "ends in {what}: {len} bytes are wanted at byte {}, {} are left; it is truncated or damaged",
                self.at,
                self.left()
            )
        })?;
        self.at += len;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        let bytes = self.take(4, what)?;
        Ok(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte)))
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        let bytes = self.take(8, what)?;
        Ok(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    /// The place of a string's bytes.
    fn string(&mut self, what: &str) -> Result<Range<usize>, String> {
        let len = self.u64(what)?;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let start = self.at;
        self.take(len, what)?;
        Ok(start..self.at)
    }

    /// A string of 1 to `max_bytes` bytes that is UTF-8.
    fn name(&mut self, what: &str, max_bytes: usize) -> Result<String, String> {
        let at = self.at;
        let bytes = &self.file[self.string(what)?];
        let name = std::str::from_utf8(bytes).ok().filter(|name| (1..=max_bytes).contains(&name.len()));
        name.map(str::to_owned).ok_or_else(|| {
            format!(
                "has {what} of {} bytes at byte {at} that is empty, too long or not UTF-8; wanted UTF-8 of \
                 at most {max_bytes} bytes",
                bytes.len()
            )
        })
    }
}
