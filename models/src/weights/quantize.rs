//! From f32 to GGUF's blocks. Decoding is exact and lives with the kernels; encoding is a choice of scales
//! and codes, made here row by row, each block by itself: the scale that covers the block's extremes, and
//! for the k-quants a few others near it of which the one with the least squared error is kept.
//!
//! A NaN is taken as 0 and infinities as the largest f16 scale allows, so that a block never decodes to NaN.

use half::f16;
use tandem_kernels::quant::BlockFormat;

use super::{Dtype, TensorView};

/// Elements widened at a time by [`reencode`], on each thread.
const CHUNK_ELEMENTS: usize = 1 << 18;

/// What weights can be written as.
pub const WRITABLE: [Dtype; 8] = [
    Dtype::F32,
    Dtype::F16,
    Dtype::Bf16,
    Dtype::Quantized(BlockFormat::Q8_0),
    Dtype::Quantized(BlockFormat::Q5_0),
    Dtype::Quantized(BlockFormat::Q4_0),
    Dtype::Quantized(BlockFormat::Q4K),
    Dtype::Quantized(BlockFormat::Q6K),
];

/// Appends `elements`, whole rows of them, to `out` as `dtype`. False, and nothing is written, if `dtype` is
/// not one of [`WRITABLE`].
///
/// # Panics
/// If the elements are not whole blocks.
pub fn encode(dtype: Dtype, elements: &[f32], out: &mut Vec<u8>) -> bool {
    assert!(elements.len().is_multiple_of(dtype.block_len()), "elements are not whole blocks");
    match dtype {
        Dtype::F32 => out.extend(elements.iter().flat_map(|x| x.to_le_bytes())),
        Dtype::F16 => out.extend(elements.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes())),
        Dtype::Bf16 => out.extend(elements.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes())),
        Dtype::Quantized(BlockFormat::Q8_0) => blocks(elements, out, q8_0),
        Dtype::Quantized(BlockFormat::Q5_0) => blocks(elements, out, q5_0),
        Dtype::Quantized(BlockFormat::Q4_0) => blocks(elements, out, q4_0),
        Dtype::Quantized(BlockFormat::Q4K) => blocks(elements, out, q4_k),
        Dtype::Quantized(BlockFormat::Q6K) => blocks(elements, out, q6_k),
        Dtype::Quantized(_) => return false,
    }
    true
}

/// The elements of `view` as `dtype`, encoded on every core; each block by itself, so that the bytes do not
/// depend on how many there are. Needs the memory of the result and little more.
///
/// # Panics
/// If `dtype` is not one of [`WRITABLE`], or a row is not whole blocks of it.
pub fn reencode(view: &TensorView<'_>, dtype: Dtype) -> Vec<u8> {
    let row = view.shape.last().copied().unwrap_or(1);
    let size = |dtype: Dtype| dtype.bytes_for(row).expect("rows are whole blocks: this is a bug");
    let (row_bytes, new_row_bytes) = (size(view.dtype), size(dtype));
    if view.data.is_empty() {
        return Vec::new();
    }
    let num_rows = view.data.len() / row_bytes;
    let mut bytes = vec![0; num_rows * new_row_bytes];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = num_rows.div_ceil(threads);
    let chunk = (CHUNK_ELEMENTS / row).clamp(1, share);
    std::thread::scope(|scope| {
        let shares = view.data.chunks(share * row_bytes).zip(bytes.chunks_mut(share * new_row_bytes));
        for (from, to) in shares {
            scope.spawn(move || {
                let mut encoded = Vec::new();
                for (from, to) in from.chunks(chunk * row_bytes).zip(to.chunks_mut(chunk * new_row_bytes)) {
                    let shape = [from.len() / row_bytes, row];
                    let rows = TensorView { dtype: view.dtype, shape: &shape, data: from };
                    encoded.clear();
                    assert!(encode(dtype, &rows.to_f32(), &mut encoded), "{} is not writable", dtype.name());
                    to.copy_from_slice(&encoded);
                }
            });
        }
    });
    bytes
}

fn blocks<const LEN: usize>(elements: &[f32], out: &mut Vec<u8>, encode: fn(&[f32; LEN], &mut Vec<u8>)) {
    for block in elements.as_chunks::<LEN>().0 {
        // 2^40: the square of the sum of a block's such values is still finite.
        let finite = block.map(|x| if x.is_nan() { 0.0 } else { x.clamp(-1e12, 1e12) });
        encode(&finite, out);
    }
}

/// The f16 nearest to `x`, kept finite.
fn scale(x: f32) -> f16 {
    f16::from_f32(x.clamp(-65504.0, 65504.0))
}

/// 1/x, or 0 for 0: then all codes are 0, as they should be.
fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// The element with the largest magnitude, with its sign.
fn extreme(elements: &[f32]) -> f32 {
    elements.iter().fold(0.0, |best: f32, &x| if x.abs() > best.abs() { x } else { best })
}

fn q8_0(block: &[f32; 32], out: &mut Vec<u8>) {
    let d = scale(extreme(block).abs() / 127.0);
    let inverse = inverse(d.to_f32());
    out.extend(d.to_le_bytes());
    out.extend(block.map(|x| (x * inverse).round().clamp(-127.0, 127.0) as i8 as u8));
}

/// The code -8 has no counterpart, so the extreme gets it.
fn q4_0(block: &[f32; 32], out: &mut Vec<u8>) {
    let d = scale(extreme(block) / -8.0);
    let inverse = inverse(d.to_f32());
    let code = |x: f32| (x * inverse + 8.0).round().clamp(0.0, 15.0) as u8;
    out.extend(d.to_le_bytes());
    out.extend((0..16).map(|i| code(block[i]) | code(block[i + 16]) << 4));
}

/// As [`q4_0`] with a fifth bit, kept apart.
fn q5_0(block: &[f32; 32], out: &mut Vec<u8>) {
    let d = scale(extreme(block) / -16.0);
    let inverse = inverse(d.to_f32());
    let codes = block.map(|x| (x * inverse + 16.0).round().clamp(0.0, 31.0) as u8);
    let fifths = codes.iter().enumerate().fold(0u32, |bits, (i, code)| bits | u32::from(code >> 4) << i);
    out.extend(d.to_le_bytes());
    out.extend(fifths.to_le_bytes());
    out.extend((0..16).map(|i| codes[i] & 15 | (codes[i + 16] & 15) << 4));
}

/// Scale and minimum (taken off, not negative) with which codes `0..=15` fit `block` best.
fn fit_q4(block: &[f32]) -> (f32, f32) {
    let max = block.iter().fold(0.0f32, |a, &b| a.max(b));
    let min = block.iter().fold(0.0f32, |a, &b| a.min(b));
    if max == min {
        return (0.0, 0.0);
    }
    let mut best = (f32::INFINITY, 0.0, 0.0);
    // Clipping an extreme a little often serves the others better.
    for step in 0..8 {
        let range = (max - min) * (1.0 - 0.03 * step as f32);
        let inverse = 15.0 / range;
        let code = |x: f32| ((x - min) * inverse).round().clamp(0.0, 15.0);
        // Least squares of x = d * code - m over the codes chosen.
        let n = block.len() as f32;
        let (mut c, mut cc, mut x_sum, mut cx) = (0.0, 0.0, 0.0, 0.0);
        for &x in block {
            let q = code(x);
            c += q;
            cc += q * q;
            x_sum += x;
            cx += q * x;
        }
        let determinant = n * cc - c * c;
        let (mut d, mut m) = (range / 15.0, -min);
        if determinant > 0.0 {
            (d, m) = ((n * cx - c * x_sum) / determinant, (c * cx - cc * x_sum) / determinant);
            if m < 0.0 {
                (d, m) = (cx / cc, 0.0);
            }
        }
        let error: f32 = block.iter().map(|&x| (d * code(x) - m - x).powi(2)).sum();
        if error < best.0 && d > 0.0 {
            best = (error, d, m);
        }
    }
    (best.1, best.2)
}

fn q4_k(block: &[f32; 256], out: &mut Vec<u8>) {
    let parts = block.as_chunks::<32>().0;
    let fits: Vec<(f32, f32)> = parts.iter().map(|part| fit_q4(part)).collect();
    let d = scale(fits.iter().fold(0.0, |a: f32, fit| a.max(fit.0)) / 63.0);
    let m = scale(fits.iter().fold(0.0, |a: f32, fit| a.max(fit.1)) / 63.0);
    let six_bits = |x: f32, unit: f16| (x * inverse(unit.to_f32())).round().clamp(0.0, 63.0) as u8;
    let scales: Vec<(u8, u8)> = fits.iter().map(|fit| (six_bits(fit.0, d), six_bits(fit.1, m))).collect();
    out.extend(d.to_le_bytes());
    out.extend(m.to_le_bytes());
    // Six bits each: four scales and the top bits of the last four, four minima and theirs, then the low bits
    // of the last four pairs.
    let mut packed = [0u8; 12];
    for i in 0..4 {
        packed[i] = scales[i].0 | (scales[i + 4].0 >> 4) << 6;
        packed[i + 4] = scales[i].1 | (scales[i + 4].1 >> 4) << 6;
        packed[i + 8] = scales[i + 4].0 & 15 | (scales[i + 4].1 & 15) << 4;
    }
    out.extend(packed);
    let code = |part: usize, i: usize| {
        let (s, o) = (d.to_f32() * f32::from(scales[part].0), m.to_f32() * f32::from(scales[part].1));
        ((parts[part][i] + o) * inverse(s)).round().clamp(0.0, 15.0) as u8
    };
    for pair in 0..4 {
        out.extend((0..32).map(|i| code(2 * pair, i) | code(2 * pair + 1, i) << 4));
    }
}

/// The scale with which codes `-32..=31` fit `block` best.
fn fit_q6(block: &[f32]) -> f32 {
    let extreme = extreme(block);
    let mut best = (f32::INFINITY, 0.0);
    for step in -4..=4i32 {
        let inverse = inverse(extreme) * (-32.0 + 0.25 * step as f32);
        let code = |x: f32| (x * inverse).round().clamp(-32.0, 31.0);
        let (cc, cx) =
            block.iter().fold((0.0, 0.0), |(cc, cx), &x| (cc + code(x) * code(x), cx + code(x) * x));
        let d = if cc > 0.0 { cx / cc } else { 0.0 };
        let error: f32 = block.iter().map(|&x| (d * code(x) - x).powi(2)).sum();
        if error < best.0 {
            best = (error, d);
        }
    }
    best.1
}

fn q6_k(block: &[f32; 256], out: &mut Vec<u8>) {
    let parts = block.as_chunks::<16>().0;
    let fits: Vec<f32> = parts.iter().map(|part| fit_q6(part)).collect();
    let d = scale(extreme(&fits) / -128.0);
    let unit = inverse(d.to_f32());
    let scales: Vec<i8> = fits.iter().map(|s| (s * unit).round().clamp(-128.0, 127.0) as i8).collect();
    let code = |i: usize| {
        let inverse = inverse(d.to_f32() * f32::from(scales[i / 16]));
        ((block[i] * inverse).round().clamp(-32.0, 31.0) as i8 + 32) as u8
    };
    let (mut low, mut high) = ([0u8; 128], [0u8; 64]);
    for half in 0..2 {
        for i in 0..32 {
            let codes: [u8; 4] = std::array::from_fn(|quarter| code(128 * half + 32 * quarter + i));
            low[64 * half + i] = codes[0] & 15 | (codes[2] & 15) << 4;
            low[64 * half + 32 + i] = codes[1] & 15 | (codes[3] & 15) << 4;
            high[32 * half + i] =
                codes.iter().enumerate().fold(0, |bits, (quarter, code)| bits | (code >> 4) << (2 * quarter));
        }
    }
    out.extend(low);
    out.extend(high);
    out.extend(scales.iter().map(|s| *s as u8));
    out.extend(d.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use tandem_kernels::quant::dequantize;

    use super::*;

    /// Pseudo-random, roughly bell-shaped.
    fn weights(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..len).map(|_| (next() + next() + next()) * 0.1).collect()
    }

    fn round_trip(format: BlockFormat, elements: &[f32]) -> Vec<f32> {
        let mut bytes = Vec::new();
        assert!(encode(Dtype::Quantized(format), elements, &mut bytes));
        assert_eq!(Some(bytes.len()), format.bytes_for(elements.len()));
        let mut decoded = vec![f32::NAN; elements.len()];
        dequantize(format, &bytes, &mut decoded);
        decoded
    }

    /// The root mean square error, relative to that of the weights; a uniform code of b bits over +-3 sigma
    /// has about 1.7 / 2^b.
    #[test]
    fn the_error_is_what_the_bits_allow() {
        let elements = weights(256 * 16, 7);
        let power: f32 = elements.iter().map(|x| x * x).sum();
        for (format, allowed) in [
            (BlockFormat::Q8_0, 0.006),
            (BlockFormat::Q6K, 0.02),
            (BlockFormat::Q4K, 0.075),
            (BlockFormat::Q5_0, 0.05),
            (BlockFormat::Q4_0, 0.095),
        ] {
            let decoded = round_trip(format, &elements);
            let error: f32 = elements.iter().zip(&decoded).map(|(x, y)| (x - y).powi(2)).sum();
            let relative = (error / power).sqrt();
            assert!(relative < allowed, "{}: {relative}", format.name());
        }
    }

    #[test]
    fn odd_blocks_decode_to_finite_values() {
        let mut odd = weights(256 * 6, 3);
        odd[..256].fill(0.0);
        odd[256..512].fill(-0.75);
        odd[600] = f32::NAN;
        odd[800] = f32::INFINITY;
        odd[1100] = -1e-30;
        odd[1280..].fill(1e-20);
        for dtype in WRITABLE {
            if let Dtype::Quantized(format) = dtype {
                let decoded = round_trip(format, &odd);
                assert!(decoded.iter().all(|x| x.is_finite()), "{}", format.name());
                assert!(decoded[..256].iter().all(|x| *x == 0.0), "{}", format.name());
                let error = decoded[256..512].iter().fold(0.0f32, |worst, x| worst.max((x + 0.75).abs()));
                assert!(error < 0.01, "{}: {error}", format.name());
            }
        }
    }

    #[test]
    fn what_cannot_be_written_is_said() {
        assert!(!encode(Dtype::Quantized(BlockFormat::Q2K), &[0.0; 256], &mut Vec::new()));
    }
}
