//! Keys and values of a layer on the CPU, and the attention over them.

use tandem_kernels::ThreadPool;
use tandem_kernels::attention::{PagedAttention, paged_attention};
use tandem_kernels::kv::{self, KvRows, Values, write_kv};
use tandem_kernels::pages::{PageWarmer, ZeroedPages};
use tandem_kernels::rope::{Rope, rope};

use crate::backend::{Attention, Heads};
use crate::batch::ForwardBatch;
use crate::error::ModelError;
use crate::kv_cache::{KvLayout, try_zeros};
use crate::rope::RopeTable;

/// Keys and values of one layer, in the layout of [`tandem_kernels::kv`].
#[derive(Debug)]
pub struct KvLayer {
    layout: kv::KvLayout,
    storage: ZeroedPages,
}

impl KvLayer {
    pub(super) fn new(shape: &KvLayout) -> Result<Self, ModelError> {
        let KvLayout { block_size, num_kv_heads, head_dim, values, kv_type, .. } = *shape;
        let layout = kv::KvLayout { block_size, num_kv_heads, head_dim, values, kv_type };
        let storage = try_zeros(shape.num_blocks * layout.block_bytes())?;
        Ok(KvLayer { layout, storage })
    }

    /// Lets `warmer` make blocks ready ahead of use.
    pub(super) fn be_watched(&self, warmer: &mut PageWarmer) {
        warmer.watch(&self.storage, self.layout.block_bytes());
    }

    /// Stores the keys and values of `qkv` at their slots.
    pub(super) fn store(&mut self, pool: &ThreadPool, inputs: &ForwardBatch, heads: Heads, qkv: &[f32]) {
        let k = &qkv[heads.q_width()..];
        let v = if heads.values == Values::Own { &k[heads.kv_width()..] } else { &[] };
        let rows = KvRows { k, v, row_stride: heads.qkv_width(), slot_mapping: &inputs.slot_mapping };
        write_kv(pool, &self.layout, &rows, &mut self.storage);
    }

    /// See [`attention`](crate::backend::Backend::attention).
    pub(super) fn attend(
        &self,
        pool: &ThreadPool,
        inputs: &ForwardBatch,
        heads: Heads,
        attention: &Attention<'_, Vec<f32>>,
        qkv: &[f32],
        out: &mut [f32],
    ) {
        let args = PagedAttention {
            q: qkv,
            q_row_stride: heads.qkv_width(),
            storage: &self.storage,
            layout: self.layout,
            num_heads: heads.num_heads,
            scale: attention.scale,
            window: attention.window,
            first_key: attention.first_key,
            soft_cap: attention.soft_cap,
            sinks: attention.sinks.map(Vec::as_slice),
            block_tables: &inputs.block_tables,
            block_table_offsets: &inputs.block_table_offsets,
            cu_seqlens_q: &inputs.cu_seqlens_q,
            context_lens: &inputs.context_lens,
        };
        paged_attention(pool, &args, out);
    }
}

/// Rotates the queries and keys of `qkv` to their positions.
pub(super) fn rotate(
    pool: &ThreadPool,
    inputs: &ForwardBatch,
    heads: Heads,
    table: &RopeTable,
    qkv: &mut [f32],
) {
    let rotation = Rope {
        cos: &table.cos,
        sin: &table.sin,
        positions: &inputs.positions,
        // They stand side by side.
        num_heads: heads.num_heads + heads.num_kv_heads,
        head_dim: table.width(),
        head_stride: heads.head_dim,
        row_stride: heads.qkv_width(),
    };
    rope(pool, &mut qkv[heads.head_dim - table.width()..], &rotation);
}
