//! Safetensors whose matrices are packed: codes of 4 or 8 bits and scales in tensors of their own. What
//! `quantization_config` says of them is read by `family/quantization.rs`; here each format has a file that
//! knows its tensors' names and layout, and nothing else.
//!
//! [`WeightStore::read`] gives a packed matrix under the name that it would have unpacked, in the smallest
//! type that holds it exactly: a block format of GGUF's where whole numbers have scales that are halves
//! ([`grouped`]), MXFP4 as it is, and else floats, each rounded once.
//!
//! The files are untrusted: the tensors of a matrix are held against each other before anything is unpacked,
//! and what is allocated is in proportion to them.

mod awq;
mod compressed;
mod fp8;
mod gptq;
mod grouped;
mod mxfp4;
mod rows;

use super::safetensors::{Raw, SafetensorsStore};
use super::{Tensor, TensorView, WeightStore};
use crate::ModelError;

/// How the matrices of a checkpoint are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Floats of 8 bits (E4M3), a scale for every block of `[rows, columns]` or for all.
    Fp8 {
        /// The extents of a block.
        block: Option<[usize; 2]>,
    },
    /// GPTQ's layout: codes packed along the inputs.
    Gptq {
        /// Bits of a code: 4 or 8.
        bits: usize,
        /// Zero points are stored less one: the older of the two forms.
        zeros_less_one: bool,
    },
    /// AWQ's layout, that of its GEMM: codes of 4 bits packed along the outputs, in an order of their own.
    Awq,
    /// The layouts of compressed-tensors: whole numbers of 4 or 8 bits, or floats of 8.
    CompressedTensors {
        /// The extents of a block of floats that share a scale.
        block: Option<[usize; 2]>,
    },
    /// gpt-oss: experts in MXFP4.
    Mxfp4,
}

impl Packing {
    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Packing::Fp8 { .. } => "fp8",
            Packing::Gptq { bits: 8, .. } => "GPTQ int8",
            Packing::Gptq { .. } => "GPTQ int4",
            Packing::Awq => "AWQ int4",
            Packing::CompressedTensors { .. } => "compressed-tensors",
            Packing::Mxfp4 => "MXFP4",
        }
    }
}

/// The tensors of a folder, the packed ones under the names that they would have unpacked.
pub(crate) struct PackedStore {
    pub(super) files: SafetensorsStore,
    pub(super) packing: Packing,
}

impl PackedStore {
    pub(crate) fn new(files: SafetensorsStore, packing: Packing) -> Self {
        PackedStore { files, packing }
    }

    /// Matrix `name` if it is packed.
    fn unpack(&self, name: &str) -> Result<Option<Tensor<'_>>, ModelError> {
        let source = Source { files: &self.files, name, stem: name.strip_suffix(".weight").unwrap_or(name) };
        match self.packing {
            Packing::Fp8 { block } => fp8::read(&source, block),
            Packing::Gptq { bits, zeros_less_one } => gptq::read(&source, bits, zeros_less_one),
            Packing::Awq => awq::read(&source),
            Packing::CompressedTensors { block } => compressed::read(&source, block),
            Packing::Mxfp4 => mxfp4::read(&source),
        }
    }
}

impl WeightStore for PackedStore {
    fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        self.files.tensor(name)
    }

    fn read(&self, name: &str) -> Result<Tensor<'_>, ModelError> {
        match self.unpack(name)? {
            Some(tensor) => Ok(tensor),
            None => self.files.read(name),
        }
    }

    fn release(&self) {
        self.files.release();
    }

    fn contains(&self, name: &str) -> bool {
        self.files.contains(name)
    }

    fn names(&self) -> Vec<String> {
        self.files.names()
    }
}

/// The tensors that make up one matrix.
struct Source<'a, 'n> {
    files: &'a SafetensorsStore,
    /// "model.layers.0.mlp.up_proj.weight"
    name: &'n str,
    /// The same without `.weight`.
    stem: &'n str,
}

impl<'a> Source<'a, '_> {
    /// The tensor with that ending, if there is one.
    fn part(&self, ending: &str) -> Option<Raw<'a>> {
        self.files.raw(&format!("{}{ending}", self.stem))
    }

    /// The tensor with that ending, which the matrix cannot do without.
    fn needed(&self, ending: &str) -> Result<Raw<'a>, ModelError> {
        self.part(ending)
            .ok_or_else(|| self.error(format!("needs a tensor `{}{ending}`, which is missing", self.stem)))
    }

    /// The integers of a tensor of i32, as their bits.
    fn words(&self, ending: &str, part: &Raw<'a>) -> Result<Vec<u32>, ModelError> {
        match part.dtype {
            safetensors::Dtype::I32 => {
                Ok(part.data.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect())
            }
            found => Err(self.error(format!("has `{ending}` of type {found}; wanted I32"))),
        }
    }

    /// The numbers of a tensor of floats.
    fn floats(&self, ending: &str, part: &Raw<'a>) -> Result<Vec<f32>, ModelError> {
        let view = part.floats();
        view.map(|view| view.to_f32()).ok_or_else(|| {
            self.error(format!("has `{ending}` of type {}; wanted F32, F16 or BF16", part.dtype))
        })
    }

    /// The extents of a matrix.
    fn matrix(&self, ending: &str, shape: &[usize]) -> Result<(usize, usize), ModelError> {
        match *shape {
            [rows, columns] if rows > 0 && columns > 0 => Ok((rows, columns)),
            _ => Err(self.wrong_shape(ending, shape, "two extents, none of them 0")),
        }
    }

    fn wrong_shape(&self, ending: &str, found: &[usize], wanted: &str) -> ModelError {
        self.error(format!("has `{ending}` of shape {found:?}; wanted {wanted}"))
    }

    fn error(&self, reason: String) -> ModelError {
        ModelError::weights(self.files.path(), format!("packed matrix `{}` {reason}", self.name))
    }
}
