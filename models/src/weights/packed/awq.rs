//! AWQ, in the layout of its GEMM kernel: codes of 4 bits packed along the outputs, of a matrix that is stored
//! transposed.
//!
//! | tensor | shape | holds |
//! |---|---|---|
//! | `qweight` | `[in, out / 8]` i32 | codes of outputs `8 i` to `8 i + 7`, in the order 0 2 4 6 1 3 5 7 |
//! | `qzeros` | `[groups, out / 8]` i32 | zero points, packed the same way |
//! | `scales` | `[groups, out]` | one for each group of inputs and output |
//!
//! An element is `(code - zero) * scale`. Source: AutoAWQ's `packing_utils.py`.

use super::Source;
use super::grouped::Grouped;
use super::rows::{Grid, fill_rows};
use crate::ModelError;
use crate::weights::{Dtype, Tensor};

const PER_WORD: usize = 8;
/// Where in a word the code of each of eight outputs lies.
const PLACES: [usize; PER_WORD] = [0, 4, 1, 5, 2, 6, 3, 7];

/// The matrix, or `None` if it is not packed.
pub(super) fn read(source: &Source<'_, '_>) -> Result<Option<Tensor<'static>>, ModelError> {
    let Some(weight) = source.part(".qweight") else { return Ok(None) };
    let (columns, words_a_line) = source.matrix(".qweight", weight.shape)?;
    let rows = words_a_line * PER_WORD;
    let (zero, scale) = (source.needed(".qzeros")?, source.needed(".scales")?);
    let (groups, of_rows) = source.matrix(".scales", scale.shape)?;
    if of_rows != rows || !columns.is_multiple_of(groups) {
        let wanted = format!("[groups, {rows}], the groups a divisor of {columns}");
        return Err(source.wrong_shape(".scales", scale.shape, &wanted));
    }
    if zero.shape != [groups, words_a_line] {
        return Err(source.wrong_shape(".qzeros", zero.shape, &format!("{:?}", [groups, words_a_line])));
    }
    let words = source.words(".qweight", &weight)?;
    let zeros = source.words(".qzeros", &zero)?;
    let scales = source.floats(".scales", &scale)?;

    let code = |words: &[u32], line: usize, row: usize| {
        (words[line * words_a_line + row / PER_WORD] >> (4 * PLACES[row % PER_WORD]) & 15) as i16
    };
    let group_len = columns / groups;
    let mut codes = vec![0; rows * columns];
    fill_rows(&mut codes, columns, |row, out| {
        for (group, out) in out.chunks_exact_mut(group_len).enumerate() {
            let zero = code(&zeros, group, row);
            for (i, out) in out.iter_mut().enumerate() {
                *out = code(&words, group * group_len + i, row) - zero;
            }
        }
    });
    let transposed = (0..rows * groups).map(|i| scales[i % groups * rows + i / groups]).collect();
    let grid = Grid { block: [1, group_len], columns: groups };
    Ok(Some(Grouped { rows, columns, codes, scales: transposed, grid, order: None }.into_tensor(Dtype::F16)))
}
