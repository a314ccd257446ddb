//! Writes GGUF files (version 3): first the metadata and the table of tensors, then the tensors' bytes one
//! after another, streamed, so that a file of any size costs the memory of its header.

use std::io::{self, Write};

use super::header::{DEFAULT_ALIGNMENT, MAGIC};
use super::types::type_id;
use super::value::{Value, ValueType};
use super::{Array, GgufFile};
use crate::weights::Dtype;

/// What a file will say about itself and hold.
#[derive(Debug, Default)]
pub struct GgufBuilder {
    num_keys: u64,
    metadata: Vec<u8>,
    tensors: Vec<(String, Dtype, Vec<usize>)>,
}

/// An array of metadata.
#[derive(Clone, Copy, Debug)]
pub enum ArrayValues<'a> {
    /// Strings.
    Strings(&'a [String]),
    /// i32.
    I32(&'a [i32]),
    /// f32.
    F32(&'a [f32]),
}

impl GgufBuilder {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn key(&mut self, key: &str, kind: ValueType) -> &mut Vec<u8> {
        self.num_keys += 1;
        put_string(&mut self.metadata, key.as_bytes());
        self.metadata.extend(kind.id().to_le_bytes());
        &mut self.metadata
    }

    /// Adds a string.
    pub fn string(&mut self, key: &str, value: &str) -> &mut Self {
        put_string(self.key(key, ValueType::String), value.as_bytes());
        self
    }

    /// Adds a u32, which is what readers expect of sizes and token ids.
    pub fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.key(key, ValueType::U32).extend(value.to_le_bytes());
        self
    }

    /// Adds an f32.
    pub fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.key(key, ValueType::F32).extend(value.to_le_bytes());
        self
    }

    /// Adds a bool.
    pub fn bool(&mut self, key: &str, value: bool) -> &mut Self {
        self.key(key, ValueType::Bool).push(value.into());
        self
    }

    /// Adds an array.
    pub fn array(&mut self, key: &str, values: ArrayValues<'_>) -> &mut Self {
        let (kind, len) = match values {
            ArrayValues::Strings(values) => (ValueType::String, values.len()),
            ArrayValues::I32(values) => (ValueType::I32, values.len()),
            ArrayValues::F32(values) => (ValueType::F32, values.len()),
        };
        let out = self.key(key, ValueType::Array);
        out.extend(kind.id().to_le_bytes());
        out.extend((len as u64).to_le_bytes());
        match values {
            ArrayValues::Strings(values) => values.iter().for_each(|value| put_string(out, value.as_bytes())),
            ArrayValues::I32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
            ArrayValues::F32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        }
        self
    }

    /// Adds the value that `file` has at `key`, byte for byte, if there is one.
    pub fn copy(&mut self, file: &GgufFile, key: &str) -> &mut Self {
        let Some((kind, element, bytes)) = file.raw(key) else { return self };
        let value = file.get(key);
        let out = self.key(key, kind);
        match (kind, value) {
            (ValueType::String, _) => put_string(out, bytes),
            (ValueType::Array, Some(Value::Array(array))) => {
                out.extend(element.id().to_le_bytes());
                out.extend((Array::len(&array) as u64).to_le_bytes());
                out.extend_from_slice(bytes);
            }
            _ => out.extend_from_slice(bytes),
        }
        self
    }

    /// Declares the next tensor; `shape` is outermost first.
    ///
    /// # Panics
    /// If a row is not whole blocks of `dtype`.
    pub fn tensor(&mut self, name: &str, dtype: Dtype, shape: &[usize]) -> &mut Self {
        let row = shape.last().copied().unwrap_or(1);
        assert!(
            row.is_multiple_of(dtype.block_len()),
            "rows of {row} are not whole blocks of {}",
            dtype.name()
        );
        self.tensors.push((name.to_owned(), dtype, shape.to_vec()));
        self
    }

    /// Writes the header to `out`. The tensors' bytes follow, in the order in which they were declared.
    ///
    /// # Errors
    /// If `out` fails.
    pub fn begin<W: Write>(self, mut out: W) -> io::Result<GgufWriter<W>> {
        let mut header = MAGIC.to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend(self.num_keys.to_le_bytes());
        header.extend(self.metadata);
        let mut sizes = Vec::with_capacity(self.tensors.len());
        let mut offset = 0usize;
        for (name, dtype, shape) in &self.tensors {
            put_string(&mut header, name.as_bytes());
            header.extend((shape.len() as u32).to_le_bytes());
            header.extend(shape.iter().rev().flat_map(|&extent| (extent as u64).to_le_bytes()));
            header.extend(type_id(*dtype).to_le_bytes());
            header.extend((offset as u64).to_le_bytes());
            let size = shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
            let size = size.and_then(|elements| dtype.bytes_for(elements)).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, format!("tensor {name} is too large"))
            })?;
            sizes.push(size);
            offset += size.next_multiple_of(DEFAULT_ALIGNMENT);
        }
        header.resize(header.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
        out.write_all(&header)?;
        sizes.reverse();
        Ok(GgufWriter { out, sizes, left: 0, padding: 0 })
    }
}

/// A file whose header is written and whose tensors are being.
#[derive(Debug)]
pub struct GgufWriter<W> {
    out: W,
    /// Sizes of the tensors that have not begun, the next one last.
    sizes: Vec<usize>,
    /// Bytes that the current tensor lacks.
    left: usize,
    /// Zeros after it.
    padding: usize,
}

impl<W: Write> GgufWriter<W> {
    /// Appends to the current tensor; begins the next one when that is complete.
    ///
    /// # Errors
    /// If the output fails.
    ///
    /// # Panics
    /// If `bytes` go beyond the end of the tensor.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if self.left == 0 {
            self.left = self.sizes.pop().expect("no tensor was declared for these bytes: this is a bug");
            self.padding = self.left.next_multiple_of(DEFAULT_ALIGNMENT) - self.left;
        }
        self.left = self.left.checked_sub(bytes.len()).expect("a tensor gets too many bytes: this is a bug");
        self.out.write_all(bytes)?;
        if self.left == 0 {
            self.out.write_all(&[0; DEFAULT_ALIGNMENT][..self.padding])?;
        }
        Ok(())
    }

    /// Ends the file and returns the output, flushed.
    ///
    /// # Errors
    /// If the output fails.
    ///
    /// # Panics
    /// If a tensor lacks bytes.
    pub fn finish(mut self) -> io::Result<W> {
        assert!(self.left == 0 && self.sizes.is_empty(), "a tensor lacks bytes: this is a bug");
        self.out.flush()?;
        Ok(self.out)
    }
}

fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text);
}
