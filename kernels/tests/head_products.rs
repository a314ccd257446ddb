//! Contract of the products of heads: the bits of one product a head, whatever the instruction set, the threads
//! and the other rows; what follows a head's inputs follows its outputs, and nothing else is touched.

mod common;

use common::{Noise, assert_same_bits, pools};
use tandem_kernels::matmul::heads::{HeadProducts, head_matmul};
use tandem_kernels::matmul::matmul;
use tandem_kernels::pack::{WeightType, Weights};
use tandem_kernels::quant::BlockFormat;
use tandem_kernels::{Isa, PackedMatrix, ThreadPool};

/// A matrix of `[outp, inp]`, in blocks of Q8_0 if it is quantised.
fn matrix(noise: &mut Noise, inp: usize, outp: usize, quantized: bool) -> PackedMatrix {
    let values = noise.floats(inp * outp);
    let (kind, bytes): (_, Vec<u8>) = match quantized {
        false => (WeightType::F32, values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        true => {
            let block = |values: &[f32]| -> Vec<u8> {
                // A scale of 2^-6 in half precision, then the whole numbers.
                let numbers = values.iter().map(|value| (value * 64.0) as i8 as u8);
                [0x00, 0x24].into_iter().chain(numbers).collect()
            };
            (WeightType::Quantized(BlockFormat::Q8_0), values.chunks(32).flat_map(block).collect())
        }
    };
    PackedMatrix::stack(&[Weights::new(kind, &bytes)], inp)
}

#[test]
fn every_head_is_a_product_by_itself() {
    let mut noise = Noise::new(31);
    let scalar = ThreadPool::with_isa(1, Isa::Scalar).unwrap();
    for (num_heads, inp, outp, tail, quantized) in [
        (3, 24, 40, 7, false),
        (1, 5, 3, 0, false),
        (16, 128, 64, 16, false),
        (4, 64, 33, 5, true),
        (5, 96, 48, 0, true),
    ] {
        let weights: Vec<PackedMatrix> =
            (0..num_heads).map(|_| matrix(&mut noise, inp, outp, quantized)).collect();
        let (in_width, out_row_stride) = (num_heads * (inp + tail), num_heads * (outp + tail) + 3);
        let heads = HeadProducts { weights: &weights, tail, out_row_stride };
        for rows in [0, 1, 2, 9] {
            let x = noise.floats(rows * in_width);
            let mut expected = vec![5.0; rows * out_row_stride];
            for (row, x) in x.chunks_exact(in_width).enumerate() {
                for (head, x) in x.chunks_exact(inp + tail).enumerate() {
                    let out = &mut expected[row * out_row_stride + head * (outp + tail)..][..outp + tail];
                    matmul(&scalar, &x[..inp], &weights[head], None, &mut out[..outp]);
                    out[outp..].copy_from_slice(&x[inp..]);
                }
            }
            for pool in pools() {
                let mut out = vec![5.0; rows * out_row_stride];
                head_matmul(&pool, &x, &heads, &mut out);
                assert_same_bits(&out, &expected, &format!("{pool:?} {num_heads} heads {inp}x{outp} {rows}"));
            }
        }
    }
}
