//! Contract: products with quantised weights have the bits of the scalar specification on every
//! instruction set, with any number of threads and any grouping of rows, and are as close to the product
//! in f32 as eight bits of activations allow.

mod common;

use common::{Noise, assert_same_bits, pools};
use tandem_kernels::matmul::matmul;
use tandem_kernels::pack::{PackedMatrix, Weights};
use tandem_kernels::quant::{BlockFormat, dequantize};
use tandem_kernels::{Isa, ThreadPool};

fn scalar() -> ThreadPool {
    ThreadPool::with_isa(1, Isa::Scalar).unwrap()
}

/// Random blocks: any codes; f16 scales of either sign, some of them subnormal, none above 2.
fn blocks(noise: &mut Noise, format: BlockFormat, elements: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        (0..format.bytes_for(elements).unwrap()).map(|_| (noise.next() >> 40) as u8).collect();
    for block in bytes.chunks_mut(format.block_bytes()) {
        match format {
            BlockFormat::Mxfp4 => block[0] = 110 + block[0] % 20,
            // Wherever its scales are: no byte of an f16 says infinity.
            _ => block.iter_mut().for_each(|byte| *byte &= 0xbf),
        }
    }
    bytes
}

fn pack(format: BlockFormat, blocks: &[u8], inp: usize) -> PackedMatrix {
    PackedMatrix::stack(&[Weights::quantized(format, blocks)], inp)
}

#[test]
fn every_format_and_shape_is_the_scalar_one() {
    let mut noise = Noise::new(21);
    let pools = pools();
    for format in BlockFormat::ALL {
        let units: &[usize] = if format.block_len() == 32 { &[1, 2, 9, 28] } else { &[1, 3] };
        for &inp in units {
            let inp = inp * format.block_len();
            for out in [1, 15, 16, 17, 65, 130] {
                let matrix = pack(format, &blocks(&mut noise, format, out * inp), inp);
                let bias = noise.floats(out);
                let few = [0, 1, 2, 5, 8, 19];
                let row_counts: Vec<usize> =
                    if out == 65 { (0..=20).chain([37]).collect() } else { few.to_vec() };
                for rows in row_counts {
                    let x = noise.floats(rows * inp + 1);
                    let x = &x[1..];
                    let bias = (rows % 2 == 0).then_some(&bias[..]);
                    let mut expected = vec![0.0; rows * out];
                    matmul(&scalar(), x, &matrix, bias, &mut expected);
                    for pool in &pools {
                        let mut got = vec![7.0; rows * out + 16];
                        matmul(pool, x, &matrix, bias, &mut got[..rows * out]);
                        assert_same_bits(
                            &got[..rows * out],
                            &expected,
                            &format!("{pool:?} {matrix:?} rows {rows}"),
                        );
                        assert!(got[rows * out..].iter().all(|&y| y == 7.0), "wrote past its output");
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_alone_is_the_row_in_a_batch() {
    let mut noise = Noise::new(22);
    for format in BlockFormat::ALL {
        let (inp, out) = (512, 80);
        let matrix = pack(format, &blocks(&mut noise, format, out * inp), inp);
        let x = noise.floats(20 * inp);
        for pool in pools().iter().filter(|pool| pool.isa() != Isa::Scalar) {
            let mut alone = vec![0.0; 20 * out];
            for (x, y) in x.chunks(inp).zip(alone.chunks_mut(out)) {
                matmul(pool, x, &matrix, None, y);
            }
            for rows in 1..=20 {
                let mut batch = vec![0.0; rows * out];
                matmul(pool, &x[..rows * inp], &matrix, None, &mut batch);
                assert_same_bits(&batch, &alone[..rows * out], &format!("{pool:?} {matrix:?} rows {rows}"));
            }
        }
    }
}

#[test]
fn many_rows_are_those_of_their_tiles() {
    let mut noise = Noise::new(23);
    let formats = [
        (BlockFormat::Q4_0, 4864),
        (BlockFormat::Q8_0, 4864),
        (BlockFormat::Q4K, 768),
        (BlockFormat::Q5K, 768),
        (BlockFormat::Q6K, 768),
    ];
    for (format, inp) in formats {
        let (out, rows) = (33, 150);
        let matrix = pack(format, &blocks(&mut noise, format, out * inp), inp);
        let x = noise.floats(rows * inp);
        let mut expected = vec![0.0; rows * out];
        for (x, y) in x.chunks(inp).zip(expected.chunks_mut(out)) {
            matmul(&scalar(), x, &matrix, None, y);
        }
        for pool in pools() {
            let mut got = vec![0.0; rows * out];
            matmul(&pool, &x, &matrix, None, &mut got);
            assert_same_bits(&got, &expected, &format!("{pool:?} {matrix:?}"));
        }
    }
}

#[test]
fn extreme_codes_do_not_overflow() {
    for format in BlockFormat::ALL {
        for byte in [0x00, 0xff, 0x80, 0x7f] {
            let (inp, rows) = (512, 30);
            let mut bytes = vec![byte; format.bytes_for(32 * inp).unwrap()];
            // All scales of f16 to 1 where a byte pattern would make them NaN or infinite: Q8_0 is where
            // sums are largest.
            if format == BlockFormat::Q8_0 {
                bytes.chunks_mut(34).for_each(|block| block[..2].copy_from_slice(&[0x00, 0x3c]));
            }
            let matrix = pack(format, &bytes, inp);
            for sign in [1.0, -1.0] {
                let x: Vec<f32> = vec![sign; rows * inp];
                let mut expected = vec![0.0; rows * 32];
                matmul(&scalar(), &x, &matrix, None, &mut expected);
                for pool in pools() {
                    let mut got = vec![0.0; rows * 32];
                    matmul(&pool, &x, &matrix, None, &mut got);
                    assert_same_bits(&got, &expected, &format!("{pool:?} {matrix:?} of {byte:#x}"));
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_makes_its_row_nan_and_no_other() {
    let mut noise = Noise::new(24);
    let (format, inp, out) = (BlockFormat::Q4K, 768, 40);
    let matrix = pack(format, &blocks(&mut noise, format, out * inp), inp);
    let clean = noise.floats(5 * inp);
    for pool in pools() {
        let mut expected = vec![0.0; 5 * out];
        matmul(&pool, &clean, &matrix, None, &mut expected);
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 255, 256, 700, 767] {
                let mut x = clean.clone();
                x[2 * inp + at] = value;
                let mut got = vec![0.0; 5 * out];
                matmul(&pool, &x, &matrix, None, &mut got);
                assert!(got[2 * out..3 * out].iter().all(|y| y.is_nan()), "{pool:?} {value} at {at}");
                assert_same_bits(&got[..2 * out], &expected[..2 * out], "rows before");
                assert_same_bits(&got[3 * out..], &expected[3 * out..], "rows after");
            }
        }
    }
}

#[test]
fn tiny_activations_count_as_zero_and_huge_ones_are_scaled() {
    let mut noise = Noise::new(25);
    let (format, inp, out) = (BlockFormat::Q8_0, 64, 16);
    let matrix = pack(format, &blocks(&mut noise, format, out * inp), inp);
    for pool in pools() {
        for x in [0.0, -0.0, f32::MIN_POSITIVE, -100.0 * f32::MIN_POSITIVE, 1e-45] {
            let mut y = vec![1.0; out];
            matmul(&pool, &vec![x; inp], &matrix, None, &mut y);
            assert!(y.iter().all(|&y| y == 0.0), "{pool:?} {x:e}");
        }
        for x in [1e30f32, -1e-30] {
            let (mut y, mut one) = (vec![0.0; out], vec![0.0; out]);
            matmul(&pool, &vec![x; inp], &matrix, None, &mut y);
            matmul(&pool, &vec![1.0; inp], &matrix, None, &mut one);
            for (y, one) in y.iter().zip(&one) {
                assert!((y / x - one).abs() <= one.abs() * 1e-5, "{pool:?} {x:e}");
            }
        }
    }
}

#[test]
fn a_stack_of_several_types_has_the_bits_of_its_parts() {
    let mut noise = Noise::new(26);
    let (inp, rows) = (256, 3);
    let q4 = blocks(&mut noise, BlockFormat::Q4K, 40 * inp);
    let floats = noise.floats(24 * inp);
    let q6 = blocks(&mut noise, BlockFormat::Q6K, 19 * inp);
    let parts = [
        (Weights::quantized(BlockFormat::Q4K, &q4), 40),
        (Weights::f32(&floats), 24),
        (Weights::quantized(BlockFormat::Q6K, &q6), 19),
    ];
    let x = noise.floats(rows * inp);
    let bias = noise.floats(83);
    let stacked = PackedMatrix::stack(&parts.map(|(weights, _)| weights), inp);
    for pool in pools() {
        let mut got = vec![0.0; rows * 83];
        matmul(&pool, &x, &stacked, Some(&bias), &mut got);
        let mut first = 0;
        for (weights, out) in parts {
            let mut part = vec![0.0; rows * out];
            let bias = &bias[first..first + out];
            matmul(&pool, &x, &PackedMatrix::stack(&[weights], inp), Some(bias), &mut part);
            for row in 0..rows {
                let got = &got[row * 83 + first..][..out];
                assert_same_bits(got, &part[row * out..(row + 1) * out], "stacked part");
            }
            first += out;
        }
    }
}

/// Root mean square of a product's error over that of the product, against one in double precision of the
/// same weights: what quantising activations costs.
fn relative_error(format: BlockFormat, x: &[f32], inp: usize, noise: &mut Noise) -> f64 {
    let out = 64;
    let blocks = blocks(noise, format, out * inp);
    let mut weights = vec![0.0; out * inp];
    dequantize(format, &blocks, &mut weights);
    let rows = x.len() / inp;
    let mut y = vec![0.0; rows * out];
    matmul(&ThreadPool::new(1), x, &pack(format, &blocks, inp), None, &mut y);
    let (mut error, mut size) = (0.0, 0.0);
    for (x, y) in x.chunks(inp).zip(y.chunks(out)) {
        for (weights, y) in weights.chunks(inp).zip(y) {
            let exact: f64 = x.iter().zip(weights).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            error += (exact - f64::from(*y)).powi(2);
            size += exact.powi(2);
        }
    }
    (error / size).sqrt()
}

#[test]
fn a_product_is_as_close_as_eight_bits_of_activations_allow() {
    let mut noise = Noise::new(27);
    let (inp, rows) = (1024, 8);
    // Normally distributed, about: the sum of twelve uniform ones.
    let x: Vec<f32> = (0..rows * inp).map(|_| (0..12).map(|_| noise.float()).sum::<f32>() / 2.0).collect();
    for format in BlockFormat::ALL {
        let error = relative_error(format, &x, inp, &mut noise);
        // The largest of 32 is about 2.2 standard deviations: a step of 2.2/127, its error evenly spread,
        // is 0.5% of one.
        assert!(error < 0.007, "{format}: {error}");
    }
}
