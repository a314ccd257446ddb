//! The table of kernels of each instruction set. An operation's safe wrapper has checked every length
//! before it calls through the table.

use crate::isa::Isa;
use crate::{activation, attention, matmul, norm, rope, sampling};

/// One compiled version of every kernel.
///
/// Each entry is unsafe to call unless the processor has `isa` (which holding the table from
/// [`kernels`] for an available `isa` ensures) and the lengths are those of the operation's contract.
pub(crate) struct Kernels {
    pub(crate) isa: Isa,
    pub(crate) matmul: unsafe fn(&matmul::Tile<'_>),
    pub(crate) rms_norm: unsafe fn(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]),
    pub(crate) add: unsafe fn(sum: &mut [f32], x: &[f32]),
    pub(crate) rope: unsafe fn(head: &mut [f32], cos: &[f32], sin: &[f32]),
    pub(crate) silu_mul: unsafe fn(gate: &[f32], up: &[f32], out: &mut [f32]),
    pub(crate) attention: unsafe fn(&attention::Task<'_>),
    pub(crate) argmax: unsafe fn(&[f32]) -> usize,
    pub(crate) all_finite: unsafe fn(&[f32]) -> bool,
    pub(crate) exp_sub: unsafe fn(x: &[f32], max: f32, out: &mut [f32]),
}

static SCALAR: Kernels = Kernels {
    isa: Isa::Scalar,
    matmul: matmul::scalar::matmul,
    rms_norm: norm::scalar::rms_norm,
    add: norm::scalar::add,
    rope: rope::scalar::rope,
    silu_mul: activation::scalar::silu_mul,
    attention: attention::scalar::attention,
    argmax: sampling::scalar::argmax,
    all_finite: sampling::scalar::all_finite,
    exp_sub: sampling::scalar::exp_sub,
};

/// The kernels of an instruction set.
///
/// # Panics
/// If the processor lacks it.
pub(crate) fn kernels(isa: Isa) -> &'static Kernels {
    assert!(isa.is_available(), "kernels of {isa} on a processor without it: this is a bug");
    match isa {
        Isa::Scalar | Isa::Avx2 | Isa::Avx512 => &SCALAR,
    }
}
