//! What passes cost on this machine, measured before the first sequence.

use std::ops::Range;
use std::time::Duration;

use arrayvec::ArrayVec;
use tandem_models::outputs::Choice;
use tandem_models::{ForwardBatch, Model, ModelError, Wanted};

use crate::api::{EngineError, Lane};
use crate::block_manager::BlockTable;
use crate::engine::Engine;
use crate::prefill::{PrefillLimit, Reach};
use crate::sequence::ModelRole;
use crate::speculation::{DraftHead, DraftPolicy, DraftTokens, HeadPolicy, PROFILED_ROWS, StepCosts};

/// Context before the measured rows.
const CONTEXT: usize = 64;

/// The fastest of so many passes counts: as many as fit the time, within these bounds.
const PASSES: std::ops::RangeInclusive<usize> = 2..=16;

/// Time for the passes of one row count.
const TIME_A_ROW_COUNT: Duration = Duration::from_millis(20);

/// After so long one pass is enough: a large model's are steadier, and its start is not to wait for this.
const TIME_OF_SLOW_PASSES: Duration = Duration::from_millis(60);

/// The context at which the price of context is measured, where the cache and the model have room for it.
const FAR_CONTEXT: usize = 1_024;

/// Passes at each context for that.
const CONTEXT_PASSES: usize = 3;

/// A model whose pass over one row takes longer is slow.
const SLOW_ROW: Duration = Duration::from_millis(20);

/// Row counts that are timed of a slow model: few, because the start waits for them. Passes that read much cost
/// nearly the same for few rows, and real ones correct what lies between.
const ROWS_OF_SLOW_MODELS: [usize; 5] = [1, 4, 8, 16, 64];

/// Of a slow model, no more rows are timed than take so long; what more would take follows in proportion.
const SLOW_ENOUGH: Duration = Duration::from_millis(100);

/// No more rows are timed than take so long.
const SLOW_PASS: Duration = Duration::from_millis(250);

/// How long the fast lane may have to wait for a layer of the target or a pass of the draft that
/// prefills a deep prompt. Where even few rows take longer, twice the time of one row.
const SLICE: Duration = Duration::from_micros(500);

/// Prompts are cut into pieces no smaller than this, whatever they cost: below it the weights are read
/// too often.
const MIN_PREFILL_TOKENS: usize = 32;

impl Engine {
    /// Measures what passes cost, for the speculation policy and for the size of prefill chunks. Takes
    /// some tens of passes; must run before the first sequence, because it writes to the KV cache.
    ///
    /// # Errors
    /// If a pass fails.
    pub fn profile(&mut self, setting: DraftTokens, clock: &dyn Fn() -> Duration) -> Result<(), EngineError> {
        assert!(self.scheduler.is_idle(), "the profile would overwrite live sequences: this is a bug");
        let mut costs = [Vec::new(), Vec::new()];
        for role in [ModelRole::Target, ModelRole::Draft] {
            costs[role as usize] = self.time_passes(role, &PROFILED_ROWS, false, clock)?;
        }
        if self.lane_isolation {
            for role in [ModelRole::Target, ModelRole::Draft] {
                self.limit_prefill(role, &costs[role as usize], clock)?;
            }
        }
        let [target, draft] = costs;
        let of_one_row = draft.first().map(|&(_, time)| time);
        self.policy = DraftPolicy::new(setting, StepCosts::from_measured(target, draft));
        if self.draft_head_setting == DraftHead::Auto
            && let Some(of_one_row) = of_one_row
        {
            self.measure_draft_heads(of_one_row, clock)?;
        }
        Ok(())
    }

    /// Limits prefill by what a model's passes cost: texts to embed always, prompts where a fast lane waits for them.
    fn limit_prefill(
        &mut self,
        role: ModelRole,
        costs: &[(usize, Duration)],
        clock: &dyn Fn() -> Duration,
    ) -> Result<(), EngineError> {
        let Some(reach) = self.models.get(role).map(|model| Reach::of(model.config())) else { return Ok(()) };
        // The draft's passes are not suspended.
        let num_slices = if role == ModelRole::Target { self.num_target_layers() } else { 1 };
        let has_fast = self.models.has(Lane::Fast);
        // What context costs takes long to measure; where nobody is in a hurry the start does not wait for it.
        let context_seconds = if has_fast { self.time_context(role, costs, &reach, clock)? } else { 0.0 };
        let budget = prefill_budget(costs, num_slices);
        let most = self.limits.embedding[role as usize].num_tokens;
        let num_tokens = prefill_chunk(costs, budget).min(most).max(1);
        let context_cost = context_seconds * num_tokens as f64 / budget.as_secs_f64().max(1e-9);
        let limit = PrefillLimit { num_tokens, context_cost, reach };
        self.limits.embedding[role as usize] = limit;
        if has_fast {
            self.limits.deep_prefill[role as usize] = limit;
        }
        Ok(())
    }

    /// Measures what short heads save of a draft pass that takes `of_one_row` with the whole one, and
    /// chooses one.
    fn measure_draft_heads(
        &mut self,
        of_one_row: Duration,
        clock: &dyn Fn() -> Duration,
    ) -> Result<(), EngineError> {
        let mut measured = ArrayVec::<_, { HeadPolicy::MOST_LENGTHS }>::new();
        for length in self.draft_head_lengths() {
            if !self.set_short_head(length)? {
                break;
            }
            if let Some(&(_, time)) = self.time_passes(ModelRole::Draft, &[1], true, clock)?.first() {
                measured.push((length, of_one_row.saturating_sub(time).as_secs_f64()));
            }
        }
        self.draft_head = HeadPolicy::new(self.draft_head_setting, &measured, &self.policy);
        self.take_draft_head()
    }

    /// Lengths that a short head may have. Through a map of vocabularies ids are in no order that says
    /// anything.
    fn draft_head_lengths(&self) -> ArrayVec<usize, { HeadPolicy::MOST_LENGTHS }> {
        match self.vocab_map {
            Some(_) => ArrayVec::new(),
            None => HeadPolicy::lengths(self.draft_head_setting, self.num_token_ids[Lane::Deep as usize]),
        }
    }

    /// Sets the length that the user has asked for.
    pub(crate) fn fix_draft_head(&mut self) -> Result<(), EngineError> {
        let lengths = self.draft_head_lengths();
        let Some(&length) = lengths.first() else { return Ok(()) };
        if self.set_short_head(length)? {
            self.draft_head = HeadPolicy::new(self.draft_head_setting, &[(length, 0.0)], &self.policy);
            self.take_draft_head()?;
        }
        Ok(())
    }

    /// Goes over to the head that the policy has chosen.
    pub(crate) fn take_draft_head(&mut self) -> Result<(), EngineError> {
        let chosen = self.draft_head.current();
        if let Some((length, _)) = chosen {
            self.set_short_head(length)?;
        }
        self.limits.short_head = chosen.is_some();
        self.policy.costs_mut().set_draft_saving(chosen.map_or(0.0, |(_, saving)| saving));
        Ok(())
    }

    fn set_short_head(&mut self, length: usize) -> Result<bool, EngineError> {
        let Some(draft) = self.models.get(ModelRole::Draft) else { return Ok(false) };
        draft.set_short_head(length).map_err(|error| EngineError::Forward(error.to_string()))
    }

    fn num_target_layers(&self) -> usize {
        self.models.target.as_ref().map_or(1, |model| model.config().num_layers.max(1))
    }

    /// Seconds that each token of context adds that a row attends to, in a pass that makes no logits. Few rows are timed
    /// where passes are slow, `costs` says how slow; 0 where there is no room for enough context.
    fn time_context(
        &mut self,
        role: ModelRole,
        costs: &[(usize, Duration)],
        reach: &Reach,
        clock: &dyn Fn() -> Duration,
    ) -> Result<f64, EngineError> {
        let quick = costs.iter().rev().find(|(_, time)| *time < TIME_OF_SLOW_PASSES);
        let rows = quick.map_or(1, |&(rows, _)| rows);
        let far = FAR_CONTEXT.min(self.max_model_len.saturating_sub(rows));
        let mut table = BlockTable::default();
        if far < 2 * CONTEXT || !self.scheduler.blocks.grow(&mut table, far + rows) {
            return Ok(0.0);
        }
        let mut best = [Duration::MAX; 2];
        let mut outcome = Ok(());
        for _ in 0..CONTEXT_PASSES {
            for (best, context) in best.iter_mut().zip([CONTEXT, far]) {
                let pass = Pass { positions: context..context + rows, num_logits: 1, short_head: false };
                match self.time_pass(role, &table, &pass, clock) {
                    Ok(time) => *best = time.min(*best),
                    Err(error) => outcome = Err(error),
                }
            }
        }
        self.scheduler.blocks.release(table);
        let seconds = best[1].saturating_sub(best[0]).as_secs_f64();
        let num_tokens = reach.tokens(far) - reach.tokens(CONTEXT);
        outcome.map(|()| if num_tokens > 0.0 { seconds / (rows as f64 * num_tokens) } else { 0.0 })
    }

    /// Times passes of one sequence of each of these many rows after some context, up to the first count that is
    /// slow: more rows follow from fewer. Fewer too where the cache has no blocks for more. Of a model whose
    /// passes are slow all the same, only [`ROWS_OF_SLOW_MODELS`] are timed, and the counts between are told by
    /// their neighbours.
    fn time_passes(
        &mut self,
        role: ModelRole,
        row_counts: &[usize],
        short_head: bool,
        clock: &dyn Fn() -> Duration,
    ) -> Result<Vec<(usize, Duration)>, EngineError> {
        let mut table = BlockTable::default();
        let mut times = Vec::with_capacity(row_counts.len());
        let outcome = self.fill_times(role, row_counts, short_head, &mut table, &mut times, clock);
        self.scheduler.blocks.release(table);
        outcome.map(|()| with_those_between(&times, row_counts))
    }

    /// The context that passes follow is whatever the cache holds: it costs the same.
    fn fill_times(
        &mut self,
        role: ModelRole,
        row_counts: &[usize],
        short_head: bool,
        table: &mut BlockTable,
        times: &mut Vec<(usize, Duration)>,
        clock: &dyn Fn() -> Duration,
    ) -> Result<(), EngineError> {
        for &rows in row_counts {
            if let (Some(&(_, first)), Some(&(_, last))) = (times.first(), times.last())
                && is_left_out(rows, first, last)
            {
                continue;
            }
            if self.models.get(role).is_none() || !self.scheduler.blocks.grow(table, CONTEXT + rows) {
                break;
            }
            let timed = Pass { positions: CONTEXT..CONTEXT + rows, num_logits: rows, short_head };
            if times.is_empty() {
                // Of a slow model the pass itself is long beside what its first time costs; it may also have been
                // put aside for once.
                let mut first = self.time_pass(role, table, &timed, clock)?;
                if (TIME_OF_SLOW_PASSES..SLOW_PASS).contains(&first) {
                    first = first.min(self.time_pass(role, table, &timed, clock)?);
                }
                if first >= TIME_OF_SLOW_PASSES {
                    times.push((rows, first));
                    continue;
                }
            }
            let mut best = Duration::MAX;
            let mut spent = Duration::ZERO;
            for pass in 1..=*PASSES.end() {
                let time = self.time_pass(role, table, &timed, clock)?;
                best = best.min(time);
                spent += time;
                let is_enough = pass >= *PASSES.start() && spent > TIME_A_ROW_COUNT;
                if is_enough || spent > TIME_OF_SLOW_PASSES {
                    break;
                }
            }
            times.push((rows, best));
            if best > SLOW_PASS {
                break;
            }
        }
        Ok(())
    }

    fn time_pass(
        &mut self,
        role: ModelRole,
        table: &BlockTable,
        pass: &Pass,
        clock: &dyn Fn() -> Duration,
    ) -> Result<Duration, EngineError> {
        let Some(model) = self.models.get(role) else { return Ok(Duration::ZERO) };
        let inputs = &mut self.draft_batch.inputs;
        inputs.clear();
        let tokens = vec![0; pass.positions.len()];
        self.scheduler.blocks.push_sequence(inputs, &tokens, pass.positions.start, table, pass.num_logits);
        inputs.short_head = pass.short_head;
        inputs.wanted.fill(Wanted::Token(Choice::default()));
        let before = clock();
        compute(model, inputs).map_err(|error| EngineError::Forward(error.to_string()))?;
        Ok(clock().saturating_sub(before))
    }
}

/// A pass from begin to finish.
fn compute(model: &mut dyn Model, inputs: &ForwardBatch) -> Result<(), ModelError> {
    model.begin(inputs)?;
    while model.advance()? {}
    model.finish().map(|_| ())
}

/// A pass over the tokens at these positions of one sequence, with logits for the last `num_logits`.
struct Pass {
    positions: Range<usize>,
    num_logits: usize,
    short_head: bool,
}

/// True if passes over `rows` rows are not timed of a model whose pass over the fewest took `first`, and that over
/// the most so far `last`.
fn is_left_out(rows: usize, first: Duration, last: Duration) -> bool {
    first > SLOW_ROW && (!ROWS_OF_SLOW_MODELS.contains(&rows) || (rows > 16 && last > SLOW_ENOUGH))
}

/// `times`, and those of the row counts between: on the line from one neighbour to the other.
fn with_those_between(times: &[(usize, Duration)], row_counts: &[usize]) -> Vec<(usize, Duration)> {
    let time = |rows: usize| {
        let after = times.partition_point(|&(timed, _)| timed < rows);
        let &(r1, t1) = times.get(after)?;
        if r1 == rows {
            return Some((rows, t1));
        }
        let (r0, t0) = times[after.checked_sub(1)?];
        let share = (rows - r0) as f64 / (r1 - r0) as f64;
        Some((rows, Duration::from_secs_f64(t0.as_secs_f64() * (1.0 - share) + t1.as_secs_f64() * share)))
    };
    row_counts.iter().filter_map(|&rows| time(rows)).collect()
}

/// The time of a pass with a chunk of a prompt in it: a slice between any two suspensions.
fn prefill_budget(costs: &[(usize, Duration)], num_slices: usize) -> Duration {
    let of_one_row = costs.first().map_or(Duration::ZERO, |&(_, time)| time);
    (SLICE * num_slices as u32).max(2 * of_one_row)
}

/// Rows that fit the budget: the largest measured count, or as many times it as its time fits.
fn prefill_chunk(costs: &[(usize, Duration)], budget: Duration) -> usize {
    let fitting = costs.iter().rev().find(|(_, time)| *time <= budget);
    let Some(&(rows, time)) = fitting else { return MIN_PREFILL_TOKENS };
    let times = budget.as_secs_f64() / time.as_secs_f64().max(1e-9);
    let is_largest = costs.last().is_some_and(|&(most, _)| most == rows);
    let rows = if is_largest { (rows as f64 * times) as usize } else { rows };
    rows.max(MIN_PREFILL_TOKENS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(micros: &[(usize, u64)], num_slices: usize) -> usize {
        let costs: Vec<_> = micros.iter().map(|&(rows, time)| (rows, Duration::from_micros(time))).collect();
        prefill_chunk(&costs, prefill_budget(&costs, num_slices))
    }

    #[test]
    fn a_chunk_takes_about_a_slice() {
        // 10 layers: 5 ms for the pass.
        assert_eq!(chunk(&[(1, 300), (64, 1_000)], 10), 320);
        assert_eq!(chunk(&[(1, 300), (48, 4_000), (64, 6_000)], 10), 48);
    }

    #[test]
    fn row_counts_between_those_timed_lie_between() {
        let millis = |times: &[(usize, u64)]| -> Vec<_> {
            times.iter().map(|&(rows, time)| (rows, Duration::from_millis(time))).collect()
        };
        let counts = [1, 2, 3, 4, 8, 16];
        let filled = with_those_between(&millis(&[(1, 100), (4, 130), (8, 150)]), &counts);
        assert_eq!(filled, millis(&[(1, 100), (2, 110), (3, 120), (4, 130), (8, 150)]));
        assert!(with_those_between(&[], &counts).is_empty());
        let [quick, slow, long] = [10, 30, 200].map(Duration::from_millis);
        assert!(is_left_out(2, slow, slow) && !is_left_out(4, slow, slow) && !is_left_out(2, quick, quick));
        assert!(is_left_out(64, slow, long) && !is_left_out(64, slow, slow) && !is_left_out(64, quick, long));
    }

    #[test]
    fn where_one_row_is_slow_a_chunk_costs_two_rows_and_is_never_tiny() {
        assert_eq!(chunk(&[(1, 100_000), (64, 150_000), (128, 300_000)], 1), 64);
        assert_eq!(chunk(&[(1, 100_000), (8, 300_000)], 1), MIN_PREFILL_TOKENS);
        assert_eq!(chunk(&[], 4), MIN_PREFILL_TOKENS);
    }
}
