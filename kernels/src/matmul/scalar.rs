//! The matrix product in plain Rust: the specification.

use super::Tile;
use crate::LANES;

/// # Safety
/// No other task may hold the same outputs.
pub(crate) unsafe fn matmul(tile: &Tile<'_>) {
    let inp = tile.weights.in_features();
    let first = tile.part.first_output;
    let begin = first + tile.panels.start * LANES;
    let end = first + tile.part.outputs.min(tile.panels.end * LANES);
    let mut weights = vec![0.0; inp];
    for output in begin..end {
        tile.weights.row(output, &mut weights);
        for row in tile.rows.clone() {
            let x = &tile.input.x[row * inp..(row + 1) * inp];
            let mut sum = 0.0f32;
            for (&x, &weight) in x.iter().zip(&weights) {
                sum = x.mul_add(weight, sum);
            }
            if let Some(bias) = tile.bias {
                sum += bias[output];
            }
            // SAFETY: the caller's promise.
            unsafe { tile.out.to.part(tile.out.at(row, output), 1)[0] = sum };
        }
    }
}
