//! Contract of paged attention: right against a naive double-precision twin, and the same bits whatever
//! the instruction set, threads, chunking of a prompt, company in the batch, or contents of unused
//! slots.

mod common;

use common::{Noise, assert_same_bits, pools};
use tandem_kernels::attention::{CHUNK, PagedAttention, paged_attention};
use tandem_kernels::kv::{KvLayout, KvRows, KvType, Values, write_kv};
use tandem_kernels::{Isa, ThreadPool};

/// Whole sequences with their queries, keys and values, and storage in scattered blocks.
struct World {
    layout: KvLayout,
    num_heads: usize,
    options: Options,
    /// Per sequence: `[len, num_heads, head_dim]`, and keys and values `[len, num_kv_heads, head_dim]`.
    q: Vec<Vec<f32>>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    tables: Vec<Vec<u32>>,
    storage: Vec<u8>,
}

/// What a layer may do to its scores.
#[derive(Clone, Debug, Default)]
struct Options {
    window: Option<usize>,
    soft_cap: Option<f32>,
    sinks: Option<Vec<f32>>,
    first_key: usize,
}

impl Options {
    /// None of them, each alone, all together; windows shorter than a tile, than a chunk, than a context.
    fn all(num_heads: usize) -> Vec<Options> {
        let sinks = Some((0..num_heads).map(|head| 2.5 - head as f32).collect::<Vec<f32>>());
        let windows = [1, 5, 100, CHUNK, CHUNK + 9, 5000];
        let mut all: Vec<Options> =
            windows.iter().map(|&window| Options { window: Some(window), ..Options::default() }).collect();
        all.push(Options::default());
        all.push(Options { soft_cap: Some(0.8), ..Options::default() });
        all.push(Options { sinks: sinks.clone(), ..Options::default() });
        all.push(Options { first_key: 1, ..Options::default() });
        all.push(Options { first_key: CHUNK + 2, ..Options::default() });
        all.push(Options { window: Some(CHUNK + 30), soft_cap: Some(1.5), sinks, first_key: 1 });
        all
    }
}

impl Options {
    /// None of them, and all together.
    fn some(num_heads: usize) -> Vec<Options> {
        let mut all = Options::all(num_heads);
        vec![Options::default(), all.pop().expect("all together")]
    }
}

impl World {
    fn new(noise: &mut Noise, layout: KvLayout, num_heads: usize, lens: &[usize]) -> Self {
        let blocks: Vec<usize> = lens.iter().map(|len| len.div_ceil(layout.block_size)).collect();
        let mut free: Vec<u32> = (0..blocks.iter().sum::<usize>() as u32 + 3).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, noise.next() as usize % (i + 1));
        }
        // What was never written is NaN, as an element or as its scale: using it would show.
        let storage = vec![0xff; free.len() * layout.block_bytes()];
        let tables: Vec<Vec<u32>> = blocks.iter().map(|&n| free.split_off(free.len() - n)).collect();
        let width = layout.token_len();
        let rows = |noise: &mut Noise, width: usize| -> Vec<Vec<f32>> {
            lens.iter().map(|len| noise.floats(len * width).iter().map(|x| x * 3.0).collect()).collect()
        };
        let q = rows(noise, num_heads * layout.head_dim);
        let k = rows(noise, width);
        let v = if layout.values == Values::Own { rows(noise, width) } else { k.clone() };
        let options = Options::default();
        let mut world = World { layout, num_heads, options, q, k, v, tables, storage };
        (0..lens.len()).for_each(|sequence| world.write(sequence, 0..lens[sequence]));
        world
    }

    /// Stores keys and values of some tokens of a sequence.
    fn write(&mut self, sequence: usize, tokens: std::ops::Range<usize>) {
        let (block_size, width) = (self.layout.block_size, self.layout.token_len());
        let slot =
            |i: usize| self.tables[sequence][i / block_size] * block_size as u32 + (i % block_size) as u32;
        let slots: Vec<u32> = tokens.clone().map(slot).collect();
        let (k, v) = (&self.k[sequence][tokens.start * width..], &self.v[sequence][tokens.start * width..]);
        let rows = KvRows { k, v, row_stride: width, slot_mapping: &slots };
        write_kv(&ThreadPool::new(2), &self.layout, &rows, &mut self.storage);
    }

    fn width(&self) -> usize {
        self.num_heads * self.layout.head_dim
    }

    /// Of a row of the output.
    fn out_width(&self) -> usize {
        self.num_heads * self.layout.value_dim()
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
            storage: &self.storage,
            layout: self.layout,
            num_heads: self.num_heads,
            scale: 0.3,
            window: self.options.window,
            first_key: self.options.first_key,
            soft_cap: self.options.soft_cap,
            sinks: self.options.sinks.as_deref(),
            block_tables: &tables,
            block_table_offsets: &offsets,
            cu_seqlens_q: &cu_seqlens_q,
            context_lens: &lens,
        };
        let width = self.out_width();
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
            let score = |j| {
                let score = (0..dim).map(|d| f64::from(q[d]) * at(&self.k[s], j, d)).sum::<f64>() * 0.3;
                self.options.soft_cap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh())
            };
            let first = self.options.window.map_or(0, |window| (position + 1).saturating_sub(window));
            let first = first.max(self.options.first_key).min(position);
            let scores: Vec<f64> = (first..=position).map(score).collect();
            let sink = self.options.sinks.as_ref().map(|sinks| f64::from(sinks[head]));
            let max = scores.iter().copied().chain(sink).fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().copied().chain(sink).map(|x| (x - max).exp()).sum();
            let weight = |j: usize| (scores[j - first] - max).exp();
            let weighted =
                |d| (first..=position).map(|j| weight(j) * at(&self.v[s], j, d)).sum::<f64>() / sum;
            out.extend((0..self.layout.value_dim()).map(weighted));
        }
        out
    }
}

/// block_size, num_heads, num_kv_heads, head_dim, values
type Shape = (usize, usize, usize, usize, Values);

const SHAPES: [Shape; 8] = [
    (16, 4, 2, 64, Values::Own),
    (16, 2, 1, 64, Values::Own),
    (32, 3, 3, 20, Values::Own),
    (4, 4, 1, 8, Values::Own),
    (5, 6, 2, 33, Values::Own),
    (16, 7, 1, 128, Values::Own),
    (16, 9, 1, 72, Values::OfKeys(64)),
    (5, 4, 2, 41, Values::OfKeys(33)),
];

fn scalar() -> ThreadPool {
    ThreadPool::with_isa(1, Isa::Scalar).unwrap()
}

fn world(noise: &mut Noise, shape: Shape, lens: &[usize]) -> World {
    let (block_size, num_heads, num_kv_heads, head_dim, values) = shape;
    let layout = KvLayout { block_size, num_kv_heads, head_dim, values, kv_type: KvType::F32 };
    World::new(noise, layout, num_heads, lens)
}

/// The same keys and values stored as every type.
fn worlds(noise: &mut Noise, shape: Shape, lens: &[usize]) -> [World; 3] {
    let seed = noise.next();
    KvType::ALL.map(|kv_type| {
        let (block_size, num_heads, num_kv_heads, head_dim, values) = shape;
        let layout = KvLayout { block_size, num_kv_heads, head_dim, values, kv_type };
        World::new(&mut Noise::new(seed), layout, num_heads, lens)
    })
}

#[test]
fn the_specification_is_close_to_the_definition() {
    let mut noise = Noise::new(11);
    for shape in SHAPES {
        for mut world in worlds(&mut noise, shape, &[2 * CHUNK + 3]) {
            // Keys and values are below 3 in magnitude. f32: rounding of the sums. f16: values are off by
            // up to 3 * 2^-12, scores by some times that. Q8: values by 3 / 254, scores by some times that.
            let tolerance = match world.layout.kv_type {
                KvType::F32 => 3e-5,
                KvType::F16 => 1e-2,
                KvType::Q8 => 0.3,
            };
            for options in Options::all(world.num_heads) {
                world.options = options;
                for position in [0, 1, 15, 16, CHUNK - 1, CHUNK, 2 * CHUNK, 2 * CHUNK + 2] {
                    let got = &world.run(&scalar(), &[(0, position..position + 1)])[0];
                    for (got, exact) in got.iter().zip(world.naive(0, position)) {
                        let what =
                            format!("{:?} {:?} {position}: {got} {exact}", world.layout, world.options);
                        assert!((f64::from(*got) - exact).abs() < tolerance, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn every_instruction_set_and_thread_count_gives_the_same_bits() {
    let mut noise = Noise::new(12);
    for shape in SHAPES {
        for mut world in worlds(&mut noise, shape, &[1, 17, CHUNK, 2 * CHUNK + 37]) {
            let batch = [(0, 0..1), (1, 3..17), (2, CHUNK - 1..CHUNK), (3, 2 * CHUNK - 5..2 * CHUNK + 37)];
            for options in Options::some(world.num_heads) {
                world.options = options;
                let expected = world.run(&scalar(), &batch);
                for pool in pools() {
                    for (got, expected) in world.run(&pool, &batch).iter().zip(&expected) {
                        assert_same_bits(
                            got,
                            expected,
                            &format!("{pool:?} {:?} {:?}", world.layout, world.options),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn what_lies_before_the_window_is_not_used() {
    let mut noise = Noise::new(17);
    let len = 3 * CHUNK + 21;
    let mut world = world(&mut noise, SHAPES[0], &[len]);
    world.options.window = Some(CHUNK + 3);
    let tokens = len - 4..len;
    let expected = world.run(&scalar(), &[(0, tokens.clone())]);
    let first_seen = tokens.start + 1 - (CHUNK + 3);
    let block_bytes = world.layout.block_bytes();
    for &block in &world.tables[0][..first_seen / world.layout.block_size] {
        world.storage[block as usize * block_bytes..][..block_bytes].fill(0xff);
    }
    for pool in pools() {
        let got = &world.run(&pool, &[(0, tokens.clone())])[0];
        assert_same_bits(got, &expected[0], &format!("{pool:?}"));
    }
}

#[test]
fn a_token_alone_in_any_piece_of_its_prompt_or_in_company_is_the_same() {
    let mut noise = Noise::new(13);
    let lens = [CHUNK + 20, 40];
    for shape in [SHAPES[0], SHAPES[4], SHAPES[5], SHAPES[6]] {
        let world = world(&mut noise, shape, &lens);
        // The specification has no grouping that could differ.
        for pool in pools().into_iter().filter(|pool| pool.isa() != Isa::Scalar) {
            let whole = &world.run(&pool, &[(0, 0..lens[0])])[0];
            for pieces in [1, 2, 5, 9, 64] {
                for begin in (0..lens[0]).step_by(pieces) {
                    let end = lens[0].min(begin + pieces);
                    let out = world.run(&pool, &[(1, 10..40), (0, begin..end)]);
                    let expected = &whole[begin * world.out_width()..end * world.out_width()];
                    assert_same_bits(&out[1], expected, &format!("{pool:?} {shape:?} {begin}..{end}"));
                }
            }
        }
    }
}

#[test]
fn a_long_context_split_over_threads_is_the_one_taken_whole() {
    let mut noise = Noise::new(16);
    for shape in [SHAPES[1], SHAPES[5], SHAPES[6]] {
        let len = 9 * CHUNK + 50;
        let mut world = world(&mut noise, shape, &[len, 3]);
        for options in Options::all(world.num_heads) {
            world.options = options;
            for tokens in [len - 1..len, len - 5..len, 9 * CHUNK - 3..9 * CHUNK + 2] {
                let expected = world.run(&scalar(), &[(0, tokens.clone())]);
                for pool in pools() {
                    let what = format!("{pool:?} {shape:?} {:?} {tokens:?}", world.options);
                    assert_same_bits(&world.run(&pool, &[(0, tokens.clone())])[0], &expected[0], &what);
                    let company = world.run(&pool, &[(1, 0..3), (0, tokens.clone())]);
                    assert_same_bits(&company[1], &expected[0], &what);
                }
            }
        }
    }
}

#[test]
fn a_nan_key_spoils_the_rows_that_see_it_and_no_others() {
    let mut noise = Noise::new(14);
    for mut world in worlds(&mut noise, SHAPES[0], &[60]) {
        let bad = 33;
        world.k[0][bad * world.layout.token_len()] = f32::NAN;
        world.write(0, bad..bad + 1);
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
        storage: &world.storage,
        layout: world.layout,
        num_heads: world.num_heads,
        scale: 1.0,
        window: None,
        first_key: 0,
        soft_cap: None,
        sinks: None,
        block_tables: &world.tables[0],
        block_table_offsets: &[0, 1],
        cu_seqlens_q: &[0, 1],
        context_lens: &[17],
    };
    paged_attention(&scalar(), &args, &mut vec![0.0; world.width()]);
}
