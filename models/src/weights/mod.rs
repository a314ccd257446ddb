//! Named tensors of a checkpoint, wherever they lie. A store hands out views into memory it keeps
//! mapped; nothing is copied or widened until somebody packs the weights.

pub mod gguf;
mod map;
mod packed;
pub mod quantize;
mod safetensors;

use std::borrow::Cow;
use std::path::Path;

use tandem_kernels::quant::{BlockFormat, dequantize};

use crate::ModelError;

pub use gguf::{GgufFile, GgufStore};
pub(crate) use packed::PackedStore;
pub use packed::Packing;
pub use safetensors::SafetensorsStore;
pub(crate) use safetensors::{INDEX_FILE, SINGLE_FILE, read_index};

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of an IEEE single.
    Bf16,
    /// Blocks of several elements that share scales, as GGUF has them.
    Quantized(BlockFormat),
}

impl Dtype {
    /// Elements that are stored together: 1, or a block's. Rows are whole blocks.
    pub fn block_len(self) -> usize {
        match self {
            Dtype::F32 | Dtype::F16 | Dtype::Bf16 => 1,
            Dtype::Quantized(format) => format.block_len(),
        }
    }

    /// Bytes of `num_elements` elements; `None` if they are not whole blocks or too many to count.
    pub fn bytes_for(self, num_elements: usize) -> Option<usize> {
        match self {
            Dtype::F32 => num_elements.checked_mul(4),
            Dtype::F16 | Dtype::Bf16 => num_elements.checked_mul(2),
            Dtype::Quantized(format) => format.bytes_for(num_elements),
        }
    }

    /// The usual name: "F32", "BF16", "Q4_K".
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
            Dtype::Quantized(format) => format.name(),
        }
    }
}

/// One tensor: row-major, little-endian, not necessarily aligned to its element type.
///
/// Invariant: `Some(data.len()) == dtype.bytes_for(num_elements)`, checked by the store.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: &'a [usize],
    /// The elements' bytes.
    pub data: &'a [u8],
}

impl<'a> TensorView<'a> {
    /// Elements in the tensor.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// A copy of all elements as f32: exact for the 16-bit types, which are subsets of f32; of blocks,
    /// what their format's specification says they stand for.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => self.data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
            Dtype::F16 => self.halves().map(|bits| half::f16::from_bits(bits).to_f32()).collect(),
            Dtype::Bf16 => self.halves().map(|bits| half::bf16::from_bits(bits).to_f32()).collect(),
            Dtype::Quantized(format) => {
                let mut elements = vec![0.0; self.num_elements()];
                dequantize(format, self.data, &mut elements);
                elements
            }
        }
    }

    /// The bit patterns of a 16-bit tensor; borrowed if the mapping happens to be aligned. `None` for
    /// other types.
    pub fn bits16(&self) -> Option<Cow<'a, [u16]>> {
        if !matches!(self.dtype, Dtype::F16 | Dtype::Bf16) {
            return None;
        }
        match bytemuck::try_cast_slice(self.data) {
            Ok(bits) if cfg!(target_endian = "little") => Some(Cow::Borrowed(bits)),
            _ => Some(Cow::Owned(self.halves().collect())),
        }
    }

    fn halves(&self) -> impl Iterator<Item = u16> + use<'a> {
        self.data.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes))
    }
}

/// A tensor as the loader takes it: its file's own bytes, or what a packed form stands for.
///
/// Invariant: as that of [`TensorView`].
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The elements' bytes.
    pub data: Cow<'a, [u8]>,
}

impl<'a> From<TensorView<'a>> for Tensor<'a> {
    fn from(view: TensorView<'a>) -> Self {
        Tensor { dtype: view.dtype, shape: view.shape.to_vec(), data: Cow::Borrowed(view.data) }
    }
}

impl Tensor<'_> {
    /// A view of it.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, shape: &self.shape, data: &self.data }
    }
}

/// A source of named tensors.
pub trait WeightStore: Send + Sync {
    /// A view of tensor `name`.
    ///
    /// # Errors
    /// If there is no such tensor, or its element type is not one of [`Dtype`].
    fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError>;

    /// Tensor `name`, unpacked if its file has it in a form of its own. Costs nothing where the file has it
    /// as one of [`Dtype`], else the unpacking.
    ///
    /// # Errors
    /// As [`WeightStore::tensor`], or if the parts of a packed tensor do not fit together.
    fn read(&self, name: &str) -> Result<Tensor<'_>, ModelError> {
        self.tensor(name).map(Tensor::from)
    }

    /// Says that what was read is done with for now: a mapped file's pages go, and come back if they are read again.
    fn release(&self) {}

    /// True if there is a tensor `name`.
    fn contains(&self, name: &str) -> bool;

    /// All tensor names, sorted.
    fn names(&self) -> Vec<String>;
}

/// Opens the weights of the checkpoint folder `dir`, whose matrices are packed as `packing` says.
///
/// # Errors
/// If there are none, or they are damaged; see [`SafetensorsStore::open`].
pub fn open(dir: &Path, packing: Option<Packing>) -> Result<Box<dyn WeightStore>, ModelError> {
    let files = SafetensorsStore::open(dir)?;
    Ok(match packing {
        None => Box::new(files),
        Some(packing) => Box::new(PackedStore::new(files, packing)),
    })
}
