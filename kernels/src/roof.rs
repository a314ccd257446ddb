//! What this machine allows: the two roofs that a product is measured against, taken on the same
//! threads and from the same kind of memory.

use std::hint::black_box;

use crate::pack::memory::Lines;
use crate::pool::ThreadPool;

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

/// Independent sums, enough to hide the latency of a dot product.
pub(crate) const CHAINS: usize = 16;

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
}

pub(crate) mod vector {
    use super::CHAINS;
    use crate::pack::memory::Line;
    use crate::simd::Integers;

    /// # Safety
    /// The processor has `V`'s instruction set.
    #[inline(always)]
    pub(crate) unsafe fn read<V: Integers>(lines: &[Line]) -> u64 {
        // SAFETY: the caller's promise; a line is 64 bytes.
        unsafe {
            let mut sums = [V::splat(0.0); 4];
            for lines in lines.as_chunks::<4>().0 {
                for (sum, line) in sums.iter_mut().zip(lines) {
                    V::prefetch(line.0.as_ptr().wrapping_add(4096));
                    *sum = sum.add(V::load(line.0.as_ptr().cast()));
                }
            }
            sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum().to_bits().into()
        }
    }

    /// # Safety
    /// The processor has `V`'s instruction set, and VNNI where `V` is AVX-512.
    #[inline(always)]
    pub(crate) unsafe fn dot_products<V: Integers>(rounds: usize) -> i32 {
        let (codes, x) = ([3u8; 64], [5i8; 4]);
        // SAFETY: the caller's promise; 64 bytes and 4 bytes are there.
        unsafe {
            let mut sums = [V::zero(); CHAINS];
            for _ in 0..rounds {
                let codes = V::load_bytes(std::hint::black_box(codes.as_ptr()));
                for sum in &mut sums {
                    *sum = V::dot(*sum, codes, V::splat_bytes(x.as_ptr()), 0);
                }
            }
            let total = sums.into_iter().map(|sum| V::to_f32(sum)).fold(V::splat(0.0), |a, b| a.add(b));
            total.sum() as i32
        }
    }
}
