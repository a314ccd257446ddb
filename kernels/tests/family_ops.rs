//! Contract of the operations that only some model families need: every instruction set and any number
//! of threads give the bits of the scalar specification, a row alone is the row in a batch, and the
//! specification is the formula.

mod common;

use common::{Noise, assert_same_bits, pools};
use tandem_kernels::experts::{Groups, Router, Scoring, combine, route};
use tandem_kernels::gate::{Gate, gate_stacked, gelu};
use tandem_kernels::head_norm::{Heads, head_norm};
use tandem_kernels::layer_norm::layer_norm;
use tandem_kernels::scaling::{add, scale, soft_cap};
use tandem_kernels::{Isa, ThreadPool};

/// Around the vector width and its small multiples.
const LENGTHS: [usize; 14] = [0, 1, 2, 7, 8, 9, 15, 16, 17, 33, 63, 65, 129, 688];

/// Written around every output: a kernel that leaves its slice overwrites one.
const GUARD: f32 = 12345.0;

/// Runs `op` on a copy of `x` that begins one element off alignment, between guards.
fn guarded(x: &[f32], op: impl FnOnce(&mut [f32])) -> Vec<f32> {
    let mut buffer = vec![GUARD; x.len() + 34];
    let inside = 17..17 + x.len();
    buffer[inside.clone()].copy_from_slice(x);
    op(&mut buffer[inside.clone()]);
    assert!(
        buffer[..17].iter().chain(&buffer[inside.end..]).all(|&x| x == GUARD),
        "wrote outside its output"
    );
    buffer[inside].to_vec()
}

fn scalar() -> ThreadPool {
    ThreadPool::with_isa(1, Isa::Scalar).unwrap()
}

fn widths() -> impl Iterator<Item = usize> {
    LENGTHS.into_iter().filter(|&width| width > 0)
}

const GATES: [Gate; 3] = [Gate::Silu, Gate::Gelu, Gate::ClampedSwiglu { alpha: 1.702, limit: 7.0 }];

#[test]
fn layer_norms_are_the_scalar_ones_at_every_width() {
    let mut noise = Noise::new(1);
    for pool in pools() {
        for (width, rows) in widths().flat_map(|width| [0, 1, 3, 20].map(|rows| (width, rows))) {
            let (weight, bias, x) = (noise.floats(width), noise.floats(width), noise.specials(rows * width));
            let zeros = vec![0.0; x.len()];
            let expected = guarded(&zeros, |y| layer_norm(&scalar(), &x, &weight, &bias, 1e-5, y));
            let got = guarded(&zeros, |y| layer_norm(&pool, &x, &weight, &bias, 1e-5, y));
            assert_same_bits(&got, &expected, &format!("{pool:?} {rows}x{width}"));
        }
    }
}

#[test]
fn head_norms_are_the_scalar_ones_and_leave_the_gaps_between_rows() {
    let mut noise = Noise::new(2);
    for pool in pools() {
        for (width, num_heads) in widths().flat_map(|width| [(width, 1), (width, 3)]) {
            let weight = noise.floats(width);
            for rows in [0, 1, 5, 20] {
                let heads = Heads { rows, row_stride: num_heads * width + 5, num_heads };
                let x = noise.specials(rows * heads.row_stride);
                let expected = guarded(&x, |x| head_norm(&scalar(), x, &weight, 1e-6, heads));
                let got = guarded(&x, |x| head_norm(&pool, x, &weight, 1e-6, heads));
                assert_same_bits(&got, &expected, &format!("{pool:?} {num_heads}x{width} rows {rows}"));
                for (got, x) in got.chunks(heads.row_stride).zip(x.chunks(heads.row_stride)) {
                    assert_same_bits(&got[num_heads * width..], &x[num_heads * width..], "the gap");
                }
            }
        }
    }
}

#[test]
fn gates_are_the_scalar_ones_and_rows_stand_alone() {
    let mut noise = Noise::new(3);
    for pool in pools() {
        for width in widths() {
            let (gate_up, zeros) = (noise.specials(3 * 2 * width), vec![0.0; 3 * width]);
            for gate in GATES {
                let expected = guarded(&zeros, |y| gate_stacked(&scalar(), gate, &gate_up, width, y));
                let got = guarded(&zeros, |y| gate_stacked(&pool, gate, &gate_up, width, y));
                assert_same_bits(&got, &expected, &format!("{pool:?} {gate:?} width {width}"));
                for (row, got) in gate_up.chunks(2 * width).zip(got.chunks(width)) {
                    let alone = guarded(&zeros[..width], |y| gate_stacked(&pool, gate, row, width, y));
                    assert_same_bits(got, &alone, "a row alone");
                }
            }
        }
    }
}

#[test]
fn elementwise_operations_are_the_scalar_ones_at_every_length() {
    let mut noise = Noise::new(4);
    for pool in pools() {
        for len in LENGTHS.into_iter().chain([5 * 688]) {
            let (x, y) = (noise.specials(len), noise.specials(len));
            let what = format!("{pool:?} length {len}");
            let run = |pool: &ThreadPool| {
                [
                    guarded(&x, |sum| add(pool, sum, &y)),
                    guarded(&x, |x| scale(pool, x, 0.3)),
                    guarded(&x, |x| soft_cap(pool, x, 30.0)),
                    guarded(&vec![0.0; len], |out| gelu(pool, &x, out)),
                ]
            };
            for (got, expected) in run(&pool).iter().zip(&run(&scalar())) {
                assert_same_bits(got, expected, &what);
            }
        }
    }
}

#[test]
fn combinations_are_the_scalar_ones_and_rows_stand_alone() {
    let mut noise = Noise::new(5);
    for pool in pools() {
        for (width, picks) in widths().flat_map(|width| [(width, 1), (width, 4)]) {
            for rows in [0, 1, 6] {
                let (x, weights) = (noise.specials(rows * picks * width), noise.floats(rows * picks));
                let zeros = vec![7.0; rows * width];
                let expected = guarded(&zeros, |y| combine(&scalar(), &x, &weights, width, y));
                let got = guarded(&zeros, |y| combine(&pool, &x, &weights, width, y));
                assert_same_bits(&got, &expected, &format!("{pool:?} {rows}x{picks}x{width}"));
                for (row, got) in got.chunks(width).enumerate() {
                    let (x, weights) = (&x[row * picks * width..], &weights[row * picks..]);
                    let x = &x[..picks * width];
                    let alone = guarded(&zeros[..width], |y| combine(&pool, x, &weights[..picks], width, y));
                    assert_same_bits(got, &alone, "a row alone");
                }
            }
        }
    }
}

#[test]
fn a_row_is_routed_alone_as_in_a_batch() {
    let mut noise = Noise::new(6);
    let (num_experts, num_picks, rows) = (12, 4, 9);
    let logits = noise.specials(rows * num_experts);
    let bias = noise.floats(num_experts);
    let softmax = Router {
        num_experts,
        num_picks,
        scoring: Scoring::Softmax,
        choice_bias: None,
        groups: None,
        renormalise: false,
        scale: 1.0,
    };
    let sigmoid = Router {
        scoring: Scoring::Sigmoid,
        choice_bias: Some(&bias),
        groups: Some(Groups { num_groups: 4, num_picked: 2, two_best: true }),
        scale: 2.5,
        ..softmax
    };
    for router in [softmax, sigmoid].into_iter().flat_map(|r| [r, Router { renormalise: true, ..r }]) {
        let (mut picks, mut weights) = (vec![0; rows * num_picks], vec![0.0; rows * num_picks]);
        route(&logits, &router, &mut Vec::new(), &mut picks, &mut weights);
        for row in 0..rows {
            let (mut pick, mut weight) = (vec![0; num_picks], vec![0.0; num_picks]);
            let logits = &logits[row * num_experts..(row + 1) * num_experts];
            route(logits, &router, &mut Vec::new(), &mut pick, &mut weight);
            let range = row * num_picks..(row + 1) * num_picks;
            assert_eq!(pick, picks[range.clone()]);
            assert_same_bits(&weight, &weights[range], "weights");
        }
    }
}

/// In double precision, to a few units of f32's last place.
#[test]
fn the_specification_is_the_formula() {
    let mut noise = Noise::new(7);
    let pool = scalar();
    let x: Vec<f32> = noise.floats(100).iter().map(|x| x * 9.0).collect();
    let close = |got: f32, exact: f64| (f64::from(got) - exact).abs() <= 2e-6 * exact.abs().max(1.0);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let gelu_of = |x: f64| 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x.powi(3))).tanh());

    let mut out = vec![0.0; 100];
    gelu(&pool, &x, &mut out);
    assert!(x.iter().zip(&out).all(|(&x, &got)| close(got, gelu_of(x.into()))));
    let mut gated = vec![0.0; 50];
    gate_stacked(&pool, Gate::ClampedSwiglu { alpha: 1.5, limit: 4.0 }, &x, 50, &mut gated);
    for (i, &got) in gated.iter().enumerate() {
        let (gate, up) = (f64::from(x[i]).min(4.0), f64::from(x[50 + i]).clamp(-4.0, 4.0));
        assert!(close(got, (up + 1.0) * gate * sigmoid(1.5 * gate)));
    }
    let (weight, bias) = (noise.floats(100), noise.floats(100));
    layer_norm(&pool, &x, &weight, &bias, 1e-5, &mut out);
    let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / 100.0;
    let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 100.0;
    for i in 0..100 {
        let exact = (f64::from(x[i]) - mean) / (variance + 1e-5).sqrt() * f64::from(weight[i]);
        assert!(close(out[i], exact + f64::from(bias[i])));
    }
}
