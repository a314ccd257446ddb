//! The engine's thread, and the handle through which the rest of the process talks to it.
//!
//! One bounded channel of commands goes in; each sequence's events come out through its own sink.
//! Requests are checked on the caller's thread, so a bad one never reaches the engine's. A model that
//! fails or panics costs the sequence that made it do so. If the engine itself panics, or its account of
//! blocks contradicts itself, every sequence fails, it is unhealthy from then on and its thread ends with
//! a panic: it never continues on a state that may be wrong.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::api::{Command, EngineError, EngineStats, Event, Lane, SequenceId, SubmitRequest, TokenId};
use crate::embedding::EmbedRequest;
use crate::engine::{Engine, EngineConfig, Models};
use crate::kv_events::KvEvents;
use crate::limits::Limits;
use crate::speculation::DraftTokens;

/// Talks to a running engine. Cheap to clone; never blocks on the engine, except to tell it to stop.
#[derive(Clone)]
pub struct EngineHandle {
    commands: SyncSender<Command>,
    shared: Arc<Shared>,
}

/// What both sides see. All of it is advisory, so relaxed atomics do.
struct Shared {
    next_id: AtomicU64,
    /// Submissions in the channel, not yet seen by the engine, by lane.
    num_submitted: [AtomicU64; 2],
    healthy: AtomicBool,
    accepting: AtomicBool,
    heartbeat: AtomicU64,
    stats: SharedStats,
    limits: Limits,
}

/// Commands that can be under way; aborts of a full house and as many submissions.
const COMMAND_QUEUE: usize = 4096;

/// How long the engine sleeps before it offers last events to a slow reader again.
const REDELIVERY_INTERVAL: Duration = Duration::from_millis(2);

/// How long an ending engine waits for slow readers to take their last events.
const LAST_DELIVERY: Duration = Duration::from_secs(1);

impl EngineHandle {
    /// Allocates the caches, measures step costs if the policy needs them, and starts the thread.
    ///
    /// # Errors
    /// If there is no model, a cache cannot be allocated or a measuring pass fails.
    pub fn spawn(config: EngineConfig, models: Models) -> Result<(Self, JoinHandle<()>), EngineError> {
        EngineHandle::spawn_with(config, models, None)
    }

    /// The same, with somebody who is told of what the prefix cache gains and loses.
    ///
    /// # Errors
    /// As [`EngineHandle::spawn`].
    pub fn spawn_with(
        config: EngineConfig,
        models: Models,
        kv_events: Option<KvEvents>,
    ) -> Result<(Self, JoinHandle<()>), EngineError> {
        let shared = Arc::new(Shared {
            next_id: AtomicU64::new(0),
            num_submitted: Default::default(),
            healthy: AtomicBool::new(true),
            accepting: AtomicBool::new(true),
            heartbeat: AtomicU64::new(0),
            stats: SharedStats::default(),
            limits: Limits::new(&config, &models),
        });
        let start = Instant::now();
        let mut engine = Engine::new(&config, models)?;
        if config.draft_tokens == DraftTokens::Auto || config.lane_isolation {
            engine.profile(config.draft_tokens, &|| start.elapsed())?;
        }
        if let Some(kv_events) = kv_events {
            engine.publish_kv_events(kv_events);
        }
        shared.stats.publish(&engine.stats());
        let (commands, inbox) = sync_channel(COMMAND_QUEUE);
        let handle = EngineHandle { commands, shared: Arc::clone(&shared) };
        let thread = std::thread::Builder::new()
            .name("tandem-engine".into())
            .spawn(move || {
                EngineThread {
                    engine,
                    inbox,
                    shared,
                    start,
                    ending: None,
                    num_received: [0; 2],
                    fast_lane_asked: None,
                    broken: None,
                }
                .guarded_run()
            })
            .map_err(|error| EngineError::Forward(format!("the engine's thread did not start: {error}")))?;
        Ok((handle, thread))
    }

    /// Checks a request and queues it.
    ///
    /// # Errors
    /// What is wrong with the request; `QueueFull` and `ShuttingDown` are not the request's fault.
    pub fn submit(&self, mut request: SubmitRequest) -> Result<(), EngineError> {
        self.shared.limits.check(&mut request)?;
        self.enqueue(request.lane, Command::Submit(request))
    }

    /// Checks a text to embed and queues it.
    ///
    /// # Errors
    /// As [`EngineHandle::submit`].
    pub fn embed(&self, request: EmbedRequest) -> Result<(), EngineError> {
        self.check_embed(request.lane, &request.tokens)?;
        self.enqueue(request.lane, Command::Embed(request))
    }

    /// Whether `lane` could embed these tokens, which are not queued.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check_embed(&self, lane: Lane, tokens: &[TokenId]) -> Result<(), EngineError> {
        let limits = &self.shared.limits;
        limits.check_tokens(lane, tokens)?;
        limits.check_blocks(tokens.len())
    }

    fn enqueue(&self, lane: Lane, command: Command) -> Result<(), EngineError> {
        if !self.is_healthy() {
            return Err(EngineError::Forward("the engine stopped after an internal error".into()));
        }
        if !self.shared.accepting.load(Ordering::Relaxed) {
            return Err(EngineError::ShuttingDown);
        }
        let num_submitted = &self.shared.num_submitted[lane as usize];
        let submitted = num_submitted.fetch_add(1, Ordering::Relaxed);
        let stats = self.shared.stats.load();
        let waiting = (submitted + stats.num_waiting_by_lane[lane as usize]) as usize;
        let limits = &self.shared.limits;
        let free_seats =
            limits.max_num_seqs.saturating_sub(stats.num_running_by_lane[lane as usize] as usize);
        let refuse = |error| {
            num_submitted.fetch_sub(1, Ordering::Relaxed);
            Err(error)
        };
        if waiting >= limits.max_waiting + free_seats {
            return refuse(EngineError::QueueFull { waiting, retry_after: stats.retry_after(lane) });
        }
        match self.commands.try_send(command) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => {
                refuse(EngineError::QueueFull { waiting, retry_after: stats.retry_after(lane) })
            }
            Err(TrySendError::Disconnected(_)) => refuse(EngineError::ShuttingDown),
        }
    }

    /// Ends a sequence; its blocks are free when the current step ends.
    /// False if the command queue is full or the engine has ended; then the caller drops its end of
    /// the event channel, which the engine takes for an abort when it next has something to say.
    #[must_use]
    pub fn abort(&self, id: SequenceId) -> bool {
        self.commands.try_send(Command::Abort(id)).is_ok()
    }

    /// Raises the `max_tokens` of a sequence whose output somebody else reads too, to at most what the
    /// context holds. False as for [`EngineHandle::abort`].
    #[must_use]
    pub fn extend(&self, id: SequenceId, max_tokens: u32) -> bool {
        self.commands.try_send(Command::Extend(id, max_tokens)).is_ok()
    }

    /// Sequences that a lane holds at most, running and waiting.
    pub fn max_sequences(&self) -> usize {
        self.shared.limits.max_num_seqs + self.shared.limits.max_waiting
    }

    /// Refuses new sequences, finishes the running and waiting ones, then ends the thread.
    pub fn drain(&self) {
        self.shared.accepting.store(false, Ordering::Relaxed);
        // An engine that has ended already has nothing to drain.
        let _ = self.commands.send(Command::Drain);
    }

    /// Aborts every sequence and ends the thread.
    pub fn shutdown(&self) {
        self.shared.accepting.store(false, Ordering::Relaxed);
        // An engine that has ended already is shut down.
        let _ = self.commands.send(Command::Shutdown);
    }

    /// Counters and gauges as of the last step.
    pub fn stats(&self) -> EngineStats {
        self.shared.stats.load()
    }

    /// False once a step has panicked.
    pub fn is_healthy(&self) -> bool {
        self.shared.healthy.load(Ordering::Relaxed)
    }

    /// A number that goes up as long as the engine gets on: with every pass of the draft and every layer of the
    /// target.
    pub fn heartbeat(&self) -> u64 {
        self.shared.heartbeat.load(Ordering::Relaxed)
    }

    /// True while a sequence runs, waits, or is on its way to the engine.
    pub fn has_work(&self) -> bool {
        let stats = self.stats();
        let submitted = self.shared.num_submitted.iter().map(|count| count.load(Ordering::Relaxed));
        stats.num_running + stats.num_waiting + submitted.sum::<u64>() > 0
    }

    /// A name for the next sequence.
    pub fn next_id(&self) -> SequenceId {
        SequenceId(self.shared.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Longest prompt plus output, in tokens.
    pub fn max_model_len(&self) -> usize {
        self.shared.limits.max_model_len
    }

    /// Tokens of one block of the KV cache.
    pub fn block_size(&self) -> usize {
        self.shared.limits.block_size
    }

    /// Values of an embedding that a lane's model gives; 0 if that lane is not there.
    pub fn hidden_size(&self, lane: Lane) -> usize {
        self.shared.limits.hidden_size[lane as usize]
    }

    /// Ids below this are tokens of a lane.
    pub fn vocab_size(&self, lane: Lane) -> usize {
        self.shared.limits.num_token_ids[lane as usize]
    }
}

/// For how long after its last request the fast lane is taken to be in use: longer than somebody who writes code
/// looks at it.
const IN_USE: Duration = Duration::from_secs(60);

/// How the thread is to end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// When nothing is left to do.
    Drained,
    /// At once.
    Now,
}

struct EngineThread {
    engine: Engine,
    inbox: Receiver<Command>,
    shared: Arc<Shared>,
    start: Instant,
    ending: Option<Ending>,
    /// Submissions taken from the channel since the statistics were last published, by lane.
    num_received: [u64; 2],
    /// When the fast lane was last asked for a completion, from `start`.
    fast_lane_asked: Option<Duration>,
    /// What the engine found wrong with itself.
    broken: Option<EngineError>,
}

impl EngineThread {
    /// Runs to the end; if that is a panic, says so to every client before the thread dies of it.
    fn guarded_run(mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.run()));
        self.shared.accepting.store(false, Ordering::Relaxed);
        if let Err(panic) = outcome {
            self.shared.healthy.store(false, Ordering::Relaxed);
            let broken = self.broken.take();
            let error =
                broken.unwrap_or_else(|| EngineError::Forward("an internal error stopped the engine".into()));
            self.engine.fail_all(&error);
            self.publish();
            resume_unwind(panic);
        }
    }

    fn run(&mut self) {
        while self.ending != Some(Ending::Now) {
            self.receive();
            if self.engine.is_idle() {
                self.engine.deliver();
                if self.ending == Some(Ending::Drained) && self.engine.is_delivered() {
                    break;
                }
            } else {
                let (start, heartbeat) = (self.start, &self.shared.heartbeat);
                // Every pass and every layer reads the clock.
                let clock = || {
                    heartbeat.fetch_add(1, Ordering::Relaxed);
                    start.elapsed()
                };
                if let Err(error) = self.engine.step(&clock) {
                    self.broken = Some(error.clone());
                    panic!("{error}: this is a bug");
                }
                if self.offers_core(start.elapsed()) {
                    std::thread::yield_now();
                }
            }
            self.publish();
        }
        self.shared.accepting.store(false, Ordering::Relaxed);
        self.engine.abort_all();
        while let Ok(command) = self.inbox.try_recv() {
            let mut events = match command {
                Command::Submit(request) => request.events,
                Command::Embed(request) => request.events,
                _ => continue,
            };
            // A client too slow for its only event finds its channel closed instead.
            let _ = events.try_send(Event::Failed(EngineError::ShuttingDown));
        }
        let deadline = Instant::now() + LAST_DELIVERY;
        while !self.engine.is_delivered() && Instant::now() < deadline {
            std::thread::sleep(REDELIVERY_INTERVAL);
            self.engine.deliver();
        }
        self.publish();
    }

    /// Whether the threads behind the sockets are to have this core now if they want it: between two steps of the
    /// target's pass, while the fast lane is in use. Its next request may be with a thread that waits for this very
    /// core, which it would do until the system's next tick, for some milliseconds.
    fn offers_core(&self, now: Duration) -> bool {
        let in_use = self.fast_lane_asked.is_some_and(|asked| now.saturating_sub(asked) < IN_USE);
        in_use && self.engine.is_in_target_pass()
    }

    fn publish(&mut self) {
        self.shared.stats.publish(&self.engine.stats());
        // Only now, so that at every moment each sequence is counted somewhere.
        for (submitted, received) in self.shared.num_submitted.iter().zip(&mut self.num_received) {
            submitted.fetch_sub(std::mem::take(received), Ordering::Relaxed);
        }
    }

    /// Takes every command there is; waits for one only if there is nothing else to do.
    fn receive(&mut self) {
        if self.engine.is_idle() {
            let first = match (self.engine.is_delivered(), self.ending) {
                (true, None) => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                (true, Some(_)) => return,
                (false, _) => self.inbox.recv_timeout(REDELIVERY_INTERVAL),
            };
            match first {
                Ok(command) => self.apply(command),
                Err(RecvTimeoutError::Timeout) => return,
                Err(RecvTimeoutError::Disconnected) => {
                    self.ending = Some(Ending::Now);
                    return;
                }
            }
        }
        loop {
            match self.inbox.try_recv() {
                Ok(command) => self.apply(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    // Nobody is left to listen, unless sequences still run for sinks that do.
                    self.ending = self.ending.or(Some(Ending::Drained));
                    return;
                }
            }
        }
    }

    fn apply(&mut self, command: Command) {
        match command {
            Command::Submit(request) => {
                self.num_received[request.lane as usize] += 1;
                let now = self.start.elapsed();
                if request.lane == Lane::Fast {
                    self.fast_lane_asked = Some(now);
                }
                self.engine.submit(request, now);
            }
            Command::Embed(request) => {
                self.num_received[request.lane as usize] += 1;
                self.engine.embed(request, self.start.elapsed());
            }
            Command::Abort(id) => self.engine.abort(id),
            Command::Extend(id, max_tokens) => self.engine.extend(id, max_tokens),
            Command::Drain => self.ending = self.ending.or(Some(Ending::Drained)),
            Command::Shutdown => self.ending = Some(Ending::Now),
        }
    }
}

/// [`EngineStats`], written by the engine's thread and read by any other.
struct SharedStats {
    values: [AtomicU64; NUM_STATS],
}

impl Default for SharedStats {
    fn default() -> Self {
        SharedStats { values: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

const NUM_STATS: usize = size_of::<EngineStats>() / size_of::<u64>();

impl SharedStats {
    fn publish(&self, stats: &EngineStats) {
        let values: &[u64] = bytemuck::cast_slice(std::slice::from_ref(stats));
        for (cell, value) in self.values.iter().zip(values) {
            cell.store(*value, Ordering::Relaxed);
        }
    }

    fn load(&self) -> EngineStats {
        let mut stats = EngineStats::default();
        let values: &mut [u64] = bytemuck::cast_slice_mut(std::slice::from_mut(&mut stats));
        for (value, cell) in values.iter_mut().zip(&self.values) {
            *value = cell.load(Ordering::Relaxed);
        }
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::SamplingParams;
    use crate::common::{config, hash_pair, request};

    fn shared() -> Arc<Shared> {
        Arc::new(Shared {
            next_id: AtomicU64::new(0),
            num_submitted: Default::default(),
            healthy: AtomicBool::new(true),
            accepting: AtomicBool::new(true),
            heartbeat: AtomicU64::new(0),
            stats: SharedStats::default(),
            limits: Limits {
                num_token_ids: [48, 48],
                hidden_size: [8, 8],
                max_model_len: 1024,
                max_waiting: 4,
                max_num_seqs: 4,
                block_size: 4,
                num_blocks: 512,
                has_fast: true,
                has_deep: true,
            },
        })
    }

    fn thread(engine: Engine, inbox: Receiver<Command>) -> EngineThread {
        EngineThread {
            engine,
            inbox,
            shared: shared(),
            start: Instant::now(),
            ending: None,
            num_received: [0; 2],
            fast_lane_asked: None,
            broken: None,
        }
    }

    #[test]
    fn the_core_is_offered_in_the_targets_pass_while_the_fast_lane_is_in_use() {
        let engine = Engine::new(&config(DraftTokens::Fixed(0)), hash_pair(1.0)).expect("the engine starts");
        let (_commands, inbox) = sync_channel(1);
        let mut thread = thread(engine, inbox);
        let params = SamplingParams { max_tokens: 50, ..SamplingParams::default() };
        let (deep, _deep_events) = request(1, Lane::Deep, &[1, 2, 3], params.clone(), 100);
        let (fast, _fast_events) = request(2, Lane::Fast, &[1, 2, 3], params, 100);
        thread.apply(Command::Submit(deep));
        while !thread.engine.is_in_target_pass() {
            thread.engine.step(&|| Duration::ZERO).expect("its account is whole");
        }
        assert!(!thread.offers_core(Duration::ZERO), "nobody asks the fast lane");
        thread.apply(Command::Submit(fast));
        let asked = thread.fast_lane_asked.expect("now somebody does");
        assert!(thread.offers_core(asked + IN_USE / 2) && !thread.offers_core(asked + IN_USE));
        while thread.engine.is_in_target_pass() {
            thread.engine.step(&|| Duration::ZERO).expect("its account is whole");
        }
        assert!(!thread.offers_core(asked), "no layer is on its way");
    }

    #[test]
    fn a_broken_account_fails_everybody_and_stops_the_engine() {
        let mut engine =
            Engine::new(&config(DraftTokens::Fixed(2)), hash_pair(1.0)).expect("the engine starts");
        let params = SamplingParams { max_tokens: 50, ..SamplingParams::default() };
        let (submit, events) = request(1, Lane::Deep, &[1, 2, 3], params, 100);
        engine.submit(submit, Duration::ZERO);
        engine.scheduler.blocks.corrupt();
        let (_commands, inbox) = sync_channel(1);
        let thread = thread(engine, inbox);
        let shared = Arc::clone(&thread.shared);
        let ended = catch_unwind(AssertUnwindSafe(|| thread.guarded_run()));
        assert!(ended.is_err(), "it must not go on");
        assert!(!shared.healthy.load(Ordering::Relaxed) && !shared.accepting.load(Ordering::Relaxed));
        let last = events.try_iter().last();
        let Some(Event::Failed(EngineError::Integrity(reason))) = last else { panic!("{last:?}") };
        assert!(reason.contains("block 511"), "{reason}");
    }
}
