//! gpt-oss as published: the experts of a layer in one tensor of MXFP4, `*_blocks` `[experts, out, in / 32, 16]`
//! and `*_scales` `[experts, out, in / 32]`, both bytes. GGUF's block is the same but for the order of its
//! codes, so nothing is lost: here a byte holds neighbours, there elements `i` and `i + 16`.
//! Source: gpt-oss, `weights.py`; the OCP Microscaling specification 1.0.

use tandem_kernels::quant::BlockFormat;

use super::Source;
use super::rows::fill_rows;
use crate::ModelError;
use crate::weights::{Dtype, Tensor};

const CODE_BYTES: usize = 16;
const BLOCK_LEN: usize = 32;

/// The experts `[experts, out, in]`, or `None` if they are not packed.
pub(super) fn read(source: &Source<'_, '_>) -> Result<Option<Tensor<'static>>, ModelError> {
    let Some(blocks) = source.part("_blocks") else { return Ok(None) };
    let scales = source.needed("_scales")?;
    for (ending, part) in [("_blocks", &blocks), ("_scales", &scales)] {
        if part.dtype != safetensors::Dtype::U8 {
            return Err(source.error(format!("has `{ending}` of type {}; wanted U8", part.dtype)));
        }
    }
    let &[experts, rows, width, CODE_BYTES] = blocks.shape else {
        return Err(source.wrong_shape("_blocks", blocks.shape, "[experts, out, in / 32, 16]"));
    };
    if scales.shape != &blocks.shape[..3] {
        return Err(source.wrong_shape("_scales", scales.shape, &format!("{:?}", &blocks.shape[..3])));
    }
    let block_bytes = BlockFormat::Mxfp4.block_bytes();
    let mut data = vec![0; scales.data.len() * block_bytes];
    if !data.is_empty() {
        fill_rows(&mut data, width * block_bytes, |row, out| {
            for (i, out) in out.chunks_exact_mut(block_bytes).enumerate() {
                let index = row * width + i;
                let pairs = &blocks.data[index * CODE_BYTES..][..CODE_BYTES];
                let code = |element: usize| pairs[element / 2] >> (element % 2 * 4) & 15;
                out[0] = scales.data[index];
                for (i, out) in out[1..].iter_mut().enumerate() {
                    *out = code(i) | code(i + 16) << 4;
                }
            }
        });
    }
    let shape = vec![experts, rows, width * BLOCK_LEN];
    Ok(Some(Tensor { dtype: Dtype::Quantized(BlockFormat::Mxfp4), shape, data: data.into() }))
}
