//! GPTQ: codes of 4 or 8 bits packed along the inputs, of a matrix that is stored transposed.
//!
//! | tensor | shape | holds |
//! |---|---|---|
//! | `qweight` | `[in * bits / 32, out]` i32 | codes of inputs `8 i` to `8 i + 7`, the first lowest |
//! | `qzeros` | `[groups, out * bits / 32]` i32 | zero points, packed along the outputs; in the older form less one |
//! | `scales` | `[groups, out]` | one for each group of inputs and output |
//! | `g_idx` | `[in]` i32 | the group of each input; without it, stretches of equal length |
//!
//! An element is `(code - zero) * scale`. With `desc_act` the inputs of a group lie apart; then no block format
//! holds the matrix. Source: AutoGPTQ's `qlinear_triton.py`; GPTQModel's for the newer form.

use super::Source;
use super::grouped::Grouped;
use super::rows::{Grid, fill_rows};
use crate::ModelError;
use crate::weights::{Dtype, Tensor};

/// The matrix, or `None` if it is not packed.
pub(super) fn read(
    source: &Source<'_, '_>,
    bits: usize,
    zeros_less_one: bool,
) -> Result<Option<Tensor<'static>>, ModelError> {
    let Some(weight) = source.part(".qweight") else { return Ok(None) };
    let per_word = 32 / bits;
    let (lines, rows) = source.matrix(".qweight", weight.shape)?;
    let columns = lines * per_word;
    let (zero, scale) = (source.needed(".qzeros")?, source.needed(".scales")?);
    let (groups, of_rows) = source.matrix(".scales", scale.shape)?;
    if of_rows != rows || !columns.is_multiple_of(groups) {
        let wanted = format!("[groups, {rows}], the groups a divisor of {columns}");
        return Err(source.wrong_shape(".scales", scale.shape, &wanted));
    }
    if zero.shape != [groups, rows.div_ceil(per_word)] {
        let wanted = format!("{:?}", [groups, rows.div_ceil(per_word)]);
        return Err(source.wrong_shape(".qzeros", zero.shape, &wanted));
    }
    let order = order(source, columns, groups)?;
    let words = source.words(".qweight", &weight)?;
    let zeros = source.words(".qzeros", &zero)?;
    let scales = source.floats(".scales", &scale)?;

    let mask = (1u32 << bits) - 1;
    let code = |word: u32, index: usize| word >> (index % per_word * bits) & mask;
    let group_len = columns / groups;
    let zero_of = |row: usize, group: usize| {
        let stored = code(zeros[group * zero.shape[1] + row / per_word], row);
        (if zeros_less_one { (stored + 1) & mask } else { stored }) as i16
    };
    let mut codes = vec![0; rows * columns];
    fill_rows(&mut codes, columns, |row, out| {
        let zeros: Vec<i16> = (0..groups).map(|group| zero_of(row, group)).collect();
        for (column, out) in out.iter_mut().enumerate() {
            let group = order.as_ref().map_or(column / group_len, |order| order[column] as usize);
            *out = code(words[column / per_word * rows + row], column) as i16 - zeros[group];
        }
    });
    let transposed = (0..rows * groups).map(|i| scales[i % groups * rows + i / groups]).collect();
    let grid = Grid { block: [1, group_len], columns: groups };
    let matrix = Grouped { rows, columns, codes, scales: transposed, grid, order };
    Ok(Some(matrix.into_tensor(if scale.dtype == safetensors::Dtype::BF16 {
        Dtype::Bf16
    } else {
        Dtype::F16
    })))
}

/// The group of each input, if they are not stretches of equal length.
fn order(source: &Source<'_, '_>, columns: usize, groups: usize) -> Result<Option<Vec<u32>>, ModelError> {
    let Some(index) = source.part(".g_idx") else { return Ok(None) };
    if index.shape != [columns] {
        return Err(source.wrong_shape(".g_idx", index.shape, &format!("[{columns}]")));
    }
    let order = source.words(".g_idx", &index)?;
    if let Some(group) = order.iter().find(|group| **group as usize >= groups) {
        return Err(source.error(format!(
            "has group {} in `.g_idx`; wanted 0 to {}",
            *group as i32,
            groups - 1
        )));
    }
    let plain =
        order.iter().enumerate().all(|(column, group)| column / (columns / groups) == *group as usize);
    Ok(if plain { None } else { Some(order) })
}
