//! Who runs: the queues, the seats, and who gives way when there is not room for all. Pure
//! bookkeeping: no model, and no clock but the time passed in. What a pass computes is in
//! [`crate::batch`].
//!
//! **Order.** Interactive before batch, then the oldest first ([`Urgency`]). Each lane has a queue and
//! seats of its own, so that a deep sequence which waits never stands before a fast one.
//!
//! **Blocks** are taken as a sequence grows. When there are none left the least urgent running
//! sequence is preempted: its blocks go back (those that are full stay cached), it waits again and
//! computes later what it lost. The most urgent one is never preempted and every sequence fits alone
//! (checked at submission), so somebody always makes progress; and who has waited long for blocks
//! keeps everybody younger from starting, so nobody starves.
//!
//! **Prompts** that begin alike are computed once: while a running sequence computes what a waiting one
//! could then find in the prefix cache, that one waits and others may have the seat. It waits only for a
//! more urgent one, which goes before it in every pass anyhow, and only while that one runs and computes
//! its prompt: nobody waits in a circle, nor for an answer.

#![expect(clippy::vec_box, reason = "sequences move from queue to seat to delivery: their boxes do")]

use std::collections::VecDeque;
use std::time::Duration;

use crate::api::{BATCH_PATIENCE, FinishReason, Lane, Priority, SequenceId};
use crate::block_manager::{BlockManager, CachedPrefix};
use crate::drain::DrainRate;
use crate::sequence::{ModelRole, Sequence, Urgency};

/// Blocks that an admitted sequence, and each running one, should still be able to take before
/// anybody must be preempted; fewer if it will not need as many.
const HEADROOM_BLOCKS: usize = 4;

/// Fewer tokens of a prompt are sooner computed beside others than found a pass later.
const WORTH_WAITING_FOR: usize = 32;

/// Waiting and running sequences, and the blocks they own.
pub(crate) struct Scheduler {
    max_num_seqs: usize,
    pub(crate) blocks: BlockManager,
    /// By lane, each in no particular order.
    waiting: [VecDeque<Box<Sequence>>; 2],
    /// A sequence keeps its seat while it runs. The first half is the fast lane's. Boxed, because every
    /// step goes along all seats a few times.
    pub(crate) seats: Vec<Option<Box<Sequence>>>,
    /// Finished, blocks released, the client still has to take the last events.
    delivering: Vec<Box<Sequence>>,
    /// Ended while they waited, to be retired.
    expired: Vec<Box<Sequence>>,
    /// Scratch: seats of those whose prompts others may wait for.
    forerunners: Vec<usize>,
    num_preemptions: u64,
    num_cached_tokens: u64,
    /// By lane.
    drain: [DrainRate; 2],
}

impl Scheduler {
    /// `max_num_seqs` seats a lane.
    pub(crate) fn new(max_num_seqs: usize, blocks: BlockManager) -> Self {
        Scheduler {
            max_num_seqs,
            blocks,
            waiting: [VecDeque::new(), VecDeque::new()],
            seats: std::iter::repeat_with(|| None).take(2 * max_num_seqs).collect(),
            delivering: Vec::new(),
            expired: Vec::new(),
            forerunners: Vec::with_capacity(max_num_seqs),
            num_preemptions: 0,
            num_cached_tokens: 0,
            drain: Default::default(),
        }
    }

    pub(crate) fn add(&mut self, sequence: Box<Sequence>) {
        self.waiting[sequence.lane as usize].push_back(sequence);
    }

    pub(crate) fn num_waiting(&self) -> usize {
        self.waiting.iter().map(VecDeque::len).sum()
    }

    /// The same by lane.
    pub(crate) fn num_waiting_by_lane(&self) -> [usize; 2] {
        [Lane::Fast, Lane::Deep].map(|lane| self.waiting[lane as usize].len())
    }

    /// The running sequences, by seat.
    pub(crate) fn running(&self) -> impl Iterator<Item = &Sequence> {
        self.seats.iter().flatten().map(|sequence| &**sequence)
    }

    pub(crate) fn num_preemptions(&self) -> u64 {
        self.num_preemptions
    }

    /// Tokens that started sequences found in the prefix cache.
    pub(crate) fn num_cached_tokens(&self) -> u64 {
        self.num_cached_tokens
    }

    /// Time until a sequence that starts to wait now would run, by lane.
    pub(crate) fn queue_wait_by_lane(&self) -> [Duration; 2] {
        std::array::from_fn(|lane| self.drain[lane].time_for(self.waiting[lane].len()))
    }

    /// Nothing to compute.
    pub(crate) fn is_idle(&self) -> bool {
        self.num_waiting() == 0 && self.running().next().is_none()
    }

    /// Clients that have not taken their last events.
    pub(crate) fn num_delivering(&self) -> usize {
        self.delivering.len()
    }

    /// Starts waiting sequences while there is room for them.
    pub(crate) fn admit(&mut self, now: Duration) {
        // Set when somebody has waited long for blocks: nobody less urgent starts before.
        let mut overdue: Option<Urgency> = None;
        for lane in 0..2 {
            let mut num_started = 0;
            self.find_forerunners(lane);
            while let Some(seat) = self.seat_for(lane, now) {
                let has_seat = |s: &Sequence| self.seats[seat].is_none() || self.outranks(s, seat, now);
                let may = |s: &Sequence| has_seat(s) && !self.is_forerun(s, now);
                let Some((index, turn)) = self.first_waiting(lane, now, may) else { break };
                if overdue.is_some_and(|overdue| overdue < turn) {
                    break;
                }
                if !self.make_room(lane, index, now) {
                    if self.waiting[lane][index].age(now) >= BATCH_PATIENCE {
                        overdue = Some(overdue.map_or(turn, |overdue| overdue.min(turn)));
                    }
                    break;
                }
                // Unless that was done for its blocks.
                self.preempt(seat);
                self.start(lane, index, seat, now);
                self.find_forerunners(lane);
                num_started += 1;
            }
            let others_wait = self.waiting[lane].iter().any(|s| !self.is_forerun(s, now));
            self.drain[lane].observe(num_started, others_wait, now);
        }
    }

    fn start(&mut self, lane: usize, index: usize, seat: usize, now: Duration) {
        let mut sequence = self.waiting[lane].remove(index).expect("found a moment ago: this is a bug");
        // Every row of a text to embed is computed: see `crate::embedding`.
        let prefix = match sequence.is_embedding() {
            true => CachedPrefix::default(),
            false => self.blocks.acquire_prefix(sequence.cache_salt, sequence.committed_tokens()),
        };
        sequence.start(prefix, now);
        self.num_cached_tokens += sequence.num_computed(sequence.lane.answered_by()) as u64;
        self.seats[seat] = Some(sequence);
    }

    /// Notes who of the lane computes a prompt that is worth waiting for.
    fn find_forerunners(&mut self, lane: usize) {
        let mut forerunners = std::mem::take(&mut self.forerunners);
        forerunners.clear();
        if self.waiting[lane].is_empty() {
            self.forerunners = forerunners;
            return;
        }
        let of_lane = lane * self.max_num_seqs..(lane + 1) * self.max_num_seqs;
        forerunners.extend(of_lane.filter(|&seat| {
            let Some(sequence) = self.seats[seat].as_deref() else { return false };
            let computes_prompt = sequence.is_prefilling() && !sequence.is_embedding();
            let has_more = |reach| reach <= sequence.num_prompt_tokens();
            computes_prompt && sequence.finished.is_none() && self.reach(sequence, 1).is_some_and(has_more)
        }));
        self.forerunners = forerunners;
    }

    /// True if the waiting sequence's prompt begins as one that is being computed, by a sequence that goes before it.
    fn is_forerun(&self, waiting: &Sequence, now: Duration) -> bool {
        // It computes all of its prompt in any case.
        if self.forerunners.is_empty() || waiting.is_embedding() || waiting.scores_prompt() {
            return false;
        }
        let forerunners = self.forerunners.iter().filter_map(|&seat| self.seats[seat].as_deref());
        forerunners.filter(|s| s.turn(now) < waiting.turn(now)).any(|s| {
            // Who has waited for it so far may as well have the rest.
            let num_more = if waiting.was_alike(s.id) { 1 } else { WORTH_WAITING_FOR };
            s.cache_salt == waiting.cache_salt
                && self.reach(s, num_more).is_some_and(|reach| waiting.begins_as(s, reach))
        })
    }

    /// How far a running sequence must be computed for the cache to have so many tokens more of it, in whole blocks.
    fn reach(&self, sequence: &Sequence, num_more: usize) -> Option<usize> {
        self.blocks.reach(&sequence.block_table, sequence.lane.answered_by(), num_more)
    }

    /// Whose turn it is of those that `may`.
    fn first_waiting(
        &self,
        lane: usize,
        now: Duration,
        may: impl Fn(&Sequence) -> bool,
    ) -> Option<(usize, Urgency)> {
        let waiting = self.waiting[lane].iter().enumerate().filter(|(_, sequence)| may(sequence));
        waiting.map(|(index, sequence)| (index, sequence.turn(now))).min_by_key(|&(_, turn)| turn)
    }

    /// An empty seat of the lane, or that of the running batch sequence that gives way first; `None`
    /// if nobody waits.
    fn seat_for(&self, lane: usize, now: Duration) -> Option<usize> {
        if self.waiting[lane].is_empty() {
            return None;
        }
        let of_lane = lane * self.max_num_seqs..(lane + 1) * self.max_num_seqs;
        let empty = of_lane.clone().find(|&seat| self.seats[seat].is_none());
        let is_batch = |s: &Sequence| s.turn(now).priority() == Priority::Batch;
        empty.or_else(|| self.least_urgent(now, |seat, s| of_lane.contains(&seat) && is_batch(s)))
    }

    /// True if there are blocks for a waiting sequence's tokens and some more, if need be because
    /// running batch sequences gave theirs to an interactive one.
    fn make_room(&mut self, lane: usize, index: usize, now: Duration) -> bool {
        loop {
            let sequence = &self.waiting[lane][index];
            let tokens = sequence.committed_tokens();
            let (num_found, num_unused) = match sequence.is_embedding() {
                true => (0, 0),
                false => self.blocks.cached_prefix_blocks(sequence.cache_salt, tokens),
            };
            let wanted = self.blocks.blocks_for(tokens.len()) - num_found + num_unused;
            let headroom = self.headroom(sequence) + self.running().map(|s| self.headroom(s)).sum::<usize>();
            let is_alone = self.running().next().is_none();
            let available = self.blocks.num_available();
            if available >= wanted + headroom || (is_alone && available >= wanted) {
                return true;
            }
            let Some(victim) = self.least_urgent(now, |_, _| true) else { return false };
            if !self.outranks(&self.waiting[lane][index], victim, now) {
                return false;
            }
            self.preempt(victim);
        }
    }

    /// Blocks that a sequence will want next.
    fn headroom(&self, sequence: &Sequence) -> usize {
        let at_most = self.blocks.blocks_for(sequence.max_len());
        at_most.saturating_sub(self.blocks.blocks_for(sequence.num_tokens())).min(HEADROOM_BLOCKS)
    }

    /// True if a waiting sequence may take the seat of one that runs: only interactive work that of batch work.
    /// Otherwise whoever runs goes on, or they would take turns at computing the same again.
    fn outranks(&self, waiting: &Sequence, seat: usize, now: Duration) -> bool {
        let priority = waiting.turn(now).priority();
        self.seats[seat].as_ref().is_some_and(|s| priority < s.turn(now).priority())
    }

    /// The running sequence that gives way first. Those of a pass under way do not.
    fn least_urgent(&self, now: Duration, may: impl Fn(usize, &Sequence) -> bool) -> Option<usize> {
        let candidates = self.seats.iter().enumerate().filter_map(|(seat, s)| Some((seat, s.as_deref()?)));
        candidates
            .filter(|(seat, s)| s.finished.is_none() && !s.in_flight && may(*seat, s))
            .max_by_key(|(_, s)| s.turn(now))
            .map(|(seat, _)| seat)
    }

    fn preempt(&mut self, seat: usize) {
        if let Some(mut sequence) = self.seats[seat].take() {
            self.blocks.release(sequence.preempt());
            self.num_preemptions += 1;
            self.add(sequence);
        }
    }

    /// Makes the running sequence's table hold `num_tokens` tokens; less urgent ones are preempted if
    /// need be. False if it has to wait.
    pub(crate) fn grow(&mut self, seat: usize, num_tokens: usize, now: Duration) -> bool {
        loop {
            let Some(sequence) = &mut self.seats[seat] else { return false };
            if self.blocks.grow(&mut sequence.block_table, num_tokens) {
                return true;
            }
            let turn = sequence.turn(now);
            let gives_way = |other: usize, s: &Sequence| other != seat && s.turn(now) > turn;
            let Some(victim) = self.least_urgent(now, gives_way) else { return false };
            self.preempt(victim);
        }
    }

    /// Tells the prefix cache what a running sequence has computed.
    pub(crate) fn register(&mut self, seat: usize) {
        let Some(sequence) = self.seats[seat].as_mut().filter(|s| !s.is_embedding()) else { return };
        let mut table = std::mem::take(&mut sequence.block_table);
        let computed = [ModelRole::Target, ModelRole::Draft].map(|role| sequence.num_computed(role));
        self.blocks.register(&mut table, sequence.cache_salt, sequence.committed_tokens(), computed);
        sequence.block_table = table;
    }

    /// Makes the table hold `num_tokens` tokens, or as many as there are blocks for without anybody
    /// giving way; returns how many it holds.
    pub(crate) fn grow_if_free(&mut self, seat: usize, num_tokens: usize) -> usize {
        let Some(sequence) = &mut self.seats[seat] else { return 0 };
        let mut wanted = num_tokens;
        while wanted > 0 && !self.blocks.grow(&mut sequence.block_table, wanted) {
            wanted -= 1;
        }
        wanted
    }

    /// Ends sequences whose time is over. What they have is their answer.
    pub(crate) fn expire(&mut self, now: Duration) {
        for sequence in self.seats.iter_mut().flatten() {
            if sequence.finished.is_none() && !sequence.in_flight && sequence.is_out_of_time(now) {
                sequence.rollback();
                sequence.finished = Some(FinishReason::Deadline);
            }
        }
        for lane in &mut self.waiting {
            while let Some(index) = lane.iter().position(|sequence| sequence.is_out_of_time(now)) {
                if let Some(mut sequence) = lane.remove(index) {
                    sequence.finished = Some(FinishReason::Deadline);
                    self.expired.push(sequence);
                }
            }
        }
    }

    /// Takes finished sequences from their seats and gives their blocks back; returns all that ended
    /// since the last call.
    pub(crate) fn retire(&mut self) -> impl Iterator<Item = &Sequence> {
        let first_new = self.delivering.len();
        self.delivering.append(&mut self.expired);
        for seat in &mut self.seats {
            if let Some(mut sequence) = seat.take_if(|s| s.finished.is_some() && !s.in_flight) {
                self.blocks.release(std::mem::take(&mut sequence.block_table));
                self.delivering.push(sequence);
            }
        }
        self.delivering[first_new..].iter().map(|sequence| &**sequence)
    }

    /// Offers the finished sequences' last events again and forgets those that took them.
    pub(crate) fn deliver(&mut self) {
        self.delivering.retain_mut(|sequence| sequence.emit().is_ok() && !sequence.is_delivered());
    }

    /// Hands over a finished sequence's last events, now or as soon as its client has room.
    pub(crate) fn deliver_last(&mut self, sequence: Box<Sequence>) {
        self.delivering.push(sequence);
        self.deliver();
    }

    /// A sequence that has not finished, waiting or running.
    pub(crate) fn find(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        let waiting = self.waiting.iter_mut().flatten();
        let mut all = waiting.chain(self.seats.iter_mut().flatten());
        all.find(|s| s.id == id && s.finished.is_none()).map(|sequence| &mut **sequence)
    }

    /// Takes a sequence that has not finished out of the queue or its seat, its blocks back.
    ///
    /// It may be part of a pass under way. That goes on and writes to its blocks, though only to slots
    /// that nobody counts as computed: whoever gets such a block next fills it in a later pass of that
    /// model.
    pub(crate) fn remove(&mut self, id: SequenceId) -> Option<Box<Sequence>> {
        for (lane, drain) in self.waiting.iter_mut().zip(&mut self.drain) {
            if let Some(index) = lane.iter().position(|s| s.id == id) {
                let removed = lane.remove(index);
                if lane.is_empty() {
                    drain.nobody_waits();
                }
                return removed;
            }
        }
        let seat = self.seats.iter_mut().find(|seat| seat.as_ref().is_some_and(|s| s.id == id))?;
        let mut sequence = seat.take()?;
        self.blocks.release(std::mem::take(&mut sequence.block_table));
        Some(sequence)
    }

    /// Removes every sequence that has not finished.
    pub(crate) fn remove_all(&mut self) -> Vec<Box<Sequence>> {
        let mut removed: Vec<Box<Sequence>> =
            self.waiting.iter_mut().flat_map(|lane| lane.drain(..)).collect();
        self.drain.iter_mut().for_each(DrainRate::nobody_waits);
        for mut sequence in self.seats.iter_mut().filter_map(Option::take) {
            self.blocks.release(std::mem::take(&mut sequence.block_table));
            removed.push(sequence);
        }
        removed
    }

    /// Checks the account of blocks; see [`BlockManager::check`].
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.blocks.check(self.running().map(|sequence| &sequence.block_table))
    }
}
