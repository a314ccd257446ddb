//! Runs a scenario: steps the engine, lets the clients do their deeds, and looks for what must never be.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tandem_engine::{Engine, EngineStats, Event, FinishReason, Models, SequenceId, TokenId};

use super::client::Client;
use super::clock::FakeClock;
use super::oracle::Oracle;
use super::rng::Rng;
use super::scenario::Scenario;
use super::verdict::{judge, most_cached_tokens};
use super::workload::Plan;

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

/// What simulations came across, so that one can see that they are not idle.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Summary {
    pub(crate) steps: u64,
    pub(crate) sequences: u64,
    pub(crate) stopped: u64,
    pub(crate) at_length: u64,
    pub(crate) at_deadline: u64,
    pub(crate) aborted: u64,
    pub(crate) failed: u64,
    pub(crate) output_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) preemptions: u64,
    pub(crate) evictions: u64,
    pub(crate) draft_tokens: [u64; 3],
    pub(crate) accepted_tokens: [u64; 3],
}

impl Summary {
    pub(crate) fn add(&mut self, other: &Summary) {
        self.steps += other.steps;
        self.sequences += other.sequences;
        self.stopped += other.stopped;
        self.at_length += other.at_length;
        self.at_deadline += other.at_deadline;
        self.aborted += other.aborted;
        self.failed += other.failed;
        self.output_tokens += other.output_tokens;
        self.cached_tokens += other.cached_tokens;
        self.preemptions += other.preemptions;
        self.evictions += other.evictions;
        for source in 0..3 {
            self.draft_tokens[source] += other.draft_tokens[source];
            self.accepted_tokens[source] += other.accepted_tokens[source];
        }
    }

    fn note(&mut self, clients: &[Client<'_>], stats: &EngineStats) {
        self.steps += stats.num_steps;
        self.sequences += clients.len() as u64;
        for finished in clients.iter().filter_map(|c| c.answer.finished) {
            *match finished.reason {
                FinishReason::Stop(_) | FinishReason::Complete => &mut self.stopped,
                FinishReason::Length => &mut self.at_length,
                FinishReason::Deadline => &mut self.at_deadline,
                FinishReason::Aborted => continue,
            } += 1;
        }
        self.aborted += stats.num_aborted;
        self.failed += stats.num_failed;
        self.output_tokens += stats.num_fast_tokens + stats.num_deep_tokens;
        self.cached_tokens += stats.num_cached_tokens;
        self.preemptions += stats.num_preemptions;
        self.evictions += stats.num_evictions;
        self.draft_tokens = stats.num_draft_tokens;
        self.accepted_tokens = stats.num_accepted_tokens;
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} steps, {} sequences: {} stopped, {} reached their length, {} their deadline, \
             {} aborted, {} failed",
            self.steps,
            self.sequences,
            self.stopped,
            self.at_length,
            self.at_deadline,
            self.aborted,
            self.failed
        )?;
        write!(
            f,
            "{} output tokens, {} cached prompt tokens, {} preemptions, {} evictions; \
             draft tokens accepted of offered: draft {} of {}, n-gram {} of {}, prediction {} of {}",
            self.output_tokens,
            self.cached_tokens,
            self.preemptions,
            self.evictions,
            self.accepted_tokens[0],
            self.draft_tokens[0],
            self.accepted_tokens[1],
            self.draft_tokens[1],
            self.accepted_tokens[2],
            self.draft_tokens[2]
        )
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
    if let Some(last) = &scenario.last {
        world.run(std::slice::from_ref(last))?;
        world.check_rest(&mut oracle)?;
    }
    let mut summary = Summary::default();
    summary.note(&world.clients, &world.engine.stats());
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
    verbose: bool,
}

impl<'a> World<'a> {
    fn new(scenario: &'a Scenario, rng: Rng, verbose: bool) -> Result<Self, String> {
        let models =
            Models { target: Some(scenario.pair.target.build()), draft: Some(scenario.pair.draft.build()) };
        let clock = FakeClock::new(rng.fork());
        let mut engine = Engine::new(&scenario.config, models).map_err(|error| error.to_string())?;
        if scenario.profile {
            engine
                .profile(scenario.config.draft_tokens, &|| clock.read())
                .map_err(|error| error.to_string())?;
        }
        Ok(World { scenario, rng, clock, engine, clients: Vec::new(), step: 0, digest: 0, verbose })
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
        let now = self.clock.now();
        for client in &mut self.clients {
            client.count_overdue(now);
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
        if self.engine.is_idle() {
            self.engine.deliver();
        } else {
            let clock = &self.clock;
            self.engine.step(&|| clock.read()).map_err(|error| error.to_string())?;
        }
        self.engine.check_integrity().map_err(|error| format!("step {}: {error}", self.step))?;
        let stats = self.engine.stats();
        self.check_stats(&stats)?;
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
            judge(client, config, oracle)
                .map_err(|account| format!("{account}\n{}", self.describe(client)))?;
        }
        self.check_totals(&stats)?;
        self.check_sharing(&stats, oracle)
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
