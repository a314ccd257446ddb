//! Shared by the contract tests: noise, pools, and equality of bits.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use tandem_kernels::{Isa, ThreadPool};

/// A small deterministic generator (splitmix64).
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Noise(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Uniform in -1..1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    /// Floats of all sizes, now and then a NaN, an infinity or a signed zero.
    pub fn specials(&mut self, len: usize) -> Vec<f32> {
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, f32::MIN_POSITIVE, 1e30, -90.0];
        let mut value = || match self.next() % 400 {
            i @ 0..8 => special[i as usize],
            i => self.float() * if i % 2 == 0 { 1.0 } else { 60.0 },
        };
        (0..len).map(|_| value()).collect()
    }
}

/// Every instruction set of this machine with 1, 2 and 3 threads; with `TANDEM_TEST_THREADS` threads only, if that
/// is set, as it is where an emulator takes its time.
pub fn pools() -> Vec<ThreadPool> {
    let threads = match std::env::var("TANDEM_TEST_THREADS") {
        Ok(threads) => vec![threads.parse().expect("TANDEM_TEST_THREADS: a number of threads")],
        Err(_) => vec![1, 2, 3],
    };
    let pool = |isa| threads.iter().map(move |&threads| ThreadPool::with_isa(threads, isa).unwrap());
    Isa::available().flat_map(pool).collect()
}

/// Equality of bits, except that one NaN is as good as another.
#[track_caller]
pub fn assert_same_bits(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
        assert!(same, "{what}: element {i} is {got:e}, not {expected:e}");
    }
}
