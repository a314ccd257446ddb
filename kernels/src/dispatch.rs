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
    pub(crate) merge: unsafe fn(parts: &[f32], out: &mut [f32]),
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
    merge: attention::scalar::merge,
    argmax: sampling::scalar::argmax,
    all_finite: sampling::scalar::all_finite,
    exp_sub: sampling::scalar::exp_sub,
};

/// Compiles the vector version of every kernel for one instruction set.
#[cfg(target_arch = "x86_64")]
macro_rules! vector_kernels {
    ($table:ident, $isa:expr, $features:literal, $simd:ty,
     matmul: { rows: $matmul_rows:literal },
     attention: { rows: $attention_rows:literal, tiles: $tiles:literal, columns: $columns:literal }) => {
        struct $table;

        impl matmul::vector::Target for $table {
            const MAX_ROWS: usize = $matmul_rows;
            type Lanes = $simd;

            unsafe fn block<W: matmul::vector::Format, const R: usize, const P: usize>(
                block: &matmul::vector::Block,
            ) {
                #[target_feature(enable = $features)]
                unsafe fn block_with<W: matmul::vector::Format, const R: usize, const P: usize>(
                    block: &matmul::vector::Block,
                ) {
                    // SAFETY: the caller's promise.
                    unsafe { matmul::vector::block::<$simd, W, R, P>(block) }
                }
                // SAFETY: the caller's promise.
                unsafe { block_with::<W, R, P>(block) }
            }
        }

        impl attention::vector::Target for $table {
            const MAX_ROWS: usize = $attention_rows;

            unsafe fn group<const R: usize>(task: &attention::Task<'_>, first_row: usize) {
                #[target_feature(enable = $features)]
                unsafe fn group_with<const R: usize>(task: &attention::Task<'_>, first_row: usize) {
                    // SAFETY: the caller's promise.
                    unsafe { attention::vector::group::<$simd, R, $tiles, $columns>(task, first_row) }
                }
                // SAFETY: the caller's promise.
                unsafe { group_with::<R>(task, first_row) }
            }
        }

        impl $table {
            vector_kernels!(@wrap $features, $simd,
                rms_norm = norm::vector::rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);
                add = norm::vector::add(sum: &mut [f32], x: &[f32]);
                rope = rope::vector::rope(head: &mut [f32], cos: &[f32], sin: &[f32]);
                silu_mul = activation::vector::silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]);
                merge = attention::vector::merge(parts: &[f32], out: &mut [f32]);
                exp_sub = sampling::vector::exp_sub(x: &[f32], max: f32, out: &mut [f32]);
            );

            #[target_feature(enable = $features)]
            unsafe fn argmax(values: &[f32]) -> usize {
                // SAFETY: the caller's promise.
                unsafe { sampling::vector::argmax::<$simd>(values) }
            }

            #[target_feature(enable = $features)]
            unsafe fn all_finite(values: &[f32]) -> bool {
                // SAFETY: the caller's promise.
                unsafe { sampling::vector::all_finite::<$simd>(values) }
            }

            const KERNELS: Kernels = Kernels {
                isa: $isa,
                matmul: matmul::vector::matmul::<$table>,
                rms_norm: Self::rms_norm,
                add: Self::add,
                rope: Self::rope,
                silu_mul: Self::silu_mul,
                attention: attention::vector::attention::<$table>,
                merge: Self::merge,
                argmax: Self::argmax,
                all_finite: Self::all_finite,
                exp_sub: Self::exp_sub,
            };
        }
    };
    (@wrap $features:literal, $simd:ty,
     $($name:ident = $op:ident::vector::$kernel:ident($($arg:ident: $type:ty),*);)*) => {
        $(
            #[target_feature(enable = $features)]
            unsafe fn $name($($arg: $type),*) {
                // SAFETY: the caller's promise.
                unsafe { $op::vector::$kernel::<$simd>($($arg),*) }
            }
        )*
    };
}

#[cfg(target_arch = "x86_64")]
vector_kernels!(
    Avx512, Isa::Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c", crate::simd::avx512::Avx512,
    matmul: { rows: 8 },
    attention: { rows: 6, tiles: 4, columns: 4 }
);

#[cfg(target_arch = "x86_64")]
vector_kernels!(
    Avx2, Isa::Avx2, "avx2,fma,f16c", crate::simd::avx2::Avx2,
    matmul: { rows: 6 },
    attention: { rows: 3, tiles: 2, columns: 2 }
);

/// The kernels of an instruction set.
///
/// # Panics
/// If the processor lacks it.
pub(crate) fn kernels(isa: Isa) -> &'static Kernels {
    assert!(isa.is_available(), "kernels of {isa} on a processor without it: this is a bug");
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &Avx2::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &Avx512::KERNELS,
        _ => &SCALAR,
    }
}
