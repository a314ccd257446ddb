//! Causal attention over paged keys and values, for any mix of prefill, decode and verification.
//!
//! A token at position `p` sees the keys at `0..=p` of its sequence, or the last `window` of them. The
//! context is cut at fixed absolute positions into chunks of [`CHUNK`] keys; a chunk that lies outside
//! the window is not read. For one query row and one chunk:
//!
//! 1. `score[j] = (chain of fused multiply-adds over the head, ascending) * scale`, in which a stored
//!    key's own scale comes before `scale`; with a soft cap, `cap * tanh(score[j] / cap)`;
//! 2. `max` of the visible scores, `weight[j] = exp(score[j] - max)`, their sum in 16 lanes (key
//!    `j` in lane `j % 16`), folded in halves; then the weight is multiplied with a stored value's own
//!    scale;
//! 3. `part[d]` = the chain over visible keys, ascending, of `weight[j] * value[j][d]`.
//!
//! Chunks are merged in order: with `m` the larger maximum, `a = exp(max - m)`,
//! `b = exp(chunk_max - m)`: `sum = fma(sum, a, chunk_sum * b)`, `out[d] = fma(out[d], a, part[d] * b)`;
//! at the end `out[d] *= 1 / sum`. A sink is a logit that weighs in the softmax and has no value: with
//! `m = max(max, sink)` and `a = exp(max - m)` the last factor is `a / fma(sum, a, exp(sink - m))`. None of
//! this depends on which rows are computed together, or where a pass begins or ends.
//!
//! Where the values are the first elements of the keys ([`Values::OfKeys`]), keys are read token by token:
//! element `d` of the head adds to lane `d % 16` of a score, and the lanes are folded in halves.
//!
//! The query heads of a group and the tokens of a sequence share each key and value that is read.

pub(crate) mod element;
pub(crate) mod scalar;
pub(crate) mod vector;

use std::cell::RefCell;
use std::ops::Range;

use crate::kv::{KvLayout, Tile, Values};
use crate::math::exp;
use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// Keys of a chunk. Part of what the results are.
pub const CHUNK: usize = 128;

/// Widest head: bounds what a task copies of queries, and of keys whose block size is not a multiple of 16.
/// DeepSeek's latent has 512 channels, and 64 that turn.
pub const MAX_HEAD_DIM: usize = 576;

const _: () = assert!(CHUNK.is_multiple_of(crate::LANES));

/// The inputs of one layer's attention. Row `i` of sequence `s` is the token at position
/// `context_lens[s] - num_tokens(s) + i`; keys and values of this pass are already written.
#[derive(Clone, Copy, Debug)]
pub struct PagedAttention<'a> {
    /// Token `t`'s queries are `q[t * q_row_stride..]`, `[num_heads, head_dim]`.
    pub q: &'a [f32],
    /// Elements from one token's queries to the next's; at least `num_heads * head_dim`.
    pub q_row_stride: usize,
    /// Keys and values, as [`crate::kv`] lays them out.
    pub storage: &'a [u8],
    /// The storage's shape.
    pub layout: KvLayout,
    /// Query heads; a multiple of the key/value heads.
    pub num_heads: usize,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Keys that a token sees, itself included; `None` for all before it.
    pub window: Option<usize>,
    /// Keys before this position are seen by nobody but their own token: a drafting head has nothing to make
    /// the first from.
    pub first_key: usize,
    /// Bound on the scores' magnitude (Gemma 2's `attn_logit_softcapping`).
    pub soft_cap: Option<f32>,
    /// `[num_heads]`: a logit that joins each head's softmax without a value (gpt-oss).
    pub sinks: Option<&'a [f32]>,
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
    pub(crate) output: Output<'a>,
}

/// Where a task's results go.
pub(crate) enum Output<'a> {
    /// Everything a row sees, merged: `[num_tokens, num_heads, value_dim]`.
    Whole(&'a SharedOut<'a>),
    /// Some chunks, each by itself, for the kernel `merge` to put together.
    Parts {
        /// `[num_tokens, num_heads, num_chunks, value_dim + 2]`: the part, its maximum, its sum.
        parts: &'a SharedOut<'a>,
        num_chunks: usize,
        chunks: Range<usize>,
    },
}

impl Output<'_> {
    /// The chunks to compute, of those that the rows see.
    #[inline]
    pub(crate) fn chunks(&self, seen: Range<usize>) -> Range<usize> {
        match self {
            Output::Whole(_) => seen,
            Output::Parts { chunks, .. } => chunks.start.max(seen.start)..chunks.end.min(seen.end),
        }
    }
}

impl Task<'_> {
    /// The tile that holds `position`, and the token's offset in its block.
    #[inline]
    pub(crate) fn locate(&self, position: usize) -> (Tile, usize) {
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

    /// Positions of the keys that the token at `position` sees.
    #[inline]
    pub(crate) fn visible(&self, position: usize) -> Range<usize> {
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        first.max(self.first_key).min(position)..position + 1
    }

    /// Keys lie token by token.
    #[inline]
    pub(crate) fn keys_are_rows(&self) -> bool {
        self.layout.values != Values::Own
    }

    /// The logit that joins the softmax of a query head.
    #[inline]
    pub(crate) fn sink(&self, head: usize) -> Option<f32> {
        self.sinks.map(|sinks| sinks[head])
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
        let KvLayout { block_size, num_kv_heads, head_dim, .. } = self.layout;
        let (width, value_dim) = (self.num_heads * head_dim, self.layout.value_dim());
        assert!(
            block_size > 0 && num_kv_heads > 0 && head_dim > 0,
            "attention: empty layout {:?}",
            self.layout
        );
        assert!(head_dim <= MAX_HEAD_DIM, "attention: head_dim {head_dim}; at most {MAX_HEAD_DIM}");
        assert!(
            (1..=head_dim).contains(&value_dim),
            "attention: values are {value_dim} elements of keys of {head_dim}"
        );
        assert!(
            self.num_heads > 0 && self.num_heads.is_multiple_of(num_kv_heads),
            "attention: {} query heads over {num_kv_heads} key/value heads",
            self.num_heads
        );
        assert!(self.window != Some(0), "attention: a window of 0 keys; a token sees at least itself");
        assert!(
            self.soft_cap.is_none_or(|cap| cap > 0.0 && cap.is_finite()),
            "attention: soft cap {:?}; it must be positive and finite",
            self.soft_cap
        );
        assert!(
            self.sinks.is_none_or(|sinks| sinks.len() == self.num_heads),
            "attention: {} sinks for {} heads",
            self.sinks.map_or(0, <[f32]>::len),
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
            out_len == num_tokens * self.num_heads * value_dim,
            "attention: out has {out_len} elements for [{num_tokens}, {}, {value_dim}]",
            self.num_heads
        );
        assert!(self.q_row_stride >= width, "attention: rows of {width} with stride {}", self.q_row_stride);
        let needed = num_tokens.checked_sub(1).map_or(0, |last| last * self.q_row_stride + width);
        assert!(self.q.len() >= needed, "attention: q has {} elements; {needed} needed", self.q.len());
        let num_blocks = self.storage.len() / self.layout.block_bytes();
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

/// Query rows of a task, at most: a multiple of every instruction set's group.
const TASK_ROWS: usize = 48;
/// Results of chunks that may be kept for merging, at most: bounds the memory of a split context.
const MAX_PARTS: usize = 8192;

/// Attention of every row of the batch; `out: [num_tokens, num_heads, value_dim]`.
///
/// # Panics
/// If a length, a block id or a context length does not fit the others.
pub fn paged_attention(pool: &ThreadPool, args: &PagedAttention<'_>, out: &mut [f32]) {
    args.check(out.len());
    let work = Work::of(args);
    if work.units == 0 {
        return;
    }
    let out = SharedOut::new(out);
    // A context is split only where there are too few rows and heads to go round.
    let num_items = work.units * work.num_chunks;
    let split = work.units < pool.threads()
        && pool.num_tasks(num_items, work.total_ns / num_items) > 1
        && work.num_rows * work.num_chunks <= MAX_PARTS;
    if split {
        return split_attention(pool, args, &work, &out);
    }
    let tasks = pool.num_tasks(work.units, work.total_ns / work.units);
    pool.run(tasks, &|i| {
        for unit in i * work.units / tasks..(i + 1) * work.units / tasks {
            let (sequence, kv_head, rows) = args.unit(unit);
            let task = Task { args, sequence, kv_head, rows, output: Output::Whole(&out) };
            // SAFETY: `check` has passed; units differ in sequence, head or rows.
            unsafe { (pool.kernels().attention)(&task) };
        }
    });
}

/// The same with the chunks of a context on several threads, and a second step that merges them: the
/// same operations in the same order, only not at the same time.
fn split_attention(pool: &ThreadPool, args: &PagedAttention<'_>, work: &Work, out: &SharedOut<'_>) {
    thread_local! {
        /// The caller's, kept from one pass to the next.
        static PARTS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let (num_chunks, value_dim) = (work.num_chunks, args.layout.value_dim());
    let part_len = value_dim + 2;
    PARTS.with_borrow_mut(|parts| {
        parts.resize(parts.len().max(work.num_rows * num_chunks * part_len), 0.0);
        let shared = SharedOut::new(parts);
        let num_items = work.units * num_chunks;
        let tasks = pool.num_tasks(num_items, work.total_ns / num_items);
        pool.run(tasks, &|i| {
            let (mut item, end) = (i * num_items / tasks, (i + 1) * num_items / tasks);
            while item < end {
                let (unit, first) = (item / num_chunks, item % num_chunks);
                let chunks = first..num_chunks.min(first + end - item);
                item += chunks.len();
                let (sequence, kv_head, rows) = args.unit(unit);
                let output = Output::Parts { parts: &shared, num_chunks, chunks };
                let task = Task { args, sequence, kv_head, rows, output };
                // SAFETY: `check` has passed; items differ in sequence, head, rows or chunks.
                unsafe { (pool.kernels().attention)(&task) };
            }
        });
        for sequence in 0..args.num_seqs() {
            for (i, token) in args.tokens(sequence).enumerate() {
                let seen = chunks_of(&args.visible(args.start_position(sequence) + i));
                for head in 0..args.num_heads {
                    let row = token * args.num_heads + head;
                    let first = (row * num_chunks + seen.start) * part_len;
                    let parts = &parts[first..first + seen.len() * part_len];
                    // SAFETY: no task is running; a row's parts and output are as long as `merge` wants.
                    unsafe {
                        (pool.kernels().merge)(parts, args.sink(head), out.part(row * value_dim, value_dim))
                    };
                }
            }
        }
    });
}

/// The chunks that hold any of some positions, at least one.
#[inline]
pub(crate) fn chunks_of(positions: &Range<usize>) -> Range<usize> {
    positions.start / CHUNK..positions.end.div_ceil(CHUNK)
}

/// The last factor on a row's weighted values.
#[inline]
pub(crate) fn last_factor(max: f32, sum: f32, sink: Option<f32>) -> f32 {
    let Some(sink) = sink else { return 1.0 / sum };
    let all = max.max(sink);
    let a = exp(max - all);
    a / sum.mul_add(a, exp(sink - all))
}

/// How much there is to do.
struct Work {
    /// Tasks that differ in sequence, key/value head or rows; see [`PagedAttention::unit`].
    units: usize,
    /// Query rows: tokens times heads.
    num_rows: usize,
    /// Chunks of the longest context.
    num_chunks: usize,
    /// On one core, about.
    total_ns: usize,
}

impl Work {
    fn of(args: &PagedAttention<'_>) -> Work {
        let KvLayout { num_kv_heads, head_dim, .. } = args.layout;
        let mut work = Work { units: 0, num_rows: 0, num_chunks: 1, total_ns: 0 };
        for sequence in 0..args.num_seqs() {
            let rows = args.tokens(sequence).len() * args.group();
            let context_len = args.context_lens[sequence] as usize;
            work.units += num_kv_heads * rows.div_ceil(TASK_ROWS);
            work.num_rows += num_kv_heads * rows;
            work.num_chunks = work.num_chunks.max(context_len.div_ceil(CHUNK));
            // Fitted to measurements: few rows are bound by reading keys and values (the 4), many by
            // arithmetic.
            let keys =
                args.window.map_or(context_len, |window| context_len.min(window + rows / args.group()));
            work.total_ns += num_kv_heads * keys * head_dim * (rows + 4) / 60;
        }
        work
    }
}

impl PagedAttention<'_> {
    /// Sequence, key/value head and rows of a unit of work: sequences in order, within one the heads,
    /// within those blocks of [`TASK_ROWS`] rows.
    fn unit(&self, mut unit: usize) -> (usize, usize, Range<usize>) {
        for sequence in 0..self.num_seqs() {
            let num_rows = self.tokens(sequence).len() * self.group();
            let blocks = num_rows.div_ceil(TASK_ROWS);
            if unit < blocks * self.layout.num_kv_heads {
                let begin = unit % blocks * TASK_ROWS;
                return (sequence, unit / blocks, begin..num_rows.min(begin + TASK_ROWS));
            }
            unit -= blocks * self.layout.num_kv_heads;
        }
        unreachable!("attention: no such unit of work: this is a bug")
    }

    /// Position of a sequence's first row.
    pub(crate) fn start_position(&self, sequence: usize) -> usize {
        self.context_lens[sequence] as usize - self.tokens(sequence).len()
    }
}
