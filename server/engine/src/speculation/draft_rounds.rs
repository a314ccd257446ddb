//! How far the draft model goes on within a step. The plan says who starts; after each round the draft's
//! own confidence in what it drew tells what the drafted tokens are worth, so that an unsure draft stops
//! before it costs another pass, and tokens that will hardly stand are not verified. This is what makes
//! speculation pay at temperatures where only some tokens are predictable.
//!
//! O(sequences) a round; nothing is allocated.

use super::acceptance::{Acceptance, Calibration, ProposalKind, Scope};
use super::policy::DraftPolicy;
use super::proposers::Offer;
use crate::api::DraftSource;

/// The longest draft of the draft model: each token costs it a pass, and few stand so far out.
pub(crate) const MAX_MODEL_DRAFT_TOKENS: usize = 16;

/// A sequence between two draft rounds of a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drafting {
    /// The chance that its draft tokens of this step all stand.
    pub(crate) standing: f64,
    /// That one more does if they do; see [`DraftPolicy::later_standing`].
    pub(crate) later: f64,
    /// Whether it drafts in the next round: the answer.
    pub(crate) goes_on: bool,
}

/// Draft tokens ahead that the decision to go on looks.
const LOOK_AHEAD: usize = 4;

/// Of so many draft tokens not worth verifying, one is verified, so that a wrong calibration shows.
const EXPLORE_INTERVAL: u32 = 16;

impl DraftPolicy {
    /// Notes a step in which a sequence drafted and its first token was not worth verifying: it would
    /// have stood with probability `chance`.
    pub(crate) fn record_dropped(&mut self, acceptance: &mut Acceptance, chance: f64) {
        let kind = ProposalKind::new(DraftSource::Draft, Offer::default());
        acceptance.record_chance(Scope::Own, kind, self.step, chance);
        self.pools[usize::from(acceptance.samples)].record_chance(Scope::Pool, kind, self.step, chance);
    }

    /// How often tokens that the draft was so sure of stand, for sequences that sample or do not.
    pub(crate) fn calibration(&mut self, samples: bool) -> &mut Calibration {
        &mut self.calibrations[usize::from(samples)]
    }

    /// What a sequence may expect of its next draft token, beside the draft's confidence: how often a
    /// later token stands.
    pub(crate) fn later_standing(&self, acceptance: &Acceptance) -> f64 {
        let kind = ProposalKind::new(DraftSource::Draft, Offer::default());
        self.standing(acceptance, kind).later
    }

    /// Whether another draft round pays, and for which of the sequences that drafted in the last one:
    /// sets their `goes_on`. `num_paid_rows` are in the round in any case (the fast lane's, and
    /// sequences of fixed length); the target's pass has `num_target_rows` so far.
    pub(crate) fn next_round(
        &self,
        drafting: &mut [Drafting],
        num_paid_rows: usize,
        num_target_rows: usize,
    ) -> bool {
        let sharing = drafting.len().max(1);
        let rows = self.costs.target(num_target_rows + sharing) - self.costs.target(num_target_rows);
        let row = self.tokens_per_second * rows / sharing as f64;
        let mut net = 0.0;
        let pays = (1..=LOOK_AHEAD).any(|ahead| {
            let mut num_rows = 0;
            for sequence in &*drafting {
                let gain = sequence.standing * sequence.later.powi(ahead as i32) - row;
                num_rows += usize::from(gain > 0.0);
                net += gain.max(0.0);
            }
            net -= self.tokens_per_second * self.costs.draft_beside(num_rows, num_paid_rows);
            net > 0.0
        });
        for sequence in drafting {
            sequence.goes_on = pays && sequence.standing * sequence.later > row;
        }
        pays
    }

    /// Whether the target should judge a draft token that stands, with all before it, with
    /// probability `standing`; `num_target_rows` are those of the pass without it.
    pub(crate) fn is_worth_verifying(&mut self, standing: f64, num_target_rows: usize) -> bool {
        let row = self.costs.target(num_target_rows + 1) - self.costs.target(num_target_rows);
        if standing > self.tokens_per_second * row {
            return true;
        }
        self.num_dropped = (self.num_dropped + 1) % EXPLORE_INTERVAL;
        self.num_dropped == 0
    }
}
