//! What the common kinds of GGUF file store each tensor as. Source: llama.cpp's quantiser, whose names
//! and mixtures people know.

use tandem_kernels::quant::BlockFormat;

use crate::weights::Dtype;

/// A kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    /// All f32.
    F32,
    /// Matrices in f16.
    F16,
    /// Matrices in bf16.
    Bf16,
    /// Matrices in Q8_0.
    Q8_0,
    /// Matrices in Q4_0, the head in Q6_K.
    Q4_0,
    /// Matrices in Q6_K.
    Q6K,
    /// Matrices in Q4_K; the head and half of the most sensitive ones in Q6_K.
    Q4KM,
}

/// Where in the model a tensor stands.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Its GGUF name.
    pub name: &'a str,
    /// Its extents, outermost first.
    pub shape: &'a [usize],
    /// Transformer blocks of the model.
    pub num_layers: usize,
    /// The embedding is the head.
    pub tied: bool,
}

impl FileType {
    /// Every kind, with its name on the command line and ggml's number.
    pub const ALL: [(FileType, &'static str, u32); 7] = [
        (FileType::F32, "f32", 0),
        (FileType::F16, "f16", 1),
        (FileType::Bf16, "bf16", 32),
        (FileType::Q8_0, "q8_0", 7),
        (FileType::Q4_0, "q4_0", 2),
        (FileType::Q6K, "q6_k", 18),
        (FileType::Q4KM, "q4_k_m", 15),
    ];

    /// The kind with that name, whatever its case; `q8` and `q4` are short for `q8_0` and `q4_0`.
    pub fn parse(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "q8" => return Some(FileType::Q8_0),
            "q4" => return Some(FileType::Q4_0),
            _ => {}
        }
        Self::ALL.into_iter().find(|(_, known, _)| known.eq_ignore_ascii_case(name)).map(|(kind, ..)| kind)
    }

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(kind, ..)| *kind == self).map_or("", |(_, name, _)| name)
    }

    /// True if it stores matrices in blocks.
    pub fn is_quantized(self) -> bool {
        !matches!(self, FileType::F32 | FileType::F16 | FileType::Bf16)
    }

    /// ggml's number, for `general.file_type`.
    pub fn id(self) -> u32 {
        Self::ALL.into_iter().find(|(kind, ..)| *kind == self).map_or(0, |(.., id)| id)
    }

    /// What a tensor is stored as. Vectors stay f32 (norms, biases: tiny and sensitive).
    pub fn dtype_of(self, place: Place<'_>) -> Dtype {
        let Place { name, shape, .. } = place;
        if shape.len() < 2 || name.ends_with("_norm.weight") || name.contains("ffn_gate_inp") {
            return Dtype::F32;
        }
        let format = match self {
            FileType::F32 => return Dtype::F32,
            FileType::F16 => return Dtype::F16,
            FileType::Bf16 => return Dtype::Bf16,
            FileType::Q8_0 => BlockFormat::Q8_0,
            FileType::Q6K => BlockFormat::Q6K,
            FileType::Q4_0 if is_head(place) => BlockFormat::Q6K,
            FileType::Q4_0 => BlockFormat::Q4_0,
            FileType::Q4KM if is_head(place) || is_sensitive(place) => BlockFormat::Q6K,
            FileType::Q4KM => BlockFormat::Q4K,
        };
        fitting(format, shape.last().copied().unwrap_or(1))
    }
}

fn is_head(place: Place<'_>) -> bool {
    place.name == "output.weight" || place.tied && place.name == "token_embd.weight"
}

/// The value and down projections of the first and last eighth of the layers, and of every third between.
fn is_sensitive(place: Place<'_>) -> bool {
    let Some(layer) = layer_of(place.name) else { return false };
    let eighth = place.num_layers / 8;
    let chosen = layer < eighth || layer >= 7 * place.num_layers / 8 || (layer - eighth) % 3 == 2;
    chosen && (place.name.ends_with("attn_v.weight") || place.name.contains("ffn_down"))
}

fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// `format`, or the nearest that fits rows of `row` elements.
fn fitting(format: BlockFormat, row: usize) -> Dtype {
    let fits = |format: BlockFormat| row.is_multiple_of(format.block_len());
    let smaller = match format {
        BlockFormat::Q4K => BlockFormat::Q5_0,
        BlockFormat::Q6K => BlockFormat::Q8_0,
        other => other,
    };
    match () {
        () if fits(format) => Dtype::Quantized(format),
        () if fits(smaller) => Dtype::Quantized(smaller),
        () => Dtype::F16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixtures_are_the_usual_ones() {
        let of = |kind: FileType, name: &str, shape: &[usize]| {
            kind.dtype_of(Place { name, shape, num_layers: 24, tied: true }).name()
        };
        assert_eq!(of(FileType::Q4KM, "blk.0.attn_v.weight", &[256, 1024]), "Q6_K");
        assert_eq!(of(FileType::Q4KM, "blk.3.attn_v.weight", &[256, 1024]), "Q4_K");
        assert_eq!(of(FileType::Q4KM, "blk.5.ffn_down.weight", &[1024, 4864]), "Q6_K");
        assert_eq!(of(FileType::Q4KM, "blk.5.ffn_up.weight", &[4864, 896]), "Q5_0");
        assert_eq!(of(FileType::Q4KM, "token_embd.weight", &[1000, 896]), "Q8_0");
        assert_eq!(of(FileType::Q8_0, "blk.0.attn_norm.weight", &[896]), "F32");
        assert_eq!(of(FileType::Q4_0, "blk.0.attn_q.weight", &[8, 24]), "F16");
        assert_eq!(FileType::parse("Q4_K_M"), Some(FileType::Q4KM));
        assert_eq!(FileType::parse("q3"), None);
    }
}
