//! Contract: one value on every machine. The other tests compare instruction sets of one processor; here are sums over
//! the bits of results, written down, that every architecture must reproduce. A change of what an operation computes
//! changes its sum, and models' outputs with it; nothing else may.

mod common;

use common::{Noise, pools};
use tandem_kernels::ThreadPool;
use tandem_kernels::attention::{CHUNK, PagedAttention, paged_attention};
use tandem_kernels::gate::{Gate, gate_stacked, gelu};
use tandem_kernels::kv::{KvLayout, KvRows, KvType, Values, write_kv};
use tandem_kernels::layer_norm::layer_norm;
use tandem_kernels::math::double;
use tandem_kernels::matmul::matmul;
use tandem_kernels::norm::rms_norm;
use tandem_kernels::pack::{PackedMatrix, Weights};
use tandem_kernels::quant::BlockFormat;
use tandem_kernels::sampling::choice::Choice;
use tandem_kernels::sampling::choose;
use tandem_kernels::scaling::soft_cap;

/// FNV-1a over the bits of finite numbers.
fn sum_of_bits(values: &[f32]) -> u64 {
    assert!(values.iter().all(|value| value.is_finite()));
    let bytes = values.iter().flat_map(|value| value.to_bits().to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Runs `op`, which fills `len` numbers, on every instruction set and expects the sum.
#[track_caller]
fn expect(what: &str, sum: u64, len: usize, mut op: impl FnMut(&ThreadPool, &mut [f32])) {
    for pool in pools() {
        let mut out = vec![0.0; len];
        op(&pool, &mut out);
        let got = sum_of_bits(&out);
        assert_eq!(got, sum, "{what}, {pool:?}: {got:#018x} instead of {sum:#018x}");
    }
}

/// Blocks with scales up to 2 and any codes.
fn blocks(noise: &mut Noise, format: BlockFormat, elements: usize) -> Vec<u8> {
    let len = format.bytes_for(elements).expect("whole blocks");
    let mut bytes: Vec<u8> = (0..len).map(|_| (noise.next() >> 40) as u8 & 0xbf).collect();
    if format == BlockFormat::Mxfp4 {
        bytes.chunks_mut(format.block_bytes()).for_each(|block| block[0] = 110 + block[0] % 20);
    }
    bytes
}

#[test]
fn quantised_products() {
    /// In the order of [`BlockFormat::ALL`].
    const SUMS: [u64; 13] = [
        0x648e_2cae_eea7_f76f,
        0xca74_f1b6_fac7_66a1,
        0x8319_10bc_3f3a_ca22,
        0xe18f_af33_6801_0b17,
        0x796c_98ff_1c1d_5d92,
        0x78c6_2ed1_78f9_34a6,
        0x5db0_3aeb_dd51_a259,
        0x89b6_e211_274c_8220,
        0x765c_f389_e54d_4354,
        0xe0dc_7a7a_8756_b523,
        0xda91_46c3_99d4_b1eb,
        0x210b_a37f_1823_6f52,
        0x31ae_0ca1_cd4f_0c5b,
    ];
    let (inp, out, rows) = (512, 33, 7);
    for (format, sum) in BlockFormat::ALL.into_iter().zip(SUMS) {
        let mut noise = Noise::new(1);
        let blocks = blocks(&mut noise, format, out * inp);
        let matrix = PackedMatrix::stack(&[Weights::quantized(format, &blocks)], inp);
        let x = noise.floats(rows * inp);
        expect(&format!("{format:?}"), sum, rows * out, |pool, y| matmul(pool, &x, &matrix, None, y));
    }
}

#[test]
fn dense_products() {
    let mut noise = Noise::new(2);
    let (inp, out, rows) = (129, 50, 5);
    let (w, x, bias) = (noise.floats(out * inp), noise.floats(rows * inp), noise.floats(out));
    let matrix = PackedMatrix::from_f32(&w, out, inp);
    expect("f32", 0x7ff2_04d3_cdb2_5b6f, rows * out, |pool, y| matmul(pool, &x, &matrix, Some(&bias), y));
    let halves: Vec<u16> = w.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
    let matrix = PackedMatrix::from_bf16(&halves, out, inp);
    expect("bf16", 0xb223_d72e_311f_b202, rows * out, |pool, y| matmul(pool, &x, &matrix, None, y));
}

#[test]
fn norms_gates_and_exponentials() {
    let mut noise = Noise::new(3);
    let x: Vec<f32> = noise.floats(2 * 300).iter().map(|x| x * 12.0).collect();
    let (weight, bias) = (noise.floats(300), noise.floats(300));
    expect("rms_norm", 0x1e62_c463_66a7_433d, 600, |pool, y| rms_norm(pool, &x, &weight, 1e-5, y));
    expect("layer_norm", 0xcfe3_e679_a5e1_ab9a, 600, |pool, y| layer_norm(pool, &x, &weight, &bias, 1e-5, y));
    expect("gelu", 0x552d_4b28_854a_e78a, 600, |pool, y| gelu(pool, &x, y));
    expect("silu", 0xf158_8f5e_199e_2c4d, 300, |pool, y| gate_stacked(pool, Gate::Silu, &x, 300, y));
    expect("soft_cap", 0x94b4_144a_2f47_a02b, 600, |pool, y| {
        y.copy_from_slice(&x);
        soft_cap(pool, y, 5.0);
    });
    // Sums of exponentials, of rows of one chunk and of two.
    let choice = Choice { share: true, report: Some(0), ..Choice::default() };
    expect("choose", 0x13e5_f53b_c5e1_86bf, 200, |_, y| {
        for (y, first) in y.chunks_exact_mut(2).zip((0..).step_by(3)) {
            let chosen = choose(&x[first..], &choice);
            let report = chosen.report.expect("finite logits");
            y.copy_from_slice(&[chosen.share, report.log_sum as f32]);
        }
    });
}

#[test]
fn attention() {
    /// In the order of [`KvType::ALL`].
    const SUMS: [u64; 3] = [0x1048_2ffc_eb72_7c92, 0x820d_a158_6ba5_9118, 0x7ff6_fdcb_80e3_c2e6];
    let (num_heads, len, num_queries) = (4, CHUNK + 19, 3);
    for (kv_type, sum) in KvType::ALL.into_iter().zip(SUMS) {
        let mut noise = Noise::new(4);
        let layout = KvLayout { block_size: 16, num_kv_heads: 2, head_dim: 32, values: Values::Own, kv_type };
        let width = layout.token_len();
        let (k, v) = (noise.floats(len * width), noise.floats(len * width));
        let q: Vec<f32> = noise.floats(num_queries * num_heads * 32).iter().map(|q| q * 3.0).collect();
        let blocks: Vec<u32> = (0..len.div_ceil(16) as u32).rev().collect();
        let slots: Vec<u32> = (0..len).map(|i| blocks[i / 16] * 16 + (i % 16) as u32).collect();
        let mut storage = vec![0; blocks.len() * layout.block_bytes()];
        let rows = KvRows { k: &k, v: &v, row_stride: width, slot_mapping: &slots };
        write_kv(&ThreadPool::new(1), &layout, &rows, &mut storage);
        let args = PagedAttention {
            q: &q,
            q_row_stride: num_heads * 32,
            storage: &storage,
            layout,
            num_heads,
            scale: 0.3,
            window: None,
            first_key: 0,
            soft_cap: None,
            sinks: None,
            block_tables: &blocks,
            block_table_offsets: &[0, blocks.len() as u32],
            cu_seqlens_q: &[0, num_queries as u32],
            context_lens: &[len as u32],
        };
        expect(&format!("{kv_type:?}"), sum, q.len(), |pool, out| paged_attention(pool, &args, out));
    }
}

#[test]
fn functions_of_doubles() {
    /// Of sines, cosines, exponentials, logarithms, logarithms of one more, powers.
    const SUMS: [u64; 6] = [
        0xd6f9_2a69_87c2_0540,
        0x2fc8_6155_f6a1_324a,
        0x5af8_7fad_e18b_6c40,
        0xed1b_208d_6085_47be,
        0xe7b2_d6d0_89b7_0d40,
        0x3e95_9191_eb38_6faa,
    ];
    let mut noise = Noise::new(5);
    let mut sums = [0xcbf2_9ce4_8422_2325u64; 6];
    for _ in 0..50_000 {
        let (x, unit) = (f64::from(noise.float()), (noise.next() >> 11) as f64 / (1u64 << 53) as f64 + 1e-17);
        let (angle, power) = (x * 131_072.0, (1e4 + unit * 1e6, x));
        let values = [
            double::sin(angle),
            double::cos(angle),
            double::exp(x * 80.0),
            double::ln(unit),
            double::ln_1p(-unit),
            double::pow(power.0, power.1),
        ];
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum = (*sum ^ value.to_bits()).wrapping_mul(0x100_0000_01b3);
        }
    }
    assert_eq!(sums, SUMS, "{sums:#018x?}");
}
