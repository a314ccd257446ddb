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

/// Lines that are filled at a time: they stay in the cache while the rows pass.
const STRIPE: usize = 64;

/// Fills a panel of zeros with the elements of at most 16 rows.
pub(super) fn pack(weight_type: WeightType, rows: &[&[u8]], panel: &mut [Line]) {
    for (stripe, lines) in panel.chunks_mut(STRIPE).enumerate() {
        for (lane, row) in rows.iter().enumerate() {
            // A line has four bytes of every row.
            let bytes = &row[stripe * STRIPE * 4..];
            let (words, rest) = bytes[..bytes.len().min(lines.len() * 4)].as_chunks::<4>();
            for (line, &word) in lines.iter_mut().zip(words) {
                put(weight_type, line, lane, word);
            }
            if let &[low, high] = rest {
                put(weight_type, &mut lines[words.len()], lane, [low, high, 0, 0]);
            }
        }
    }
}

/// Two neighbours of bf16 stay together, those of f16 part.
#[inline(always)]
fn put(weight_type: WeightType, line: &mut Line, lane: usize, word: [u8; 4]) {
    if weight_type == WeightType::F16 {
        let (halves, _) = line.0.as_chunks_mut::<2>();
        halves[lane] = [word[0], word[1]];
        halves[LANES + lane] = [word[2], word[3]];
    } else {
        line.0.as_chunks_mut::<4>().0[lane] = word;
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
