//! Products with quantised weights against what the machine allows.
//!
//! For an operation of a model, a format and numbers of rows: milliseconds, bytes and operations a second,
//! and their shares of the two roofs. Rounds are interleaved (every row count and both roofs
//! once a round) and each figure is its median, because the machines this runs on are shared. Copies of
//! a matrix take turns, enough of them that no cache holds them.

use std::time::Instant;

use tandem_kernels::ThreadPool;
use tandem_kernels::matmul::matmul;
use tandem_kernels::pack::{PackedMatrix, Weights};
use tandem_kernels::quant::BlockFormat;
use tandem_kernels::roof::{ReadRoof, dot_products};

/// One product of a model's pass.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The model and the operation.
    pub name: &'static str,
    /// Outputs.
    pub out: usize,
    /// Inputs.
    pub inp: usize,
}

/// Qwen2.5-Coder's products, heads included.
pub const SHAPES: [Shape; 15] = [
    Shape { name: "0.5B qkv", out: 1152, inp: 896 },
    Shape { name: "0.5B o", out: 896, inp: 896 },
    Shape { name: "0.5B gate_up", out: 9728, inp: 896 },
    Shape { name: "0.5B down", out: 896, inp: 4864 },
    Shape { name: "0.5B head", out: 151_936, inp: 896 },
    Shape { name: "1.5B qkv", out: 2048, inp: 1536 },
    Shape { name: "1.5B o", out: 1536, inp: 1536 },
    Shape { name: "1.5B gate_up", out: 17_920, inp: 1536 },
    Shape { name: "1.5B down", out: 1536, inp: 8960 },
    Shape { name: "1.5B head", out: 151_936, inp: 1536 },
    Shape { name: "7B qkv", out: 4608, inp: 3584 },
    Shape { name: "7B o", out: 3584, inp: 3584 },
    Shape { name: "7B gate_up", out: 37_888, inp: 3584 },
    Shape { name: "7B down", out: 3584, inp: 18_944 },
    Shape { name: "7B head", out: 152_064, inp: 3584 },
];

/// Far beyond the caches of a machine with two cores' share of one.
const WORKING_SET_BYTES: usize = 192 << 20;

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Rows of activations.
    pub rows: usize,
    /// Of one product.
    pub ms: f64,
    /// Of weights.
    pub gb_per_s: f64,
    /// A multiplication and an addition are two.
    pub gops: f64,
    /// Of the read roof of the same rounds.
    pub memory_share: f64,
    /// Of the int8 roof of the same rounds.
    pub compute_share: f64,
}

/// Measures `shape` in `format` for each of `rows`, `rounds` times.
///
/// # Panics
/// If a row of the shape is not whole blocks of the format.
pub fn measure(
    pool: &ThreadPool,
    read: &ReadRoof,
    shape: Shape,
    format: BlockFormat,
    rows: &[usize],
    rounds: usize,
) -> Vec<Measured> {
    let first = matrix(shape, format);
    let copies = (WORKING_SET_BYTES / first.size_bytes()).clamp(1, 64);
    let size_bytes = first.size_bytes();
    let matrices: Vec<_> = std::iter::once(first).chain((1..copies).map(|_| matrix(shape, format))).collect();
    let most = rows.iter().copied().max().unwrap_or(1);
    let x: Vec<f32> = (0..most * shape.inp)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 8 & 0xffff) as f32 / 32768.0 - 1.0)
        .collect();
    let mut y = vec![0.0; most * shape.out];
    let mut seconds = vec![Vec::new(); rows.len()];
    let (mut gb_roof, mut gops_roof) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let start = Instant::now();
        let bytes = read.read(pool);
        gb_roof.push(bytes as f64 / start.elapsed().as_secs_f64() / 1e9);
        let start = Instant::now();
        let operations = dot_products(pool, 200_000);
        gops_roof.push(operations as f64 / start.elapsed().as_secs_f64() / 1e9);
        for (&rows, seconds) in rows.iter().zip(&mut seconds) {
            // A long product is its own many repetitions.
            let products = if rows >= 64 { 1 } else { matrices.len() };
            let start = Instant::now();
            for weights in &matrices[..products] {
                matmul(pool, &x[..rows * shape.inp], weights, None, &mut y[..rows * shape.out]);
            }
            seconds.push(start.elapsed().as_secs_f64() / products as f64);
        }
    }
    let (gb_roof, gops_roof) = (median(&mut gb_roof), median(&mut gops_roof));
    let line = |(&rows, seconds): (&usize, &mut Vec<f64>)| {
        let seconds = median(seconds);
        let gb_per_s = size_bytes as f64 / seconds / 1e9;
        let gops = 2.0 * (rows * shape.out * shape.inp) as f64 / seconds / 1e9;
        Measured {
            rows,
            ms: seconds * 1e3,
            gb_per_s,
            gops,
            memory_share: gb_per_s / gb_roof,
            compute_share: gops / gops_roof,
        }
    };
    rows.iter().zip(&mut seconds).map(line).collect()
}

fn matrix(shape: Shape, format: BlockFormat) -> PackedMatrix {
    let elements = shape.out * shape.inp;
    let len = format.bytes_for(elements).expect("rows of whole blocks");
    // No byte of a scale says infinity.
    let blocks: Vec<u8> = (0..len).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 15) as u8 & 0xbf).collect();
    PackedMatrix::stack(&[Weights::Quantized { format, blocks: &blocks }], shape.inp)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Prints the table for arguments `[NAME,..|all] [FORMAT,..] [ROWS,..] [ROUNDS]`: names are beginnings of
/// those of [`SHAPES`].
///
/// # Panics
/// If a number is not one.
pub fn print(arguments: &[String]) {
    let list = |i: usize, default: &'static str| -> Vec<String> {
        arguments.get(i).map_or(default, String::as_str).split(',').map(str::to_owned).collect()
    };
    let names = list(0, "all");
    let formats = list(1, "Q4_0,Q8_0,Q4_K,Q6_K");
    let rows = list(2, "1,2,4,5,8,16,64,512");
    let rows: Vec<usize> = rows.iter().map(|rows| rows.parse().expect("a number of rows")).collect();
    let rounds = arguments.get(3).map_or(7, |rounds| rounds.parse().expect("a number of rounds"));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let pool = ThreadPool::new(threads);
    let read = ReadRoof::new(WORKING_SET_BYTES);
    println!("{threads} threads, {}; medians of {rounds} interleaved rounds", pool.isa());
    println!("shape          format rows        ms  x n=first   GB/s   GOPS  of memory  of int8");
    for shape in SHAPES {
        if !names.iter().any(|name| name == "all" || shape.name.starts_with(name.as_str())) {
            continue;
        }
        for format in BlockFormat::ALL.into_iter().filter(|format| formats.iter().any(|f| f == format.name()))
        {
            if !shape.inp.is_multiple_of(format.block_len()) {
                continue;
            }
            let lines = measure(&pool, &read, shape, format, &rows, rounds);
            for line in &lines {
                println!(
                    "{:14} {:6} {:4} {:9.3} {:10.2} {:6.1} {:6.0} {:9.0}% {:7.0}%",
                    shape.name,
                    format.name(),
                    line.rows,
                    line.ms,
                    line.ms / lines[0].ms,
                    line.gb_per_s,
                    line.gops,
                    100.0 * line.memory_share,
                    100.0 * line.compute_share
                );
            }
        }
    }
}
