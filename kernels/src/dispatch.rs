//! The table of kernels of each instruction set. An operation's safe wrapper has checked every length
//! before it calls through the table.

use crate::isa::Isa;
use crate::matmul::quantized;
use crate::pack::memory::Line;
use crate::pack::words;
use crate::quant::BlockFormat;
use crate::sampling::choice::{Best, Mass, Race};
use crate::{attention, experts, gate, head_norm, layer_norm, matmul, norm, roof, rope, sampling, scaling};

/// One compiled version of every kernel.
///
/// Each entry is unsafe to call unless the processor has `isa` (which holding the table from
/// [`kernels`] for an available `isa` ensures) and the lengths are those of the operation's contract.
pub(crate) struct Kernels {
    pub(crate) isa: Isa,
    pub(crate) matmul: unsafe fn(&matmul::Tile<'_>),
    pub(crate) matmul_quantized: unsafe fn(&matmul::Tile<'_>),
    pub(crate) quantize: unsafe fn(x: &[f32], to: quantized::RowMut<'_>),
    pub(crate) rms_norm: unsafe fn(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]),
    pub(crate) add: unsafe fn(sum: &mut [f32], x: &[f32]),
    pub(crate) rope: unsafe fn(head: &mut [f32], cos: &[f32], sin: &[f32]),
    pub(crate) attention: unsafe fn(&attention::Task<'_>),
    pub(crate) merge: unsafe fn(parts: &[f32], sink: Option<f32>, out: &mut [f32]),
    pub(crate) argmax: unsafe fn(&[f32]) -> usize,
    pub(crate) all_finite: unsafe fn(&[f32]) -> bool,
    pub(crate) greatest: unsafe fn(logits: &[f32], first: u32, best: &mut Best),
    pub(crate) race: unsafe fn(logits: &[f32], first: u32, race: &Race, best: &mut Best),
    pub(crate) mass: unsafe fn(logits: &[f32], factor: f32) -> Mass,
    pub(crate) mask: unsafe fn(logits: &mut [f32], words: &[u32]),
    pub(crate) collect: sampling::Collect,
    pub(crate) pack: unsafe fn(format: BlockFormat, rows: &words::Rows<'_>, panel: &mut [Line]),
    pub(crate) read: unsafe fn(&[Line]) -> u64,
    pub(crate) dot_products: unsafe fn(rounds: usize) -> i32,
    pub(crate) multiply_adds: unsafe fn(rounds: usize) -> f32,
    pub(crate) layer_norm: layer_norm::Kernel,
    pub(crate) head_norm: unsafe fn(head: &mut [f32], weight: &[f32], eps: f32),
    pub(crate) gelu: unsafe fn(x: &[f32], out: &mut [f32]),
    pub(crate) gate: unsafe fn(gate: gate::Gate, gates: &[f32], ups: &[f32], out: &mut [f32]),
    pub(crate) scale: unsafe fn(x: &mut [f32], factor: f32),
    pub(crate) soft_cap: unsafe fn(x: &mut [f32], cap: f32),
    pub(crate) add_scaled: unsafe fn(sum: &mut [f32], x: &[f32], factor: f32),
}

static SCALAR: Kernels = Kernels {
    isa: Isa::Scalar,
    matmul: matmul::scalar::matmul,
    matmul_quantized: quantized::scalar::matmul,
    quantize: quantized::scalar::quantize,
    rms_norm: norm::scalar::rms_norm,
    add: norm::scalar::add,
    rope: rope::scalar::rope,
    attention: attention::scalar::attention,
    merge: attention::scalar::merge,
    argmax: sampling::scalar::argmax,
    all_finite: sampling::scalar::all_finite,
    greatest: sampling::scalar::greatest,
    race: sampling::scalar::race,
    mass: sampling::scalar::mass,
    mask: sampling::scalar::mask,
    collect: sampling::scalar::collect,
    pack: words::pack,
    read: roof::scalar::read,
    dot_products: roof::scalar::dot_products,
    multiply_adds: roof::scalar::multiply_adds,
    layer_norm: layer_norm::scalar::layer_norm,
    head_norm: head_norm::scalar::head_norm,
    gelu: gate::scalar::gelu,
    gate: gate::scalar::gate,
    scale: scaling::scalar::scale,
    soft_cap: scaling::scalar::soft_cap,
    add_scaled: experts::scalar::add_scaled,
};

/// Compiles the vector version of every kernel for one instruction set.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! vector_kernels {
    ($table:ident, $isa:expr, $features:literal, $simd:ty,
     matmul: { rows: $matmul_rows:literal },
     quantized: { rows: [$($group_rows:literal),+], many: $many_rows:literal, two_panels: $two_panels:literal, features: $quantized_features:literal },
     attention: { $($attention_rows:literal rows: $width:literal vectors),+ }) => {
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

        impl quantized::vector::Target for $table {
            const MAX_ROWS: usize = [$($group_rows),+].len();
            const MANY_ROWS: usize = $many_rows;
            const TWO_PANELS: bool = $two_panels;

            unsafe fn block<F: quantized::formats::Format, const R: usize, const P: usize>(
                block: &quantized::vector::Block,
            ) {
                #[target_feature(enable = $quantized_features)]
                unsafe fn block_with<F: quantized::formats::Format, const R: usize, const P: usize>(
                    block: &quantized::vector::Block,
                ) {
                    // SAFETY: the caller's promise.
                    unsafe { quantized::vector::block::<$simd, F, R, P>(block) }
                }
                // SAFETY: the caller's promise.
                unsafe { block_with::<F, R, P>(block) }
            }

            unsafe fn unpack<F: quantized::formats::Format, const P: usize>(
                at: *const u8,
                panel_bytes: usize,
                chunks: usize,
                to: *mut quantized::grouped::Unpacked<P>,
            ) {
                #[target_feature(enable = $quantized_features)]
                unsafe fn unpack_with<F: quantized::formats::Format, const P: usize>(
                    at: *const u8,
                    panel_bytes: usize,
                    chunks: usize,
                    to: *mut quantized::grouped::Unpacked<P>,
                ) {
                    // SAFETY: the caller's promise.
                    unsafe { quantized::grouped::unpack::<$simd, F, P>(at, panel_bytes, chunks, to) }
                }
                // SAFETY: the caller's promise.
                unsafe { unpack_with::<F, P>(at, panel_bytes, chunks, to) }
            }

            unsafe fn group<K: quantized::grouped::Kind, const P: usize>(
                rows: &quantized::grouped::Rows<'_, P>,
                num_rows: usize,
            ) {
                // SAFETY: the caller's promise.
                unsafe {
                    match num_rows {
                        $($group_rows => Self::group_of::<K, $group_rows, P>(rows),)+
                        rows => unreachable!("a product of {rows} rows in one block: this is a bug"),
                    }
                }
            }
        }

        impl $table {
            #[target_feature(enable = $quantized_features)]
            unsafe fn group_of<K: quantized::grouped::Kind, const R: usize, const P: usize>(
                rows: &quantized::grouped::Rows<'_, P>,
            ) {
                // SAFETY: the caller's promise.
                unsafe { quantized::grouped::group::<$simd, K, R, P>(rows) }
            }
        }

        impl attention::vector::Target for $table {
            const MAX_ROWS: usize = [$($attention_rows),+].len();

            unsafe fn group<E: attention::element::Element>(
                group: &attention::vector::Group<'_>,
                rows: &mut [attention::vector::Row],
            ) {
                #[target_feature(enable = $features)]
                unsafe fn group_with<E: attention::element::Element, const R: usize, const W: usize>(
                    group: &attention::vector::Group<'_>,
                    rows: &mut [attention::vector::Row],
                ) {
                    // SAFETY: the caller's promise.
                    unsafe { attention::vector::group::<$simd, E, R, W>(group, rows) }
                }
                // SAFETY: the caller's promise.
                unsafe {
                    match rows.len() {
                        $($attention_rows => group_with::<E, $attention_rows, $width>(group, rows),)+
                        rows => unreachable!("attention: a group of {rows} rows: this is a bug"),
                    }
                }
            }
        }

        impl $table {
            vector_kernels!(@wrap $features, $simd,
                rms_norm = norm::vector::rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);
                add = norm::vector::add(sum: &mut [f32], x: &[f32]);
                rope = rope::vector::rope(head: &mut [f32], cos: &[f32], sin: &[f32]);
                merge = attention::vector::merge(parts: &[f32], sink: Option<f32>, out: &mut [f32]);
                greatest = sampling::vector::greatest(logits: &[f32], first: u32, best: &mut Best);
                race = sampling::vector::race(logits: &[f32], first: u32, race: &Race, best: &mut Best);
                collect = sampling::vector::collect(
                    logits: &[f32], first: u32, least: f32, out: &mut Vec<(u32, f32)>
                );
                layer_norm = layer_norm::vector::layer_norm(
                    x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]
                );
                head_norm = head_norm::vector::head_norm(head: &mut [f32], weight: &[f32], eps: f32);
                gelu = gate::vector::gelu(x: &[f32], out: &mut [f32]);
                gate = gate::vector::gate(gate: gate::Gate, gates: &[f32], ups: &[f32], out: &mut [f32]);
                scale = scaling::vector::scale(x: &mut [f32], factor: f32);
                soft_cap = scaling::vector::soft_cap(x: &mut [f32], cap: f32);
                add_scaled = experts::vector::add_scaled(sum: &mut [f32], x: &[f32], factor: f32);
            );

            #[target_feature(enable = $features)]
            unsafe fn quantize(x: &[f32], to: quantized::RowMut<'_>) {
                // SAFETY: the caller's promise.
                unsafe { quantized::vector::quantize::<$simd>(x, to) }
            }

            #[target_feature(enable = $features)]
            unsafe fn pack(format: BlockFormat, rows: &words::Rows<'_>, panel: &mut [Line]) {
                words::pack(format, rows, panel);
            }

            #[target_feature(enable = $features)]
            unsafe fn mask(logits: &mut [f32], words: &[u32]) {
                sampling::scalar::mask(logits, words);
            }

            #[target_feature(enable = $features)]
            unsafe fn read(lines: &[Line]) -> u64 {
                // SAFETY: the caller's promise.
                unsafe { roof::vector::read::<$simd>(lines) }
            }

            #[target_feature(enable = $quantized_features)]
            unsafe fn dot_products(rounds: usize) -> i32 {
                // SAFETY: the caller's promise.
                unsafe { roof::vector::dot_products::<$simd>(rounds) }
            }

            #[target_feature(enable = $features)]
            unsafe fn multiply_adds(rounds: usize) -> f32 {
                // SAFETY: the caller's promise.
                unsafe { roof::vector::multiply_adds::<$simd>(rounds) }
            }

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

            #[target_feature(enable = $features)]
            unsafe fn mass(logits: &[f32], factor: f32) -> Mass {
                // SAFETY: the caller's promise.
                unsafe { sampling::vector::mass::<$simd>(logits, factor) }
            }

            const KERNELS: Kernels = Kernels {
                isa: $isa,
                matmul: matmul::vector::matmul::<$table>,
                matmul_quantized: quantized::vector::matmul::<$table>,
                quantize: Self::quantize,
                rms_norm: Self::rms_norm,
                add: Self::add,
                rope: Self::rope,
                attention: attention::vector::attention::<$table>,
                merge: Self::merge,
                argmax: Self::argmax,
                all_finite: Self::all_finite,
                greatest: Self::greatest,
                race: Self::race,
                mass: Self::mass,
                mask: Self::mask,
                collect: Self::collect,
                pack: Self::pack,
                read: Self::read,
                dot_products: Self::dot_products,
                multiply_adds: Self::multiply_adds,
                layer_norm: Self::layer_norm,
                head_norm: Self::head_norm,
                gelu: Self::gelu,
                gate: Self::gate,
                scale: Self::scale,
                soft_cap: Self::soft_cap,
                add_scaled: Self::add_scaled,
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
    quantized: { rows: [1, 2, 3, 4, 5, 6], many: 4, two_panels: true, features: "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c" },
    attention: {
        1 rows: 4 vectors, 2 rows: 4 vectors, 3 rows: 4 vectors, 4 rows: 4 vectors,
        5 rows: 4 vectors, 6 rows: 4 vectors, 7 rows: 2 vectors, 8 rows: 2 vectors
    }
);

#[cfg(target_arch = "x86_64")]
vector_kernels!(
    Avx2, Isa::Avx2, "avx2,fma,f16c", crate::simd::avx2::Avx2,
    matmul: { rows: 6 },
    quantized: { rows: [1, 2, 3], many: 3, two_panels: false, features: "avx2,fma,f16c" },
    attention: { 1 rows: 2 vectors, 2 rows: 2 vectors, 3 rows: 2 vectors }
);

/// [`Avx512`] on a processor without VNNI: quantised products are those of [`Avx2`].
#[cfg(target_arch = "x86_64")]
static AVX512_WITHOUT_VNNI: Kernels = Kernels {
    matmul_quantized: Avx2::KERNELS.matmul_quantized,
    dot_products: Avx2::KERNELS.dot_products,
    ..Avx512::KERNELS
};

#[cfg(target_arch = "aarch64")]
vector_kernels!(
    Neon, Isa::Neon, "neon", crate::simd::neon::Neon<{ crate::simd::neon::WIDENING }>,
    matmul: { rows: 6 },
    quantized: { rows: [1, 2, 3, 4], many: 4, two_panels: false, features: "neon" },
    attention: {
        1 rows: 2 vectors, 2 rows: 2 vectors, 3 rows: 1 vectors, 4 rows: 1 vectors,
        5 rows: 1 vectors, 6 rows: 1 vectors
    }
);

#[cfg(target_arch = "aarch64")]
vector_kernels!(
    NeonDot, Isa::NeonDot, "neon", crate::simd::neon::Neon<{ crate::simd::neon::DOTS }>,
    matmul: { rows: 6 },
    quantized: { rows: [1, 2, 3, 4, 5, 6], many: 6, two_panels: false, features: "neon,dotprod" },
    attention: {
        1 rows: 2 vectors, 2 rows: 2 vectors, 3 rows: 1 vectors, 4 rows: 1 vectors,
        5 rows: 1 vectors, 6 rows: 1 vectors
    }
);

#[cfg(target_arch = "aarch64")]
vector_kernels!(
    NeonI8mm, Isa::NeonI8mm, "neon", crate::simd::neon::Neon<{ crate::simd::neon::TILES }>,
    matmul: { rows: 6 },
    quantized: { rows: [1, 2, 3, 4, 5, 6], many: 6, two_panels: false, features: "neon,i8mm" },
    attention: {
        1 rows: 2 vectors, 2 rows: 2 vectors, 3 rows: 1 vectors, 4 rows: 1 vectors,
        5 rows: 1 vectors, 6 rows: 1 vectors
    }
);

/// What products of bytes make a difference to is [`NeonDot`]'s, all else is [`Neon`]'s.
#[cfg(target_arch = "aarch64")]
static NEON_DOT: Kernels = Kernels {
    isa: Isa::NeonDot,
    matmul_quantized: NeonDot::KERNELS.matmul_quantized,
    dot_products: NeonDot::KERNELS.dot_products,
    ..Neon::KERNELS
};

/// As [`NEON_DOT`].
#[cfg(target_arch = "aarch64")]
static NEON_I8MM: Kernels = Kernels {
    isa: Isa::NeonI8mm,
    matmul_quantized: NeonI8mm::KERNELS.matmul_quantized,
    dot_products: NeonI8mm::KERNELS.dot_products,
    ..Neon::KERNELS
};

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
        Isa::Avx512 if !is_x86_feature_detected!("avx512vnni") => &AVX512_WITHOUT_VNNI,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &Avx512::KERNELS,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => &Neon::KERNELS,
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDot => &NEON_DOT,
        #[cfg(target_arch = "aarch64")]
        Isa::NeonI8mm => &NEON_I8MM,
        _ => &SCALAR,
    }
}
