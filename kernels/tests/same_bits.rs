//! Contract: every instruction set, any number of threads and any grouping of rows give the bits of
//! the scalar specification, and touch nothing outside their outputs.

mod common;

use common::{Noise, assert_same_bits, pools};
use tandem_kernels::matmul::matmul;
use tandem_kernels::norm::{add_rms_norm, rms_norm};
use tandem_kernels::pack::{PackedMatrix, Weights};
use tandem_kernels::rope::{Rope, rope};
use tandem_kernels::{Isa, ThreadPool};

/// Around the vector width and its small multiples.
const LENGTHS: [usize; 14] = [0, 1, 2, 7, 8, 9, 15, 16, 17, 33, 63, 65, 129, 688];

/// Written around every output: a kernel that leaves its slice overwrites one.
const GUARD: f32 = 12345.0;

/// Runs `op` into a slice that begins one element off alignment, between guards.
fn guarded(len: usize, op: impl FnOnce(&mut [f32])) -> Vec<f32> {
    let mut buffer = vec![GUARD; len + 34];
    op(&mut buffer[17..17 + len]);
    assert!(buffer[..17].iter().chain(&buffer[17 + len..]).all(|&x| x == GUARD), "wrote outside its output");
    buffer[17..17 + len].to_vec()
}

fn scalar() -> ThreadPool {
    ThreadPool::with_isa(1, Isa::Scalar).unwrap()
}

/// One matrix in each weight type.
fn matrices(noise: &mut Noise, out: usize, inp: usize) -> Vec<PackedMatrix> {
    let floats = noise.floats(out * inp);
    let bf16: Vec<u16> = floats.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
    // Halves with exponents near 1, both signs.
    let f16: Vec<u16> = floats.iter().map(|x| (x.to_bits() >> 16) as u16 & 0x8fff | 0x3000).collect();
    vec![
        PackedMatrix::from_f32(&floats, out, inp),
        PackedMatrix::from_bf16(&bf16, out, inp),
        PackedMatrix::from_f16(&f16, out, inp),
    ]
}

#[test]
fn matmul_of_every_shape_is_the_scalar_one() {
    let mut noise = Noise::new(1);
    let pools = pools();
    for inp in [1, 2, 7, 16, 33, 64] {
        for out in [1, 15, 16, 17, 64, 65, 130, 250] {
            let bias = noise.floats(out);
            for matrix in matrices(&mut noise, out, inp) {
                for rows in (0..=20).chain([37]) {
                    let x = noise.floats(rows * inp + 1);
                    let x = &x[1..];
                    let bias = (rows % 2 == 0).then_some(&bias[..]);
                    let expected = guarded(rows * out, |y| matmul(&scalar(), x, &matrix, bias, y));
                    for pool in &pools {
                        let got = guarded(rows * out, |y| matmul(pool, x, &matrix, bias, y));
                        assert_same_bits(&got, &expected, &format!("{pool:?} {matrix:?} rows {rows}"));
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_of_a_product_alone_is_the_row_in_a_batch() {
    let mut noise = Noise::new(2);
    for matrix in matrices(&mut noise, 688, 256) {
        let x = noise.floats(20 * 256);
        for pool in pools() {
            let mut alone = vec![0.0; 20 * 688];
            for (x, y) in x.chunks(256).zip(alone.chunks_mut(688)) {
                matmul(&pool, x, &matrix, None, y);
            }
            for rows in 1..=20 {
                let mut batch = vec![0.0; rows * 688];
                matmul(&pool, &x[..rows * 256], &matrix, None, &mut batch);
                assert_same_bits(&batch, &alone[..rows * 688], &format!("{pool:?} {matrix:?} rows {rows}"));
            }
        }
    }
}

#[test]
fn a_product_is_close_to_one_in_double_precision() {
    let mut noise = Noise::new(3);
    let (rows, inp, out) = (3, 257, 40);
    let (x, w) = (noise.floats(rows * inp), noise.floats(out * inp));
    let mut y = vec![0.0; rows * out];
    matmul(&ThreadPool::new(2), &x, &PackedMatrix::from_f32(&w, out, inp), None, &mut y);
    for r in 0..rows {
        for o in 0..out {
            let exact: f64 = (0..inp).map(|k| f64::from(x[r * inp + k]) * f64::from(w[o * inp + k])).sum();
            assert!((f64::from(y[r * out + o]) - exact).abs() < 1e-4, "row {r} output {o}");
        }
    }
}

#[test]
fn nan_and_infinity_stay_in_their_row_and_column() {
    let mut noise = Noise::new(4);
    let (inp, out) = (48, 64);
    let mut w = noise.floats(out * inp);
    w[5 * inp + 3] = f32::INFINITY;
    let matrix = PackedMatrix::from_f32(&w, out, inp);
    let mut x = noise.floats(6 * inp);
    x[2 * inp + 7] = f32::NAN;
    x[4 * inp + 3] = 0.0;
    let expected = guarded(6 * out, |y| matmul(&scalar(), &x, &matrix, None, y));
    assert!(expected[2 * out..3 * out].iter().all(|y| y.is_nan()));
    assert!(expected[out + 5].is_infinite() && expected[4 * out + 5].is_nan());
    assert_eq!(expected.iter().filter(|y| !y.is_finite()).count(), out + 5);
    for pool in pools() {
        let got = guarded(6 * out, |y| matmul(&pool, &x, &matrix, None, y));
        assert_same_bits(&got, &expected, &format!("{pool:?}"));
    }
}

#[test]
fn a_stacked_projection_has_the_bits_of_its_parts() {
    let mut noise = Noise::new(5);
    let (a, b, x) = (noise.floats(40 * 32), noise.floats(24 * 32), noise.floats(3 * 32));
    let pool = ThreadPool::new(1);
    let mut stacked = vec![0.0; 3 * 64];
    matmul(&pool, &x, &PackedMatrix::stack(&[Weights::f32(&a), Weights::f32(&b)], 32), None, &mut stacked);
    for (weights, out, first) in [(&a, 40, 0), (&b, 24, 40)] {
        let mut part = vec![0.0; 3 * out];
        matmul(&pool, &x, &PackedMatrix::from_f32(weights, out, 32), None, &mut part);
        for row in 0..3 {
            let got = &stacked[row * 64 + first..][..out];
            assert_same_bits(got, &part[row * out..(row + 1) * out], "stacked part");
        }
    }
}

#[test]
fn norms_are_the_scalar_ones_at_every_width() {
    let mut noise = Noise::new(6);
    for pool in pools() {
        for width in LENGTHS.into_iter().filter(|&width| width > 0) {
            for rows in [0, 1, 3, 20] {
                let weight = noise.floats(width);
                let (x, residual) = (noise.specials(rows * width), noise.floats(rows * width));
                let expected = guarded(x.len(), |y| rms_norm(&scalar(), &x, &weight, 1e-5, y));
                let got = guarded(x.len(), |y| rms_norm(&pool, &x, &weight, 1e-5, y));
                assert_same_bits(&got, &expected, &format!("{pool:?} rms_norm {rows}x{width}"));

                let (mut sum, mut expected_sum) = (residual.clone(), residual.clone());
                let expected =
                    guarded(x.len(), |y| add_rms_norm(&scalar(), &mut expected_sum, &x, &weight, 1e-5, y));
                let got = guarded(x.len(), |y| add_rms_norm(&pool, &mut sum, &x, &weight, 1e-5, y));
                assert_same_bits(&got, &expected, &format!("{pool:?} add_rms_norm {rows}x{width}"));
                assert_same_bits(&sum, &expected_sum, "the residual");
            }
        }
    }
}

#[test]
fn rope_is_the_scalar_one_and_leaves_the_gaps_between_rows() {
    let mut noise = Noise::new(8);
    for pool in pools() {
        for (head_dim, num_heads) in [(2, 1), (6, 3), (32, 2), (64, 4), (80, 2), (128, 3)] {
            let angles = noise.floats(50 * head_dim / 2);
            let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
            for rows in [0, 1, 5, 40] {
                let positions: Vec<u32> = (0..rows as u32).map(|i| i * 7 % 50).collect();
                // Heads of which a part turns stand apart.
                let head_stride = head_dim + rows % 3;
                let row_stride = num_heads * head_stride + 5;
                let x = noise.specials(rows * row_stride);
                let args = Rope {
                    cos: &cos,
                    sin: &sin,
                    positions: &positions,
                    num_heads,
                    head_dim,
                    head_stride,
                    row_stride,
                };
                let (mut got, mut expected) = (x.clone(), x.clone());
                rope(&pool, &mut got, &args);
                rope(&scalar(), &mut expected, &args);
                assert_same_bits(&got, &expected, &format!("{pool:?} {num_heads}x{head_dim} rows {rows}"));
                for (got, x) in got.chunks(row_stride).zip(x.chunks(row_stride)) {
                    assert_same_bits(&got[row_stride - 5..], &x[row_stride - 5..], "the gap");
                    for (got, x) in got.chunks_exact(head_stride).zip(x.chunks_exact(head_stride)) {
                        assert_same_bits(&got[head_dim..], &x[head_dim..], "the gap between heads");
                    }
                }
            }
        }
    }
}
