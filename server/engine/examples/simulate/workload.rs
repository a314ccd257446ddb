//! Who comes, with what, and how they behave: prompts that share much with each other, every
//! parameter, and clients that read slowly, go away, change their minds or ask for more.

use std::sync::Arc;
use std::time::Duration;

use tandem_engine::{
    CacheSalt, DraftSource, DraftSources, DraftTokens, EngineConfig, Lane, Priority, SamplingParams,
    SpeculationParams, TokenId,
};

use super::oracle::Oracle;
use super::pair::PairSpec;
use super::rng::Rng;
use super::scenario::Shape;
use crate::common::{Fault, Grammar, STOP, VOCAB_SIZE};

/// A channel that is never full, if it is read after every step.
pub(crate) const AMPLE_CAPACITY: usize = 256;

/// One client: its request and its behaviour.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Steps after the client before it.
    pub(crate) arrives_after: usize,
    pub(crate) lane: Lane,
    /// Its prompt is a text to embed, and most of the rest means nothing.
    pub(crate) is_embedding: bool,
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) params: SamplingParams,
    pub(crate) priority: Priority,
    pub(crate) salt: CacheSalt,
    pub(crate) max_predict_time: Option<Duration>,
    pub(crate) speculation: SpeculationParams,
    /// The form of its answer.
    pub(crate) grammar: Option<Grammar>,
    /// Events that fit its channel.
    pub(crate) capacity: usize,
    /// It reads after one step in so many.
    pub(crate) reads_one_in: usize,
    /// What it does, that many steps after its arrival.
    pub(crate) deed: Option<(usize, Deed)>,
}

impl Plan {
    /// Of a client that does nothing out of the way.
    fn plain(lane: Lane, prompt: Arc<[TokenId]>, params: SamplingParams) -> Self {
        Plan {
            arrives_after: 0,
            lane,
            is_embedding: false,
            prompt,
            params,
            priority: Priority::Interactive,
            salt: CacheSalt(1),
            max_predict_time: None,
            speculation: SpeculationParams::default(),
            grammar: None,
            capacity: AMPLE_CAPACITY,
            reads_one_in: 1,
            deed: None,
        }
    }

    /// The same client with its prompt as a text to embed.
    fn embedding(self) -> Self {
        let params = SamplingParams { max_tokens: 0, ..SamplingParams::default() };
        let Plan { arrives_after, priority, capacity, reads_one_in, deed, .. } = self;
        let plain = Plan::plain(self.lane, self.prompt, params);
        Plan { is_embedding: true, arrives_after, priority, capacity, reads_one_in, deed, ..plain }
    }
}

/// What a client may do while it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    Abort,
    Close,
    /// Raises `max_tokens` to this.
    Extend(u32),
}

/// Makes plans, each in view of those before it.
pub(crate) struct Workload {
    shape: Shape,
    capacity: usize,
    /// Prompts are made of ids below this.
    alphabet: usize,
    num_tenants: usize,
    /// Percentages of this scenario.
    fast: usize,
    batch: usize,
    burst: usize,
    misbehaving: usize,
    greedy: usize,
    embedding: usize,
    fault: Option<Fault>,
    plain: bool,
    /// There is one lane.
    is_alone: bool,
    earlier: Vec<Plan>,
    /// So many more ask what the last one did.
    num_twins: usize,
}

impl Workload {
    /// With a mirror of the cache there is one tenant alone, since events do not say whose blocks they are.
    pub(crate) fn new(
        rng: &Rng,
        shape: Shape,
        config: &EngineConfig,
        (pair, is_mirrored): (PairSpec, bool),
    ) -> Self {
        Workload {
            shape,
            capacity: (config.num_blocks * config.block_size).min(config.max_model_len),
            alphabet: rng.pick(&[2, 5, VOCAB_SIZE]),
            num_tenants: if is_mirrored { 1 } else { rng.range(1, 3) },
            fast: match (pair.target, pair.draft) {
                (Some(_), None) => 0,
                (None, _) => 100,
                _ => rng.pick(&[0, 30, 50, 100]),
            },
            batch: rng.pick(&[0, 30, 70]),
            burst: rng.pick(&[20, 70, 95]),
            misbehaving: rng.pick(&[0, 20, 60]),
            greedy: rng.pick(&[20, 80, 100]),
            embedding: rng.pick(&[0, 0, 10, 40]),
            fault: pair.fault(),
            plain: config.draft_tokens == DraftTokens::Fixed(0) && rng.one_in(2),
            is_alone: pair.target.is_none() || pair.draft.is_none(),
            earlier: Vec::new(),
            num_twins: 0,
        }
    }

    pub(crate) fn next_plan(&mut self, rng: &Rng, oracle: &mut Oracle) -> Plan {
        if let Some(twin) = self.next_twin(rng) {
            self.earlier.push(twin.clone());
            return twin;
        }
        let lane = self.lane(rng);
        let mut params = self.params(rng);
        let mut prompt = self.prompt(rng, oracle);
        let mut grammar = self.grammar(rng);
        let mut arrives_after = if rng.percent(self.burst) { 0 } else { rng.range(1, 12) };
        if let Some(twin) = self.earlier.last().filter(|_| rng.one_in(8)) {
            (prompt, params, grammar) = (twin.prompt.to_vec(), twin.params.clone(), twin.grammar.clone());
            if rng.one_in(2) {
                // The next of `n` answers to one request.
                params.seed = params.seed.wrapping_add(1);
                arrives_after = 0;
            }
        }
        prompt.truncate(self.shape.max_prompt.min(self.capacity - params.max_tokens as usize));
        let meets_fault = self.fault.is_some() && rng.percent(20);
        if let Some(fault) = self.fault.filter(|_| !meets_fault) {
            avoid(fault, &mut prompt, &mut params);
        }
        let prompt: Arc<[TokenId]> = prompt.into();
        let mut prediction = self.prediction(rng, oracle, lane, &prompt, (&params, grammar.as_ref()));
        if let Some(fault) = self.fault.filter(|_| !meets_fault) {
            prediction.retain(|&id| id != fault.token);
        }
        let slow = rng.percent(self.misbehaving / 2);
        let plan = Plan {
            arrives_after,
            deed: self.deed(rng, prompt.len(), &params),
            priority: if rng.percent(self.batch) { Priority::Batch } else { Priority::Interactive },
            salt: CacheSalt(rng.range(1, self.num_tenants) as u128),
            max_predict_time: rng
                .one_in(8)
                .then(|| Duration::from_micros(rng.pick(&[0, 100, 20_000, 1_000_000]))),
            speculation: self.speculation(rng, prediction),
            grammar,
            capacity: if slow { rng.range(1, 3) } else { AMPLE_CAPACITY },
            reads_one_in: if slow { rng.range(1, 40) } else { 1 },
            ..Plan::plain(lane, prompt, params)
        };
        let plan = if rng.percent(self.embedding) { plan.embedding() } else { plan };
        self.earlier.push(plan.clone());
        plan
    }

    /// The next of a crowd with one prompt, or one beginning, that all come at about the same time.
    fn next_twin(&mut self, rng: &Rng) -> Option<Plan> {
        let first = self.earlier.last()?;
        if self.num_twins == 0 {
            self.num_twins = if rng.one_in(12) { rng.range(1, 8) } else { return None };
        }
        self.num_twins -= 1;
        let mut twin = first.clone();
        twin.arrives_after = rng.pick(&[0, 0, 0, rng.range(0, 4)]);
        twin.params.seed = rng.next();
        if rng.one_in(2) {
            twin.params.temperature = 0.8;
        }
        if rng.percent(self.batch / 2) {
            twin.priority = Priority::Batch;
        }
        if rng.one_in(3) {
            // The same beginning; or the same prompt, though not one and the same.
            let kept = rng.range(0, first.prompt.len());
            let mut prompt = first.prompt[..kept].to_vec();
            prompt.extend(self.fresh(rng, first.prompt.len() - kept));
            if let Some(fault) = self.fault {
                avoid(fault, &mut prompt, &mut twin.params);
            }
            twin.prompt = prompt.into();
        }
        twin.deed = self.deed(rng, twin.prompt.len(), &twin.params);
        Some(twin)
    }

    fn lane(&self, rng: &Rng) -> Lane {
        if rng.percent(self.fast) { Lane::Fast } else { Lane::Deep }
    }

    fn speculation(&self, rng: &Rng, prediction: Vec<TokenId>) -> SpeculationParams {
        SpeculationParams {
            max_draft_tokens: match rng.range(0, 2) {
                _ if self.plain => Some(0),
                0 => Some(rng.pick(&[rng.range(0, 8), rng.range(9, 40), 255]) as u8),
                _ => None,
            },
            sources: DraftSource::ALL
                .into_iter()
                .filter(|_| !rng.one_in(4))
                .fold(DraftSources::NONE, DraftSources::with),
            prediction: prediction.into(),
        }
    }

    /// A client whose text is, up to a place, that of one before, with its answer. Only the model whose blocks are
    /// told of is asked: the target, where there is one.
    pub(crate) fn probe(&self, rng: &Rng, oracle: &mut Oracle) -> Plan {
        let before = &self.earlier[rng.range(0, self.earlier.len() - 1)];
        let mut prompt = before.prompt.to_vec();
        if !before.is_embedding {
            let answer = oracle.answer(before.lane, &before.prompt, &before.params, before.grammar.as_ref());
            prompt.extend(&answer.tokens);
        }
        prompt.truncate(rng.range(1, prompt.len()).max(rng.range(1, prompt.len())).min(self.capacity - 1));
        let mut params = SamplingParams { max_tokens: 1, ..SamplingParams::default() };
        if let Some(fault) = self.fault {
            avoid(fault, &mut prompt, &mut params);
        }
        let lane = if self.fast == 100 && self.is_alone { Lane::Fast } else { Lane::Deep };
        Plan::plain(lane, prompt.into(), params)
    }

    /// A client whose prompt and answer, or text to embed or to score, fill `capacity` tokens.
    pub(crate) fn last_plan(&self, rng: &Rng, capacity: usize) -> Plan {
        let max_tokens = match rng.range(0, 5) {
            0 | 1 => 0,
            _ => rng.range(1, self.shape.max_output.min(capacity - 1)),
        };
        let mut prompt = self.fresh(rng, capacity - max_tokens);
        let prompt_logprobs = (max_tokens == 0).then_some(1);
        let max_tokens = max_tokens as u32;
        let mut params = SamplingParams { max_tokens, prompt_logprobs, ..SamplingParams::default() };
        if let Some(fault) = self.fault {
            avoid(fault, &mut prompt, &mut params);
        }
        let plan = Plan { priority: Priority::Batch, ..Plan::plain(self.lane(rng), prompt.into(), params) };
        if max_tokens == 0 && rng.one_in(2) { plan.embedding() } else { plan }
    }

    fn params(&self, rng: &Rng) -> SamplingParams {
        let penalty = rng.pick(&[0.0, 0.0, 0.0, 0.5]);
        let logprobs = rng.pick(&[None, Some(0), Some(3)]);
        let scores_only = rng.one_in(16);
        SamplingParams {
            temperature: if rng.percent(self.greedy) { 0.0 } else { rng.pick(&[0.3, 0.8, 1.5]) },
            top_k: if rng.one_in(3) { rng.range(1, 10) as u32 } else { 0 },
            top_p: rng.pick(&[1.0, 1.0, 0.9, 0.4]),
            min_p: rng.pick(&[0.0, 0.0, 0.1]),
            repetition_penalty: rng.pick(&[1.0, 1.0, 1.0, 1.2]),
            presence_penalty: penalty,
            frequency_penalty: penalty / 2.0,
            logit_bias: if rng.one_in(6) { vec![(3, 1.5), (9, -50.0)] } else { Vec::new() },
            seed: rng.pick(&[0, 1, 2, 3, u64::MAX]),
            logprobs,
            prompt_logprobs: if scores_only || rng.one_in(8) { Some(logprobs.unwrap_or(1)) } else { None },
            num_margins: 2,
            stop_token_ids: if rng.one_in(3) { vec![STOP, 11] } else { Vec::new() },
            min_tokens: if rng.one_in(3) { rng.range(0, 6) as u32 } else { 0 },
            max_tokens: if scores_only { 0 } else { rng.range(1, self.shape.max_output) as u32 },
        }
    }

    fn deed(&self, rng: &Rng, num_prompt_tokens: usize, params: &SamplingParams) -> Option<(usize, Deed)> {
        let when = rng.pick(&[0, 1, 2, rng.range(3, 12), rng.range(3, 60)]);
        if !rng.percent(self.misbehaving) {
            return None;
        }
        let room = self.capacity - num_prompt_tokens;
        let deed = match rng.range(0, 2) {
            0 => Deed::Abort,
            1 => Deed::Close,
            _ if params.max_tokens == 0 => return None,
            // Sometimes more than there is room for.
            _ => Deed::Extend(rng.range(1, (2 * self.shape.max_output).min(room + 4)) as u32),
        };
        Some((when, deed))
    }

    /// None that could lead to a fault's token, which bias cannot avoid where there is no alternative.
    fn grammar(&self, rng: &Rng) -> Option<Grammar> {
        let wanted = self.fault.is_none() && rng.one_in(4);
        wanted.then(|| Grammar { forgets: rng.one_in(4), ..Grammar::new(rng.range(0, 30) as u64) })
    }

    fn fresh(&self, rng: &Rng, length: usize) -> Vec<TokenId> {
        (0..length).map(|_| rng.range(0, self.alphabet - 1) as TokenId).collect()
    }

    fn prompt(&self, rng: &Rng, oracle: &mut Oracle) -> Vec<TokenId> {
        let length = rng.range(1, self.shape.max_prompt);
        if self.earlier.is_empty() || rng.one_in(3) {
            return self.fresh(rng, length);
        }
        let before = &self.earlier[rng.range(0, self.earlier.len() - 1)];
        let mut prompt = before.prompt.to_vec();
        match rng.range(0, 7) {
            // The very same.
            0 => {}
            // The same beginning.
            1 | 2 => {
                prompt.truncate(rng.range(1, prompt.len()));
                let rest = rng.range(0, self.shape.max_prompt.saturating_sub(prompt.len()));
                prompt.extend(self.fresh(rng, rest));
            }
            // The next turn, or the next keystroke.
            kind @ 3..=5 => {
                let answer =
                    oracle.answer(before.lane, &before.prompt, &before.params, before.grammar.as_ref());
                let kept = if kind == 3 { answer.tokens.len() } else { rng.range(0, answer.tokens.len()) };
                prompt.extend(&answer.tokens[..kept]);
                let turn = if kind == 5 { 0 } else { rng.range(0, 6) };
                prompt.extend(self.fresh(rng, turn));
            }
            // Blocks that are equal behind a beginning that is not.
            6 => {
                let edited = rng.range(0, prompt.len() - 1);
                prompt[edited] = (prompt[edited] + 1) % self.alphabet as TokenId;
            }
            // Blocks that are equal at other places.
            _ => drop(prompt.drain(..rng.range(0, prompt.len() - 1).min(self.shape.block_size))),
        }
        prompt
    }

    fn prediction(
        &self,
        rng: &Rng,
        oracle: &mut Oracle,
        lane: Lane,
        prompt: &[TokenId],
        (params, grammar): (&SamplingParams, Option<&Grammar>),
    ) -> Vec<TokenId> {
        if rng.one_in(2) {
            return Vec::new();
        }
        let mut prediction = oracle.answer(lane, prompt, params, grammar).tokens.clone();
        for _ in 0..rng.pick(&[0, 0, 1, 2, 5]) {
            let at = rng.range(0, prediction.len());
            match rng.range(0, 3) {
                0 => prediction.insert(at, rng.range(0, VOCAB_SIZE - 1) as TokenId),
                1 if at < prediction.len() => drop(prediction.remove(at)),
                2 if at < prediction.len() => prediction[at] = rng.range(0, VOCAB_SIZE - 1) as TokenId,
                _ => prediction = self.fresh(rng, rng.range(0, 2 * self.shape.max_output)),
            }
        }
        prediction
    }
}

/// Changes a request so that it never computes the fault's token.
fn avoid(fault: Fault, prompt: &mut [TokenId], params: &mut SamplingParams) {
    for id in prompt.iter_mut().filter(|id| **id == fault.token) {
        *id = 0;
    }
    if !params.logit_bias.contains(&(fault.token, -100.0)) {
        params.logit_bias.push((fault.token, -100.0));
    }
}
