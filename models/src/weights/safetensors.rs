//! Memory-mapped safetensors: one file, or shards named by `model.safetensors.index.json`.
//!
//! The files are untrusted. Before anything is allocated or handed out, the header's length is held
//! against the file's, and the tensors must tile the data section exactly: no gap, no overlap, no
//! byte past the end, every shape's product equal to its bytes. Afterwards a view is a slice of the
//! mapping and cannot fail. Opening costs the header's parse; weights are paged in when first read.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::map::{map_file, release};
use super::{Dtype, TensorView, WeightStore};
use crate::ModelError;
use crate::files::read_json;

/// The unsharded file's name.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// The name of the file that lists the shards.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// The header's length precedes it as a little-endian u64.
const LENGTH_BYTES: usize = 8;
/// The format's own limit; the largest real headers are about 1 MB.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// An index has one short line a tensor.
const MAX_INDEX_BYTES: u64 = 100_000_000;

/// The tensors of a checkpoint folder, memory-mapped.
pub struct SafetensorsStore {
    /// What errors name: the file, or the index of the shards.
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: HashMap<String, Entry>,
}

struct Shard {
    path: PathBuf,
    map: Mmap,
}

/// Invariant: `start..end` lies within the shard's mapping and is `shape`'s product in bytes.
struct Entry {
    shard: usize,
    /// `Err` holds the format's name of a type that we do not read; it is reported when asked for, so
    /// that a stray integer buffer does not spoil a checkpoint.
    dtype: Result<Dtype, String>,
    stored: safetensors::Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// A tensor of any type that the format has; `data` is `shape`'s product in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Raw<'a> {
    pub(super) dtype: safetensors::Dtype,
    pub(super) shape: &'a [usize],
    pub(super) data: &'a [u8],
}

impl<'a> Raw<'a> {
    /// The tensor if it is of floats that are read as they are.
    pub(super) fn floats(&self) -> Option<TensorView<'a>> {
        let dtype = supported_dtype(self.dtype).ok()?;
        Some(TensorView { dtype, shape: self.shape, data: self.data })
    }
}

impl SafetensorsStore {
    /// Maps `model.safetensors` of `dir`, or else the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// If neither exists, a shard is missing or lies outside `dir`, or any file is damaged.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let single = dir.join(SINGLE_FILE);
        if single.exists() {
            return Self::open_file(&single);
        }
        let index = dir.join(INDEX_FILE);
        if index.exists() {
            return Self::open_sharded(dir, index);
        }
        Err(ModelError::weights(
            dir,
            format!(
                "holds neither {SINGLE_FILE} nor {INDEX_FILE}; weights in other formats \
                 (.bin, .pth) must be converted to safetensors first"
            ),
        ))
    }

    /// Maps one file.
    ///
    /// # Errors
    /// If it cannot be read or is damaged.
    pub fn open_file(path: &Path) -> Result<Self, ModelError> {
        let mut store = SafetensorsStore { path: path.to_owned(), shards: vec![], tensors: HashMap::new() };
        store.add_shard(path)?;
        Ok(store)
    }

    /// What errors name.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Tensor `name` of whatever type, if there is one.
    pub(super) fn raw(&self, name: &str) -> Option<Raw<'_>> {
        let entry = self.tensors.get(name)?;
        let data = &self.shards[entry.shard].map[entry.start..entry.end];
        Some(Raw { dtype: entry.stored, shape: &entry.shape, data })
    }

    /// The elements of tensor `name`, if there is one.
    ///
    /// # Errors
    /// If they are not 32-bit or 64-bit integers.
    pub(crate) fn integers(&self, name: &str) -> Result<Option<Vec<i64>>, ModelError> {
        let Some(Raw { dtype, data, .. }) = self.raw(name) else { return Ok(None) };
        match dtype {
            safetensors::Dtype::I64 => {
                Ok(Some(data.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()))
            }
            safetensors::Dtype::I32 => {
                Ok(Some(data.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes).into()).collect()))
            }
            other => {
                let reason = format!("tensor `{name}` has element type {other}; wanted I64 or I32");
                Err(ModelError::weights(&self.path, reason))
            }
        }
    }

    fn open_sharded(dir: &Path, index: PathBuf) -> Result<Self, ModelError> {
        let weight_map = read_index(&index)?;
        let files: BTreeSet<&String> = weight_map.values().collect();
        let mut store = SafetensorsStore { path: index, shards: vec![], tensors: HashMap::new() };
        for file in files {
            store.add_shard(&dir.join(file))?;
        }
        for (name, file) in &weight_map {
            let held_by = store.tensors.get(name).map(|entry| &store.shards[entry.shard].path);
            if held_by.is_none_or(|path| path.file_name() != Some(file.as_ref())) {
                return Err(ModelError::weights(
                    &store.path,
                    format!("says that tensor `{name}` is in {file}, but it is not"),
                ));
            }
        }
        Ok(store)
    }

    fn add_shard(&mut self, path: &Path) -> Result<(), ModelError> {
        let map = map_file(path, LENGTH_BYTES as u64 + 1, "safetensors")?;
        let (data_start, tensors) = read_header(path, &map)?;
        let shard = self.shards.len();
        for (name, info) in tensors {
            let entry = Entry {
                shard,
                dtype: supported_dtype(info.dtype),
                stored: info.dtype,
                shape: info.shape,
                start: data_start + info.data_offsets.0,
                end: data_start + info.data_offsets.1,
            };
            if let Some(earlier) = self.tensors.insert(name.clone(), entry) {
                let other = self.shards[earlier.shard].path.display();
                return Err(ModelError::weights(path, format!("tensor `{name}` is also in {other}")));
            }
        }
        self.shards.push(Shard { path: path.to_owned(), map });
        Ok(())
    }
}

impl WeightStore for SafetensorsStore {
    fn release(&self) {
        self.shards.iter().for_each(|shard| release(&shard.map));
    }

    fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        let entry = self.tensors.get(name).ok_or_else(|| ModelError::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
            num_tensors: self.tensors.len(),
        })?;
        let shard = &self.shards[entry.shard];
        let dtype = entry.dtype.clone().map_err(|found| {
            ModelError::weights(
                &shard.path,
                format!("tensor `{name}` has element type {found}; supported are F32, F16 and BF16"),
            )
        })?;
        Ok(TensorView { dtype, shape: &entry.shape, data: &shard.map[entry.start..entry.end] })
    }

    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors.keys().cloned().collect();
        names.sort_unstable();
        names
    }
}

fn supported_dtype(dtype: safetensors::Dtype) -> Result<Dtype, String> {
    match dtype {
        safetensors::Dtype::F32 => Ok(Dtype::F32),
        safetensors::Dtype::F16 => Ok(Dtype::F16),
        safetensors::Dtype::BF16 => Ok(Dtype::Bf16),
        other => Err(other.to_string()),
    }
}

#[derive(Deserialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    _metadata: Option<IgnoredAny>,
    #[serde(flatten)]
    tensors: BTreeMap<String, TensorInfo>,
}

/// Where the data section starts in `file`, and the tensors in it, checked to tile it.
///
/// The crate's own `read_metadata` checks the same, but adds untrusted offsets without a check for
/// overflow and does not say which tensor is at fault.
fn read_header(path: &Path, file: &[u8]) -> Result<(usize, BTreeMap<String, TensorInfo>), ModelError> {
    let error = |reason: String| ModelError::weights(path, reason);
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(error("is too short for a safetensors header".to_owned()));
    };
    let header_len = u64::from_le_bytes(*length);
    if header_len > rest.len() as u64 {
        return Err(error(format!(
            "says its header is {header_len} bytes long, but only {} bytes follow; it is truncated or not \
             a safetensors file",
            rest.len()
        )));
    }
    if header_len > MAX_HEADER_BYTES {
        return Err(error(format!(
            "has a header of {header_len} bytes; the format allows {MAX_HEADER_BYTES}"
        )));
    }
    let (header, data) = rest.split_at(header_len as usize);
    let header: Header =
        serde_json::from_slice(header).map_err(|source| error(format!("has a damaged header: {source}")))?;
    check_layout(&header.tensors, data.len()).map_err(error)?;
    Ok((LENGTH_BYTES + header_len as usize, header.tensors))
}

fn check_layout(tensors: &BTreeMap<String, TensorInfo>, data_len: usize) -> Result<(), String> {
    let mut in_file_order: Vec<(&String, &TensorInfo)> = tensors.iter().collect();
    in_file_order.sort_by_key(|(_, info)| info.data_offsets);
    let mut expected_start = 0;
    for (name, info) in in_file_order {
        let (start, end) = info.data_offsets;
        if end > data_len || start > end {
            return Err(format!(
                "tensor `{name}` is said to lie at {start}..{end}, but the file holds {data_len} bytes of \
                 data; it is truncated or damaged"
            ));
        }
        if start != expected_start {
            let what = if start < expected_start { "overlaps its neighbour" } else { "leaves a gap" };
            return Err(format!("tensor `{name}` {what}: it starts at {start}, wanted {expected_start}"));
        }
        let size_bits = info
            .shape
            .iter()
            .try_fold(info.dtype.bitsize(), |product, &extent| product.checked_mul(extent))
            .ok_or_else(|| format!("tensor `{name}` has shape {:?}, whose size overflows", info.shape))?;
        if Some(size_bits) != (end - start).checked_mul(8) {
            return Err(format!(
                "tensor `{name}` of shape {:?} and type {} needs {} bytes, but {} are given to it",
                info.shape,
                info.dtype,
                size_bits.div_ceil(8),
                end - start
            ));
        }
        expected_start = end;
    }
    if expected_start != data_len {
        return Err(format!("{} bytes after the last tensor belong to none", data_len - expected_start));
    }
    Ok(())
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Reads the index of a sharded checkpoint: tensor name to file name. The file names are checked to
/// be plain: an index must not lead us out of its folder.
pub(crate) fn read_index(path: &Path) -> Result<BTreeMap<String, String>, ModelError> {
    let index: Index = read_json(path, MAX_INDEX_BYTES)?;
    if index.weight_map.is_empty() {
        return Err(ModelError::weights(path, "has an empty `weight_map`; wanted tensor names and files"));
    }
    for (name, file) in &index.weight_map {
        let mut components = Path::new(file).components();
        let plain = matches!(components.next(), Some(Component::Normal(only)) if only == file.as_str());
        if !plain || file.contains('\\') || !file.ends_with(".safetensors") {
            return Err(ModelError::weights(
                path,
                format!(
                    "places tensor `{name}` in {file:?}; wanted the name of a .safetensors file in the \
                     same folder"
                ),
            ));
        }
    }
    Ok(index.weight_map)
}
