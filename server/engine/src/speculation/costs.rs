//! What passes cost on this machine: measured at start, over one sequence and little context, then
//! corrected by what real passes take with all that the engine does for them (scheduling, sampling,
//! handing out) and at the contexts of the day.

use std::time::Duration;

/// Seconds that passes take.
#[derive(Clone, Debug, Default)]
pub(crate) struct StepCosts {
    /// `(rows, seconds)` of target passes, ascending in rows.
    target: Vec<(usize, f64)>,
    /// The same for the draft.
    draft: Vec<(usize, f64)>,
    target_overhead: Overhead,
    draft_factor: Factor,
}

/// What the engine does for a target pass beyond what was measured, in seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Overhead {
    /// Drawing from a row of logits, at the temperatures of the day.
    of_row: f64,
    /// All else.
    of_pass: f64,
}

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

/// What a row adds to a pass at least, as a share of what rows add on average.
const LEAST_ROW: f64 = 0.5;

/// Row counts worth measuring: every length of one sequence, then batches of them.
pub(crate) const PROFILED_ROWS: [usize; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32, 64];

impl StepCosts {
    /// From `(rows, time)` of passes, ascending in rows; empty for a model that is not there.
    pub(crate) fn from_measured(target: Vec<(usize, Duration)>, draft: Vec<(usize, Duration)>) -> Self {
        let seconds = |costs: Vec<(usize, Duration)>| {
            let mut least = f64::INFINITY;
            // A pass over more rows cannot be cheaper; where it seems so, the smaller one was disturbed.
            let mut costs: Vec<(usize, f64)> = costs
                .into_iter()
                .rev()
                .map(|(rows, time)| {
                    least = least.min(time.as_secs_f64());
                    (rows, least)
                })
                .collect();
            costs.reverse();
            // Nor is a row free because of that: it costs some part of what rows cost on the whole.
            if let (Some(&(fewest, least)), Some(&(most, greatest))) = (costs.first(), costs.last())
                && most > fewest
            {
                let row = LEAST_ROW * (greatest - least) / (most - fewest) as f64;
                let mut before = (fewest, least);
                for cost in &mut costs {
                    cost.1 = cost.1.max(before.1 + row * (cost.0 - before.0) as f64);
                    before = *cost;
                }
            }
            costs
        };
        StepCosts { target: seconds(target), draft: seconds(draft), ..StepCosts::default() }
    }

    /// Seconds of a target pass over `rows` rows; none for no rows.
    pub(crate) fn target(&self, rows: usize) -> f64 {
        Self::lookup(&self.target, rows)
            + self.target_overhead.of_pass
            + rows as f64 * self.target_overhead.of_row
    }

    /// Notes what a target pass over `rows` rows took, `drawing` of it for drawing from `num_logits` of them.
    pub(crate) fn observe_target(
        &mut self,
        rows: usize,
        num_logits: usize,
        drawing: Duration,
        time: Duration,
    ) {
        let measured = Self::lookup(&self.target, rows);
        self.target_overhead.observe(measured, num_logits, drawing.as_secs_f64(), time.as_secs_f64());
    }

    /// Notes what a draft pass over `rows` rows took.
    pub(crate) fn observe_draft(&mut self, rows: usize, time: Duration) {
        self.draft_factor.observe(Self::lookup(&self.draft, rows), time.as_secs_f64());
    }

    /// The least that any row beyond the first `rows` adds to a target pass.
    pub(crate) fn least_target_row(&self, rows: usize) -> f64 {
        let slopes = self.target.windows(2).filter(|w| w[1].0 > rows);
        let slopes = slopes.map(|w| (w[1].1 - w[0].1) / (w[1].0 - w[0].0) as f64);
        slopes
            .chain(self.target.last().map(|&(rows, seconds)| seconds / rows as f64))
            .fold(f64::INFINITY, f64::min)
            + self.target_overhead.of_row
    }

    /// Seconds that `rows` more rows add to a draft pass over `others` rows.
    pub(crate) fn draft_beside(&self, rows: usize, others: usize) -> f64 {
        self.draft_factor.0 * (Self::lookup(&self.draft, rows + others) - Self::lookup(&self.draft, others))
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
}
