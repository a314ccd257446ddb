//! Attention at the shapes of real models over a long context, its blocks in no order, as after some hours
//! of serving. Every query row needs one multiply-add for every stored element that it sees, so few rows are
//! bound by reading and many by arithmetic.

use super::{Least, Measured, ReadRoof, WORKING_SET_BYTES, multiply_adds, noise};
use crate::attention::{PagedAttention, paged_attention};
use crate::kv::{KvLayout, KvRows, KvType, Values, write_kv};
use crate::pack::memory::{LINE_BYTES, Lines, bytes_mut};
use crate::pool::ThreadPool;

const BLOCK_SIZE: usize = 16;

/// The attention of a model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The model.
    pub model: &'static str,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// Qwen2.5-Coder's.
pub const SHAPES: [Shape; 3] = [
    Shape { model: "0.5B", num_heads: 14, num_kv_heads: 2, head_dim: 64 },
    Shape { model: "1.5B", num_heads: 12, num_kv_heads: 2, head_dim: 128 },
    Shape { model: "7B", num_heads: 28, num_kv_heads: 4, head_dim: 128 },
];

/// Measures a layer's attention of the last `rows` tokens of a context of `context_len`, for each of `rows`, in
/// `rounds` rounds.
///
/// # Panics
/// If the context is shorter than the rows.
pub fn measure(
    pool: &ThreadPool,
    read: &ReadRoof,
    shape: Shape,
    (kv_type, context_len): (KvType, usize),
    rows: &[usize],
    rounds: usize,
) -> Vec<Measured> {
    let Shape { num_heads, num_kv_heads, head_dim, .. } = shape;
    let layout = KvLayout { block_size: BLOCK_SIZE, num_kv_heads, head_dim, values: Values::Own, kv_type };
    let block_table = shuffled(context_len.div_ceil(BLOCK_SIZE));
    let layer_bytes = block_table.len() * layout.block_bytes();
    let num_layers = (WORKING_SET_BYTES / layer_bytes).max(2);
    let mut storage = Lines::zeroed((num_layers * layer_bytes).div_ceil(LINE_BYTES));
    let storage = &mut bytes_mut(&mut storage)[..num_layers * layer_bytes];
    storage.chunks_exact_mut(layer_bytes).for_each(|layer| fill(pool, &layout, layer));
    let layers: Vec<&[u8]> = storage.chunks_exact(layer_bytes).collect();
    let width = num_heads * head_dim;
    let most = rows.iter().copied().max().unwrap_or(1);
    let (q, mut out) = (noise(most * width), vec![0.0; most * width]);

    let mut times = vec![Least::NONE; rows.len()];
    let (mut reading, mut computing) = (Least::NONE, Least::NONE);
    let (mut read_bytes, mut computed) = (0, 0);
    for _ in 0..rounds {
        read_bytes = reading.time(|| read.read(pool));
        computed = computing.time(|| multiply_adds(pool, 100_000));
        for (&rows, time) in rows.iter().zip(&mut times) {
            // Of many layers each is timed by itself: the least disturbed one counts.
            for layer in &layers {
                let args = PagedAttention {
                    q: &q,
                    q_row_stride: width,
                    storage: layer,
                    layout,
                    num_heads,
                    scale: (head_dim as f32).sqrt().recip(),
                    window: None,
                    first_key: 0,
                    soft_cap: None,
                    sinks: None,
                    block_tables: &block_table,
                    block_table_offsets: &[0, block_table.len() as u32],
                    cu_seqlens_q: &[0, rows as u32],
                    context_lens: &[context_len as u32],
                };
                time.time(|| paged_attention(pool, &args, &mut out[..rows * width]));
            }
        }
    }
    let measured = |(&rows, time): (&usize, &Least)| Measured {
        rows,
        seconds: time.0,
        bytes: layer_bytes as f64,
        operations: 4.0 * (rows * width * context_len) as f64,
        read_roof: read_bytes as f64 / reading.0,
        compute_roof: computed as f64 / computing.0,
    };
    rows.iter().zip(&times).map(measured).collect()
}

/// The blocks of a layer in no order.
fn shuffled(num_blocks: usize) -> Vec<u32> {
    let mut blocks: Vec<u32> = (0..num_blocks as u32).collect();
    let mut state = 1u64;
    for i in (1..num_blocks).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        blocks.swap(i, (state >> 33) as usize % (i + 1));
    }
    blocks
}

/// Keys and values in every slot of a layer.
fn fill(pool: &ThreadPool, layout: &KvLayout, layer: &mut [u8]) {
    const TOKENS: usize = 512;
    let kv = noise(TOKENS * layout.token_len());
    let num_slots = layer.len() / layout.block_bytes() * layout.block_size;
    for first in (0..num_slots).step_by(TOKENS) {
        let slots: Vec<u32> = (first as u32..num_slots.min(first + TOKENS) as u32).collect();
        let rows = KvRows { k: &kv, v: &kv, row_stride: layout.token_len(), slot_mapping: &slots };
        write_kv(pool, layout, &rows, layer);
    }
}
