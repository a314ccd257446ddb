//! Floats of 8 bits: `weight` of E4M3 (a sign, 4 bits of exponent, 3 of fraction; no infinities) and a scale for
//! all, for each row or for each block, in `weight_scale_inv` (Qwen3's and DeepSeek's name) or `weight_scale`.
//! Both are factors, whatever the first is called. Scales of activations are for hardware that multiplies in
//! 8 bits; activations stay f32 here.
//!
//! The product has more digits than bf16, and is rounded to it once: that is what the models' own code computes
//! with. Source: the OCP 8-bit floating point specification 1.0; DeepSeek-V3's `fp8_cast_bf16.py`.

use half::bf16;

use super::Source;
use super::rows::{Grid, fill_rows};
use crate::ModelError;
use crate::weights::{Dtype, Tensor};

/// The matrix, or `None` if it is not of E4M3.
pub(super) fn read(
    source: &Source<'_, '_>,
    block: Option<[usize; 2]>,
) -> Result<Option<Tensor<'static>>, ModelError> {
    let Some(weight) = source.part(".weight") else { return Ok(None) };
    if weight.dtype == safetensors::Dtype::F8_E5M2 {
        return Err(source.error("is of type F8_E5M2; wanted F8_E4M3".to_owned()));
    }
    if weight.dtype != safetensors::Dtype::F8_E4M3 {
        return Ok(None);
    }
    let (rows, columns) = source.matrix(".weight", weight.shape)?;
    let ending = if source.part(".weight_scale").is_some() { ".weight_scale" } else { ".weight_scale_inv" };
    let scale = source.needed(ending)?;
    let grid = Grid::find([rows, columns], scale.shape, block).ok_or_else(|| {
        let wanted = match block {
            Some([r, c]) => format!("one for each block of {r}x{c} of {:?}", [rows, columns]),
            None => format!("one for all, or one for each row of {:?}", [rows, columns]),
        };
        source.wrong_shape(ending, scale.shape, &wanted)
    })?;
    let scales = source.floats(ending, &scale)?;
    let values: [f32; 256] = std::array::from_fn(|code| e4m3(code as u8));
    let mut data = vec![0; rows * columns * 2];
    fill_rows(&mut data, columns * 2, |row, out| {
        let scales = &scales[grid.row(row)];
        let codes = &weight.data[row * columns..][..columns];
        for (column, (&code, out)) in codes.iter().zip(out.as_chunks_mut().0).enumerate() {
            let product = values[usize::from(code)] * scales[column / grid.block[1]];
            *out = bf16::from_f32(product).to_le_bytes();
        }
    });
    Ok(Some(Tensor { dtype: Dtype::Bf16, shape: vec![rows, columns], data: data.into() }))
}

/// The number that a byte of E4M3 stands for.
fn e4m3(code: u8) -> f32 {
    let sign = if code >= 0x80 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * fraction / 8.0 * 2f32.powi(-6),
        _ => sign * (1.0 + fraction / 8.0) * 2f32.powi(exponent - 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specifications_examples() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 0.875 * 2f32.powi(-6)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(e4m3(code), value, "{code:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan() && e4m3(0x80).is_sign_negative());
    }
}
