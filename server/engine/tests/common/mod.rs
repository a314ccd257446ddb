//! A model for tests, a collector for events, and a driver for the synchronous engine.
#![allow(dead_code, unused_imports)] // Each test file uses its own part.

mod grammar;
mod head;
mod model;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use tandem_engine::{
    CacheSalt, DraftHead, DraftTokens, Engine, EngineConfig, EngineError, Event, Finished, Lane, Models,
    OutputToken, Priority, SamplingParams, SequenceId, SpeculationParams, SubmitRequest, TokenId,
    TokenLogprobs,
};

pub(crate) use grammar::Grammar;
pub(crate) use head::{HeadRecipe, HeadedModel, Watch};
pub(crate) use model::{
    Fault, FaultKind, HIDDEN_SIZE, HashModel, NUM_LAYERS, Recipe, STOP, VOCAB_SIZE, hidden_state,
    mean_hidden_state,
};

/// Everything a client saw of one sequence.
#[derive(Debug, Default, PartialEq, Clone)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) drafted: usize,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) margins: Vec<f32>,
    pub(crate) prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    pub(crate) embedding: Option<Vec<f32>>,
    pub(crate) finished: Option<Finished>,
    pub(crate) failed: Option<EngineError>,
}

/// What must be equal whatever the batch, chunking and speculation.
pub(crate) type Invariant =
    (Vec<TokenId>, Vec<TokenLogprobs>, Option<Vec<Option<TokenLogprobs>>>, Option<String>);

impl Answer {
    pub(crate) fn take(&mut self, event: Event) {
        assert!(self.finished.is_none() && self.failed.is_none(), "an event after the last one");
        match event {
            Event::PromptLogprobs(logprobs) => {
                assert!(self.tokens.is_empty() && self.prompt_logprobs.is_none());
                self.prompt_logprobs = Some(logprobs);
            }
            Event::Tokens(chunk) => {
                assert!(!chunk.tokens.is_empty());
                self.drafted += chunk.tokens.iter().filter(|t: &&OutputToken| t.drafted).count();
                self.tokens.extend(chunk.tokens.iter().map(|t| t.id));
                self.logprobs.extend(chunk.logprobs);
                self.margins.extend(chunk.margins);
            }
            Event::Embedding(embedding) => {
                assert!(self.tokens.is_empty() && self.embedding.is_none());
                self.embedding = Some(embedding);
            }
            Event::Finished(finished) => self.finished = Some(finished),
            Event::Failed(error) => self.failed = Some(error),
        }
    }

    pub(crate) fn invariant(&self) -> Invariant {
        (
            self.tokens.clone(),
            self.logprobs.clone(),
            self.prompt_logprobs.clone(),
            self.finished.map(|f| format!("{:?}", f.reason)),
        )
    }
}

pub(crate) fn config(draft_tokens: DraftTokens) -> EngineConfig {
    EngineConfig {
        block_size: 4,
        num_blocks: 512,
        max_num_seqs: 64,
        max_num_batched_tokens: 2048,
        max_waiting: 1024,
        max_model_len: 1024,
        num_token_ids: VOCAB_SIZE,
        vocab_map: None,
        draft_tokens,
        draft_head: DraftHead::Auto,
        prefix_cache: true,
        hash_key: [1, 2],
        hash_bits: 64,
        lane_isolation: true,
    }
}

pub(crate) fn hash_pair(draft_stray: f32) -> Models {
    Models { target: HashModel::boxed(0.0), draft: HashModel::boxed(draft_stray) }
}

pub(crate) fn request(
    id: u64,
    lane: Lane,
    prompt: &[TokenId],
    params: SamplingParams,
    capacity: usize,
) -> (SubmitRequest, Receiver<Event>) {
    let (sender, receiver) = sync_channel(capacity);
    let events = Box::new(sender);
    let prompt: Arc<[TokenId]> = prompt.into();
    let request = SubmitRequest {
        id: SequenceId(id),
        lane,
        prompt,
        params,
        priority: Priority::default(),
        cache_salt: CacheSalt::default(),
        max_predict_time: None,
        speculation: SpeculationParams::default(),
        constraint: None,
        events,
    };
    (request, receiver)
}

/// A clock that ticks a microsecond a reading.
pub(crate) fn clock() -> impl Fn() -> Duration {
    let ticks = Cell::new(0);
    move || {
        ticks.set(ticks.get() + 1);
        Duration::from_micros(ticks.get())
    }
}

/// One request of a test, and when it comes.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) lane: Lane,
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) params: SamplingParams,
    pub(crate) priority: Priority,
    pub(crate) salt: CacheSalt,
    pub(crate) speculation: SpeculationParams,
    pub(crate) grammar: Option<Grammar>,
    /// Steps before it is submitted.
    pub(crate) arrives: usize,
}

impl Ask {
    pub(crate) fn new(lane: Lane, prompt: &[TokenId], params: &SamplingParams) -> Self {
        Ask {
            lane,
            prompt: prompt.into(),
            params: params.clone(),
            priority: Priority::default(),
            salt: CacheSalt::default(),
            speculation: SpeculationParams::default(),
            grammar: None,
            arrives: 0,
        }
    }
}

/// A synchronous engine under a clock that ticks a microsecond a reading.
pub(crate) struct Server {
    pub(crate) engine: Engine,
    clock: Box<dyn Fn() -> Duration>,
    next_id: u64,
}

impl Server {
    pub(crate) fn new(config: &EngineConfig, models: Models) -> Self {
        let engine = Engine::new(config, models).expect("the engine starts");
        Server { engine, clock: Box::new(clock()), next_id: 0 }
    }

    /// Serves all requests and returns their answers.
    pub(crate) fn serve(&mut self, asks: &[Ask]) -> Vec<Answer> {
        let mut receivers: Vec<Option<Receiver<Event>>> = asks.iter().map(|_| None).collect();
        let mut answers = vec![Answer::default(); asks.len()];
        for step in 0..100_000 {
            for (ask, receiver) in asks.iter().zip(&mut receivers).filter(|(ask, _)| ask.arrives == step) {
                *receiver = Some(self.submit(ask));
            }
            self.engine.step(&self.clock).expect("the account is whole");
            self.engine.check_integrity().expect("the account is whole");
            for (answer, receiver) in answers.iter_mut().zip(receivers.iter().flatten()) {
                receiver.try_iter().for_each(|event| answer.take(event));
            }
            let all_came = receivers.iter().all(Option::is_some);
            if all_came && self.engine.is_idle() && self.engine.is_delivered() {
                let stats = self.engine.stats();
                let unused = stats.num_free_blocks + stats.num_cached_blocks;
                assert_eq!(unused, stats.num_total_blocks, "blocks leaked");
                return answers;
            }
        }
        panic!("the engine did not finish");
    }

    fn submit(&mut self, ask: &Ask) -> Receiver<Event> {
        let (request, receiver) = request(self.next_id, ask.lane, &ask.prompt, ask.params.clone(), 4);
        self.next_id += 1;
        let request = SubmitRequest {
            priority: ask.priority,
            cache_salt: ask.salt,
            speculation: ask.speculation.clone(),
            constraint: ask.grammar.as_ref().map(Grammar::start),
            ..request
        };
        self.engine.submit(request, (self.clock)());
        receiver
    }
}

/// Runs all requests together on one synchronous engine and returns their answers.
pub(crate) fn run(
    config: &EngineConfig,
    models: Models,
    requests: &[(Lane, Vec<TokenId>, SamplingParams)],
) -> Vec<Answer> {
    let asks: Vec<Ask> =
        requests.iter().map(|(lane, prompt, params)| Ask::new(*lane, prompt, params)).collect();
    Server::new(config, models).serve(&asks)
}
