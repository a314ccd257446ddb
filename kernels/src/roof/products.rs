//! Matrix products at the shapes of real models, from memory.

use super::{Least, Measured, ReadRoof, WORKING_SET_BYTES, dot_products, multiply_adds, noise};
use crate::matmul::matmul;
use crate::pack::{PackedMatrix, WeightType, Weights};
use crate::pool::ThreadPool;

/// One product of a model's pass.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The model.
    pub model: &'static str,
    /// The operation.
    pub op: &'static str,
    /// Outputs.
    pub out: usize,
    /// Inputs.
    pub inp: usize,
}

const fn shape(model: &'static str, op: &'static str, out: usize, inp: usize) -> Shape {
    Shape { model, op, out, inp }
}

/// Qwen2.5-Coder's products, heads included.
pub const SHAPES: [Shape; 15] = [
    shape("0.5B", "qkv", 1152, 896),
    shape("0.5B", "o", 896, 896),
    shape("0.5B", "gate_up", 9728, 896),
    shape("0.5B", "down", 896, 4864),
    shape("0.5B", "head", 151_936, 896),
    shape("1.5B", "qkv", 2048, 1536),
    shape("1.5B", "o", 1536, 1536),
    shape("1.5B", "gate_up", 17_920, 1536),
    shape("1.5B", "down", 1536, 8960),
    shape("1.5B", "head", 151_936, 1536),
    shape("7B", "qkv", 4608, 3584),
    shape("7B", "o", 3584, 3584),
    shape("7B", "gate_up", 37_888, 3584),
    shape("7B", "down", 3584, 18_944),
    shape("7B", "head", 152_064, 3584),
];

/// From so many rows on a product is its own many repetitions.
const MANY_ROWS: usize = 64;

/// Measures the product of `shape` with weights of `weight_type`, for each of `rows`, in `rounds` rounds. `None`
/// if a row of the shape is not whole blocks of the type.
pub fn measure(
    pool: &ThreadPool,
    read: &ReadRoof,
    shape: Shape,
    weight_type: WeightType,
    rows: &[usize],
    rounds: usize,
) -> Option<Vec<Measured>> {
    let (unit, unit_bytes) = weight_type.unit();
    if !shape.inp.is_multiple_of(unit) {
        return None;
    }
    // Bit 6 of every byte clear: no scale says infinity.
    let len = shape.out * shape.inp / unit * unit_bytes;
    let bytes: Vec<u8> = (0..len).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 15) as u8 & 0xbf).collect();
    let matrix = || PackedMatrix::stack_on(pool, &[Weights::new(weight_type, &bytes)], shape.inp);
    let first = matrix();
    let size_bytes = first.size_bytes();
    let copies = (WORKING_SET_BYTES / size_bytes).clamp(1, 64);
    let matrices: Vec<_> = std::iter::once(first).chain((1..copies).map(|_| matrix())).collect();
    let most = rows.iter().copied().max().unwrap_or(1);
    let (x, mut y) = (noise(most * shape.inp), vec![0.0; most * shape.out]);

    let mut times = vec![Least::NONE; rows.len()];
    let (mut reading, mut computing) = (Least::NONE, Least::NONE);
    let (mut read_bytes, mut computed) = (0, 0);
    for _ in 0..rounds {
        read_bytes = reading.time(|| read.read(pool));
        computed = computing.time(|| match weight_type {
            WeightType::Quantized(_) => dot_products(pool, 100_000),
            _ => multiply_adds(pool, 100_000),
        });
        for (&rows, time) in rows.iter().zip(&mut times) {
            let (x, y) = (&x[..rows * shape.inp], &mut y[..rows * shape.out]);
            let products = if rows >= MANY_ROWS { 1 } else { matrices.len() };
            time.time(|| matrices[..products].iter().for_each(|weights| matmul(pool, x, weights, None, y)));
        }
    }
    let measured = |(&rows, time): (&usize, &Least)| {
        let products = if rows >= MANY_ROWS { 1 } else { matrices.len() };
        Measured {
            rows,
            seconds: time.0 / products as f64,
            bytes: size_bytes as f64,
            operations: 2.0 * (rows * shape.out * shape.inp) as f64,
            read_roof: read_bytes as f64 / reading.0,
            compute_roof: computed as f64 / computing.0,
        }
    };
    Some(rows.iter().zip(&times).map(measured).collect())
}
