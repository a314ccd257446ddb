//! Runs a scenario: steps the engine, lets the clients do their deeds, and looks for what must never be.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tandem_engine::{Engine, EngineStats, Event, SequenceId, TokenId};

use super::client::Client;
use super::clock::FakeClock;
use super::mirror::SharedMirror;
use super::oracle::Oracle;
use super::rng::Rng;
use super::scenario::Scenario;
use super::summary::Summary;
use super::verdict::{judge, most_cached_tokens};
use super::workload::Plan;
use crate::common::Watch;

/// What must never be, and where.
#[derive(Debug)]
pub(crate) struct Violation {
    seed: u64,
    account: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}: {}", self.seed, self.account)
    }
}

/// Steps that a pass under way may take after a sequence's time is up: its layers, and some to spare.
const MOST_OVERDUE_STEPS: usize = 8;

/// Every so many seeds one is run twice, to see that it repeats.
const REPEATED_ONE_IN: u64 = 16;

/// Runs one seed's scenario.
///
/// # Errors
/// The first thing that must never be.
pub(crate) fn simulate(seed: u64, verbose: bool) -> Result<Summary, Violation> {
    let violation = |account| Violation { seed, account };
    let (summary, digest) = guarded_run(seed, verbose).map_err(violation)?;
    if seed.is_multiple_of(REPEATED_ONE_IN) && guarded_run(seed, false).map_err(violation)?.1 != digest {
        return Err(violation("a second run of the same scenario went another way".into()));
    }
    Ok(summary)
}

/// A panic is a violation too.
fn guarded_run(seed: u64, verbose: bool) -> Result<(Summary, u64), String> {
    catch_unwind(AssertUnwindSafe(|| run(seed, verbose))).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or(panic.downcast_ref::<&str>().copied())
            .unwrap_or("without a message");
        Err(format!("a panic: {message}"))
    })
}

fn run(seed: u64, verbose: bool) -> Result<(Summary, u64), String> {
    let rng = Rng::new(seed);
    let (scenario, mut oracle) = Scenario::generate(&rng, Oracle::new);
    if verbose {
        println!("{:?}\n{:?}", scenario.config, scenario.pair);
    }
    let mut world = World::new(&scenario, rng, verbose)?;
    world.run(&scenario.plans)?;
    world.check_rest(&mut oracle)?;
    for probe in &scenario.probes {
        world.probe(probe)?;
    }
    if let Some(last) = &scenario.last {
        world.run(std::slice::from_ref(last))?;
        world.check_rest(&mut oracle)?;
    }
    let mut summary = Summary::default();
    summary.note(&world.clients, &world.engine.stats(), scenario.pair.head.is_some());
    if let Some(mirror) = &world.mirror {
        summary.kv_events = mirror.lock().num_events;
    }
    summary.found_tokens = world.num_found;
    Ok((summary, world.digest))
}

struct World<'a> {
    scenario: &'a Scenario,
    rng: Rng,
    clock: FakeClock,
    engine: Engine,
    clients: Vec<Client<'a>>,
    step: usize,
    /// Of everything that clients saw, and when.
    digest: u64,
    watch: Watch,
    mirror: Option<SharedMirror>,
    /// Tokens that probes found in the cache.
    num_found: u64,
    verbose: bool,
}

impl<'a> World<'a> {
    fn new(scenario: &'a Scenario, rng: Rng, verbose: bool) -> Result<Self, String> {
        let (models, watch) = scenario.pair.build();
        let clock = FakeClock::new(rng.fork());
        let mut engine = Engine::new(&scenario.config, models).map_err(|error| error.to_string())?;
        if scenario.profile {
            engine
                .profile(scenario.config.draft_tokens, &|| clock.read())
                .map_err(|error| error.to_string())?;
        }
        // Measuring passes are made of nothing.
        watch.take();
        let mirror = scenario.is_mirrored.then(|| SharedMirror::new(scenario.config.block_size));
        if let Some(mirror) = &mirror {
            engine.publish_kv_events(mirror.events([rng.next(), rng.next()]));
        }
        Ok(World {
            scenario,
            rng,
            clock,
            engine,
            clients: Vec::new(),
            step: 0,
            digest: 0,
            watch,
            mirror,
            num_found: 0,
            verbose,
        })
    }

    /// Lets a client come alone with a text that the cache may have: it finds what the engine has told of.
    fn probe(&mut self, plan: &'a Plan) -> Result<(), String> {
        let Some(mirror) = self.mirror.clone() else { return Ok(()) };
        let found = mirror.lock().longest_prefix(&plan.prompt).min(plan.prompt.len() - 1);
        self.run(std::slice::from_ref(plan))?;
        let client = self.clients.last().expect("it came");
        let usage = client.answer.finished.map(|finished| finished.usage);
        match usage.map(|usage| usage.num_cached_tokens as usize) {
            Some(num_cached) if num_cached != found => Err(format!(
                "{num_cached} cached tokens, and told of were {found}\n{}",
                self.describe(client)
            )),
            _ => {
                self.num_found += found as u64;
                Ok(())
            }
        }
    }

    /// Lets the clients of `plans` come and waits until all are served.
    fn run(&mut self, plans: &'a [Plan]) -> Result<(), String> {
        let mut plans = plans.iter();
        let mut next = plans.next();
        let mut next_arrival = self.step + next.map_or(0, |plan| plan.arrives_after);
        // A sequence that is computed ten times over, a token a step, is not going to end.
        let mut patience = 1_000;
        loop {
            while let Some(plan) = next
                && next_arrival <= self.step
            {
                self.arrive(plan);
                patience += 10 * (plan.prompt.len() + 2 * plan.params.max_tokens as usize + 20);
                next = plans.next();
                next_arrival += next.map_or(0, |plan| plan.arrives_after);
            }
            self.act();
            let is_closing = next.is_none() && self.engine.is_idle();
            self.step_engine()?;
            self.read(is_closing);
            self.step += 1;
            if next.is_none() && self.engine.is_idle() && self.engine.is_delivered() {
                self.read(true);
                return Ok(());
            }
            patience -= 1;
            if patience == 0 {
                return Err(format!("no end in sight: {:?}", self.engine.stats()));
            }
        }
    }

    fn arrive(&mut self, plan: &'a Plan) {
        let id = SequenceId(self.clients.len() as u64);
        if self.verbose {
            println!("step {}: {} arrives: {plan:?}", self.step, id.0);
        }
        let now = self.clock.read();
        self.clients.push(Client::arrive(plan, id, &mut self.engine, now, self.step));
    }

    fn act(&mut self) {
        for client in &mut self.clients {
            if let Some(deed) = client.act(&mut self.engine, self.step)
                && self.verbose
            {
                println!("step {}: {} does {deed:?}", self.step, client.id.0);
            }
        }
    }

    /// As the engine's thread does: a step if there is work, otherwise only the rest of the events.
    fn step_engine(&mut self) -> Result<(), String> {
        let before = self.engine.stats();
        let began = self.clock.now();
        if self.engine.is_idle() {
            self.engine.deliver();
        } else {
            let clock = &self.clock;
            self.engine.step(&|| clock.read()).map_err(|error| error.to_string())?;
        }
        self.engine.check_integrity().map_err(|error| format!("step {}: {error}", self.step))?;
        let stats = self.engine.stats();
        self.check_stats(&stats)?;
        let is_draft_step = stats.num_draft_passes > before.num_draft_passes
            && stats.num_target_passes == before.num_target_passes;
        self.clients.iter_mut().for_each(|client| client.count_overdue(began, is_draft_step));
        if let Some(wrong) = self.watch.take() {
            return Err(format!("step {}: {wrong}", self.step));
        }
        if let Some(late) = self.clients.iter().find(|client| client.overdue_steps > MOST_OVERDUE_STEPS) {
            return Err(format!(
                "step {}: its time is up and it goes on\n{}",
                self.step,
                self.describe(late)
            ));
        }
        if self.verbose && stats != before {
            println!("step {}: {:?} {stats:?}", self.step, self.clock.now());
        }
        Ok(())
    }

    fn check_stats(&self, stats: &EngineStats) -> Result<(), String> {
        let wrong = |what: &str| Err(format!("step {}: {what}: {stats:?}", self.step));
        if stats.num_free_blocks + stats.num_cached_blocks > stats.num_total_blocks {
            return wrong("more blocks than there are");
        }
        // Seats are counted by lane.
        if stats.num_running > 2 * self.scenario.config.max_num_seqs as u64 {
            return wrong("too many run");
        }
        let ended = stats.num_finished + stats.num_aborted + stats.num_failed;
        if stats.num_waiting + stats.num_running + ended != self.clients.len() as u64 {
            return wrong("somebody is lost or counted twice");
        }
        Ok(())
    }

    fn read(&mut self, hurry: bool) {
        let now = self.clock.now();
        for client in &mut self.clients {
            let id = client.id.0;
            client.read(&self.rng, hurry, now, |event| {
                if self.verbose {
                    println!("step {}: {id} hears {event:?}", self.step);
                }
                for value in [self.step as u64, id].into_iter().chain(essence(event)) {
                    self.digest = (self.digest ^ value).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(17);
                }
            });
        }
    }

    /// When all is quiet: the blocks, the account, and every client.
    fn check_rest(&self, oracle: &mut Oracle) -> Result<(), String> {
        let stats = self.engine.stats();
        let config = &self.scenario.config;
        if stats.num_free_blocks + stats.num_cached_blocks != stats.num_total_blocks {
            return Err(format!("blocks leaked: {stats:?}"));
        }
        if !config.prefix_cache && stats.num_cached_blocks + stats.num_cached_tokens > 0 {
            return Err(format!("there is no cache, and something in it: {stats:?}"));
        }
        for client in &self.clients {
            judge(client, self.scenario, oracle)
                .map_err(|account| format!("{account}\n{}", self.describe(client)))?;
        }
        self.check_totals(&stats)?;
        self.check_mirror(&stats)?;
        self.check_sharing(&stats, oracle)
    }

    /// What was told of the cache adds up, and to no more than is in it.
    fn check_mirror(&self, stats: &EngineStats) -> Result<(), String> {
        let Some(mirror) = &self.mirror else { return Ok(()) };
        let mirror = mirror.lock();
        mirror.check()?;
        let num_told = mirror.num_blocks() as u64;
        // Of two models only one's blocks are told of.
        let is_alone = self.scenario.pair.is_alone();
        if num_told > stats.num_cached_blocks || (is_alone && num_told < stats.num_cached_blocks) {
            return Err(format!("told of are {num_told} blocks: {stats:?}"));
        }
        Ok(())
    }

    /// The engine's totals are the sum of what it told its clients.
    fn check_totals(&self, stats: &EngineStats) -> Result<(), String> {
        let usages = self.clients.iter().filter_map(|c| c.answer.finished).map(|f| f.usage);
        let mut output = 0;
        let mut drafts = [0; 3];
        for usage in usages {
            output += u64::from(usage.num_output_tokens);
            for (sum, count) in drafts.iter_mut().zip(usage.num_draft_tokens) {
                *sum += u64::from(count);
            }
        }
        let is_known = self.clients.iter().all(|c| c.answer.finished.is_some());
        let counted = (stats.num_fast_tokens + stats.num_deep_tokens, stats.num_draft_tokens);
        if is_known && counted != (output, drafts) {
            return Err(format!("the clients' sums are {output} and {drafts:?}: {stats:?}"));
        }
        Ok(())
    }

    /// Nobody finds in the cache what nobody with the same salt put there.
    fn check_sharing(&self, stats: &EngineStats, oracle: &mut Oracle) -> Result<(), String> {
        if stats.num_cached_tokens == 0 || stats.num_preemptions > 0 {
            // A preempted sequence finds its own blocks.
            return Ok(());
        }
        let texts: Vec<(Vec<TokenId>, &Client<'_>)> = self
            .clients
            .iter()
            .filter(|client| !client.plan.is_embedding)
            .map(|client| {
                let plan = client.plan;
                let mut params = plan.params.clone();
                params.max_tokens = params.max_tokens.max(client.answer.tokens.len() as u32);
                let answer = oracle.answer(plan.lane, &plan.prompt, &params, plan.grammar.as_ref());
                (plan.prompt.iter().chain(&answer.tokens).copied().collect(), client)
            })
            .collect();
        for client in &self.clients {
            let Some(finished) = client.answer.finished else { continue };
            let found = finished.usage.num_cached_tokens as usize;
            let most = most_cached_tokens(client, &texts, self.scenario.config.block_size);
            if found > most {
                return Err(format!(
                    "{found} cached tokens and nobody had more than {most} of them\n{}",
                    self.describe(client)
                ));
            }
        }
        Ok(())
    }

    fn describe(&self, client: &Client<'_>) -> String {
        let Client { plan, id, aborted, closed, extended, answer, .. } = client;
        format!(
            "sequence {} (aborted {aborted}, closed {closed}, extended {extended:?})\n{plan:?}\n\
             saw {:?} {:?} {:?}\n{:?}\n{:?}",
            id.0, answer.tokens, answer.finished, answer.failed, self.scenario.config, self.scenario.pair
        )
    }
}

/// What of an event must be the same in every run.
fn essence(event: &Event) -> Vec<u64> {
    match event {
        Event::PromptLogprobs(scored) => vec![1, scored.len() as u64],
        Event::Tokens(chunk) => {
            chunk.tokens.iter().map(|t| 2 + 2 * u64::from(t.id) + u64::from(t.drafted)).collect()
        }
        Event::Finished(finished) => {
            vec![3, u64::from(finished.usage.num_decode_steps), finished.usage.decode_time.as_micros() as u64]
        }
        Event::Failed(_) => vec![4],
        Event::Embedding(embedding) => embedding.iter().map(|value| value.to_bits().into()).collect(),
    }
}
