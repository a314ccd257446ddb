//! Contract of paged attention: right against a naive double-precision twin, and the same bits whatever
//! the instruction set, threads, chunking of a prompt, company in the batch, or contents of unused
//! slots.

mod common;

use common::{Noise, assert_same_bits, pools};
use tandem_kernels::attention::{CHUNK, PagedAttention, paged_attention};
use tandem_kernels::kv::{KvLayout, KvRows, write_kv};
use tandem_kernels::{Isa, ThreadPool};

/// Whole sequences with their queries, keys and values, and storage in scattered blocks.
struct World {
    layout: KvLayout,
    num_heads: usize,
    /// Per sequence: `[len, num_heads, head_dim]`, and keys and values `[len, num_kv_heads, head_dim]`.
    q: Vec<Vec<f32>>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    tables: Vec<Vec<u32>>,
    k_cache: Vec<f32>,
    v_cache: Vec<f32>,
}

impl World {
    fn new(noise: &mut Noise, layout: KvLayout, num_heads: usize, lens: &[usize]) -> Self {
        let blocks: Vec<usize> = lens.iter().map(|len| len.div_ceil(layout.block_size)).collect();
        let mut free: Vec<u32> = (0..blocks.iter().sum::<usize>() as u32 + 3).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, noise.next() as usize % (i + 1));
        }
        // What was never written is NaN: using it would show.
        let mut k_cache = vec![f32::NAN; free.len() * layout.block_len()];
        let mut v_cache = k_cache.clone();
        let tables: Vec<Vec<u32>> = blocks.iter().map(|&n| free.split_off(free.len() - n)).collect();
        let width = layout.token_len();
        let rows = |noise: &mut Noise, width: usize| -> Vec<Vec<f32>> {
            lens.iter().map(|len| noise.floats(len * width).iter().map(|x| x * 3.0).collect()).collect()
        };
        let q = rows(noise, num_heads * layout.head_dim);
        let (k, v) = (rows(noise, width), rows(noise, width));
        for s in 0..lens.len() {
            let slot = |i: usize| {
                tables[s][i / layout.block_size] * layout.block_size as u32 + (i % layout.block_size) as u32
            };
            let slots: Vec<u32> = (0..lens[s]).map(slot).collect();
            let rows = KvRows { k: &k[s], v: &v[s], row_stride: width, slot_mapping: &slots };
            write_kv(&layout, &rows, &mut k_cache, &mut v_cache);
        }
        World { layout, num_heads, q, k, v, tables, k_cache, v_cache }
    }

    fn width(&self) -> usize {
        self.num_heads * self.layout.head_dim
    }

    /// Attention of `(sequence, tokens)` pairs as one batch; one output per pair.
    fn run(&self, pool: &ThreadPool, batch: &[(usize, std::ops::Range<usize>)]) -> Vec<Vec<f32>> {
        let (width, stride) = (self.width(), self.width() + 3);
        let (mut q, mut lens, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        let (mut cu_seqlens_q, mut offsets) = (vec![0], vec![0]);
        for (s, tokens) in batch {
            for token in tokens.clone() {
                q.extend_from_slice(&self.q[*s][token * width..(token + 1) * width]);
                q.extend_from_slice(&[f32::NAN; 3]);
            }
            lens.push(tokens.end as u32);
            cu_seqlens_q.push((q.len() / stride) as u32);
            tables.extend_from_slice(&self.tables[*s][..tokens.end.div_ceil(self.layout.block_size)]);
            offsets.push(tables.len() as u32);
        }
        let args = PagedAttention {
            q: &q,
            q_row_stride: stride,
            k_cache: &self.k_cache,
            v_cache: &self.v_cache,
            layout: self.layout,
            num_heads: self.num_heads,
            scale: 0.3,
            block_tables: &tables,
            block_table_offsets: &offsets,
            cu_seqlens_q: &cu_seqlens_q,
            context_lens: &lens,
        };
        let mut out = vec![f32::NAN; q.len() / stride * width];
        paged_attention(pool, &args, &mut out);
        cu_seqlens_q
            .windows(2)
            .map(|rows| out[rows[0] as usize * width..rows[1] as usize * width].to_vec())
            .collect()
    }

    /// One token's attention in double precision, straight from the definition.
    fn naive(&self, s: usize, position: usize) -> Vec<f64> {
        let (dim, kv_heads) = (self.layout.head_dim, self.layout.num_kv_heads);
        let mut out = Vec::new();
        for head in 0..self.num_heads {
            let kv = head / (self.num_heads / kv_heads);
            let q = &self.q[s][position * self.width() + head * dim..][..dim];
            let at = |x: &[f32], j: usize, d: usize| f64::from(x[(j * kv_heads + kv) * dim + d]);
            let score = |j| (0..dim).map(|d| f64::from(q[d]) * at(&self.k[s], j, d)).sum::<f64>() * 0.3;
            let scores: Vec<f64> = (0..=position).map(score).collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().map(|x| (x - max).exp()).sum();
            let weighted =
                |d| (0..=position).map(|j| (scores[j] - max).exp() * at(&self.v[s], j, d)).sum::<f64>() / sum;
            out.extend((0..dim).map(weighted));
        }
        out
    }
}

const SHAPES: [(usize, usize, usize, usize); 6] = [
    // block_size, num_heads, num_kv_heads, head_dim
    (16, 4, 2, 64),
    (16, 2, 1, 64),
    (32, 3, 3, 20),
    (4, 4, 1, 8),
    (5, 6, 2, 33),
    (16, 7, 1, 128),
];

fn scalar() -> ThreadPool {
    ThreadPool::with_isa(1, Isa::Scalar).unwrap()
}

fn world(noise: &mut Noise, shape: (usize, usize, usize, usize), lens: &[usize]) -> World {
    let (block_size, num_heads, num_kv_heads, head_dim) = shape;
    World::new(noise, KvLayout { block_size, num_kv_heads, head_dim }, num_heads, lens)
}

#[test]
fn the_specification_is_close_to_the_definition() {
    let mut noise = Noise::new(11);
    for shape in SHAPES {
        let world = world(&mut noise, shape, &[2 * CHUNK + 3]);
        let out = &world.run(&scalar(), &[(0, 0..2 * CHUNK + 3)])[0];
        for position in [0, 1, 15, 16, CHUNK - 1, CHUNK, 2 * CHUNK, 2 * CHUNK + 2] {
            let got = &out[position * world.width()..(position + 1) * world.width()];
            for (got, exact) in got.iter().zip(world.naive(0, position)) {
                assert!((f64::from(*got) - exact).abs() < 2e-5, "{shape:?} {position}: {got} {exact}");
            }
        }
    }
}

#[test]
fn every_instruction_set_and_thread_count_gives_the_same_bits() {
    let mut noise = Noise::new(12);
    for shape in SHAPES {
        let world = world(&mut noise, shape, &[1, 17, CHUNK, 2 * CHUNK + 37]);
        let batch = [(0, 0..1), (1, 3..17), (2, CHUNK - 1..CHUNK), (3, CHUNK - 5..2 * CHUNK + 37)];
        let expected = world.run(&scalar(), &batch);
        for pool in pools() {
            for (got, expected) in world.run(&pool, &batch).iter().zip(&expected) {
                assert_same_bits(got, expected, &format!("{pool:?} {shape:?}"));
            }
        }
    }
}

#[test]
fn a_token_alone_in_any_piece_of_its_prompt_or_in_company_is_the_same() {
    let mut noise = Noise::new(13);
    let lens = [CHUNK + 20, 40];
    for shape in [SHAPES[0], SHAPES[4], SHAPES[5]] {
        let world = world(&mut noise, shape, &lens);
        // The specification has no grouping that could differ.
        for pool in pools().into_iter().filter(|pool| pool.isa() != Isa::Scalar) {
            let whole = &world.run(&pool, &[(0, 0..lens[0])])[0];
            for pieces in [1, 2, 5, 9, 64] {
                for begin in (0..lens[0]).step_by(pieces) {
                    let end = lens[0].min(begin + pieces);
                    let out = world.run(&pool, &[(1, 10..40), (0, begin..end)]);
                    let expected = &whole[begin * world.width()..end * world.width()];
                    assert_same_bits(&out[1], expected, &format!("{pool:?} {shape:?} {begin}..{end}"));
                }
            }
        }
    }
}

#[test]
fn a_long_context_split_over_threads_is_the_one_taken_whole() {
    let mut noise = Noise::new(16);
    for shape in [SHAPES[1], SHAPES[5]] {
        let len = 9 * CHUNK + 50;
        let world = world(&mut noise, shape, &[len, 3]);
        for tokens in [len - 1..len, len - 5..len, 9 * CHUNK - 3..9 * CHUNK + 2] {
            let expected = world.run(&scalar(), &[(0, tokens.clone())]);
            for pool in pools() {
                let what = format!("{pool:?} {shape:?} {tokens:?}");
                assert_same_bits(&world.run(&pool, &[(0, tokens.clone())])[0], &expected[0], &what);
                let company = world.run(&pool, &[(1, 0..3), (0, tokens.clone())]);
                assert_same_bits(&company[1], &expected[0], &what);
            }
        }
    }
}

#[test]
fn a_nan_key_spoils_the_rows_that_see_it_and_no_others() {
    let mut noise = Noise::new(14);
    let mut world = world(&mut noise, SHAPES[0], &[60]);
    let bad = 33;
    let tile = world.tables[0][bad / 16] as usize * world.layout.block_len();
    world.k_cache[tile + bad % 16] = f32::NAN;
    for pool in pools() {
        let out = &world.run(&pool, &[(0, 0..60)])[0];
        for (position, row) in out.chunks(world.width()).enumerate() {
            // Head 0 of the two key/value heads serves the first half of the row.
            let (first, second) = row.split_at(world.width() / 2);
            assert_eq!(first.iter().all(|x| x.is_nan()), position >= bad, "{pool:?} {position}");
            assert!(second.iter().all(|x| x.is_finite()), "{pool:?} {position}");
        }
    }
}

#[test]
#[should_panic(expected = "sequence 0 has 1 blocks of 16 for a context of 17")]
fn a_block_table_that_is_too_short_is_refused() {
    let mut noise = Noise::new(15);
    let mut world = world(&mut noise, SHAPES[0], &[17]);
    world.tables[0].pop();
    world.tables.push(vec![0]);
    let args = PagedAttention {
        q: &world.q[0],
        q_row_stride: world.width(),
        k_cache: &world.k_cache,
        v_cache: &world.v_cache,
        layout: world.layout,
        num_heads: world.num_heads,
        scale: 1.0,
        block_tables: &world.tables[0],
        block_table_offsets: &[0, 1],
        cu_seqlens_q: &[0, 1],
        context_lens: &[17],
    };
    paged_attention(&scalar(), &args, &mut vec![0.0; world.width()]);
}
