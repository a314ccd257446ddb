//! Blocks to f32: the specification of what a quantised weight is.

use super::BlockFormat;
use super::block::Block;

/// The values of `blocks` in `out`.
///
/// # Panics
/// If `blocks` is not the whole blocks of `out.len()` elements.
pub fn dequantize(format: BlockFormat, blocks: &[u8], out: &mut [f32]) {
    assert!(
        format.bytes_for(out.len()) == Some(blocks.len()),
        "{} bytes are not the {format} blocks of {} elements",
        blocks.len(),
        out.len()
    );
    let blocks = blocks.chunks_exact(format.block_bytes());
    for (bytes, out) in blocks.zip(out.chunks_exact_mut(format.block_len())) {
        let block = Block::read(format, bytes);
        for (i, out) in out.iter_mut().enumerate() {
            let scale = i / format.scale_len();
            *out = format.element(block.codes[i], block.scales[scale], block.mins[scale]);
        }
    }
}
