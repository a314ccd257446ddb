//! Worker threads for one operation at a time.
//!
//! An operation is cut into tasks numbered from 0. Each thread owns a contiguous range of them, the same
//! range every time, so a thread meets the same weights again and finds them in its own cache; a
//! thread that is through takes tasks off the far end of another's range, so a worker that the
//! operating system has put aside delays the operation by no more than the task it holds. Between
//! operations workers spin for some tens of microseconds and then park.
//!
//! That one task is what other programs cost: nobody else may do it again, so the operation waits until
//! the worker has a core once more, a hundred times as long as it had worked. Two things keep that rare. Between
//! operations a worker offers its core as it spins, so that the system has less reason to take it later. And in a
//! pool of two threads such a wait is followed by a while on the caller alone (`pool/alone.rs`); with more threads
//! the caller alone would be slower than the wait.
//!
//! Cost: about a cache-line exchange each way when the workers spin; a wake-up by the operating system
//! (some microseconds) when they have parked. Operations too small to pay for that run on the caller,
//! which never changes a result: tasks only say who computes what.

pub(crate) mod activity;
mod alone;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::dispatch::{self, Kernels};
use crate::isa::{self, Isa, IsaError};
use crate::matmul::quantized::QuantizedRows;
use activity::Activity;
use alone::Alone;

/// How long an idle worker stays hot. Longer than the gaps inside a forward pass and between the
/// passes of a busy engine; short enough to leave the core to others when there is no work.
const SPIN: Duration = Duration::from_micros(50);
/// How often the caller looks for the end of the others' last tasks (some tens of microseconds in all)
/// before it also offers its core: a worker that was put aside may be waiting for it.
const CALLER_SPINS: u32 = 4_000;

/// Bits of a ticket's begin and end; the remaining 40 bits hold the number of the operation.
const INDEX_BITS: u32 = 12;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
/// Tasks that a ticket can hold; more are handed out in groups.
const MAX_TASKS: usize = INDEX_MASK as usize;

type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// One operation in flight. Lives on the caller's stack until every task is done.
struct Job<'a> {
    task: Task<'a>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// What one thread polls: its share of the current operation. A line of its own.
#[repr(align(128))]
struct Seat {
    /// `operation << 24 | begin << 12 | end`: the tasks of this thread that nobody has taken.
    ticket: AtomicU64,
    /// The operation's [`Job`]; written before the ticket, valid while the caller of a task that was
    /// taken from a ticket of the same operation has not reported it.
    job: AtomicPtr<Job<'static>>,
    parked: AtomicBool,
}

#[repr(align(128))]
struct Pending(AtomicUsize);

struct Shared {
    seats: Box<[Seat]>,
    /// Tasks of the current operation not yet reported as done.
    pending: Pending,
    /// Held while an operation is in flight.
    busy: AtomicBool,
    closing: AtomicBool,
}

/// A fixed set of threads, the caller being one of them, and the kernels they run.
pub struct ThreadPool {
    shared: Arc<Shared>,
    handles: Vec<JoinHandle<()>>,
    unpark: Vec<Thread>,
    operation: AtomicU64,
    start: Instant,
    alone: Alone,
    activity: Activity,
    kernels: &'static Kernels,
    scratch: Mutex<QuantizedRows>,
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThreadPool").field("threads", &self.threads()).field("isa", &self.isa()).finish()
    }
}

impl ThreadPool {
    /// `threads` threads, the caller of [`run`](Self::run) included (0 counts as 1), with the kernels of
    /// [`isa::active`].
    ///
    /// # Panics
    /// If the operating system refuses a thread.
    pub fn new(threads: usize) -> Self {
        Self::start(threads, isa::active())
    }

    /// As [`new`](Self::new), with the kernels of a given instruction set.
    ///
    /// # Errors
    /// If this processor lacks it.
    pub fn with_isa(threads: usize, isa: Isa) -> Result<Self, IsaError> {
        if !isa.is_available() {
            return Err(IsaError::Unavailable { isa, best: Isa::best() });
        }
        Ok(Self::start(threads, isa))
    }

    fn start(threads: usize, isa: Isa) -> Self {
        let threads = threads.max(1);
        let seats = (0..threads).map(|_| Seat {
            ticket: AtomicU64::new(0),
            job: AtomicPtr::new(std::ptr::null_mut()),
            parked: AtomicBool::new(false),
        });
        let shared = Arc::new(Shared {
            seats: seats.collect(),
            pending: Pending(AtomicUsize::new(0)),
            busy: AtomicBool::new(false),
            closing: AtomicBool::new(false),
        });
        let spawn = |seat: usize| {
            let shared = Arc::clone(&shared);
            let builder = thread::Builder::new().name(format!("kernel-{seat}"));
            builder.spawn(move || work(&shared, seat)).expect("the system gives a kernel thread")
        };
        let handles: Vec<_> = (1..threads).map(spawn).collect();
        let unpark = handles.iter().map(|handle| handle.thread().clone()).collect();
        ThreadPool {
            shared,
            handles,
            unpark,
            operation: AtomicU64::new(0),
            start: Instant::now(),
            alone: Alone::default(),
            activity: Activity::default(),
            kernels: dispatch::kernels(isa),
            scratch: Mutex::default(),
        }
    }

    /// Threads that an operation is split over, the caller included.
    pub fn threads(&self) -> usize {
        self.shared.seats.len()
    }

    /// The instruction set of this pool's kernels.
    pub fn isa(&self) -> Isa {
        self.kernels.isa
    }

    pub(crate) fn activity(&self) -> &Activity {
        &self.activity
    }

    pub(crate) fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// Lends the buffer for quantised activations, which products on this pool share: it grows to the
    /// largest and stays. Who finds it lent, to a product on another thread, gets a new one.
    pub(crate) fn with_scratch<T>(&self, work: impl FnOnce(&mut QuantizedRows) -> T) -> T {
        match self.scratch.try_lock() {
            Ok(mut scratch) => work(&mut scratch),
            Err(TryLockError::Poisoned(scratch)) => work(&mut scratch.into_inner()),
            Err(TryLockError::WouldBlock) => work(&mut QuantizedRows::new()),
        }
    }

    /// Calls `task` with every number below `num_tasks`, once each, on all threads, and returns when
    /// all are done. Called from inside a task, or while another thread's operation is in flight, it
    /// runs everything on the calling thread.
    ///
    /// # Panics
    /// If a task panics: with the first panic's payload, after all tasks that have begun have ended.
    pub fn run(&self, num_tasks: usize, task: Task<'_>) {
        self.run_if_worth(num_tasks, true, task);
    }

    /// As [`run`](Self::run), for tasks that wait for the system, for fresh pages or a file's: how long one takes
    /// says nothing about other programs, and there is work for all threads meanwhile, whoever was put aside before.
    pub(crate) fn run_waiting(&self, num_tasks: usize, task: Task<'_>) {
        self.run_if_worth(num_tasks, false, task);
    }

    /// `are_alike` says whether the tasks of one operation take about as long as one another.
    fn run_if_worth(&self, num_tasks: usize, are_alike: bool, task: Task<'_>) {
        let _in_flight = self.activity.begin();
        if num_tasks <= 1 || self.threads() == 1 {
            return (0..num_tasks).for_each(task);
        }
        let begin = self.start.elapsed();
        if are_alike && self.alone.lasts_at(as_nanos(begin)) || self.shared.busy.swap(true, Ordering::Acquire)
        {
            return (0..num_tasks).for_each(task);
        }
        let begin = are_alike.then_some(begin);
        if num_tasks <= MAX_TASKS {
            self.run_all(begin, num_tasks, task);
        } else {
            let group = num_tasks.div_ceil(MAX_TASKS);
            self.run_all(begin, num_tasks.div_ceil(group), &|i| {
                (i * group..num_tasks.min((i + 1) * group)).for_each(task);
            });
        }
    }

    /// The operation itself; `busy` is held on entry and released here. `begin` is that of tasks that are alike.
    fn run_all(&self, begin: Option<Duration>, num_tasks: usize, task: Task<'_>) {
        let shared = &*self.shared;
        let threads = self.threads();
        // As many bits as a ticket holds, so that the two always compare equal.
        let operation = operation_of(ticket(self.operation.load(Ordering::Relaxed) + 1, 0, 0));
        self.operation.store(operation, Ordering::Relaxed);

        let job = Job { task, panic: Mutex::new(None) };
        let pointer = std::ptr::from_ref(&job).cast::<Job<'static>>().cast_mut();
        shared.pending.0.store(num_tasks, Ordering::Relaxed);
        for (i, seat) in shared.seats.iter().enumerate() {
            seat.job.store(pointer, Ordering::Relaxed);
            let (begin, end) = (i * num_tasks / threads, (i + 1) * num_tasks / threads);
            seat.ticket.store(ticket(operation, begin, end), Ordering::Release);
        }
        // Pairs with the fence of a worker about to park: either it sees its ticket or we see it parked.
        fence(Ordering::SeqCst);
        for (seat, thread) in shared.seats[1..].iter().zip(&self.unpark) {
            if seat.parked.load(Ordering::Relaxed) {
                thread.unpark();
            }
        }
        shared.work_on(0, operation, pointer);

        self.wait_for_others(begin);
        shared.busy.store(false, Ordering::Release);
        let panic = job.panic.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Waits for the tasks that others hold, the caller's being done since `begin`, if all are alike.
    fn wait_for_others(&self, begin: Option<Duration>) {
        let done = || self.shared.pending.0.load(Ordering::Acquire) == 0;
        for _ in 0..CALLER_SPINS {
            if done() {
                return;
            }
            std::hint::spin_loop();
        }
        let own_end = self.start.elapsed();
        while !done() {
            thread::yield_now();
        }
        // Tasks are alike, and the caller had more than one: who holds its last for longer than all of
        // those took was put aside.
        let end = self.start.elapsed();
        let held_up = end - own_end;
        if begin.is_some_and(|begin| held_up > own_end - begin) && self.threads() == 2 {
            self.alone.extend(as_nanos(end), as_nanos(held_up));
        }
    }

    /// Into how many tasks to split `count` items of about `item_ns` nanoseconds on one core: 1 where
    /// handing out would cost more than it brings, else a few per thread.
    pub(crate) fn num_tasks(&self, count: usize, item_ns: usize) -> usize {
        /// Below this an exchange with another core is a loss.
        const MIN_TASK_NS: usize = 400;
        const TASKS_PER_THREAD: usize = 4;
        if self.threads() == 1 || count <= 1 {
            return count.min(1);
        }
        let worth = count.saturating_mul(item_ns) / MIN_TASK_NS;
        if worth < 2 { 1 } else { worth.min(self.threads() * TASKS_PER_THREAD).min(count) }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        for handle in self.handles.drain(..) {
            handle.thread().unpark();
            // Tasks' panics are caught, so a worker ends well.
            let _ = handle.join();
        }
    }
}

fn as_nanos(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

fn ticket(operation: u64, begin: usize, end: usize) -> u64 {
    operation << (2 * INDEX_BITS) | (begin as u64) << INDEX_BITS | end as u64
}

/// The number of the operation that a ticket belongs to.
fn operation_of(ticket: u64) -> u64 {
    ticket >> (2 * INDEX_BITS)
}

impl Seat {
    /// Takes one task of `operation`: the owner off the front, others off the back.
    fn take(&self, operation: u64, front: bool) -> Option<usize> {
        let mut current = self.ticket.load(Ordering::Acquire);
        loop {
            let begin = (current >> INDEX_BITS & INDEX_MASK) as usize;
            let end = (current & INDEX_MASK) as usize;
            if begin == end || operation_of(current) != operation {
                return None;
            }
            let (next, taken) = if front {
                (ticket(operation, begin + 1, end), begin)
            } else {
                (ticket(operation, begin, end - 1), end - 1)
            };
            match self.ticket.compare_exchange_weak(current, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(taken),
                Err(seen) => current = seen,
            }
        }
    }
}

impl Shared {
    /// Does this seat's tasks of `operation`, then others', then reports them all at once.
    fn work_on(&self, own: usize, operation: u64, job: *mut Job<'static>) {
        let mut done = 0;
        for i in 0..self.seats.len() {
            let seat = &self.seats[(own + i) % self.seats.len()];
            while let Some(index) = seat.take(operation, i == 0) {
                // SAFETY: a task of `operation` was taken and not yet reported, so `pending` is not 0 and
                // the caller is still inside `run_all`, where the job lives. `job` is this operation's:
                // it was stored before the ticket that named the operation and is replaced only after
                // all its tasks have been reported.
                let job = unsafe { &*job };
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| (job.task)(index))) {
                    let mut first = job.panic.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    first.get_or_insert(payload);
                }
                done += 1;
            }
        }
        if done > 0 {
            self.pending.0.fetch_sub(done, Ordering::AcqRel);
        }
    }
}

/// A worker's life: wait for a ticket of a new operation, work on it, repeat.
fn work(shared: &Shared, own: usize) {
    let seat = &shared.seats[own];
    let mut last = 0;
    loop {
        let Some(operation) = wait(shared, seat, last) else { return };
        last = operation;
        shared.work_on(own, operation, seat.job.load(Ordering::Relaxed));
    }
}

/// The number of the next operation after `last`; `None` when the pool closes.
fn wait(shared: &Shared, seat: &Seat, last: u64) -> Option<u64> {
    let new = || {
        let operation = operation_of(seat.ticket.load(Ordering::Acquire));
        (operation != last).then_some(operation)
    };
    let start = Instant::now();
    loop {
        for _ in 0..64 {
            if let Some(operation) = new() {
                return Some(operation);
            }
            std::hint::spin_loop();
        }
        if shared.closing.load(Ordering::Relaxed) {
            return None;
        }
        if start.elapsed() > SPIN {
            break;
        }
        // A thread behind a socket that the system lets wait for this core would wait for its next tick:
        // milliseconds, several times what a token of the fast lane takes.
        thread::yield_now();
    }
    seat.parked.store(true, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    let found = loop {
        if let Some(operation) = new() {
            break Some(operation);
        }
        if shared.closing.load(Ordering::SeqCst) {
            break None;
        }
        thread::park();
    };
    seat.parked.store(false, Ordering::Relaxed);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_counts() {
        for threads in 1..=4 {
            let pool = ThreadPool::new(threads);
            for num_tasks in [0, 1, 2, 3, 7, 64, MAX_TASKS, MAX_TASKS + 1, 3 * MAX_TASKS + 5] {
                let counts: Vec<_> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(num_tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_short_operations_with_pauses_long_enough_to_park() {
        let pool = ThreadPool::new(3);
        let total = AtomicUsize::new(0);
        for round in 0..20_000 {
            pool.run(5, &|i| {
                total.fetch_add(i + 1, Ordering::Relaxed);
            });
            assert_eq!(total.load(Ordering::Relaxed), (round + 1) * 15);
            if round % 2_000 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_after_the_rest_and_the_pool_lives_on() {
        let pool = ThreadPool::new(2);
        let done = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, &|i| {
                assert!(i != 5, "task five");
                done.fetch_add(1, Ordering::Relaxed);
            });
        }));
        assert_eq!(*result.unwrap_err().downcast::<&str>().unwrap(), "task five");
        assert_eq!(done.load(Ordering::Relaxed), 7);
        pool.run(2, &|_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 9);
    }

    #[test]
    fn nested_and_concurrent_operations_run_on_their_callers() {
        let pool = ThreadPool::new(2);
        let total = AtomicUsize::new(0);
        let add = |_| {
            total.fetch_add(1, Ordering::Relaxed);
        };
        pool.run(4, &|_| pool.run(4, &add));
        assert_eq!(total.load(Ordering::Relaxed), 16);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..500).for_each(|_| pool.run(4, &add)));
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 16 + 3 * 500 * 4);
    }
}
