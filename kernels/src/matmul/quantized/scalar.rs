//! Quantised products in plain Rust: the specification.

use super::RowMut;
use crate::LANES;
use crate::matmul::Tile;
use crate::pack::WeightType;
use crate::pack::quantized::{self, CHUNK, GROUP};

/// The largest code.
pub(crate) const MAX_CODE: f32 = 127.0;
/// Largest magnitudes below this count as zero, so that their inverse is finite.
pub(crate) const MIN_AMPLITUDE: f32 = MAX_CODE * f32::MIN_POSITIVE;

/// Scale, and its inverse, of inputs whose largest magnitude is `amplitude`.
pub(crate) fn scale_of(amplitude: f32) -> (f32, f32) {
    if amplitude < MIN_AMPLITUDE { (0.0, 0.0) } else { (amplitude / MAX_CODE, MAX_CODE / amplitude) }
}

/// Quantises part of a row.
///
/// # Safety
/// None beyond the lengths of [`RowMut`].
pub(crate) unsafe fn quantize(x: &[f32], to: RowMut<'_>) {
    let blocks = x.chunks_exact(CHUNK).zip(to.codes.chunks_exact_mut(CHUNK));
    for ((x, codes), scale) in blocks.zip(&mut *to.scales) {
        if !x.iter().all(|x| x.is_finite()) {
            *scale = f32::NAN;
            codes.fill(0);
            continue;
        }
        let inverse;
        (*scale, inverse) = scale_of(x.iter().fold(0.0, |max, x| max.max(x.abs())));
        for (code, &x) in codes.iter_mut().zip(x) {
            *code = (x * inverse).round_ties_even() as i8;
        }
    }
    let sum = |codes: &[i8]| codes.iter().map(|&code| -i32::from(code)).sum();
    for (neg_sum, codes) in to.neg_sums16.iter_mut().zip(to.codes.chunks_exact(16)) {
        *neg_sum = sum(codes);
    }
    for (block, codes) in to.codes.chunks_exact(CHUNK).enumerate() {
        to.neg_sums32[block] = sum(codes);
        to.scaled_neg_sums[block] = to.neg_sums32[block] as f32 * to.scales[block];
    }
}

/// # Safety
/// No other task may hold the same outputs.
pub(crate) unsafe fn matmul(tile: &Tile<'_>) {
    let first = tile.part.first_output;
    let begin = first + tile.panels.start * LANES;
    let end = first + tile.part.outputs.min(tile.panels.end * LANES);
    for output in begin..end {
        for row in tile.rows.clone() {
            let mut sum = product(tile, row, output);
            if let Some(bias) = tile.bias {
                sum += bias[output];
            }
            // SAFETY: the caller's promise.
            unsafe { tile.out.to.part(tile.out.at(row, output), 1)[0] = sum };
        }
    }
}

fn product(tile: &Tile<'_>, row: usize, output: usize) -> f32 {
    let (part, panel, lane) = tile.weights.panel(output);
    let WeightType::Quantized(format) = part.weight_type else {
        unreachable!("a dense part in a quantised product: this is a bug")
    };
    let x = tile.input.quantized.row(row);
    let block_len = format.scale_len();
    let mut sum = 0.0f32;
    for (group, (scales, chunks)) in quantized::groups(format, panel).enumerate() {
        for (i, chunk) in chunks.chunks_exact(quantized::chunk_lines(format)).enumerate() {
            let weights = quantized::codes(format, chunk, lane);
            let begin = group * GROUP + i * CHUNK;
            let inputs = &x.codes[begin..][..CHUNK];
            for (j, (weights, inputs)) in
                weights.chunks_exact(block_len).zip(inputs.chunks_exact(block_len)).enumerate()
            {
                let dot: i32 =
                    weights.iter().zip(inputs).map(|(&w, &x)| format.value(w) * i32::from(x)).sum();
                let neg_sum: i32 = inputs.iter().map(|&x| -i32::from(x)).sum();
                let block = (i * CHUNK + j * block_len) / block_len;
                let (scale, min) = quantized::scale_min(format, scales, lane, block);
                let x_scale = x.scales[begin / CHUNK];
                sum = (dot as f32).mul_add(scale * x_scale, sum);
                if format.has_min() {
                    sum = (-min).mul_add(neg_sum as f32 * x_scale, sum);
                }
            }
        }
    }
    sum
}
