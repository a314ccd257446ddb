//! How often draft tokens stand: decayed counts by who proposed them and how surely, and the
//! draft model's own confidence set against what came of it.
//!
//! Everything here is O(1) and allocates nothing.

use super::proposers::Offer;
use crate::api::DraftSource;

/// A source, and for text how well it agreed: proposals that stand about equally often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProposalKind(u8);

/// The longest agreement of each kind of n-gram but the last: a token, two, some, many.
const NGRAM_AGREEMENT: [usize; 3] = [1, 2, 12];

/// The same for the prediction: a guess, one token in common, some, in step.
const PREDICTION_AGREEMENT: [usize; 3] = [0, 1, 8];

const NUM_KINDS: usize = 1 + (NGRAM_AGREEMENT.len() + 1) + (PREDICTION_AGREEMENT.len() + 1);

/// How often the first token stands, and how often a later one does when those before it do, until
/// there is experience. Text: from instructed edits of Python functions (EditEval).
const PRIORS: [(f64, f64); NUM_KINDS] = [
    (0.8, 0.85),
    (0.3, 0.8),
    (0.5, 0.85),
    (0.6, 0.85),
    (0.95, 0.97),
    (0.05, 0.7),
    (0.35, 0.8),
    (0.5, 0.85),
    (0.95, 0.97),
];

impl ProposalKind {
    /// The kind of `source`'s present offer.
    pub(crate) fn new(source: DraftSource, offer: Offer) -> Self {
        let class = |longest: &[usize]| longest.iter().take_while(|&&l| offer.agreement > l).count();
        ProposalKind(match source {
            DraftSource::Draft => 0,
            DraftSource::Ngram => 1 + class(&NGRAM_AGREEMENT) as u8,
            DraftSource::Prediction => (2 + NGRAM_AGREEMENT.len() + class(&PREDICTION_AGREEMENT)) as u8,
        })
    }
}

/// A decayed frequency.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    accepted: f64,
    judged: f64,
}

impl Rate {
    fn decay(&mut self, factor: f64) {
        self.accepted *= factor;
        self.judged *= factor;
    }

    /// The frequency, as if `weight` more had been judged at `prior`.
    fn estimate(self, prior: f64, weight: f64) -> f64 {
        (self.accepted + weight * prior) / (self.judged + weight)
    }
}

/// The probability that the tokens of one proposal stand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Standing {
    /// That the first does.
    pub(crate) first: f64,
    /// That a later one does, given that all before it do.
    pub(crate) later: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Record {
    first: Rate,
    later: Rate,
    /// The step of the last verification.
    step: u64,
}

/// What became of one sequence's proposals, or of all sequences' (the engine's pool, from which a new
/// sequence starts).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Acceptance {
    records: [Record; NUM_KINDS],
    /// Whether its sequences draw their tokens at random: drafts stand less often there, so their
    /// experience is pooled apart.
    pub(super) samples: bool,
}

/// Weight of a sequence's past after each verification: about the last thirty count.
const OWN_DECAY: f64 = 0.97;

/// And after each step without one, so that a change in the text is believed sooner.
const IDLE_DECAY: f64 = 0.99;

/// The same for the pool: about the last two hundred.
const POOL_DECAY: f64 = 0.995;

/// How many verifications the pool's experience counts for in a sequence of its own.
const POOL_WEIGHT: f64 = 10.0;

/// And the priors in the pool: overruled within some ten steps, once a server.
const PRIOR_WEIGHT: f64 = 6.0;

/// How fast the pool's experience fades while it is not used, so that a bad spell does not rule a source
/// out for good: to a half in 1,400 steps.
const POOL_IDLE_DECAY: f64 = 0.9995;

impl Record {
    /// The record as of `step`: experience fades by `decay` for each step without a verification.
    fn faded(mut self, decay: f64, step: u64) -> Record {
        let idle = step.saturating_sub(self.step).saturating_sub(1).min(100_000) as i32;
        self.fade(decay.powi(idle));
        self
    }

    fn fade(&mut self, factor: f64) {
        self.first.decay(factor);
        self.later.decay(factor);
    }

    fn add(&mut self, num_draft_tokens: usize, num_accepted_tokens: usize) {
        self.first.judged += 1.0;
        if num_accepted_tokens > 0 {
            self.first.accepted += 1.0;
            // Tokens after the first that fell were never judged.
            self.later.judged += (num_draft_tokens.min(num_accepted_tokens + 1) - 1) as f64;
            self.later.accepted += (num_accepted_tokens - 1) as f64;
        }
    }
}

/// Whose experience an [`Acceptance`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// One sequence's.
    Own,
    /// The engine's.
    Pool,
}

impl Scope {
    fn decays(self) -> (f64, f64) {
        match self {
            Scope::Own => (OWN_DECAY, IDLE_DECAY),
            Scope::Pool => (POOL_DECAY, POOL_IDLE_DECAY),
        }
    }
}

impl Acceptance {
    /// No experience yet, of sequences that draw their tokens at random or do not.
    pub(crate) fn new(samples: bool) -> Self {
        Acceptance { samples, ..Acceptance::default() }
    }

    /// Notes a verification at engine step `step`.
    pub(crate) fn record(
        &mut self,
        scope: Scope,
        kind: ProposalKind,
        step: u64,
        num_draft_tokens: usize,
        num_accepted_tokens: usize,
    ) {
        debug_assert!(num_accepted_tokens <= num_draft_tokens, "more accepted than offered: this is a bug");
        if num_draft_tokens > 0 {
            self.update(scope, kind, step).add(num_draft_tokens, num_accepted_tokens);
        }
    }

    /// Notes a first token that nobody judged and that would have stood with probability `chance`.
    pub(crate) fn record_chance(&mut self, scope: Scope, kind: ProposalKind, step: u64, chance: f64) {
        let first = &mut self.update(scope, kind, step).first;
        first.judged += 1.0;
        first.accepted += chance;
    }

    fn update(&mut self, scope: Scope, kind: ProposalKind, step: u64) -> &mut Record {
        let (decay, idle_decay) = scope.decays();
        let record = &mut self.records[usize::from(kind.0)];
        *record = record.faded(idle_decay, step);
        record.fade(decay);
        record.step = step;
        record
    }

    /// What this sequence may expect of a proposal at engine step `step`.
    pub(crate) fn standing(&self, pool: &Acceptance, kind: ProposalKind, step: u64) -> Standing {
        let kind = usize::from(kind.0);
        let own = self.records[kind].faded(IDLE_DECAY, step);
        let pool = pool.records[kind].faded(POOL_IDLE_DECAY, step);
        let estimate = |own: Rate, pool: Rate, prior: f64| {
            own.estimate(pool.estimate(prior, PRIOR_WEIGHT), POOL_WEIGHT).clamp(0.0, 0.995)
        };
        Standing {
            first: estimate(own.first, pool.first, PRIORS[kind].0),
            later: estimate(own.later, pool.later, PRIORS[kind].1),
        }
    }

    /// How many recent verifications the sequence's own estimate rests on.
    pub(crate) fn experience(&self, kind: ProposalKind, step: u64) -> f64 {
        self.records[usize::from(kind.0)].faded(IDLE_DECAY, step).first.judged
    }
}

/// How often a draft token stands, given how sure the draft was of it.
///
/// Any number from 0 to 1 serves as confidence if it grows with the chance to stand: it is set against what
/// came of it, bin by bin.
#[derive(Clone, Debug, Default)]
pub(crate) struct Calibration {
    bins: [Rate; CONFIDENCE_BINS.len() + 1],
}

/// Upper ends of the bins but the last.
const CONFIDENCE_BINS: [f32; 7] = [0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95];

/// What a bin stands for until there is experience: a little less than what the draft believes.
const CONFIDENCE_PRIORS: [f64; 8] = [0.1, 0.2, 0.35, 0.45, 0.6, 0.75, 0.88, 0.95];

/// Weight of a bin's past after each record: about the last two hundred count.
const BIN_DECAY: f64 = 0.995;

/// Records that the prior of a bin counts for.
const BIN_PRIOR_WEIGHT: f64 = 4.0;

impl Calibration {
    fn bin(confidence: f32) -> usize {
        CONFIDENCE_BINS.iter().take_while(|&&end| confidence > end).count()
    }

    /// The probability that a token drawn with this confidence stands, given that those before it do.
    pub(crate) fn acceptance_given(&self, confidence: f32) -> f64 {
        let bin = Self::bin(confidence);
        self.bins[bin].estimate(CONFIDENCE_PRIORS[bin], BIN_PRIOR_WEIGHT)
    }

    /// Notes what came of a token that was judged.
    pub(crate) fn record(&mut self, confidence: f32, accepted: bool) {
        let bin = &mut self.bins[Self::bin(confidence)];
        bin.decay(BIN_DECAY);
        bin.judged += 1.0;
        bin.accepted += f64::from(u8::from(accepted));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DRAFT: ProposalKind = ProposalKind(0);

    fn offer(agreement: usize) -> Offer {
        Offer { num_tokens: 16, agreement }
    }

    #[test]
    fn kinds_tell_sources_and_agreement_apart() {
        let kinds: Vec<u8> = [
            (DraftSource::Draft, 0),
            (DraftSource::Ngram, 1),
            (DraftSource::Ngram, 2),
            (DraftSource::Ngram, 12),
            (DraftSource::Ngram, 13),
            (DraftSource::Prediction, 0),
            (DraftSource::Prediction, 1),
            (DraftSource::Prediction, 8),
            (DraftSource::Prediction, 32),
        ]
        .map(|(source, agreement)| ProposalKind::new(source, offer(agreement)).0)
        .to_vec();
        assert_eq!(kinds, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(ProposalKind::new(DraftSource::Ngram, offer(3)).0, 3);
    }

    #[test]
    fn a_useless_draft_is_known_after_a_few_verifications() {
        let (mut own, mut pool) = (Acceptance::default(), Acceptance::default());
        for step in 0..12 {
            own.record(Scope::Own, DRAFT, step, 4, 0);
            pool.record(Scope::Pool, DRAFT, step, 4, 0);
        }
        assert!(own.standing(&pool, DRAFT, 12).first < 0.15);
        let next = Acceptance::default();
        assert!(next.standing(&pool, DRAFT, 12).first < 0.3, "the next sequence starts from the pool");
    }

    #[test]
    fn a_sequence_differs_from_the_pool() {
        let (mut own, mut pool) = (Acceptance::default(), Acceptance::default());
        for step in 0..100 {
            pool.record(Scope::Pool, DRAFT, step, 4, 0);
            own.record(Scope::Own, DRAFT, step, 4, 4);
        }
        let standing = own.standing(&pool, DRAFT, 100);
        assert!(standing.first > 0.7 && standing.later > 0.9, "{standing:?}");
        assert!(own.experience(DRAFT, 100) > 10.0);
        assert!(own.experience(DRAFT, 500) < 1.0, "experience fades");
    }

    #[test]
    fn confidence_is_calibrated() {
        let mut calibration = Calibration::default();
        assert!(calibration.acceptance_given(0.99) > calibration.acceptance_given(0.05));
        for _ in 0..200 {
            calibration.record(0.99, false);
            calibration.record(0.05, true);
        }
        assert!(calibration.acceptance_given(0.97) < 0.1);
        assert!(calibration.acceptance_given(0.02) > 0.9);
    }

    proptest! {
        #[test]
        fn estimates_are_probabilities(
            records in proptest::collection::vec((0usize..17, 0usize..17, 0u64..50), 0..100),
        ) {
            let (mut own, mut pool) = (Acceptance::default(), Acceptance::default());
            let mut step = 0;
            for (num_draft, num_accepted, idle) in records {
                step += idle;
                let num_accepted = num_accepted.min(num_draft);
                own.record(Scope::Own, DRAFT, step, num_draft, num_accepted);
                pool.record(Scope::Pool, DRAFT, step, num_draft, num_accepted);
                let standing = own.standing(&pool, DRAFT, step);
                prop_assert!((0.0..1.0).contains(&standing.first) && (0.0..1.0).contains(&standing.later));
            }
        }
    }
}
