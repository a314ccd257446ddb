//! Panels of f32, bf16 and f16.

use super::WeightType;
use super::memory::{LINE_BYTES, Line};
use crate::LANES;
use crate::math::{bf16_to_f32, f16_to_f32};

/// Inputs that a line of a panel holds.
pub(super) fn inputs_per_line(weight_type: WeightType) -> usize {
    match weight_type {
        WeightType::F32 => LINE_BYTES / (LANES * 4),
        _ => LINE_BYTES / (LANES * 2),
    }
}

/// Which element of a line is the weight of an output of the panel and an input of the line.
#[inline(always)]
fn element(weight_type: WeightType, lane: usize, input: usize) -> usize {
    match weight_type {
        WeightType::Bf16 => lane * 2 + input,
        _ => input * LANES + lane,
    }
}

/// Writes a row to lane `lane` of a panel.
pub(super) fn put_row<T: Copy, const N: usize>(
    weight_type: WeightType,
    panel: &mut [Line],
    lane: usize,
    row: &[T],
    to_bytes: fn(T) -> [u8; N],
) {
    for (line, weights) in panel.iter_mut().zip(row.chunks(inputs_per_line(weight_type))) {
        for (i, &weight) in weights.iter().enumerate() {
            line.0.as_chunks_mut::<N>().0[element(weight_type, lane, i)] = to_bytes(weight);
        }
    }
}

/// Fills `out` with the weights of one output of a panel.
pub(super) fn unpack(weight_type: WeightType, panel: &[Line], lane: usize, out: &mut [f32]) {
    // The types by name, so that each loop knows its stride.
    match weight_type {
        WeightType::F32 => unpack_as(panel, lane, WeightType::F32, out, f32::from_ne_bytes),
        WeightType::Bf16 => {
            unpack_as(panel, lane, WeightType::Bf16, out, |b| bf16_to_f32(u16::from_ne_bytes(b)));
        }
        _ => unpack_as(panel, lane, WeightType::F16, out, |b| f16_to_f32(u16::from_ne_bytes(b))),
    }
}

#[inline(always)]
fn unpack_as<const N: usize>(
    panel: &[Line],
    lane: usize,
    weight_type: WeightType,
    out: &mut [f32],
    from_bytes: impl Fn([u8; N]) -> f32,
) {
    for (line, out) in panel.iter().zip(out.chunks_mut(inputs_per_line(weight_type))) {
        for (input, out) in out.iter_mut().enumerate() {
            *out = from_bytes(line.0.as_chunks::<N>().0[element(weight_type, lane, input)]);
        }
    }
}
