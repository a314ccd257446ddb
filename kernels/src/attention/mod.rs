//! Causal attention over paged keys and values, for any mix of prefill, decode and verification.
//!
//! A token at position `p` sees the keys at `0..=p` of its sequence. The context is cut at fixed
//! absolute positions into chunks of [`CHUNK`] keys. For one query row and one chunk:
//!
//! 1. `score[j] = (chain of fused multiply-adds over the head, ascending) * scale`;
//! 2. `max` of the visible scores, `weight[j] = exp(score[j] - max)`, their sum in 16 lanes (key
//!    `j` in lane `j % 16`), folded in halves;
//! 3. `part[d]` = the chain over visible keys, ascending, of `weight[j] * value[j][d]`.
//!
//! Chunks are merged in order: with `m` the larger maximum, `a = exp(max - m)`,
//! `b = exp(chunk_max - m)`: `sum = fma(sum, a, chunk_sum * b)`, `out[d] = fma(out[d], a, part[d] * b)`;
//! at the end `out[d] *= 1 / sum`. None of this depends on which rows are computed together, or
//! where a pass begins or ends.
//!
//! The query heads of a group and the tokens of a sequence share each key and value that is read.

pub(crate) mod scalar;
pub(crate) mod vector;

use std::ops::Range;

use crate::kv::KvLayout;
use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// Keys of a chunk. Part of what the results are.
pub const CHUNK: usize = 128;

/// Widest head: bounds the copy of keys whose block size is not a multiple of 16.
pub const MAX_HEAD_DIM: usize = 512;

const _: () = assert!(CHUNK % crate::LANES == 0);

/// The inputs of one layer's attention. Row `i` of sequence `s` is the token at position
/// `context_lens[s] - num_tokens(s) + i`; keys and values of this pass are already written.
#[derive(Clone, Copy, Debug)]
pub struct PagedAttention<'a> {
    /// Token `t`'s queries are `q[t * q_row_stride..]`, `[num_heads, head_dim]`.
    pub q: &'a [f32],
    /// Elements from one token's queries to the next's; at least `num_heads * head_dim`.
    pub q_row_stride: usize,
    /// Keys, as [`crate::kv`] lays them out.
    pub k_cache: &'a [f32],
    /// Values, as [`crate::kv`] lays them out.
    pub v_cache: &'a [f32],
    /// Shape of both storages.
    pub layout: KvLayout,
    /// Query heads; a multiple of the key/value heads.
    pub num_heads: usize,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Block ids of all sequences, one after the other.
    pub block_tables: &'a [u32],
    /// `[num_seqs + 1]`: where each sequence's blocks begin in `block_tables`.
    pub block_table_offsets: &'a [u32],
    /// `[num_seqs + 1]`: where each sequence's rows begin.
    pub cu_seqlens_q: &'a [u32],
    /// `[num_seqs]`: tokens of context, this pass's included.
    pub context_lens: &'a [u32],
}

/// Query rows of one sequence and one key/value head. Rows count `token * group + head_in_group`.
pub(crate) struct Task<'a> {
    pub(crate) args: &'a PagedAttention<'a>,
    pub(crate) sequence: usize,
    pub(crate) kv_head: usize,
    pub(crate) rows: Range<usize>,
    /// `[num_tokens, num_heads, head_dim]`
    pub(crate) out: &'a SharedOut<'a>,
}

impl Task<'_> {
    /// First element of the tile that holds `position`, in either storage, and the token's offset in
    /// its block.
    #[inline]
    pub(crate) fn locate(&self, position: usize) -> (usize, usize) {
        let layout = &self.args.layout;
        let block = self.args.blocks(self.sequence)[position / layout.block_size];
        (layout.tile(block as usize, self.kv_head), position % layout.block_size)
    }
}

impl PagedAttention<'_> {
    /// Query heads that share a key/value head.
    pub(crate) fn group(&self) -> usize {
        self.num_heads / self.layout.num_kv_heads
    }

    fn num_seqs(&self) -> usize {
        self.context_lens.len()
    }

    /// Rows of the batch that are this sequence's tokens.
    fn tokens(&self, sequence: usize) -> Range<usize> {
        self.cu_seqlens_q[sequence] as usize..self.cu_seqlens_q[sequence + 1] as usize
    }

    fn blocks(&self, sequence: usize) -> &[u32] {
        let offsets = self.block_table_offsets;
        &self.block_tables[offsets[sequence] as usize..offsets[sequence + 1] as usize]
    }

    /// Checks everything that the kernels rely on.
    fn check(&self, out_len: usize) {
        let KvLayout { block_size, num_kv_heads, head_dim } = self.layout;
        let width = self.num_heads * head_dim;
        assert!(
            block_size > 0 && num_kv_heads > 0 && head_dim > 0,
            "attention: empty layout {:?}",
            self.layout
        );
        assert!(head_dim <= MAX_HEAD_DIM, "attention: head_dim {head_dim}; at most {MAX_HEAD_DIM}");
        assert!(
            self.num_heads > 0 && self.num_heads % num_kv_heads == 0,
            "attention: {} query heads over {num_kv_heads} key/value heads",
            self.num_heads
        );
        let num_seqs = self.num_seqs();
        assert!(
            self.cu_seqlens_q.len() == num_seqs + 1 && self.block_table_offsets.len() == num_seqs + 1,
            "attention: {num_seqs} context lengths, {} row offsets, {} block table offsets",
            self.cu_seqlens_q.len(),
            self.block_table_offsets.len()
        );
        let num_tokens = self.cu_seqlens_q[num_seqs] as usize;
        assert!(
            out_len == num_tokens * width,
            "attention: out has {out_len} elements for [{num_tokens}, {width}]"
        );
        assert!(self.q_row_stride >= width, "attention: rows of {width} with stride {}", self.q_row_stride);
        let needed = num_tokens.checked_sub(1).map_or(0, |last| last * self.q_row_stride + width);
        assert!(self.q.len() >= needed, "attention: q has {} elements; {needed} needed", self.q.len());
        assert!(
            self.k_cache.len() == self.v_cache.len(),
            "attention: key storage of {} elements, value storage of {}",
            self.k_cache.len(),
            self.v_cache.len()
        );
        let num_blocks = self.k_cache.len() / self.layout.block_len();
        for sequence in 0..num_seqs {
            let (tokens, blocks) = (self.tokens(sequence), self.blocks(sequence));
            let context_len = self.context_lens[sequence] as usize;
            assert!(
                tokens.start <= tokens.end && tokens.len() <= context_len,
                "attention: sequence {sequence} has {} rows in a context of {context_len}",
                tokens.len()
            );
            assert!(
                blocks.len() * block_size >= context_len,
                "attention: sequence {sequence} has {} blocks of {block_size} for a context of {context_len}",
                blocks.len()
            );
            if let Some(block) = blocks.iter().find(|&&block| block as usize >= num_blocks) {
                panic!("attention: sequence {sequence} names block {block} of {num_blocks}");
            }
        }
    }
}

/// Attention of every row of the batch; `out: [num_tokens, num_heads, head_dim]`.
///
/// # Panics
/// If a length, a block id or a context length does not fit the others.
pub fn paged_attention(pool: &ThreadPool, args: &PagedAttention<'_>, out: &mut [f32]) {
    args.check(out.len());
    let out = SharedOut::new(out);
    let heads = args.layout.num_kv_heads;
    pool.run(args.num_seqs() * heads, &|i| {
        let (sequence, kv_head) = (i / heads, i % heads);
        let rows = 0..args.tokens(sequence).len() * args.group();
        let task = Task { args, sequence, kv_head, rows, out: &out };
        // SAFETY: `check` has passed; tasks have different sequences or heads.
        unsafe { (pool.kernels().attention)(&task) };
    });
}
