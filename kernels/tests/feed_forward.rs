//! Contract: the gated feed-forward layer has the bits of its two products and its gate one after the other,
//! on every instruction set, with any number of threads and any number of rows; and packing on several
//! threads gives the matrix that packing on one does.

mod common;

use common::{Noise, assert_same_bits, pools};
use tandem_kernels::gate::{Gate, gate_stacked};
use tandem_kernels::matmul::gated::{FeedForward, feed_forward};
use tandem_kernels::matmul::matmul;
use tandem_kernels::pack::{PackedMatrix, WeightType, Weights};
use tandem_kernels::quant::BlockFormat;
use tandem_kernels::{Isa, ThreadPool};

const Q4_0: WeightType = WeightType::Quantized(BlockFormat::Q4_0);
const Q8_0: WeightType = WeightType::Quantized(BlockFormat::Q8_0);
const Q4K: WeightType = WeightType::Quantized(BlockFormat::Q4K);
const Q6K: WeightType = WeightType::Quantized(BlockFormat::Q6K);

/// The bytes of small weights of a type.
fn weights(noise: &mut Noise, weight_type: WeightType, elements: usize) -> Vec<u8> {
    let mut bytes = |len: usize| -> Vec<u8> { (0..len).map(|_| (noise.next() >> 40) as u8).collect() };
    match weight_type {
        // Bit 6 of every byte clear: no f16 among them says infinity, no element is large.
        WeightType::Quantized(format) => {
            bytes(format.bytes_for(elements).unwrap()).into_iter().map(|byte| byte & 0xbf).collect()
        }
        WeightType::F32 => noise.floats(elements).into_iter().flat_map(f32::to_le_bytes).collect(),
        _ => bytes(2 * elements).into_iter().map(|byte| byte & 0xbf).collect(),
    }
}

/// Types of gates, ups and down, inputs, width, outputs.
const LAYERS: [([WeightType; 3], usize, usize, usize); 8] = [
    ([Q4_0; 3], 96, 320, 40),
    ([Q8_0, Q8_0, Q4_0], 64, 32, 17),
    ([Q4K, Q4K, Q6K], 256, 512, 33),
    ([Q6K, Q4K, Q4K], 512, 768, 48),
    ([WeightType::Bf16, WeightType::Bf16, Q8_0], 40, 96, 20),
    ([Q4_0, Q4_0, WeightType::F32], 32, 80, 20),
    ([WeightType::F32; 3], 24, 50, 31),
    ([WeightType::F16, WeightType::F32, WeightType::Bf16], 30, 37, 16),
];

#[test]
fn a_layer_is_its_products_and_its_gate() {
    let mut noise = Noise::new(31);
    let scalar = ThreadPool::with_isa(1, Isa::Scalar).unwrap();
    let gates = [Gate::Silu, Gate::Gelu, Gate::ClampedSwiglu { alpha: 1.702, limit: 7.0 }];
    for (i, (types, inp, width, out)) in LAYERS.into_iter().enumerate() {
        let bytes = [inp * width, inp * width, width * out];
        let bytes: Vec<_> =
            types.iter().zip(bytes).map(|(&kind, elements)| weights(&mut noise, kind, elements)).collect();
        let parts = [Weights::new(types[0], &bytes[0]), Weights::new(types[1], &bytes[1])];
        let up = PackedMatrix::stack(&parts, inp);
        let down = PackedMatrix::stack(&[Weights::new(types[2], &bytes[2])], width);
        let (up_bias, down_bias) = (noise.floats(2 * width), noise.floats(out));
        let layer = FeedForward {
            up: &up,
            up_bias: (i % 2 == 0).then_some(&up_bias),
            gate: gates[i % 3],
            down: &down,
            down_bias: (i % 3 == 0).then_some(&down_bias),
        };
        for rows in [0, 1, 2, 5, 9, 50, 101] {
            let x = noise.floats(rows * inp);
            let mut gate_up = vec![0.0; rows * 2 * width];
            matmul(&scalar, &x, &up, layer.up_bias, &mut gate_up);
            let mut gated = vec![0.0; rows * width];
            gate_stacked(&scalar, layer.gate, &gate_up, width, &mut gated);
            let mut expected = vec![0.0; rows * out];
            matmul(&scalar, &gated, &down, layer.down_bias, &mut expected);
            for pool in pools() {
                let mut got = vec![7.0; rows * out + 16];
                feed_forward(&pool, &x, &layer, &mut got[..rows * out]);
                let what = format!("{pool:?} {up:?} {down:?} rows {rows}");
                assert_same_bits(&got[..rows * out], &expected, &what);
                assert!(got[rows * out..].iter().all(|&y| y == 7.0), "{what}: wrote past its output");
            }
        }
    }
}

#[test]
#[should_panic(expected = "100 gates and ups for a width of 64")]
fn halves_of_another_width_are_refused() {
    let (up, down) = (vec![0.0; 100 * 8], vec![0.0; 4 * 64]);
    let up = PackedMatrix::from_f32(&up, 100, 8);
    let down = PackedMatrix::from_f32(&down, 4, 64);
    let layer = FeedForward { up: &up, up_bias: None, gate: Gate::Silu, down: &down, down_bias: None };
    feed_forward(&ThreadPool::new(1), &[0.0; 8], &layer, &mut [0.0; 4]);
}

#[test]
fn packing_on_several_threads_gives_the_same_matrix() {
    let mut noise = Noise::new(32);
    let pool = ThreadPool::new(3);
    let dense = [WeightType::F32, WeightType::Bf16, WeightType::F16];
    for weight_type in dense.into_iter().chain(BlockFormat::ALL.map(WeightType::Quantized)) {
        let inp = 512;
        let [first, second] = [700, 37].map(|out| weights(&mut noise, weight_type, out * inp));
        let other = noise.floats(20 * inp);
        let parts =
            [Weights::new(weight_type, &first), Weights::new(weight_type, &second), Weights::f32(&other)];
        let (alone, shared) = (PackedMatrix::stack(&parts, inp), PackedMatrix::stack_on(&pool, &parts, inp));
        let (mut row, mut shared_row) = (vec![0.0; inp], vec![0.0; inp]);
        for index in 0..757 {
            alone.row(index, &mut row);
            shared.row(index, &mut shared_row);
            assert_same_bits(&shared_row, &row, &format!("{shared:?} row {index}"));
        }
    }
}
