//! CPU kernels of Tandem: slices in, slices out.
//!
//! A leaf: no workspace dependency, no files, no logging, no global state but the detected
//! instruction set; threads are those of a [`ThreadPool`] and of a [`pages::PageWarmer`]. Activations
//! are f32; weights are f32, bf16, f16 or GGUF's quantised blocks, in [`pack::PackedMatrix`].
//!
//! **Invariant: one value, one order.** Every output element is one reduction in a fixed order that
//! depends on its own row's inputs only: never on the number of rows, the number of threads or the
//! instruction set. Threads split outputs, never reductions; every multiply-add is fused; the one
//! exponential of the crate is [`math::exp`]. So a row alone, a row in a batch, a scalar build and an
//! AVX-512 machine give the same bits, and the tests compare bits. (A NaN is a NaN on every path;
//! which of its payloads comes out is not defined.)
//!
//! Each operation has a module with its contract and safe wrapper (`mod.rs`), the plain
//! specification (`scalar.rs`), and one vector version written over the 16-lane type of `simd`
//! (`vector.rs`), which `dispatch` compiles once per instruction set.

#![cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(dead_code, reason = "vector versions exist for x86-64 and 64-bit Arm only")
)]

pub mod attention;
mod dispatch;
pub mod experts;
pub mod gate;
pub mod head_norm;
pub mod isa;
pub mod kv;
pub mod layer_norm;
pub mod math;
pub mod matmul;
pub mod norm;
pub mod pack;
pub mod pages;
pub mod pool;
pub mod quant;
pub mod roof;
pub mod rope;
pub mod sampling;
pub mod scaling;
mod shared_out;
mod simd;

pub use isa::Isa;
pub use pack::PackedMatrix;
pub use pool::ThreadPool;

/// Outputs that one vector register of the widest instruction set covers, and so the width of a
/// weight panel, of a key tile and of every lane-wise partial sum. Fixed: it is part of what the
/// results are, not a tuning knob.
pub(crate) const LANES: usize = 16;
