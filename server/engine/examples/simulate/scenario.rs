//! What a seed stands for: an engine's configuration, a pair of models, and the clients that will come.

use std::sync::Arc;

use tandem_engine::{DraftHead, DraftTokens, EngineConfig};
use tandem_models::VocabMap;

use super::oracle::Oracle;
use super::pair::PairSpec;
use super::rng::Rng;
use super::workload::{Plan, Workload};
use crate::common::VOCAB_SIZE;

/// Everything that is decided before the first step.
pub(crate) struct Scenario {
    pub(crate) config: EngineConfig,
    /// Measure step costs at start, as a server does.
    pub(crate) profile: bool,
    /// Have the engine tell of its cache.
    pub(crate) is_mirrored: bool,
    pub(crate) pair: PairSpec,
    /// In the order of their arrival.
    pub(crate) plans: Vec<Plan>,
    /// Come one by one when all others are gone, with texts that the cache may have.
    pub(crate) probes: Vec<Plan>,
    /// Comes last and needs every block there is.
    pub(crate) last: Option<Plan>,
}

/// How large a scenario is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) max_prompt: usize,
    pub(crate) max_output: usize,
    pub(crate) num_clients: usize,
    pub(crate) block_size: usize,
}

/// The longest sequence that is given every block, so that no scenario takes long.
const LONGEST_LAST: usize = 400;

impl Scenario {
    /// The scenario of `rng`'s seed. The oracle answers along the way, because clients go on from answers.
    pub(crate) fn generate(rng: &Rng, oracle: impl FnOnce(PairSpec) -> Oracle) -> (Self, Oracle) {
        let shape = Shape {
            max_prompt: rng.pick(&[3, 20, 60, 60, 120, 240]),
            max_output: rng.pick(&[2, 12, 24, 40]),
            num_clients: match rng.range(0, 19) {
                0 => rng.range(40, 90),
                1..=5 => rng.range(10, 25),
                _ => rng.range(1, 9),
            },
            block_size: rng.range(1, 19),
        };
        let pair = PairSpec::random(rng);
        let config = engine_config(rng, shape, pair);
        let is_mirrored = rng.one_in(4);
        let mut oracle = oracle(pair);
        let mut workload = Workload::new(rng, shape, &config, (pair, is_mirrored));
        let plans = (0..shape.num_clients).map(|_| workload.next_plan(rng, &mut oracle)).collect();
        let num_probes = if is_mirrored { rng.range(1, 3) } else { 0 };
        let probes = (0..num_probes).map(|_| workload.probe(rng, &mut oracle)).collect();
        let capacity = (config.num_blocks * config.block_size).min(config.max_model_len);
        let last = (capacity <= LONGEST_LAST && capacity > 1).then(|| workload.last_plan(rng, capacity));
        (Scenario { profile: rng.one_in(2), is_mirrored, config, pair, plans, probes, last }, oracle)
    }
}

fn engine_config(rng: &Rng, shape: Shape, pair: PairSpec) -> EngineConfig {
    let longest = shape.max_prompt + shape.max_output;
    let enough = longest.div_ceil(shape.block_size);
    let num_blocks = match rng.range(0, 5) {
        0 | 1 => enough,
        2 => enough + rng.range(1, 3),
        3 => 2 * enough,
        4 => 4 * enough,
        _ => 40 * enough,
    };
    EngineConfig {
        block_size: shape.block_size,
        num_blocks,
        max_num_seqs: rng.pick(&[1, 2, 3, 5, 8, 64]),
        max_num_batched_tokens: rng.pick(&[1, 16, 40, 100, 1_000]),
        max_waiting: 1_000,
        max_model_len: if rng.one_in(2) { longest } else { num_blocks * shape.block_size },
        num_token_ids: VOCAB_SIZE,
        // Two vocabularies are those of two models.
        vocab_map: (pair.target.is_some() && pair.draft.is_some() && rng.one_in(4))
            .then(|| Arc::new(vocab_map(rng))),
        draft_tokens: if rng.one_in(3) {
            DraftTokens::Fixed(rng.pick(&[0, rng.range(1, 8), rng.range(9, 40)]) as u8)
        } else {
            DraftTokens::Auto
        },
        draft_head: match rng.range(0, 2) {
            0 => DraftHead::First(rng.range(1, VOCAB_SIZE)),
            1 => DraftHead::Whole,
            _ => DraftHead::Auto,
        },
        prefix_cache: !rng.one_in(4),
        hash_key: [rng.next(), rng.next()],
        hash_bits: rng.pick(&[1, 8, 8, 64]),
        lane_isolation: rng.one_in(2),
    }
}

/// A draft that has the target's tokens under other ids, and lacks some of them.
fn vocab_map(rng: &Rng) -> VocabMap {
    let shift = rng.range(0, VOCAB_SIZE - 1);
    let lacking = rng.range(1, 20);
    let to_draft: Vec<u32> = (0..VOCAB_SIZE).map(|id| ((id * 5 + shift) % VOCAB_SIZE) as u32).collect();
    let mut to_target = vec![None; VOCAB_SIZE];
    for (id, &draft) in to_draft.iter().enumerate() {
        to_target[draft as usize] = (id % lacking != 0).then_some(id as u32);
    }
    VocabMap::from_parts(to_draft, to_target)
}
