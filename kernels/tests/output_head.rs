//! Contract: the head gives of every row what is made of the whole row: its logits, or the token that is chosen of
//! them, with its share; the same bits on every instruction set, with any number of threads, any other rows beside
//! it and whatever is wanted of those. Padding never wins, and what is not a number in a row shows in no other.

mod common;

use std::sync::Arc;

use common::{Noise, assert_same_bits, pools};
use tandem_kernels::matmul::head::{Head, HeadRoom, Wanted, head};
use tandem_kernels::matmul::matmul;
use tandem_kernels::pack::{PackedMatrix, WeightType, Weights};
use tandem_kernels::quant::BlockFormat;
use tandem_kernels::sampling::choice::{Change, Choice, Chosen, Keep, Race};
use tandem_kernels::sampling::{RowRoom, choose_in, noise};
use tandem_kernels::scaling::{scale, soft_cap};
use tandem_kernels::{Isa, ThreadPool};

/// The bytes of small weights of a type.
fn weights(noise: &mut Noise, weight_type: WeightType, elements: usize) -> Vec<u8> {
    match weight_type {
        // Bit 6 of every byte clear: no f16 among them says infinity, no element is large.
        WeightType::Quantized(format) => {
            (0..format.bytes_for(elements).unwrap()).map(|_| (noise.next() >> 40) as u8 & 0xbf).collect()
        }
        _ => noise.floats(elements).into_iter().flat_map(f32::to_le_bytes).collect(),
    }
}

/// What is wanted of a row: everything in turn.
fn wanted(row: usize) -> Wanted {
    let noise = noise::Noise::new(5, row as u64);
    let drawn =
        |inverse_temperature| Choice { race: Some(Race { noise, inverse_temperature }), ..Choice::default() };
    let kept = |top_k, top_p, min_p| Choice { keep: Keep { top_k, top_p, min_p }, ..drawn(1.25) };
    let mask = || Some(Arc::new((0..40).map(|word: u32| word.wrapping_mul(0x9e37_79b9)).collect::<Vec<_>>()));
    let change = |id| Change { bias: 0.5, repetition: 1.2, is_forbidden: id % 9 == 0, ..Change::none(id) };
    let changes = || Some(Arc::new((0..300).map(|i| change(5 * i)).collect::<Vec<_>>()));
    Wanted::Token(match row % 14 {
        0 => Choice { share: true, ..Choice::default() },
        1 => drawn(1.25),
        2 => return Wanted::Whole,
        3 => Choice::default(),
        4 => Choice { share: true, ..drawn(1.25) },
        5 => drawn(0.01),
        6 => kept(20, 1.0, 0.0),
        7 => Choice { share: true, ..kept(0, 0.7, 0.0) },
        8 => Choice { report: Some(5), ..kept(20, 0.8, 0.05) },
        9 => Choice { report: Some(0), ..Choice::default() },
        10 => Choice { mask: mask(), share: true, ..kept(0, 1.0, 0.5) },
        11 => Choice { mask: mask(), ..Choice::default() },
        12 => Choice { changes: changes(), report: Some(2), ..drawn(2.0) },
        _ => Choice { changes: changes(), mask: mask(), report: Some(3), share: true, ..kept(0, 0.9, 0.0) },
    })
}

#[derive(Clone, Copy)]
struct Case {
    weight_type: WeightType,
    inputs: usize,
    outputs: usize,
    num_token_ids: usize,
    scale: f32,
    cap: Option<f32>,
}

const Q4_0: WeightType = WeightType::Quantized(BlockFormat::Q4_0);
const Q6K: WeightType = WeightType::Quantized(BlockFormat::Q6K);
const PLAIN: Case =
    Case { weight_type: Q4_0, inputs: 64, outputs: 1300, num_token_ids: 1300, scale: 1.0, cap: None };

const CASES: [Case; 5] = [
    PLAIN,
    Case { num_token_ids: 1040, scale: 0.3, ..PLAIN },
    Case { weight_type: Q6K, inputs: 256, outputs: 530, num_token_ids: 500, cap: Some(3.0), ..PLAIN },
    Case { weight_type: WeightType::F32, inputs: 24, outputs: 700, num_token_ids: 3, ..PLAIN },
    Case { weight_type: WeightType::F32, inputs: 8, outputs: 1, num_token_ids: 1, ..PLAIN },
];

/// What is to come of the rows of `x`: the whole ones, and the tokens of the others.
fn expected(
    case: &Case,
    matrix: &PackedMatrix,
    x: &[f32],
    wanted: &[Wanted],
) -> (Vec<f32>, Vec<Chosen>, Vec<(u32, f32)>) {
    let pool = ThreadPool::with_isa(1, Isa::Scalar).unwrap();
    let mut logits = vec![0.0; wanted.len() * case.outputs];
    matmul(&pool, x, matrix, None, &mut logits);
    if case.scale != 1.0 {
        scale(&pool, &mut logits, case.scale);
    }
    if let Some(cap) = case.cap {
        soft_cap(&pool, &mut logits, cap);
    }
    let (mut whole, mut chosen, mut top) = (Vec::new(), Vec::new(), Vec::new());
    let mut room = RowRoom::default();
    for (row, wanted) in logits.chunks_exact(case.outputs).zip(wanted) {
        match wanted {
            Wanted::Whole => whole.extend_from_slice(row),
            Wanted::Token(choice) => {
                chosen.push(choose_in(&row[..case.num_token_ids], choice, &mut room));
                top.extend_from_slice(room.top());
            }
        }
    }
    (whole, chosen, top)
}

#[test]
fn a_row_gives_what_the_whole_row_would() {
    let mut noise = Noise::new(77);
    for case in CASES {
        let bytes = weights(&mut noise, case.weight_type, case.inputs * case.outputs);
        let matrix = PackedMatrix::stack(&[Weights::new(case.weight_type, &bytes)], case.inputs);
        for rows in [0, 1, 2, 7, 16, 49, 100] {
            let mut x = noise.floats(rows * case.inputs);
            if rows > 3 {
                x[3 * case.inputs + 5] = f32::NAN;
            }
            let all_alike = [2, 0, 1, 7, 8].map(|kind| vec![wanted(kind); rows]);
            for wanted in [(0..rows).map(wanted).collect()].into_iter().chain(all_alike) {
                let (expected_whole, expected_chosen, expected_top) = expected(&case, &matrix, &x, &wanted);
                let Case { num_token_ids, scale, cap, .. } = case;
                let of = Head { weights: &matrix, scale, soft_cap: cap, num_token_ids };
                for pool in pools() {
                    let (mut whole, mut room) = (vec![7.0; expected_whole.len()], HeadRoom::default());
                    head(&pool, &x, &of, &wanted, &mut room, &mut whole);
                    let chosen = room.chosen();
                    let what = format!("{pool:?} {matrix:?} rows {rows}");
                    assert_same_bits(&whole, &expected_whole, &what);
                    assert_eq!(chosen.len(), expected_chosen.len(), "{what}");
                    assert_eq!(room.top(), expected_top, "{what}");
                    for (got, expected) in chosen.iter().zip(&expected_chosen) {
                        assert_eq!(got.is_finite, expected.is_finite, "{what}");
                        assert!(!got.is_finite || got == expected, "{what}: {got:?}, not {expected:?}");
                        assert!((got.token as usize) < case.num_token_ids, "{what}: {got:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn room_serves_passes_of_any_size_one_after_the_other() {
    let mut noise = Noise::new(3);
    let bytes = weights(&mut noise, Q4_0, PLAIN.inputs * PLAIN.outputs);
    let matrix = PackedMatrix::stack(&[Weights::new(Q4_0, &bytes)], PLAIN.inputs);
    let (pool, mut room) = (ThreadPool::new(2), HeadRoom::default());
    for rows in [20, 1, 5, 0, 33] {
        let x = noise.floats(rows * PLAIN.inputs);
        let wanted: Vec<Wanted> = (0..rows).map(wanted).collect();
        let (expected_whole, expected_chosen, expected_top) = expected(&PLAIN, &matrix, &x, &wanted);
        let mut whole = vec![0.0; expected_whole.len()];
        let of = Head { weights: &matrix, scale: 1.0, soft_cap: None, num_token_ids: PLAIN.num_token_ids };
        head(&pool, &x, &of, &wanted, &mut room, &mut whole);
        assert_same_bits(&whole, &expected_whole, "whole rows");
        assert_eq!(room.chosen(), expected_chosen);
        assert_eq!(room.top(), expected_top);
    }
}

#[test]
#[should_panic(expected = "head: outputs of 2 types; wanted one")]
fn outputs_of_several_types_are_refused() {
    let mut noise = Noise::new(9);
    let (inputs, outputs) = (64, 20);
    let blocks = weights(&mut noise, Q4_0, outputs * inputs);
    let floats = weights(&mut noise, WeightType::F32, outputs * inputs);
    let parts = [Weights::new(Q4_0, &blocks), Weights::new(WeightType::F32, &floats)];
    let matrix = PackedMatrix::stack(&parts, inputs);
    let of = Head { weights: &matrix, scale: 1.0, soft_cap: None, num_token_ids: 2 * outputs };
    let (pool, mut room) = (ThreadPool::new(1), HeadRoom::default());
    head(&pool, &noise.floats(inputs), &of, &[wanted(0)], &mut room, &mut []);
}
