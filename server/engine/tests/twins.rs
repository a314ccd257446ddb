//! Prompts that begin alike are computed once, whoever comes together with them, and nobody's answer shows it.

mod common;

use std::sync::mpsc::Receiver;
use std::time::Duration;

use common::{Answer, Ask, Server, clock, config, hash_pair, request};
use tandem_engine::{
    CacheSalt, DraftTokens, Engine, EngineConfig, Event, Lane, Priority, SamplingParams, SequenceId,
    SubmitRequest, TokenId,
};

/// Twenty-five blocks and a token.
const NUM_PROMPT_TOKENS: usize = 101;

/// Answers to one request.
const NUM_TWINS: u64 = 8;

/// Passes of sixteen tokens, so that a prompt takes some.
fn narrow() -> EngineConfig {
    EngineConfig { max_num_seqs: 8, max_num_batched_tokens: 16, ..config(DraftTokens::Fixed(0)) }
}

fn prompt(first: TokenId) -> Vec<TokenId> {
    (0..NUM_PROMPT_TOKENS as TokenId).map(|i| (first + i * i) % 50).collect()
}

fn sampled(seed: u64) -> SamplingParams {
    SamplingParams { temperature: 0.8, seed, logprobs: Some(2), max_tokens: 8, ..SamplingParams::default() }
}

fn twins(lane: Lane) -> Vec<Ask> {
    let first = Ask::new(lane, &prompt(1), &sampled(0));
    (0..NUM_TWINS).map(|seed| Ask { params: sampled(seed), ..first.clone() }).collect()
}

/// Serves all together, checks each against what it is alone, and returns the answers and the prompt tokens computed.
fn serve(config: &EngineConfig, asks: &[Ask]) -> (Vec<Answer>, u64) {
    let mut server = Server::new(config, hash_pair(1.0));
    let answers = server.serve(asks);
    for (ask, answer) in asks.iter().zip(&answers) {
        assert_eq!(answer.invariant(), alone(ask).invariant());
    }
    (answers, server.engine.stats().num_prompt_tokens)
}

fn alone(ask: &Ask) -> Answer {
    let ask = Ask { arrives: 0, ..ask.clone() };
    Server::new(&config(DraftTokens::Fixed(0)), hash_pair(1.0)).serve(&[ask]).remove(0)
}

fn cached(answers: &[Answer]) -> Vec<u32> {
    answers.iter().map(|answer| answer.finished.expect("finished").usage.num_cached_tokens).collect()
}

#[test]
fn the_answers_to_one_request_compute_its_prompt_once() {
    for lane in [Lane::Fast, Lane::Deep] {
        for width in [16, 2048] {
            let config = EngineConfig { max_num_batched_tokens: width, ..narrow() };
            let (answers, num_computed) = serve(&config, &twins(lane));
            assert_eq!(cached(&answers), [0, 100, 100, 100, 100, 100, 100, 100]);
            assert_eq!(num_computed, NUM_PROMPT_TOKENS as u64 + NUM_TWINS - 1);
        }
    }
}

#[test]
fn what_a_crowd_s_prompts_have_in_common_is_computed_once() {
    let asks: Vec<Ask> = (0..6)
        .map(|i| {
            let mut prompt = prompt(1);
            prompt[60..].iter_mut().for_each(|id| *id = (*id + i) % 50);
            Ask { arrives: i as usize, ..Ask::new(Lane::Deep, &prompt, &sampled(u64::from(i))) }
        })
        .collect();
    let (answers, num_computed) = serve(&narrow(), &asks);
    assert_eq!(cached(&answers), [0, 60, 60, 60, 60, 60]);
    assert_eq!(num_computed, 101 + 5 * 41);
}

#[test]
fn tenants_do_not_wait_for_each_other_s_prompts_and_nobody_does_without_a_cache() {
    let mut asks = twins(Lane::Deep);
    for (tenant, ask) in asks.iter_mut().enumerate() {
        ask.salt = CacheSalt(tenant as u128);
    }
    let all = NUM_TWINS * NUM_PROMPT_TOKENS as u64;
    assert_eq!(serve(&narrow(), &asks).1, all);
    let without = EngineConfig { prefix_cache: false, ..narrow() };
    assert_eq!(serve(&without, &twins(Lane::Deep)).1, all);
}

#[test]
fn who_scores_the_prompt_computes_all_of_it_beside_the_others() {
    let mut asks = twins(Lane::Deep);
    for ask in &mut asks[..3] {
        ask.params.prompt_logprobs = Some(1);
    }
    let (answers, num_computed) = serve(&narrow(), &asks);
    assert_eq!(cached(&answers)[3..], [100; 5]);
    assert_eq!(num_computed, 3 * NUM_PROMPT_TOKENS as u64 + 5);
}

/// Sequences that a test submits one by one.
struct Crowd {
    engine: Engine,
    clock: Box<dyn Fn() -> Duration>,
    clients: Vec<(Ask, Receiver<Event>)>,
}

impl Crowd {
    fn new(config: &EngineConfig) -> Self {
        let engine = Engine::new(config, hash_pair(1.0)).expect("the engine starts");
        Crowd { engine, clock: Box::new(clock()), clients: Vec::new() }
    }

    fn come(&mut self, asks: Vec<Ask>) {
        for ask in asks {
            let id = self.clients.len() as u64;
            let (request, events) = request(id, ask.lane, &ask.prompt, ask.params.clone(), 100);
            let request = SubmitRequest { priority: ask.priority, ..request };
            self.engine.submit(request, (self.clock)());
            self.clients.push((ask, events));
        }
    }

    fn step(&mut self) {
        self.engine.step(&self.clock).expect("the account is whole");
    }

    fn running_and_waiting(&self) -> (u64, u64) {
        let stats = self.engine.stats();
        (stats.num_running, stats.num_waiting)
    }

    /// Goes on to the end, and checks every answer but those of `gone`.
    fn finish(mut self, gone: &[usize]) -> Engine {
        for _ in 0..10_000 {
            if self.engine.is_idle() {
                break;
            }
            self.step();
        }
        assert!(self.engine.is_idle(), "no end in sight");
        for (_, (ask, events)) in self.clients.iter().enumerate().filter(|(i, _)| !gone.contains(i)) {
            let mut answer = Answer::default();
            events.try_iter().for_each(|event| answer.take(event));
            assert_eq!(answer.invariant(), alone(ask).invariant());
        }
        self.engine
    }
}

#[test]
fn when_the_first_goes_away_the_next_goes_on_where_it_was() {
    let mut crowd = Crowd::new(&narrow());
    crowd.come(twins(Lane::Deep));
    while crowd.engine.stats().num_prompt_tokens < 48 {
        crowd.step();
    }
    assert_eq!(crowd.running_and_waiting(), (1, NUM_TWINS - 1));
    crowd.engine.abort(SequenceId(0));
    crowd.step();
    assert_eq!(crowd.running_and_waiting(), (1, NUM_TWINS - 2));
    let stats = crowd.finish(&[0]).stats();
    assert_eq!(stats.num_prompt_tokens, NUM_PROMPT_TOKENS as u64 + NUM_TWINS - 2);
}

#[test]
fn the_first_may_have_to_give_way() {
    // Room for one and a half.
    let mut crowd = Crowd::new(&EngineConfig { num_blocks: 42, lane_isolation: false, ..narrow() });
    let batch = |ask| Ask { priority: Priority::Batch, ..ask };
    crowd.come(twins(Lane::Deep).into_iter().map(batch).collect());
    while crowd.engine.stats().num_prompt_tokens < 48 {
        crowd.step();
    }
    crowd.come(vec![Ask::new(Lane::Deep, &prompt(2), &sampled(1))]);
    crowd.step();
    let engine = crowd.finish(&[]);
    assert!(engine.stats().num_preemptions > 0);
}

#[test]
fn nobody_waits_for_who_is_less_urgent() {
    let mut crowd = Crowd::new(&narrow());
    let twins = twins(Lane::Deep);
    crowd.come(vec![Ask { priority: Priority::Batch, ..twins[0].clone() }]);
    crowd.step();
    crowd.come(vec![twins[1].clone(), twins[2].clone()]);
    crowd.step();
    assert_eq!(crowd.running_and_waiting(), (2, 1), "of the two that are as urgent one waits");
    crowd.finish(&[]);
}

#[test]
fn others_have_the_seat_meanwhile() {
    let mut crowd = Crowd::new(&EngineConfig { max_num_seqs: 2, ..narrow() });
    let twins = twins(Lane::Deep);
    crowd.come(vec![twins[0].clone(), twins[1].clone(), Ask::new(Lane::Deep, &prompt(2), &sampled(1))]);
    crowd.step();
    assert_eq!(crowd.running_and_waiting(), (2, 1));
    assert_eq!(crowd.engine.stats().queue_wait_ms_by_lane, [0, 0], "it does not wait for a seat");
    crowd.finish(&[]);
}
