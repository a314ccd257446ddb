//! Element types of GGUF tensors: ggml's numbers, names and sizes.

use tandem_kernels::quant::BlockFormat;

use crate::weights::Dtype;

/// A type as a file names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TensorType {
    Known(Dtype),
    /// A type that is not read; the number is ggml's.
    Other(u32),
}

/// ggml's numbers of the types that are read.
const KNOWN: [(u32, Dtype); 16] = [
    (0, Dtype::F32),
    (1, Dtype::F16),
    (2, Dtype::Quantized(BlockFormat::Q4_0)),
    (3, Dtype::Quantized(BlockFormat::Q4_1)),
    (6, Dtype::Quantized(BlockFormat::Q5_0)),
    (7, Dtype::Quantized(BlockFormat::Q5_1)),
    (8, Dtype::Quantized(BlockFormat::Q8_0)),
    (10, Dtype::Quantized(BlockFormat::Q2K)),
    (11, Dtype::Quantized(BlockFormat::Q3K)),
    (12, Dtype::Quantized(BlockFormat::Q4K)),
    (13, Dtype::Quantized(BlockFormat::Q5K)),
    (14, Dtype::Quantized(BlockFormat::Q6K)),
    (20, Dtype::Quantized(BlockFormat::Iq4Nl)),
    (23, Dtype::Quantized(BlockFormat::Iq4Xs)),
    (30, Dtype::Bf16),
    (39, Dtype::Quantized(BlockFormat::Mxfp4)),
];

/// Names of the others, so that an error can say more than a number.
const OTHERS: [(u32, &str); 21] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

impl TensorType {
    pub(super) fn from_id(id: u32) -> Self {
        let known = KNOWN.iter().find(|(known, _)| *known == id);
        known.map_or(TensorType::Other(id), |(_, dtype)| TensorType::Known(*dtype))
    }

    /// The type to read it as, or the name of one that is not read.
    pub(super) fn dtype(self) -> Result<Dtype, String> {
        match self {
            TensorType::Known(dtype) => Ok(dtype),
            TensorType::Other(_) => Err(self.name()),
        }
    }

    pub(super) fn name(self) -> String {
        match self {
            TensorType::Known(dtype) => dtype.name().to_owned(),
            TensorType::Other(id) => {
                let other = OTHERS.iter().find(|(other, _)| *other == id);
                other.map_or_else(|| format!("number {id}"), |(_, name)| (*name).to_owned())
            }
        }
    }

    /// Bytes of `num_elements` in rows of `row`; `None` if the type is not read or a row is not whole blocks.
    pub(super) fn bytes_for(self, row: usize, num_elements: usize) -> Option<usize> {
        match self {
            TensorType::Known(dtype) if row.is_multiple_of(dtype.block_len()) => {
                dtype.bytes_for(num_elements)
            }
            _ => None,
        }
    }

    pub(super) fn block_len(self) -> usize {
        self.dtype().map_or(1, Dtype::block_len)
    }
}

/// ggml's number of `dtype`.
pub(super) fn type_id(dtype: Dtype) -> u32 {
    let known = KNOWN.iter().find(|(_, known)| *known == dtype);
    known.map(|(id, _)| *id).expect("every Dtype has a number: this is a bug")
}

/// All types that are read, for messages.
pub(super) fn supported_names() -> String {
    let names: Vec<&str> = KNOWN.iter().map(|(_, dtype)| dtype.name()).collect();
    names.join(", ")
}
