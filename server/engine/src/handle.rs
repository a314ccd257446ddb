//! The engine's thread, and the handle through which the rest of the process talks to it.
//!
//! One bounded channel of commands goes in; each sequence's events come out through its own sink.
//! Requests are checked on the caller's thread, so a bad one never reaches the engine's. If the
//! engine panics, every sequence fails, it is unhealthy from then on and its thread ends with that
//! panic: it never continues on a state that may be wrong.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::api::{Command, EngineError, EngineStats, Event, SequenceId, SubmitRequest};
use crate::engine::{Engine, EngineConfig, Models};
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
    /// Submissions in the channel, not yet seen by the engine.
    num_submitted: AtomicU64,
    healthy: AtomicBool,
    accepting: AtomicBool,
    stats: SharedStats,
    limits: Limits,
}

struct Limits {
    num_token_ids: usize,
    max_model_len: usize,
    max_waiting: usize,
    max_num_seqs: usize,
    block_size: usize,
    num_blocks: usize,
    has_fast: bool,
    has_deep: bool,
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
        use crate::api::Lane;
        let shared = Arc::new(Shared {
            next_id: AtomicU64::new(0),
            num_submitted: AtomicU64::new(0),
            healthy: AtomicBool::new(true),
            accepting: AtomicBool::new(true),
            stats: SharedStats::default(),
            limits: Limits {
                num_token_ids: config.num_token_ids,
                max_model_len: config.max_model_len,
                max_waiting: config.max_waiting,
                max_num_seqs: config.max_num_seqs,
                block_size: config.block_size,
                num_blocks: config.num_blocks,
                has_fast: models.has(Lane::Fast),
                has_deep: models.has(Lane::Deep),
            },
        });
        let start = Instant::now();
        let mut engine = Engine::new(&config, models)?;
        if config.draft_tokens == DraftTokens::Auto {
            engine.profile(config.draft_tokens, &|| start.elapsed())?;
        }
        shared.stats.publish(&engine.stats());
        let (commands, inbox) = sync_channel(COMMAND_QUEUE);
        let handle = EngineHandle { commands, shared: Arc::clone(&shared) };
        let thread = std::thread::Builder::new()
            .name("tandem-engine".into())
            .spawn(move || {
                EngineThread { engine, inbox, shared, start, ending: None, num_received: 0 }.guarded_run()
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
        if !self.is_healthy() {
            return Err(EngineError::Forward("the engine stopped after an internal error".into()));
        }
        if !self.shared.accepting.load(Ordering::Relaxed) {
            return Err(EngineError::ShuttingDown);
        }
        let submitted = self.shared.num_submitted.fetch_add(1, Ordering::Relaxed);
        let stats = self.shared.stats.load();
        let waiting = (submitted + stats.num_waiting) as usize;
        let limits = &self.shared.limits;
        let free_seats = limits.max_num_seqs.saturating_sub(stats.num_running as usize);
        let refuse = |error| {
            self.shared.num_submitted.fetch_sub(1, Ordering::Relaxed);
            Err(error)
        };
        if waiting >= limits.max_waiting + free_seats {
            return refuse(EngineError::QueueFull { waiting });
        }
        match self.commands.try_send(Command::Submit(request)) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => refuse(EngineError::QueueFull { waiting }),
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

    /// Sequences that the engine holds at most, running and waiting.
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

    /// A name for the next sequence.
    pub fn next_id(&self) -> SequenceId {
        SequenceId(self.shared.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Longest prompt plus output, in tokens.
    pub fn max_model_len(&self) -> usize {
        self.shared.limits.max_model_len
    }

    /// Ids below this are tokens.
    pub fn vocab_size(&self) -> usize {
        self.shared.limits.num_token_ids
    }
}

impl Limits {
    /// Checks a request and limits `max_tokens` to what the context holds.
    fn check(&self, request: &mut SubmitRequest) -> Result<(), EngineError> {
        use crate::api::Lane;
        let has_lane = match request.lane {
            Lane::Fast => self.has_fast,
            Lane::Deep => self.has_deep,
        };
        if !has_lane {
            return Err(EngineError::LaneUnavailable(request.lane));
        }
        request.params.validate(self.num_token_ids)?;
        let num_prompt_tokens = request.prompt.len();
        if num_prompt_tokens == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        if let Some(&id) = request.prompt.iter().find(|&&id| id as usize >= self.num_token_ids) {
            return Err(EngineError::TokenOutOfRange { id, vocab_size: self.num_token_ids });
        }
        let room = self.max_model_len.saturating_sub(num_prompt_tokens);
        if num_prompt_tokens > self.max_model_len || (room == 0 && request.params.max_tokens > 0) {
            return Err(EngineError::PromptTooLong { num_prompt_tokens, max_model_len: self.max_model_len });
        }
        request.params.max_tokens = request.params.max_tokens.min(u32::try_from(room).unwrap_or(u32::MAX));
        let needed_blocks =
            (num_prompt_tokens + request.params.max_tokens as usize).div_ceil(self.block_size);
        if needed_blocks > self.num_blocks {
            return Err(EngineError::KvCacheTooSmall { needed_blocks, total_blocks: self.num_blocks });
        }
        Ok(())
    }
}

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
    /// Submissions taken from the channel since the statistics were last published.
    num_received: u64,
}

impl EngineThread {
    /// Runs to the end; if that is a panic, says so to every client before the thread dies of it.
    fn guarded_run(mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.run()));
        self.shared.accepting.store(false, Ordering::Relaxed);
        if let Err(panic) = outcome {
            self.shared.healthy.store(false, Ordering::Relaxed);
            self.engine.fail_all(&EngineError::Forward("an internal error stopped the engine".into()));
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
                let start = self.start;
                self.engine.step(&|| start.elapsed());
            }
            self.publish();
        }
        self.shared.accepting.store(false, Ordering::Relaxed);
        self.engine.abort_all();
        while let Ok(command) = self.inbox.try_recv() {
            if let Command::Submit(mut request) = command {
                // A client too slow for its only event finds its channel closed instead.
                let _ = request.events.try_send(Event::Failed(EngineError::ShuttingDown));
            }
        }
        let deadline = Instant::now() + LAST_DELIVERY;
        while !self.engine.is_delivered() && Instant::now() < deadline {
            std::thread::sleep(REDELIVERY_INTERVAL);
            self.engine.deliver();
        }
        self.publish();
    }

    fn publish(&mut self) {
        self.shared.stats.publish(&self.engine.stats());
        // Only now, so that at every moment each sequence is counted somewhere.
        self.shared.num_submitted.fetch_sub(std::mem::take(&mut self.num_received), Ordering::Relaxed);
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
                self.engine.submit(request, self.start.elapsed());
                self.num_received += 1;
            }
            Command::Abort(id) => self.engine.abort(id),
            Command::Drain => self.ending = self.ending.or(Some(Ending::Drained)),
            Command::Shutdown => self.ending = Some(Ending::Now),
        }
    }
}

/// [`EngineStats`], written by the engine's thread and read by any other.
#[derive(Default)]
struct SharedStats {
    values: [AtomicU64; NUM_STATS],
}

const NUM_STATS: usize = 15;

impl SharedStats {
    fn publish(&self, stats: &EngineStats) {
        for (cell, value) in self.values.iter().zip(stats.to_array()) {
            cell.store(value, Ordering::Relaxed);
        }
    }

    fn load(&self) -> EngineStats {
        EngineStats::from_array(std::array::from_fn(|i| self.values[i].load(Ordering::Relaxed)))
    }
}

/// Lists the fields once, for both directions.
macro_rules! stats_array {
    ($($field:ident),+ $(,)?) => {
        impl EngineStats {
            fn to_array(self) -> [u64; NUM_STATS] {
                [$(self.$field),+]
            }

            fn from_array([$($field),+]: [u64; NUM_STATS]) -> Self {
                EngineStats { $($field),+ }
            }
        }
    };
}

stats_array!(
    num_waiting,
    num_running,
    num_total_blocks,
    num_free_blocks,
    num_steps,
    num_target_passes,
    num_draft_passes,
    num_prompt_tokens,
    num_fast_tokens,
    num_deep_tokens,
    num_draft_tokens,
    num_accepted_tokens,
    num_finished,
    num_aborted,
    num_failed,
);
