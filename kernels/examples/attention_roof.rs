//! What attention makes of the machine: decoding and verification at a long context.
//!
//! `cargo run --release -p tandem-kernels --example attention_roof [-- THREADS [CONTEXT]]`
//!
//! Two roofs are measured in turn with the kernel, in the same run: a plain read of the same bytes, and a
//! loop of fused multiply-adds. Each query row needs one multiply-add for every stored element that it
//! sees, so few rows are bound by reading and many by arithmetic; `share` is of the slower of the two.
//! Each layer is timed by itself and the fastest counts, so that other programs disturb little; the layers
//! are several hundred MB, so nothing comes from a cache.

use std::alloc::{Layout, alloc_zeroed};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tandem_kernels::ThreadPool;
use tandem_kernels::attention::{PagedAttention, paged_attention};
use tandem_kernels::kv::{KvLayout, KvRows, KvType, write_kv};

const BLOCK_SIZE: usize = 16;
/// Bytes over which a case's layers are spread.
const STORAGE_BYTES: usize = 384 << 20;
const ROUNDS: usize = 9;
/// Multiply-adds of one thread in a round of the arithmetic roof.
const ROOF_FMAS: usize = 1 << 16;

/// name, query heads, key/value heads, width of a head
const SHAPES: [(&str, usize, usize, usize); 3] =
    [("0.5B", 14, 2, 64), ("1.5B", 12, 2, 128), ("7B", 28, 4, 128)];

fn main() {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<usize>().expect("a number"));
    let threads = args.next().unwrap_or(2);
    let context_len = args.next().unwrap_or(16384);
    let pool = ThreadPool::new(threads);
    println!("{threads} threads, {} kernels, context {context_len}", pool.isa());
    println!(
        "{:5} {:4} {:>2} {:>9} {:>7} {:>7} {:>9} {:>7} {:>9} {:>6}",
        "model", "type", "n", "us", "GB/s", "roof", "GFLOPS", "roof", "% of read", "share"
    );
    let storage = large_pages(STORAGE_BYTES);
    for (name, num_heads, num_kv_heads, head_dim) in SHAPES {
        for kv_type in [KvType::F16, KvType::Q8, KvType::F32] {
            let layout = KvLayout { block_size: BLOCK_SIZE, num_kv_heads, head_dim, kv_type };
            let case = Case::new(storage, layout, num_heads, context_len);
            for num_tokens in [1, 4] {
                case.report(&pool, name, num_tokens);
            }
        }
    }
}

/// Zeros in pages of 2 MiB where the system has them.
fn large_pages(len: usize) -> &'static mut [u8] {
    #[cfg(target_os = "linux")]
    unsafe extern "C" {
        fn madvise(start: *mut u8, len: usize, advice: i32) -> i32;
    }
    let layout = Layout::from_size_align(len, 2 << 20).expect("a size");
    // SAFETY: the size is not 0; the memory is never given back; advice changes no contents.
    unsafe {
        let start = alloc_zeroed(layout);
        assert!(!start.is_null(), "no memory");
        #[cfg(target_os = "linux")]
        madvise(start, len, 14);
        std::slice::from_raw_parts_mut(start, len)
    }
}

struct Case<'a> {
    layers: Vec<&'a [u8]>,
    layout: KvLayout,
    num_heads: usize,
    context_len: usize,
    block_table: Vec<u32>,
    q: Vec<f32>,
}

impl<'a> Case<'a> {
    fn new(storage: &'a mut [u8], layout: KvLayout, num_heads: usize, context_len: usize) -> Self {
        let num_blocks = context_len.div_ceil(BLOCK_SIZE);
        // Blocks in no order, as after some hours of serving.
        let mut block_table: Vec<u32> = (0..num_blocks as u32).collect();
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state >> 33
        };
        for i in (1..num_blocks).rev() {
            block_table.swap(i, random() as usize % (i + 1));
        }
        let mut noise = |len: usize| -> Vec<f32> {
            (0..len).map(|_| random() as f32 / (1u64 << 30) as f32 - 1.0).collect()
        };
        let width = layout.token_len();
        let (k, q) = (noise(512 * width), noise(4 * num_heads * layout.head_dim));
        let layer_bytes = num_blocks * layout.block_bytes();
        let pool = ThreadPool::new(1);
        let mut layers = Vec::new();
        for layer in storage.chunks_exact_mut(layer_bytes) {
            for first in (0..num_blocks * BLOCK_SIZE).step_by(512) {
                let slots: Vec<u32> = (first..first + 512).map(|slot| slot as u32).collect();
                let rows = KvRows { k: &k, v: &k, row_stride: width, slot_mapping: &slots };
                write_kv(&pool, &layout, &rows, layer);
            }
            layers.push(&*layer);
        }
        Case { layers, layout, num_heads, context_len, block_table, q }
    }

    fn report(&self, pool: &ThreadPool, name: &str, num_tokens: usize) {
        let width = self.num_heads * self.layout.head_dim;
        let mut out = vec![0.0; num_tokens * width];
        let mut attend = |layer: &[u8]| {
            let args = PagedAttention {
                q: &self.q,
                q_row_stride: width,
                storage: layer,
                layout: self.layout,
                num_heads: self.num_heads,
                scale: 1.0 / (self.layout.head_dim as f32).sqrt(),
                window: None,
                soft_cap: None,
                sinks: None,
                block_tables: &self.block_table,
                block_table_offsets: &[0, self.block_table.len() as u32],
                cu_seqlens_q: &[0, num_tokens as u32],
                context_lens: &[self.context_len as u32],
            };
            paged_attention(pool, &args, &mut out);
        };
        let mut best = [f64::INFINITY; 3];
        for _ in 0..ROUNDS {
            for (i, layer) in self.layers.iter().enumerate() {
                // Half the storage away: not what has just been read.
                let other = self.layers[(i + self.layers.len() / 2) % self.layers.len()];
                let begin = Instant::now();
                attend(layer);
                let attended = Instant::now();
                read(pool, other);
                let has_read = Instant::now();
                multiply(pool);
                let steps = [begin, attended, has_read, Instant::now()];
                for (best, step) in best.iter_mut().zip(steps.windows(2)) {
                    *best = best.min((step[1] - step[0]).as_secs_f64());
                }
            }
        }
        let [seconds, read_seconds, fma_seconds] = best;
        let bytes = self.layers[0].len() as f64;
        let flops = (4 * num_tokens * width * self.context_len) as f64;
        let flops_roof = (2 * 16 * ROOF_FMAS * pool.threads()) as f64 / fma_seconds;
        let roof = read_seconds.max(flops / flops_roof);
        println!(
            "{name:5} {:4} {num_tokens:>2} {:>9.1} {:>7.1} {:>7.1} {:>9.1} {:>7.1} {:>8.0}% {:>5.0}%",
            self.layout.kv_type.name(),
            seconds * 1e6,
            bytes / seconds / 1e9,
            bytes / read_seconds / 1e9,
            flops / seconds / 1e9,
            flops_roof / 1e9,
            100.0 * read_seconds / seconds,
            100.0 * roof / seconds
        );
    }
}

/// Reads a layer, a part a thread.
fn read(pool: &ThreadPool, layer: &[u8]) {
    let sum = AtomicU64::new(0);
    let tasks = 4 * pool.threads();
    pool.run(tasks, &|i| {
        let part = &layer[i * layer.len() / tasks..(i + 1) * layer.len() / tasks];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: just asked.
            sum.fetch_xor(unsafe { read_avx2(part) }, Ordering::Relaxed);
        }
    });
    black_box(sum);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn read_avx2(bytes: &[u8]) -> u64 {
    use std::arch::x86_64::*;
    let mut sums = [_mm256_setzero_si256(); 4];
    for lines in bytes.as_chunks::<128>().0 {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: 32 bytes at `32 * i` of 128.
            *sum = _mm256_xor_si256(*sum, unsafe { _mm256_loadu_si256(lines.as_ptr().add(32 * i).cast()) });
        }
    }
    let [a, b, c, d] = sums;
    let all = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
    (_mm256_extract_epi64::<0>(all) ^ _mm256_extract_epi64::<1>(all)) as u64
}

/// [`ROOF_FMAS`] multiply-adds of 16 lanes on every thread.
fn multiply(pool: &ThreadPool) {
    pool.run(pool.threads(), &|_| {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: just asked.
            return unsafe { multiply_avx512() };
        }
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("fma") {
            // SAFETY: just asked.
            unsafe { multiply_avx2() }
        }
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn multiply_avx512() {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_set1_ps};
    let factor = black_box(_mm512_set1_ps(0.999));
    let mut sums = black_box([_mm512_set1_ps(1.0); 16]);
    for _ in 0..ROOF_FMAS / 16 {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, factor);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn multiply_avx2() {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps};
    let factor = black_box(_mm256_set1_ps(0.999));
    let mut sums = black_box([_mm256_set1_ps(1.0); 8]);
    for _ in 0..2 * ROOF_FMAS / 8 {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, factor);
        }
    }
    black_box(sums);
}
