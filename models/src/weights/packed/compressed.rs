//! compressed-tensors (vLLM's llm-compressor), told apart by what a matrix is stored as:
//!
//! | tensors | format |
//! |---|---|
//! | `weight_packed` `[out, in * bits / 32]` i32, `weight_shape` | pack-quantized: codes of 4 or 8 bits, above the least |
//! | `weight` `[out, in]` i8 | int-quantized |
//! | `weight` `[out, in]` E4M3 | float-quantized; see `fp8` |
//!
//! with `weight_scale` `[out, groups]`, `[out, 1]` or `[1]`, and if codes are not symmetric `weight_zero_point`,
//! packed along the outputs where the codes are packed. `weight_g_idx` `[in]` gives the group of each input.
//! An element is `(code - zero) * scale`. Source: compressed-tensors, `compressors/*/` and `quantization/lifecycle`.

use super::grouped::Grouped;
use super::rows::{Grid, fill_rows};
use super::{Raw, Source, fp8};
use crate::ModelError;
use crate::weights::{Dtype, Tensor};

/// The matrix, or `None` if it is not packed.
pub(super) fn read(
    source: &Source<'_, '_>,
    block: Option<[usize; 2]>,
) -> Result<Option<Tensor<'static>>, ModelError> {
    if let Some(packed) = source.part(".weight_packed") {
        return packed_codes(source, &packed).map(Some);
    }
    match source.part(".weight") {
        Some(weight) if weight.dtype == safetensors::Dtype::I8 => bytes(source, &weight).map(Some),
        _ => fp8::read(source, block),
    }
}

fn packed_codes(source: &Source<'_, '_>, packed: &Raw<'_>) -> Result<Tensor<'static>, ModelError> {
    let (rows, line) = source.matrix(".weight_packed", packed.shape)?;
    let shape = source.needed(".weight_shape")?;
    let columns = match (extents(&shape).as_slice(), line) {
        (&[stated, columns], _) if stated == rows && columns > 0 => columns,
        (found, _) => {
            let wanted = format!("{rows} rows and a width");
            return Err(source.error(format!("has {found:?} in `.weight_shape`; wanted {wanted}")));
        }
    };
    let fits = |bits: &usize| columns.checked_mul(*bits).is_some_and(|all| all.div_ceil(32) == line);
    let bits = [4, 8].into_iter().find(fits).ok_or_else(|| {
        let wanted = format!("{columns} codes of 4 or 8 bits a row");
        source.wrong_shape(".weight_packed", packed.shape, &wanted)
    })?;
    let (per_word, least) = (32 / bits, 1i16 << (bits - 1));
    let code =
        |word: u32, index: usize| (word >> (index % per_word * bits) & ((1 << bits) - 1)) as i16 - least;
    let words = source.words(".weight_packed", packed)?;
    let groups = Groups::read(source, [rows, columns])?;
    let grid = groups.grid;
    let zeros = match source.part(".weight_zero_point") {
        None => None,
        Some(zero) => {
            let wanted = [rows.div_ceil(per_word), grid.columns];
            if zero.shape != wanted {
                return Err(source.wrong_shape(".weight_zero_point", zero.shape, &format!("{wanted:?}")));
            }
            Some(source.words(".weight_zero_point", &zero)?)
        }
    };
    let zero = |row: usize, group: usize| {
        zeros.as_ref().map_or(0, |zeros| code(zeros[row / per_word * grid.columns + group], row))
    };
    let codes = |row: usize, column: usize| code(words[row * line + column / per_word], column);
    Ok(groups.tensor([rows, columns], codes, zero))
}

fn bytes(source: &Source<'_, '_>, weight: &Raw<'_>) -> Result<Tensor<'static>, ModelError> {
    let (rows, columns) = source.matrix(".weight", weight.shape)?;
    let groups = Groups::read(source, [rows, columns])?;
    let grid = groups.grid;
    let zeros = source.part(".weight_zero_point");
    if let Some(zeros) = &zeros
        && (zeros.dtype != safetensors::Dtype::I8 || zeros.data.len() != groups.scales.len())
    {
        let wanted = format!("{} of type I8, one for each scale", groups.scales.len());
        return Err(source.wrong_shape(".weight_zero_point", zeros.shape, &wanted));
    }
    let zero = |row: usize, group: usize| {
        zeros.as_ref().map_or(0, |zeros| i16::from(zeros.data[grid.row(row).start + group] as i8))
    };
    let codes = |row: usize, column: usize| i16::from(weight.data[row * columns + column] as i8);
    Ok(groups.tensor([rows, columns], codes, zero))
}

/// The scales of a matrix of whole numbers, and which input has which.
struct Groups {
    scales: Vec<f32>,
    grid: Grid,
    order: Option<Vec<u32>>,
    dense: Dtype,
}

impl Groups {
    fn read(source: &Source<'_, '_>, [rows, columns]: [usize; 2]) -> Result<Self, ModelError> {
        let scale = source.needed(".weight_scale")?;
        let grid = Grid::find([rows, columns], scale.shape, None).ok_or_else(|| {
            let wanted = format!("[{rows}, groups], the groups a divisor of {columns}; or one for all");
            source.wrong_shape(".weight_scale", scale.shape, &wanted)
        })?;
        let order = match source.part(".weight_g_idx") {
            None => None,
            Some(index) if index.shape != [columns] => {
                return Err(source.wrong_shape(".weight_g_idx", index.shape, &format!("[{columns}]")));
            }
            Some(index) => {
                let order = source.words(".weight_g_idx", &index)?;
                // Written for every matrix by some versions, and then without meaning.
                let unused = order.iter().all(|group| *group == u32::MAX);
                if !unused && order.iter().any(|group| *group as usize >= grid.columns) {
                    let wanted = format!("groups from 0 to {}", grid.columns - 1);
                    return Err(source.error(format!("has others in `.weight_g_idx`; wanted {wanted}")));
                }
                (!unused).then_some(order)
            }
        };
        let bf16 = scale.dtype == safetensors::Dtype::BF16;
        let dense = if bf16 { Dtype::Bf16 } else { Dtype::F16 };
        Ok(Groups { scales: source.floats(".weight_scale", &scale)?, grid, order, dense })
    }

    fn tensor(
        self,
        [rows, columns]: [usize; 2],
        code: impl Fn(usize, usize) -> i16 + Sync,
        zero: impl Fn(usize, usize) -> i16 + Sync,
    ) -> Tensor<'static> {
        let Groups { scales, grid, order, dense } = self;
        let mut codes = vec![0; rows * columns];
        fill_rows(&mut codes, columns, |row, out| {
            let zeros: Vec<i16> = (0..grid.columns).map(|group| zero(row, group)).collect();
            for (column, out) in out.iter_mut().enumerate() {
                let group = order.as_ref().map_or(column / grid.block[1], |order| order[column] as usize);
                *out = code(row, column) - zeros[group];
            }
        });
        Grouped { rows, columns, codes, scales, grid, order }.into_tensor(dense)
    }
}

/// The numbers in a tensor of integers; none if it is of another type.
fn extents(shape: &Raw<'_>) -> Vec<usize> {
    let number = |x: i64| usize::try_from(x).unwrap_or(0);
    match shape.dtype {
        safetensors::Dtype::I64 => {
            shape.data.as_chunks().0.iter().map(|&bytes| number(i64::from_le_bytes(bytes))).collect()
        }
        safetensors::Dtype::I32 => {
            shape.data.as_chunks().0.iter().map(|&bytes| number(i32::from_le_bytes(bytes).into())).collect()
        }
        _ => Vec::new(),
    }
}
