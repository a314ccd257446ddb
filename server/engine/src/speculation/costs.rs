//! What passes cost on this machine: measured at start, over one sequence and little context, then
//! corrected by what real passes take with all that the engine does for them (scheduling, sampling,
//! handing out) and at the contexts of the day: first all passes alike, which serves row counts that were
//! not seen lately, then each row count by its own.

use std::time::Duration;

/// Seconds that passes take.
#[derive(Clone, Debug, Default)]
pub(crate) struct StepCosts {
    /// `(rows, seconds)` of target passes as measured at start, ascending in rows.
    measured_target: Vec<(usize, f64)>,
    /// The same as of now.
    target: Vec<(usize, f64)>,
    target_overhead: Overhead,
    /// One a row count of the target's.
    seen: Vec<Seen>,
    /// Of passes over more rows than were measured.
    seen_beyond: Seen,
    /// As measured at start, for the draft.
    draft: Vec<(usize, f64)>,
    draft_factor: Factor,
    /// What a short head takes off a draft pass that only proposes.
    draft_saving: f64,
}

/// What the engine does for a target pass beyond what was measured, in seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Overhead {
    /// What is made of a row after the pass, at the temperatures of the day: only whole rows are drawn from then; of
    /// the others the pass itself has chosen a token.
    of_row: f64,
    /// All else.
    of_pass: f64,
}

/// How many times what was expected the passes near a row count took.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    times: f64,
    weight: f64,
}

impl Seen {
    fn observe(&mut self, times: f64, weight: f64) {
        let kept = 1.0 - NEW_WEIGHT * weight;
        self.times = kept * self.times + weight * times;
        self.weight = kept * self.weight + weight;
    }

    /// Once expected, until there is experience.
    fn factor(&self) -> f64 {
        (EXPECTED_WEIGHT + self.times) / (EXPECTED_WEIGHT + self.weight)
    }
}

/// Passes that the expectation of a row count is worth.
const EXPECTED_WEIGHT: f64 = 4.0;

/// How many times what was measured a draft pass takes. It is short, so that all it meets adds up: other
/// contexts, sampling, scheduling, threads that had fallen asleep.
#[derive(Clone, Copy, Debug)]
struct Factor(f64);

impl Default for Factor {
    fn default() -> Self {
        Factor(1.0)
    }
}

/// Weight of a new pass: about the last hundred count.
const NEW_WEIGHT: f64 = 0.02;

/// A pass counts for at most so many times what was measured: it may have been put aside by the system.
const MOST_TIMES: f64 = 4.0;

impl Overhead {
    fn observe(&mut self, measured: f64, rows: usize, drawing: f64, seconds: f64) {
        if rows > 0 {
            let of_row = (drawing / rows as f64).min(MOST_TIMES * measured);
            self.of_row += NEW_WEIGHT * (of_row - self.of_row);
        }
        let beyond = (seconds.min(MOST_TIMES * measured + drawing) - measured - drawing).max(0.0);
        self.of_pass += NEW_WEIGHT * (beyond - self.of_pass);
    }
}

impl Factor {
    fn observe(&mut self, measured: f64, seconds: f64) {
        if measured > 0.0 {
            self.0 += NEW_WEIGHT * ((seconds / measured).clamp(1.0, MOST_TIMES) - self.0);
        }
    }
}

/// What a row adds to a pass at least, as a share of what rows add on average: where a few passes were
/// measured at start, and where many were seen.
const LEAST_MEASURED_ROW: f64 = 0.5;
const LEAST_SEEN_ROW: f64 = 0.1;

/// Row counts worth measuring: every length of one sequence, then batches of them.
pub(crate) const PROFILED_ROWS: [usize; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32, 64];

impl StepCosts {
    /// From `(rows, time)` of passes, ascending in rows; empty for a model that is not there.
    pub(crate) fn from_measured(target: Vec<(usize, Duration)>, draft: Vec<(usize, Duration)>) -> Self {
        let seconds = |costs: Vec<(usize, Duration)>| {
            let mut costs: Vec<_> =
                costs.into_iter().map(|(rows, time)| (rows, time.as_secs_f64())).collect();
            make_rising(&mut costs, LEAST_MEASURED_ROW);
            costs
        };
        let (target, draft) = (seconds(target), seconds(draft));
        let seen = vec![Seen::default(); target.len()];
        StepCosts { measured_target: target.clone(), target, seen, draft, ..StepCosts::default() }
    }

    /// Seconds of a target pass over `rows` rows; none for no rows.
    pub(crate) fn target(&self, rows: usize) -> f64 {
        match self.target.last() {
            Some(&(most, seconds)) if rows > most => {
                let measured = Self::lookup(&self.measured_target, rows);
                (self.seen_beyond.factor() * self.expected(rows, measured)).max(seconds)
            }
            _ => Self::lookup(&self.target, rows),
        }
    }

    /// Notes what a target pass over `rows` rows took, `drawing` of it for drawing from `num_logits` of them.
    pub(crate) fn observe_target(
        &mut self,
        rows: usize,
        num_logits: usize,
        drawing: Duration,
        time: Duration,
    ) {
        let seconds = time.as_secs_f64();
        let measured = Self::lookup(&self.measured_target, rows);
        self.target_overhead.observe(measured, num_logits, drawing.as_secs_f64(), seconds);
        if measured > 0.0 {
            let times = (seconds / self.expected(rows, measured)).min(MOST_TIMES);
            let after = self.measured_target.partition_point(|c| c.0 < rows);
            if let Some(&(r1, _)) = self.measured_target.get(after) {
                let before = after.checked_sub(1);
                let share = before.map_or(0.0, |before| {
                    let r0 = self.measured_target[before].0;
                    (r1 - rows) as f64 / (r1 - r0) as f64
                });
                if let Some(before) = before {
                    self.seen[before].observe(times, share);
                }
                self.seen[after].observe(times, 1.0 - share);
            } else {
                // What follows in proportion may be far off, which says nothing about the counts below.
                self.seen_beyond.observe(times, 1.0);
            }
        }
        let mut target = std::mem::take(&mut self.target);
        for (index, cost) in target.iter_mut().enumerate() {
            let (rows, measured) = self.measured_target[index];
            *cost = (rows, self.seen[index].factor() * self.expected(rows, measured));
        }
        make_rising(&mut target, LEAST_SEEN_ROW);
        self.target = target;
    }

    /// What passes of all row counts let expect of one that took `measured` at start.
    fn expected(&self, rows: usize, measured: f64) -> f64 {
        measured + self.target_overhead.of_pass + rows as f64 * self.target_overhead.of_row
    }

    /// Notes what a draft pass over `rows` rows took, with the short head or the whole one.
    pub(crate) fn observe_draft(&mut self, rows: usize, short_head: bool, time: Duration) {
        let saving = if short_head { self.draft_saving } else { 0.0 };
        self.draft_factor.observe(Self::lookup(&self.draft, rows) - saving, time.as_secs_f64());
    }

    /// Draft passes that only propose take `seconds` less than with the whole head.
    pub(crate) fn set_draft_saving(&mut self, seconds: f64) {
        self.draft_saving = seconds;
    }

    /// Seconds of a draft pass over `rows` rows with the whole head.
    pub(crate) fn whole_draft(&self, rows: usize) -> f64 {
        self.draft_factor.0 * Self::lookup(&self.draft, rows)
    }

    /// The least that any row beyond the first `rows` adds to a target pass.
    pub(crate) fn least_target_row(&self, rows: usize) -> f64 {
        let slopes = self.target.windows(2).filter(|w| w[1].0 > rows);
        let slopes = slopes.map(|w| (w[1].1 - w[0].1) / (w[1].0 - w[0].0) as f64);
        slopes
            .chain(self.target.last().map(|&(rows, seconds)| seconds / rows as f64))
            .fold(f64::INFINITY, f64::min)
    }

    /// Seconds that `rows` more rows add to a draft pass over `others` rows, which are the fast lane's and
    /// have the whole head.
    pub(crate) fn draft_beside(&self, rows: usize, others: usize) -> f64 {
        let saving = if rows > 0 && others == 0 { self.draft_saving } else { 0.0 };
        let added = Self::lookup(&self.draft, rows + others) - Self::lookup(&self.draft, others);
        self.draft_factor.0 * (added - saving).max(0.0)
    }

    /// Between measured points linearly, beyond them in proportion.
    fn lookup(costs: &[(usize, f64)], rows: usize) -> f64 {
        if rows == 0 {
            return 0.0;
        }
        let after = costs.partition_point(|c| c.0 < rows);
        match (after.checked_sub(1).map(|i| costs[i]), costs.get(after)) {
            (_, Some(&(at, seconds))) if at == rows => seconds,
            (Some((r0, s0)), Some(&(r1, s1))) => s0 + (s1 - s0) * (rows - r0) as f64 / (r1 - r0) as f64,
            (Some((r0, s0)), None) => s0 * rows as f64 / r0 as f64,
            (None, Some(&(_, seconds))) => seconds,
            (None, None) => 0.0,
        }
    }
}

/// Makes `costs`, ascending in rows, rise with them: a pass over more rows cannot be cheaper, so where it seems
/// so the smaller one was disturbed; nor is a row free because of that, it costs some part of what rows
/// cost on the whole.
fn make_rising(costs: &mut [(usize, f64)], least_row: f64) {
    let mut least = f64::INFINITY;
    for cost in costs.iter_mut().rev() {
        least = least.min(cost.1);
        cost.1 = least;
    }
    if let (Some(&(fewest, least)), Some(&(most, greatest))) = (costs.first(), costs.last())
        && most > fewest
    {
        let row = least_row * (greatest - least) / (most - fewest) as f64;
        let mut before = (fewest, least);
        for cost in costs.iter_mut() {
            cost.1 = cost.1.max(before.1 + row * (cost.0 - before.0) as f64);
            before = *cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_between_and_beyond_what_was_measured() {
        let micros = |rows, time| (rows, Duration::from_micros(time));
        // The pass over two rows was disturbed.
        let costs = StepCosts::from_measured(
            vec![micros(1, 100), micros(2, 900), micros(4, 200)],
            vec![micros(1, 10), micros(4, 40)],
        );
        let close = |a: f64, b: f64| assert!((a - b * 1e-6).abs() < 1e-12, "{a} s is not {b} µs");
        close(costs.target(0), 0.0);
        close(costs.target(1), 100.0);
        close(costs.target(2), 200.0);
        // Four rows cost no more than two when measured; half of what rows cost on average is added.
        close(costs.target(3), 200.0 + 50.0 / 3.0);
        close(costs.target(8), 2.0 * (200.0 + 100.0 / 3.0));
        close(costs.draft_beside(1, 0), 10.0);
        close(costs.draft_beside(2, 1), 20.0);
        close(costs.least_target_row(0), 50.0 / 3.0);
        close(costs.least_target_row(4), (200.0 + 100.0 / 3.0) / 4.0);
        close(StepCosts::default().target(5), 0.0);
    }

    #[test]
    fn a_row_count_costs_what_its_own_passes_take() {
        let micros = |rows, time| (rows, Duration::from_micros(time));
        let mut costs =
            StepCosts::from_measured(vec![micros(1, 100), micros(4, 400), micros(8, 800)], Vec::new());
        for _ in 0..500 {
            costs.observe_target(1, 1, Duration::ZERO, Duration::from_micros(100));
            costs.observe_target(4, 4, Duration::ZERO, Duration::from_micros(200));
            costs.observe_target(8, 8, Duration::ZERO, Duration::from_micros(1000));
        }
        let close = |a: f64, b: f64| assert!((a * 1e6 / b - 1.0).abs() < 0.15, "{a} s is not {b} µs");
        close(costs.target(4), 200.0);
        close(costs.target(8), 1000.0);
        close(costs.target(6), 600.0);
        assert!(costs.target(1) < costs.target(4));
        // Prompts take half of what follows in proportion.
        for _ in 0..500 {
            costs.observe_target(32, 1, Duration::ZERO, Duration::from_micros(1_600));
        }
        close(costs.target(32), 1_600.0);
        close(costs.target(8), 1000.0);
    }
}
