//! What rows of the output head cost by what is wanted of them: a token, drawn this way or that, or every logit, of
//! which then a token is drawn on one thread.
//!
//! `cargo run --release -p tandem-kernels --example draw [-- THREADS INPUTS TEMPERATURE DEVIATION ROUNDS]`
//!
//! Over a vocabulary of 152 thousand tokens, Q8_0 weights, at 1, 5 and 16 rows of logits: a few tokens stand out by
//! [`PEAKS`] deviations, the others are normally distributed (3, as a model's are; less: flat, nearly all may be
//! drawn). In turn, medians, so only ratios count.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use tandem_kernels::ThreadPool;
use tandem_kernels::matmul::head::{Head, HeadRoom, Wanted, head};
use tandem_kernels::pack::{PackedMatrix, WeightType, Weights};
use tandem_kernels::quant::BlockFormat;
use tandem_kernels::sampling::choice::{Change, Choice, Keep, Race};
use tandem_kernels::sampling::noise::Noise;
use tandem_kernels::sampling::{RowRoom, choose_in};

const OUTPUTS: usize = 151_936;
const NUM_TOKEN_IDS: usize = 151_665;
const ROWS: [usize; 3] = [1, 5, 16];
/// What the likeliest tokens' logits are, about, in deviations of the others'.
const PEAKS: [f32; 6] = [8.0, 7.7, 7.2, 6.5, 5.8, 5.0];
/// Elements and bytes of a block of Q8_0.
const BLOCK: (usize, usize) = (32, 34);

/// A stream of numbers that look random.
struct Stream(u64);

impl Stream {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.next() as f32 / (1u32 << 31) as f32).sum::<f32>() - 6.0
    }
}

/// The kinds of rows, each with a name; the race is another one for every row.
fn kinds(temperature: f64) -> Vec<(&'static str, Choice)> {
    let race = Race { noise: Noise::new(7, 0), inverse_temperature: 1.0 / temperature };
    let drawn = Choice { race: Some(race), ..Choice::default() };
    let kept = |top_k, top_p, min_p| Choice { keep: Keep { top_k, top_p, min_p }, ..drawn.clone() };
    let words = (0..NUM_TOKEN_IDS.div_ceil(32)).map(|word| [u32::MAX, 0x8421_1248, 0][word % 3]);
    let mask = Some(Arc::new(words.collect::<Vec<u32>>()));
    let changes = (0..300).map(|i| Change { repetition: 1.1, ..Change::none(401 * i) }).collect::<Vec<_>>();
    vec![
        ("greedy", Choice::default()),
        ("temperature", drawn.clone()),
        ("top_k 20", kept(20, 1.0, 0.0)),
        ("top_p 0.95", kept(0, 0.95, 0.0)),
        ("top_k 20 top_p 0.8", kept(20, 0.8, 0.0)),
        ("min_p 0.05", kept(0, 1.0, 0.05)),
        ("logprobs 5", Choice { report: Some(5), ..drawn.clone() }),
        ("mask", Choice { mask: mask.clone(), ..drawn.clone() }),
        ("mask top_p 0.95", Choice { mask, ..kept(0, 0.95, 0.0) }),
        ("penalty", Choice { changes: Some(Arc::new(changes)), ..drawn }),
    ]
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number =
        |i: usize, default: f64| arguments.get(i).map_or(default, |arg| arg.parse().expect("a number"));
    let (threads, inputs) = (number(0, 2.0) as usize, number(1, 896.0) as usize);
    let (temperature, deviation, rounds) = (number(2, 0.8), number(3, 3.0) as f32, number(4, 9.0) as usize);
    let pool = ThreadPool::new(threads);
    let mut stream = Stream(1);
    let weights = weights(&mut stream, inputs);
    // A weight is uniform among 256 numbers from -1/2 to 1/2.
    let scale = deviation / ((1.0f32 / 12.0).sqrt() * (inputs as f32).sqrt());
    let mut x: Vec<f32> = (0..ROWS[2] * inputs).map(|_| scale * stream.normal()).collect();
    let mut weight = vec![0.0; inputs];
    for row in x.chunks_exact_mut(inputs) {
        for peak in PEAKS {
            weights.row(stream.next() as usize % NUM_TOKEN_IDS, &mut weight);
            let share = deviation * peak / weight.iter().map(|weight| weight * weight).sum::<f32>();
            row.iter_mut().zip(&weight).for_each(|(x, weight)| *x += share * weight);
        }
    }
    println!(
        "{threads} threads, {}, inputs {inputs}, temperature {temperature}, deviation {deviation}",
        pool.isa()
    );
    println!(
        "of the medians of {rounds} rounds, ms: in the head; the row whole, then drawn; the latter's head alone"
    );
    let kinds = kinds(temperature);
    let mut bench =
        Bench { pool, weights, room: HeadRoom::default(), row: RowRoom::default(), whole: Vec::new() };
    for rows in ROWS {
        let mut times = vec![[const { Vec::new() }; 3]; kinds.len()];
        for round in 0..rounds {
            for ((_, choice), times) in kinds.iter().zip(&mut times) {
                let choices = choices(choice, rows, round);
                let seconds = bench.time(&x[..rows * inputs], &choices);
                times.iter_mut().zip(seconds).for_each(|(times, seconds)| times.push(seconds));
            }
        }
        let medians: Vec<[f64; 3]> = times.into_iter().map(|times| times.map(median)).collect();
        for ((name, _), times) in kinds.iter().zip(&medians) {
            let [own, whole, head] = times.map(|seconds| 1e3 * seconds);
            let against = times[0] / medians[1][0];
            println!("{rows:3} rows {name:20} {own:8.3} ({against:.2}x temperature) {whole:8.3} {head:8.3}");
        }
    }
}

/// Blocks of random bytes, with scales of 1/256.
fn weights(stream: &mut Stream, inputs: usize) -> PackedMatrix {
    let mut bytes = vec![0u8; OUTPUTS * inputs / BLOCK.0 * BLOCK.1];
    for block in bytes.chunks_exact_mut(BLOCK.1) {
        block.iter_mut().for_each(|byte| *byte = stream.next() as u8);
        block[..2].copy_from_slice(&0x1c00u16.to_le_bytes());
    }
    PackedMatrix::stack(&[Weights::new(WeightType::Quantized(BlockFormat::Q8_0), &bytes)], inputs)
}

fn choices(choice: &Choice, rows: usize, round: usize) -> Vec<Choice> {
    let noise = |row: usize| Noise::new(7, (round * ROWS[2] + row) as u64);
    let race = |row: usize| choice.race.map(|race| Race { noise: noise(row), ..race });
    (0..rows).map(|row| Choice { race: race(row), ..choice.clone() }).collect()
}

struct Bench {
    pool: ThreadPool,
    weights: PackedMatrix,
    room: HeadRoom,
    row: RowRoom,
    whole: Vec<f32>,
}

impl Bench {
    /// Seconds of the choice in the head, of whole rows and the choice, and of whole rows alone.
    fn time(&mut self, x: &[f32], choices: &[Choice]) -> [f64; 3] {
        let Bench { pool, weights, room, row, whole } = self;
        let of = Head { weights, scale: 1.0, soft_cap: None, num_token_ids: NUM_TOKEN_IDS };
        let wanted: Vec<Wanted> = choices.iter().cloned().map(Wanted::Token).collect();
        let begin = Instant::now();
        head(pool, x, &of, &wanted, room, &mut []);
        let own = begin.elapsed();
        let own_chosen = room.chosen().to_vec();

        whole.resize(choices.len() * OUTPUTS, 0.0);
        let wanted = vec![Wanted::Whole; choices.len()];
        let begin = Instant::now();
        head(pool, x, &of, &wanted, room, whole);
        let computed = begin.elapsed();
        for ((choice, logits), own) in choices.iter().zip(whole.chunks_exact(OUTPUTS)).zip(own_chosen) {
            let chosen = black_box(choose_in(&logits[..NUM_TOKEN_IDS], choice, row));
            assert_eq!(chosen, own, "the same either way");
        }
        [own, begin.elapsed(), computed].map(|time| time.as_secs_f64())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
