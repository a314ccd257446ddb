//! GGUF's block formats: what the bytes of a quantised tensor mean.
//!
//! A row of weights is a sequence of blocks of 32 or 256 elements, each with its own scales. Every
//! format but MXFP4 has f16 scales and codes so small that `scale * code` fits the 24 bits of an f32
//! exactly; where a minimum is added or taken off, that is the one rounding. So a value does not depend
//! on how it is computed, and [`dequantize`] is the specification of what a file's weights are.
//!
//! Source: the formats of ggml (`ggml-common.h`, `ggml-quants.c`); MXFP4 is that of the OCP
//! Microscaling specification 1.0.

pub(crate) mod block;
mod dequantize;

use std::fmt;

pub use dequantize::dequantize;

/// The values of the codes of [`BlockFormat::Iq4Nl`] and [`BlockFormat::Iq4Xs`].
pub(crate) const IQ4_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the values of the codes of [`BlockFormat::Mxfp4`] (E2M1), so that they are whole numbers.
pub(crate) const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// A quantised element type: how a block of weights is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockFormat {
    /// 32 codes of 4 bits less 8, one f16 scale.
    Q4_0,
    /// 32 codes of 4 bits, an f16 scale and an f16 minimum.
    Q4_1,
    /// 32 codes of 5 bits less 16, one f16 scale.
    Q5_0,
    /// 32 codes of 5 bits, an f16 scale and an f16 minimum.
    Q5_1,
    /// 32 signed bytes, one f16 scale.
    Q8_0,
    /// 256 codes of 2 bits; for every 16 a scale and a minimum of 4 bits, in units of two f16.
    Q2K,
    /// 256 codes of 3 bits less 4; for every 16 a scale of 6 bits less 32, in units of an f16.
    Q3K,
    /// 256 codes of 4 bits; for every 32 a scale and a minimum of 6 bits, in units of two f16.
    Q4K,
    /// 256 codes of 5 bits; for every 32 a scale and a minimum of 6 bits, in units of two f16.
    Q5K,
    /// 256 codes of 6 bits less 32; for every 16 a scale of 8 bits, in units of an f16.
    Q6K,
    /// 32 codes of 4 bits that name one of 16 values, one f16 scale.
    Iq4Nl,
    /// 256 codes of 4 bits that name one of 16 values; for every 32 a scale of 6 bits less 32, in units
    /// of an f16.
    Iq4Xs,
    /// 32 floats of 4 bits (E2M1), their exponent in a byte (E8M0).
    Mxfp4,
}

impl BlockFormat {
    /// Every format.
    pub const ALL: [BlockFormat; 13] = [
        BlockFormat::Q4_0,
        BlockFormat::Q4_1,
        BlockFormat::Q5_0,
        BlockFormat::Q5_1,
        BlockFormat::Q8_0,
        BlockFormat::Q2K,
        BlockFormat::Q3K,
        BlockFormat::Q4K,
        BlockFormat::Q5K,
        BlockFormat::Q6K,
        BlockFormat::Iq4Nl,
        BlockFormat::Iq4Xs,
        BlockFormat::Mxfp4,
    ];

    /// Elements of a block.
    #[inline]
    pub const fn block_len(self) -> usize {
        match self {
            BlockFormat::Q4_0
            | BlockFormat::Q4_1
            | BlockFormat::Q5_0
            | BlockFormat::Q5_1
            | BlockFormat::Q8_0
            | BlockFormat::Iq4Nl
            | BlockFormat::Mxfp4 => 32,
            BlockFormat::Q2K
            | BlockFormat::Q3K
            | BlockFormat::Q4K
            | BlockFormat::Q5K
            | BlockFormat::Q6K
            | BlockFormat::Iq4Xs => 256,
        }
    }

    /// Bytes of a block.
    #[inline]
    pub const fn block_bytes(self) -> usize {
        match self {
            BlockFormat::Mxfp4 => 1 + 16,
            BlockFormat::Q4_0 | BlockFormat::Iq4Nl => 2 + 16,
            BlockFormat::Q4_1 => 4 + 16,
            BlockFormat::Q5_0 => 2 + 4 + 16,
            BlockFormat::Q5_1 => 4 + 4 + 16,
            BlockFormat::Q8_0 => 2 + 32,
            BlockFormat::Q2K => 16 + 64 + 4,
            BlockFormat::Q3K => 32 + 64 + 12 + 2,
            BlockFormat::Q4K => 4 + 12 + 128,
            BlockFormat::Q5K => 4 + 12 + 32 + 128,
            BlockFormat::Q6K => 128 + 64 + 16 + 2,
            BlockFormat::Iq4Xs => 2 + 2 + 4 + 128,
        }
    }

    /// GGUF's name.
    pub const fn name(self) -> &'static str {
        match self {
            BlockFormat::Q4_0 => "Q4_0",
            BlockFormat::Q4_1 => "Q4_1",
            BlockFormat::Q5_0 => "Q5_0",
            BlockFormat::Q5_1 => "Q5_1",
            BlockFormat::Q8_0 => "Q8_0",
            BlockFormat::Q2K => "Q2_K",
            BlockFormat::Q3K => "Q3_K",
            BlockFormat::Q4K => "Q4_K",
            BlockFormat::Q5K => "Q5_K",
            BlockFormat::Q6K => "Q6_K",
            BlockFormat::Iq4Nl => "IQ4_NL",
            BlockFormat::Iq4Xs => "IQ4_XS",
            BlockFormat::Mxfp4 => "MXFP4",
        }
    }

    /// Elements that share a scale, and a minimum if the format has one.
    #[inline]
    pub(crate) const fn scale_len(self) -> usize {
        match self {
            BlockFormat::Q2K | BlockFormat::Q3K | BlockFormat::Q6K => 16,
            _ => 32,
        }
    }

    /// True if elements have a minimum.
    #[inline]
    pub(crate) const fn has_min(self) -> bool {
        matches!(
            self,
            BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q2K | BlockFormat::Q4K | BlockFormat::Q5K
        )
    }

    /// The whole number that a code stands for.
    #[inline]
    pub(crate) const fn value(self, code: u8) -> i32 {
        match self {
            BlockFormat::Q4_0 => code as i32 - 8,
            BlockFormat::Q5_0 => code as i32 - 16,
            BlockFormat::Q8_0 => code as i32 - 128,
            BlockFormat::Q3K => code as i32 - 4,
            BlockFormat::Q6K => code as i32 - 32,
            BlockFormat::Iq4Nl | BlockFormat::Iq4Xs => IQ4_VALUES[(code & 0xf) as usize] as i32,
            BlockFormat::Mxfp4 => MXFP4_VALUES[(code & 0xf) as usize] as i32,
            BlockFormat::Q4_1
            | BlockFormat::Q5_1
            | BlockFormat::Q2K
            | BlockFormat::Q4K
            | BlockFormat::Q5K => code as i32,
        }
    }

    /// The element that has this code, scale and minimum.
    #[inline]
    pub(crate) fn element(self, code: u8, scale: f32, min: f32) -> f32 {
        let product = scale * self.value(code) as f32;
        // Without minimum nothing is added: -0 + 0 is +0.
        if self.has_min() { product + min } else { product }
    }

    /// Bytes of `elements` elements; `None` if they are not whole blocks, or too many to count.
    pub const fn bytes_for(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_len()) {
            return None;
        }
        (elements / self.block_len()).checked_mul(self.block_bytes())
    }
}

impl fmt::Display for BlockFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_have_a_size() {
        assert_eq!(BlockFormat::Q4_0.bytes_for(96), Some(54));
        assert_eq!(BlockFormat::Q4K.bytes_for(512), Some(288));
        assert_eq!(BlockFormat::Q6K.bytes_for(0), Some(0));
        assert_eq!(BlockFormat::Q4K.bytes_for(896), None);
        assert_eq!(BlockFormat::Q8_0.bytes_for(33), None);
        assert_eq!(BlockFormat::Q8_0.bytes_for(usize::MAX & !31), None);
    }
}
