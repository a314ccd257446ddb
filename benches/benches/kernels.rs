//! The kernels at the demo target's shapes, on one thread and on two; with `-- roofline`, what
//! `tandem bench kernels` measures, without the server:
//!
//! ```text
//! cargo bench -p tandem-benches --bench kernels -- roofline [MODEL] [OP] [FORMAT,..] [ROWS,..] [ROUNDS] [THREADS]
//! ```
//!
//! `matmul` and `attention` report the bytes of weights or of keys and values that a pass reads, to be
//! read against `roof`, which only reads: a plain sum over as many bytes, from this machine's caches.
//! The step from 1 row to 5 is what a verification of four drafted tokens costs over a plain step; from
//! about four rows on, a product is bound by multiply-adds and no longer by bytes.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group};
use tandem_benches::roofline;
use tandem_kernels::attention::{PagedAttention, paged_attention};
use tandem_kernels::kv::{KvLayout, KvType, Values};
use tandem_kernels::matmul::matmul;
use tandem_kernels::{PackedMatrix, ThreadPool};

const THREADS: [usize; 2] = [1, 2];
const ROWS: [usize; 6] = [1, 2, 4, 5, 8, 16];

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(600));
    group
}

/// How fast this machine reads, from a working set that fits a core's cache and from one that does not.
fn roof(c: &mut Criterion) {
    let mut group = group(c, "roof");
    for size_bytes in [128 << 10, 10 << 20] {
        let words = vec![1u64; size_bytes / 8];
        group.throughput(Throughput::Bytes(size_bytes as u64));
        for threads in THREADS {
            let pool = ThreadPool::new(threads);
            let part = words.len() / threads;
            group.bench_function(format!("{}KiB/{threads}t", size_bytes >> 10), |b| {
                b.iter(|| pool.run(threads, &|i| sum(&words[i * part..(i + 1) * part])));
            });
        }
    }
}

fn sum(words: &[u64]) {
    let mut lanes = [0u64; 32];
    for chunk in words.as_chunks::<32>().0 {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    black_box(lanes);
}

fn noise(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn bf16_matrix(out: usize, inp: usize) -> PackedMatrix {
    let bits: Vec<u16> = noise(out * inp).iter().map(|x| (x.to_bits() >> 16) as u16).collect();
    PackedMatrix::from_bf16(&bits, out, inp)
}

fn bench_matmul(c: &mut Criterion) {
    for (out, inp) in [(256, 256), (688, 256), (256, 688), (4096, 256)] {
        let weights = bf16_matrix(out, inp);
        let mut group = group(c, &format!("matmul/{out}x{inp}"));
        group.throughput(Throughput::Bytes(weights.size_bytes() as u64));
        for threads in THREADS {
            let pool = ThreadPool::new(threads);
            for rows in ROWS {
                let (x, mut y) = (noise(rows * inp), vec![0.0; rows * out]);
                group.bench_function(BenchmarkId::new(format!("{threads}t"), rows), |b| {
                    b.iter(|| matmul(&pool, &x, &weights, None, &mut y));
                });
            }
        }
    }
}

/// All products of one pass of the demo target, so that the weights come from where they do in a server.
fn bench_pass(c: &mut Criterion) {
    let layer = [(512, 256), (256, 256), (1376, 256), (256, 688)];
    let shapes = std::iter::repeat_n(layer, 6).flatten().chain([(4096, 256)]);
    let matrices: Vec<_> = shapes.map(|(out, inp)| bf16_matrix(out, inp)).collect();
    let size_bytes: usize = matrices.iter().map(PackedMatrix::size_bytes).sum();
    let mut group = group(c, "matmul/pass");
    group.throughput(Throughput::Bytes(size_bytes as u64));
    for threads in THREADS {
        let pool = ThreadPool::new(threads);
        for rows in ROWS {
            let (x, mut y) = (noise(rows * 688), vec![0.0; rows * 4096]);
            group.bench_function(BenchmarkId::new(format!("{threads}t"), rows), |b| {
                b.iter(|| {
                    for w in &matrices {
                        let (inp, out) = (w.in_features(), w.out_features());
                        matmul(&pool, &x[..rows * inp], w, None, &mut y[..rows * out]);
                    }
                });
            });
        }
    }
}

fn bench_attention(c: &mut Criterion) {
    let layout =
        KvLayout { block_size: 16, num_kv_heads: 2, head_dim: 64, values: Values::Own, kv_type: KvType::F16 };
    let num_heads = 4;
    let mut group = group(c, "attention");
    for context_len in [64, 1024] {
        let num_blocks = context_len / layout.block_size;
        let storage = vec![0x33; num_blocks * layout.block_bytes()];
        let block_tables: Vec<u32> = (0..num_blocks as u32).collect();
        group.throughput(Throughput::Bytes(storage.len() as u64));
        for threads in THREADS {
            let pool = ThreadPool::new(threads);
            for num_tokens in [1, 5] {
                let width = num_heads * layout.head_dim;
                let (q, mut out) = (noise(num_tokens * width), vec![0.0; num_tokens * width]);
                let args = PagedAttention {
                    q: &q,
                    q_row_stride: width,
                    storage: &storage,
                    layout,
                    num_heads,
                    scale: 0.125,
                    window: None,
                    first_key: 0,
                    soft_cap: None,
                    sinks: None,
                    block_tables: &block_tables,
                    block_table_offsets: &[0, num_blocks as u32],
                    cu_seqlens_q: &[0, num_tokens as u32],
                    context_lens: &[context_len as u32],
                };
                group.bench_function(
                    BenchmarkId::new(format!("{context_len}/{threads}t"), num_tokens),
                    |b| {
                        b.iter(|| paged_attention(&pool, &args, &mut out));
                    },
                );
            }
        }
    }
}

criterion_group!(benches, roof, bench_matmul, bench_pass, bench_attention);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if arguments.first().is_some_and(|first| first == "roofline") {
        roofline::print(&arguments[1..]);
        return;
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
