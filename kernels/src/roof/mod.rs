//! What this machine allows, and how near the kernels come.
//!
//! Three roofs, taken on the same threads and from the same kind of memory as operations are: reading, dot
//! products of bytes, multiply-adds of f32. [`products`] and [`attention`] measure operations at the shapes of real
//! models in turns with the roofs, so that a share does not depend on what else the machine did meanwhile. Of
//! every time the least over the rounds counts: what disturbs a kernel only adds.

pub mod attention;
pub mod products;

use std::hint::black_box;
use std::time::Instant;

use crate::pack::memory::Lines;
use crate::pool::ThreadPool;

/// Bytes over which the operands of an operation are spread, so that they come from memory: far beyond the
/// caches of a machine with a few cores' share of one.
pub const WORKING_SET_BYTES: usize = 192 << 20;

/// An operation and the roofs of the same rounds.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Rows of activations, or tokens.
    pub rows: usize,
    /// The least over the rounds.
    pub seconds: f64,
    /// What the operation must read: weights, or keys and values.
    pub bytes: f64,
    /// What it must compute; a multiplication and an addition are two.
    pub operations: f64,
    /// Bytes that the machine reads in a second.
    pub read_roof: f64,
    /// Operations of the operation's kind that it does in a second.
    pub compute_roof: f64,
}

impl Measured {
    /// Share of the read roof.
    pub fn read_share(&self) -> f64 {
        self.bytes / self.seconds / self.read_roof
    }

    /// Share of the compute roof.
    pub fn compute_share(&self) -> f64 {
        self.operations / self.seconds / self.compute_roof
    }
}

/// The least that something has taken so far.
#[derive(Clone, Copy, Debug)]
struct Least(f64);

impl Least {
    const NONE: Least = Least(f64::INFINITY);

    fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.0 = self.0.min(start.elapsed().as_secs_f64());
        result
    }
}

/// `len` numbers from -1 to 1.
fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 8 & 0xffff) as f32 / 32768.0 - 1.0).collect()
}

/// Memory to read, in large pages where the system has them.
pub struct ReadRoof {
    lines: Lines,
}

impl ReadRoof {
    /// Allocates `size_bytes`, which should be far more than the caches hold.
    pub fn new(size_bytes: usize) -> Self {
        let mut lines = Lines::zeroed(size_bytes / 64);
        lines.iter_mut().for_each(|line| line.0[0] = 1);
        ReadRoof { lines }
    }

    /// Reads everything once on all threads, as products do: in as many tasks. Returns the bytes.
    pub fn read(&self, pool: &ThreadPool) -> usize {
        let tasks = pool.threads() * 4;
        pool.run(tasks, &|i| {
            let part = &self.lines[i * self.lines.len() / tasks..(i + 1) * self.lines.len() / tasks];
            // SAFETY: the pool's table is for this processor; whole lines are handed over.
            black_box(unsafe { (pool.kernels().read)(part) });
        });
        size_of_val(&self.lines[..])
    }
}

/// Does dot products of bytes without touching memory, on all threads, `rounds` times sixteen on each.
/// Returns the operations, a multiplication and an addition being two.
pub fn dot_products(pool: &ThreadPool, rounds: usize) -> usize {
    pool.run(pool.threads(), &|_| {
        // SAFETY: the pool's table is for this processor.
        black_box(unsafe { (pool.kernels().dot_products)(rounds) });
    });
    pool.threads() * rounds * CHAINS * 2 * 64
}

/// Multiply-adds of f32 without touching memory, on all threads, `rounds` times sixteen vectors on each.
/// Returns the operations.
pub fn multiply_adds(pool: &ThreadPool, rounds: usize) -> usize {
    pool.run(pool.threads(), &|_| {
        // SAFETY: the pool's table is for this processor.
        black_box(unsafe { (pool.kernels().multiply_adds)(rounds) });
    });
    pool.threads() * rounds * CHAINS * 2 * crate::LANES
}

/// Independent sums, enough to hide the latency of a dot product; those that a round adds to.
pub(crate) const CHAINS: usize = 16;

/// As many of them at a time as registers hold where a sum is two registers or four.
pub(crate) const FEW_CHAINS: usize = 4;

pub(crate) mod scalar {
    use crate::pack::memory::Line;

    pub(crate) unsafe fn read(lines: &[Line]) -> u64 {
        lines.iter().map(|line| u64::from(line.0[0])).sum()
    }

    pub(crate) unsafe fn dot_products(rounds: usize) -> i32 {
        let mut sum = 0i32;
        for i in 0..rounds * super::CHAINS * 64 {
            sum = sum.wrapping_add(std::hint::black_box(i as i32 & 0x7f));
        }
        sum
    }

    pub(crate) unsafe fn multiply_adds(rounds: usize) -> f32 {
        let mut sums = [0.0f32; crate::LANES];
        for _ in 0..rounds * super::CHAINS {
            for sum in &mut sums {
                *sum = std::hint::black_box(*sum).mul_add(0.999, 0.001);
            }
        }
        sums[0]
    }
}

pub(crate) mod vector {
    use super::{CHAINS, FEW_CHAINS};
    use crate::pack::memory::{LINE_BYTES, Line};
    use crate::simd::{Integers, Simd};

    /// # Safety
    /// The processor has `V`'s instruction set.
    #[allow(
        clippy::needless_range_loop,
        reason = "an iterator's functions are not always compiled into this one"
    )]
    #[inline(always)]
    pub(crate) unsafe fn read<V: Integers>(lines: &[Line]) -> u64 {
        // SAFETY: the caller's promise; a line is 64 bytes.
        unsafe {
            let mut sums = [V::splat(0.0); 4];
            // By pointers, for the same reason: a call for each line would be what is measured.
            let start = lines.as_ptr().cast::<u8>();
            for i in 0..lines.len() / 4 {
                for j in 0..4 {
                    let line = start.add((4 * i + j) * LINE_BYTES);
                    V::prefetch(line.wrapping_add(4096));
                    sums[j] = sums[j].add(V::load(line.cast()));
                }
            }
            sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum().to_bits().into()
        }
    }

    /// # Safety
    /// The processor has `V`'s instruction set, and VNNI where `V` is AVX-512.
    #[inline(always)]
    pub(crate) unsafe fn dot_products<V: Integers>(rounds: usize) -> i32 {
        // SAFETY: the caller's promise.
        let total = unsafe {
            match (V::TILES, V::WIDE) {
                (true, _) => tiles::<V>(rounds),
                (false, true) => dots::<V, CHAINS>(rounds),
                (false, false) => dots::<V, FEW_CHAINS>(rounds),
            }
        };
        total as i32
    }

    /// # Safety
    /// As for [`dot_products`].
    #[inline(always)]
    unsafe fn dots<V: Integers, const N: usize>(rounds: usize) -> f32 {
        let codes = [3u8; 64];
        // Where a dot product is several instructions, those before the last would be done once for all sums of one
        // `x`.
        let x = std::hint::black_box([[5i8; 4]; N]);
        // SAFETY: the caller's promise; 64 bytes and 4 bytes are there.
        unsafe {
            let mut sums = [V::zero(); N];
            for _ in 0..rounds * (CHAINS / N) {
                let codes = V::load_bytes(std::hint::black_box(codes.as_ptr()));
                for (i, sum) in sums.iter_mut().enumerate() {
                    let x = V::splat_bytes(x[if V::WIDE { 0 } else { i }].as_ptr());
                    *sum = V::dot(*sum, codes, x, 0);
                }
            }
            sums.into_iter().map(|sum| V::to_f32(sum)).fold(V::splat(0.0), |a, b| a.add(b)).sum()
        }
    }

    /// # Safety
    /// As for [`dot_products`], with [`Integers::TILES`].
    #[inline(always)]
    unsafe fn tiles<V: Integers>(rounds: usize) -> f32 {
        /// Pairs of rows whose sums registers hold; each is four dot products of 64 bytes.
        const PAIRS: usize = FEW_CHAINS / 2;
        // Of codes or rows known to be equal one sum would do for all.
        let codes = std::hint::black_box([[3u8; 64]; 2]);
        let x = std::hint::black_box([[[5i8; 8]; 2]; PAIRS]);
        let mut rows = [[x[0][0].as_ptr(); 2]; PAIRS];
        for (rows, x) in rows.iter_mut().zip(&x) {
            *rows = [x[0].as_ptr(), x[1].as_ptr()];
        }
        // SAFETY: the caller's promise; 64 bytes and 8 bytes are there.
        unsafe {
            let codes = [V::load_bytes(codes[0].as_ptr()), V::load_bytes(codes[1].as_ptr())];
            let mut sums = [[V::zero(); 2]; PAIRS];
            for _ in 0..rounds * (CHAINS / (4 * PAIRS)) {
                V::tiles(&mut sums, codes, rows);
            }
            let sums = sums.into_iter().flatten();
            sums.map(|sum| V::to_f32(sum)).fold(V::splat(0.0), |a, b| a.add(b)).sum()
        }
    }

    /// # Safety
    /// The processor has `V`'s instruction set.
    #[inline(always)]
    pub(crate) unsafe fn multiply_adds<V: Simd>(rounds: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { if V::WIDE { fmas::<V, CHAINS>(rounds) } else { fmas::<V, FEW_CHAINS>(rounds) } }
    }

    /// # Safety
    /// As for [`multiply_adds`].
    #[inline(always)]
    unsafe fn fmas<V: Simd, const N: usize>(rounds: usize) -> f32 {
        let factor = std::hint::black_box(0.999f32);
        // SAFETY: the caller's promise.
        unsafe {
            let factor = V::splat(factor);
            let mut sums = [V::splat(1.0); N];
            for _ in 0..rounds * (CHAINS / N) {
                for sum in &mut sums {
                    *sum = sum.fma(factor, factor);
                }
            }
            sums.into_iter().fold(V::splat(0.0), |a, b| a.add(b)).sum()
        }
    }
}
