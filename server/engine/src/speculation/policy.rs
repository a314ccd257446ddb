//! How many tokens to draft: the length that maximises expected tokens per second, from step costs
//! measured at start and the sequence's own acceptance so far. Zero is a length like any other, so
//! speculation that does not pay is not done. The choice never changes the output.

use std::time::Duration;

use crate::api::MAX_DRAFT_TOKENS;

/// What the user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DraftTokens {
    /// The policy chooses per sequence and step.
    Auto,
    /// Always this many, as far as the sequence's room allows; 0 is no speculation.
    Fixed(u8),
}

/// The longest draft that the policy chooses by itself.
const MAX_AUTO_DRAFT_TOKENS: usize = 8;

/// A decayed estimate of the probability that a draft token stands, given that all before it do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AcceptanceRate {
    accepted: f64,
    offered: f64,
    /// Steps since tokens were last offered.
    idle_steps: u32,
}

/// Weight of the past after each verification: about the last ten count.
const DECAY: f64 = 0.9;

impl Default for AcceptanceRate {
    fn default() -> Self {
        // As if three of five had stood: optimistic enough to try, quickly overruled.
        AcceptanceRate { accepted: 3.0, offered: 5.0, idle_steps: 0 }
    }
}

impl AcceptanceRate {
    /// Notes a verification. Tokens after the first that fell were never judged.
    pub(crate) fn record(&mut self, num_draft_tokens: usize, num_accepted_tokens: usize) {
        if num_draft_tokens == 0 {
            self.idle_steps += 1;
            return;
        }
        let num_judged = num_draft_tokens.min(num_accepted_tokens + 1);
        self.accepted = DECAY * self.accepted + num_accepted_tokens as f64;
        self.offered = DECAY * self.offered + num_judged as f64;
        self.idle_steps = 0;
    }

    /// The estimate, in `0.0..1.0`.
    pub(crate) fn estimate(&self) -> f64 {
        (self.accepted / self.offered).min(0.99)
    }
}

/// Seconds that passes take, measured at start.
#[derive(Clone, Debug, Default)]
pub(crate) struct StepCosts {
    /// `(rows, seconds)` of target passes, ascending in rows.
    target: Vec<(usize, f64)>,
    /// The same for the draft.
    draft: Vec<(usize, f64)>,
}

/// Row counts worth measuring: every length of one sequence, then batches of them.
pub(crate) const PROFILED_ROWS: [usize; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32, 64];

impl StepCosts {
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
            costs
        };
        StepCosts { target: seconds(target), draft: seconds(draft) }
    }

    /// Seconds of a pass over `rows` rows, between measured points linearly, beyond them in proportion.
    fn lookup(costs: &[(usize, f64)], rows: usize) -> f64 {
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

/// Chooses draft lengths.
#[derive(Clone, Debug)]
pub(crate) struct DraftPolicy {
    setting: DraftTokens,
    costs: StepCosts,
}

/// After this many steps without a draft one is tried again, so that a sequence whose text became
/// predictable is noticed; costs at most a draft of two in 64 steps.
const PROBE_INTERVAL: u32 = 64;

impl DraftPolicy {
    /// A policy for the user's setting and the machine's costs.
    pub(crate) fn new(setting: DraftTokens, costs: StepCosts) -> Self {
        DraftPolicy { setting, costs }
    }

    /// Draft tokens for a sequence with this acceptance while `num_deep` sequences verify together
    /// and `num_fast` fast-lane sequences share the draft's passes.
    pub(crate) fn choose(&self, acceptance: &AcceptanceRate, num_deep: usize, num_fast: usize) -> usize {
        if let DraftTokens::Fixed(length) = self.setting {
            return usize::from(length).min(MAX_DRAFT_TOKENS);
        }
        let rate = acceptance.estimate();
        let mut best = (0, 0.0);
        let mut expected_tokens = 1.0;
        let mut standing = 1.0;
        for length in 0..=MAX_AUTO_DRAFT_TOKENS {
            if length > 0 {
                standing *= rate;
                expected_tokens += standing;
            }
            let verify = StepCosts::lookup(&self.costs.target, num_deep * (1 + length));
            // Fast-lane rows are computed in any case; only the deep lane's share is speculation's cost.
            let with = StepCosts::lookup(&self.costs.draft, num_deep + num_fast);
            let without = if num_fast == 0 { 0.0 } else { StepCosts::lookup(&self.costs.draft, num_fast) };
            let value = expected_tokens / (verify + length as f64 * (with - without)).max(1e-9);
            if value > best.1 {
                best = (length, value);
            }
        }
        if best.0 == 0 && acceptance.idle_steps >= PROBE_INTERVAL { 2 } else { best.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(target: &[(usize, u64)], draft_micros: u64) -> StepCosts {
        let micros = |m| Duration::from_micros(m);
        StepCosts::from_measured(
            target.iter().map(|&(rows, m)| (rows, micros(m))).collect(),
            vec![(1, micros(draft_micros)), (64, micros(draft_micros * 20))],
        )
    }

    fn rate(accepted: usize, offered: usize) -> AcceptanceRate {
        let mut rate = AcceptanceRate::default();
        for _ in 0..50 {
            rate.record(offered, accepted);
        }
        rate
    }

    #[test]
    fn a_good_draft_and_cheap_verification_draft_long() {
        let policy = DraftPolicy::new(DraftTokens::Auto, costs(&[(1, 100), (9, 130)], 2));
        assert_eq!(policy.choose(&rate(8, 8), 1, 0), 8);
    }

    #[test]
    fn a_useless_draft_is_not_used_but_probed() {
        let policy = DraftPolicy::new(DraftTokens::Auto, costs(&[(1, 100), (9, 300)], 20));
        let mut useless = rate(0, 4);
        assert_eq!(policy.choose(&useless, 1, 0), 0);
        for _ in 0..PROBE_INTERVAL {
            useless.record(0, 0);
        }
        assert_eq!(policy.choose(&useless, 1, 0), 2);
    }

    #[test]
    fn verification_that_costs_in_proportion_is_not_worth_a_middling_draft() {
        let policy = DraftPolicy::new(DraftTokens::Auto, costs(&[(1, 100), (64, 6_400)], 20));
        assert_eq!(policy.choose(&rate(2, 4), 16, 0), 0);
    }

    #[test]
    fn a_fixed_length_is_kept() {
        let policy = DraftPolicy::new(DraftTokens::Fixed(5), StepCosts::default());
        assert_eq!(policy.choose(&rate(0, 4), 64, 3), 5);
    }
}
