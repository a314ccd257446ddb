//! The right answers: one sequence alone, no speculation, no cache, room for everything, the prompt
//! in one pass. Greedy answers are checked once more against the model's formula, without any engine.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use tandem_engine::{
    DraftHead, DraftTokens, EmbedRequest, Ending, Engine, EngineConfig, EngineError, Event, FinishReason,
    Lane, Models, SamplingParams, SubmitRequest, TokenId,
};

use super::pair::PairSpec;
use crate::common::{Answer, Grammar, Recipe, STOP, VOCAB_SIZE, clock, mean_hidden_state, request};

/// Answers and remembers.
pub(crate) struct Oracle {
    pair: PairSpec,
    known: HashMap<(Lane, Vec<TokenId>, String), Rc<Answer>>,
    embeddings: HashMap<(Lane, Vec<TokenId>), Rc<Answer>>,
}

/// More than any sequence of any scenario.
const MAX_MODEL_LEN: usize = 2048;

impl Oracle {
    pub(crate) fn new(pair: PairSpec) -> Self {
        Oracle { pair, known: HashMap::new(), embeddings: HashMap::new() }
    }

    /// The whole answer to a prompt.
    pub(crate) fn answer(
        &mut self,
        lane: Lane,
        prompt: &[TokenId],
        params: &SamplingParams,
        grammar: Option<&Grammar>,
    ) -> Rc<Answer> {
        let key = (lane, prompt.to_vec(), format!("{params:?} {grammar:?}"));
        if let Some(known) = self.known.get(&key) {
            return Rc::clone(known);
        }
        let answer = Rc::new(self.run(lane, prompt, params, grammar));
        if let Some(grammar) = grammar {
            check_form(grammar, &answer);
        }
        if params.temperature == 0.0 && grammar.is_none() && self.pair.answering(lane).fault.is_none() {
            check_greedy(&self.pair.answering(lane).recipe, prompt, params, &answer);
        }
        self.known.insert(key, Rc::clone(&answer));
        answer
    }

    /// A text's embedding. It is checked by the model's formula, without any engine.
    ///
    /// # Panics
    /// If the oracle's engine is wrong.
    pub(crate) fn embedding(&mut self, lane: Lane, text: &[TokenId]) -> Rc<Answer> {
        let key = (lane, text.to_vec());
        if let Some(known) = self.embeddings.get(&key) {
            return Rc::clone(known);
        }
        let answer = Rc::new(self.run_alone(lane, text.len(), |engine| {
            let (request, receiver) = request(0, lane, text, SamplingParams::default(), 3);
            let SubmitRequest { id, prompt: tokens, priority, events, .. } = request;
            engine.embed(EmbedRequest { id, lane, tokens, priority, events }, Duration::ZERO);
            receiver
        }));
        if self.pair.answering(lane).fault.is_none() {
            assert_eq!(answer.embedding, Some(mean_hidden_state(text)), "the oracle's embedding");
        }
        self.embeddings.insert(key, Rc::clone(&answer));
        answer
    }

    fn run(
        &self,
        lane: Lane,
        prompt: &[TokenId],
        params: &SamplingParams,
        grammar: Option<&Grammar>,
    ) -> Answer {
        self.run_alone(lane, prompt.len() + params.max_tokens as usize, |engine| {
            let capacity = params.max_tokens as usize + 3;
            let (request, receiver) = request(0, lane, prompt, params.clone(), capacity);
            let constraint = grammar.map(Grammar::start);
            engine.submit(SubmitRequest { constraint, ..request }, Duration::ZERO);
            receiver
        })
    }

    /// What becomes of one sequence, of `num_tokens` at most, on an engine of its own.
    fn run_alone(
        &self,
        lane: Lane,
        num_tokens: usize,
        submit: impl FnOnce(&mut Engine) -> Receiver<Event>,
    ) -> Answer {
        let config = EngineConfig {
            block_size: 32,
            num_blocks: num_tokens.div_ceil(32) + 1,
            max_num_seqs: 1,
            max_num_batched_tokens: MAX_MODEL_LEN,
            max_waiting: 1,
            max_model_len: MAX_MODEL_LEN,
            num_token_ids: VOCAB_SIZE,
            vocab_map: None,
            draft_tokens: DraftTokens::Fixed(0),
            draft_head: DraftHead::Whole,
            prefix_cache: false,
            hash_key: [0; 2],
            hash_bits: 64,
            lane_isolation: false,
        };
        let model = Some(self.pair.answering(lane).build());
        let models = match lane {
            Lane::Fast => Models { target: None, draft: model },
            Lane::Deep => Models { target: model, draft: None },
        };
        let mut engine = Engine::new(&config, models).expect("the oracle's engine starts");
        let receiver = submit(&mut engine);
        let clock = clock();
        let mut answer = Answer::default();
        while answer.finished.is_none() && answer.failed.is_none() {
            engine.step(&clock).expect("the oracle's engine is whole");
            receiver.try_iter().for_each(|event| answer.take(event));
        }
        answer
    }
}

/// Holds an answer to its form, by the automaton alone.
///
/// # Panics
/// If the oracle's engine is wrong.
fn check_form(grammar: &Grammar, answer: &Answer) {
    let ended = match answer.finished.map(|finished| finished.reason) {
        // The other stop token can be text of the form, and then ends the output anywhere.
        Some(FinishReason::Stop(STOP)) => Some(Ending::Allowed),
        Some(FinishReason::Complete) => Some(Ending::Forced),
        _ => None,
    };
    grammar.check(&answer.tokens, ended).unwrap_or_else(|wrong| panic!("the oracle's form: {wrong}"));
}

/// Says what is wrong with a greedy answer, by the model's formula alone. Penalties are left to the
/// engine's own sampler.
///
/// # Panics
/// If the oracle's engine is wrong.
fn check_greedy(recipe: &Recipe, prompt: &[TokenId], params: &SamplingParams, answer: &Answer) {
    let mut context: Vec<TokenId> = prompt.to_vec();
    let mut state = context.iter().fold(0, |state, &token| Recipe::extend(state, token));
    if let Some(scored) = &answer.prompt_logprobs {
        let mut state = 0;
        for (position, &token) in prompt.iter().enumerate() {
            if let Some(entry) = &scored[position] {
                check_logprob(recipe, &prompt[..position], state, token, entry.logprob);
            }
            state = Recipe::extend(state, token);
        }
    }
    if params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        return;
    }
    let best = |context: &[TokenId], state: u64| {
        let mut logits: Vec<f32> = recipe.logits(context, state).collect();
        for &(id, bias) in &params.logit_bias {
            logits[id as usize] += bias;
        }
        if context.len() - prompt.len() < params.min_tokens as usize {
            for &id in &params.stop_token_ids {
                logits[id as usize] = f32::NEG_INFINITY;
            }
        }
        (0..VOCAB_SIZE).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).map(|id| id as TokenId)
    };
    for (i, &token) in answer.tokens.iter().enumerate() {
        assert_eq!(best(&context, state), Some(token), "the oracle's output token {i}");
        if let Some(entry) = answer.logprobs.get(i) {
            check_logprob(recipe, &context, state, token, entry.logprob);
        }
        context.push(token);
        state = Recipe::extend(state, token);
    }
    match answer.finished.expect("without a fault the oracle finishes").reason {
        FinishReason::Stop(id) => assert_eq!(best(&context, state), Some(id), "the oracle's stop token"),
        FinishReason::Length => assert_eq!(answer.tokens.len(), params.max_tokens as usize),
        reason => panic!("the oracle ended with {reason:?}"),
    }
}

fn check_logprob(recipe: &Recipe, context: &[TokenId], state: u64, token: TokenId, got: f32) {
    let logits: Vec<f32> = recipe.logits(context, state).collect();
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    let wanted = f64::from(logits[token as usize] - max) - sum.ln();
    // Sums are added up in another order here; an off-by-one row is wrong by far more.
    assert!((wanted - f64::from(got)).abs() < 1e-4, "the oracle's log-probability: {got}, by hand {wanted}");
}

/// True if the two say the same of a failure, whatever the words.
pub(crate) fn same_failure(a: &EngineError, b: &EngineError) -> bool {
    std::mem::discriminant(a) == std::mem::discriminant(b)
}
