//! What a pool's operations cost, and what is left of its speed when other programs use the cores.
//!
//! `cargo run --release -p tandem-kernels --example pool_load [-- THREADS]`
//!
//! First the cost of handing out an operation that does nothing. Then passes like a small model's, 170
//! operations that read about 2 MB each, by themselves and beside two threads that compute without a pause;
//! with the pool, and on the caller alone. In turn, medians, so only ratios count.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tandem_kernels::ThreadPool;

const OPERATIONS: usize = 170;
const OPERATION_BYTES: usize = 2 << 20;
const ROUNDS: usize = 12;

fn main() {
    let threads = std::env::args().nth(1).map_or(2, |arg| arg.parse().expect("a number"));
    let (pool, alone) = (ThreadPool::new(threads), ThreadPool::new(1));
    let empty: Vec<f64> = (0..2_000).map(|_| seconds(|| pool.run(8, &|i| _ = black_box(i)))).collect();
    println!("{threads} threads: an empty operation takes {:.2} us", 1e6 * median(empty));

    let weights: Vec<u64> = (0..OPERATIONS * OPERATION_BYTES / 8).map(|i| i as u64).collect();
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        times[0].push(seconds(|| pass(&pool, &weights)));
        times[1].push(seconds(|| pass(&alone, &weights)));
        beside_others(|| {
            times[2].push(seconds(|| pass(&pool, &weights)));
            times[3].push(seconds(|| pass(&alone, &weights)));
        });
    }
    let names = ["pool", "caller alone", "pool beside others", "caller alone beside others"];
    for (name, times) in names.iter().zip(times) {
        let worst = times.iter().copied().fold(0.0, f64::max);
        println!("{name:28} {:>8.2} ms a pass, {:>8.2} at worst", 1e3 * median(times), 1e3 * worst);
    }
}

/// Operations of 8 tasks, each of which reads its part.
fn pass(pool: &ThreadPool, weights: &[u64]) {
    let sum = AtomicU64::new(0);
    for operation in weights.chunks_exact(OPERATION_BYTES / 8) {
        let tasks = operation.len() / 8;
        pool.run(8, &|i| {
            let part = &operation[i * tasks..(i + 1) * tasks];
            sum.fetch_xor(part.iter().fold(0, |a, b| a ^ b), Ordering::Relaxed);
        });
    }
    black_box(sum);
}

/// Runs `f` beside two threads that never pause.
fn beside_others(f: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    black_box((0..1_000).fold(0u64, |a, b| a.wrapping_mul(31) ^ b));
                }
            });
        }
        thread::sleep(Duration::from_millis(20));
        f();
        stop.store(true, Ordering::Relaxed);
    });
}

fn seconds(f: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    f();
    begin.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
