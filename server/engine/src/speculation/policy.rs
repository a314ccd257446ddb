//! Who drafts for each sequence and how many tokens: what maximises the expected tokens per second of the
//! whole step, from pass costs measured at start and what became of earlier proposals. Zero is a
//! length like any other, so speculation that does not pay is not done. The choice never changes the output.
//!
//! All deep sequences of a step are planned together. Every token that could be drafted has a chance to
//! stand and a price; they are taken in the order of what they are worth, and of all prefixes of that
//! order the one with the most tokens per second is the plan. (All, because pass costs are not convex: a
//! ninth row may cost nothing and a tenth a lot.) A draft round is paid by whoever is first in it, so
//! every number of rounds is tried. So a full batch's rows go to the sequences that gain
//! the most from them.
//!
//! Trying again what did not pay has a budget, a fixed share of the time ([`PROBE_SHARE`]).
//! A plan costs O(T log T + R T) for R rounds and T tokens that could be drafted, some microseconds at batch 16, and
//! allocates nothing once it has seen the largest batch.

use super::acceptance::{Acceptance, Calibration, ProposalKind, Scope, Standing};
use super::costs::StepCosts;
use super::proposers::Offer;
use crate::api::{DraftSource, MAX_DRAFT_TOKENS};

/// What the user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DraftTokens {
    /// The policy chooses per sequence and step.
    Auto,
    /// Always this many, as far as the sequence's room allows; 0 is no speculation.
    Fixed(u8),
}

/// A deep sequence that decodes in this step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    /// What became of its proposals.
    pub(crate) acceptance: Acceptance,
    /// The request's own choice of length.
    pub(crate) fixed: Option<u8>,
    /// What each [`DraftSource`] could give now; of the draft model `num_tokens` is the most that is wanted.
    pub(crate) offers: [Offer; 3],
    /// Tokens that the draft's cache lacks, beyond the one that every draft pass computes.
    pub(crate) catch_up: usize,
    /// Output tokens that may still come, of which the target adds the last itself.
    pub(crate) remaining: usize,
}

impl Candidate {
    /// The most tokens worth taking from `source`.
    fn limit(&self, source: DraftSource) -> usize {
        let room = self.remaining.saturating_sub(1).min(MAX_DRAFT_TOKENS);
        self.offers[source as usize].num_tokens.min(room)
    }

    fn kind(&self, source: DraftSource) -> ProposalKind {
        ProposalKind::new(source, self.offers[source as usize])
    }

    /// `length` tokens of the first source that offers any. A prediction that has lost its place only
    /// guesses, and so comes last.
    fn fixed_choice(&self, length: u8) -> Option<(DraftSource, usize)> {
        let guesses = self.offers[DraftSource::Prediction as usize].agreement == 0;
        let mut order = [DraftSource::Prediction, DraftSource::Draft, DraftSource::Ngram];
        order.rotate_left(usize::from(guesses));
        order
            .into_iter()
            .map(|source| (source, self.limit(source).min(usize::from(length))))
            .find(|&(_, length)| length > 0)
    }
}

/// What else the step computes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StepLoad {
    /// Fast-lane sequences: rows of every draft pass.
    pub(crate) num_fast: usize,
    /// Rows of prompts in the target's pass.
    pub(crate) num_prefill_rows: usize,
}

/// Share of the time, per source, that goes into trying again what did not pay. Of the servers that this file's tests
/// model, 140 gain nothing from any fixed length; of the speed without drafting they have, on average and at least,
/// 0.998 and 0.985 with a share of 0.001, 0.996 and 0.981 with 0.003, 0.995 and 0.979 with 0.005, 0.991 and 0.975
/// with 0.01, 0.983 and 0.959 with 0.02. The 85 others hardly differ. But the smaller the share, the later a source
/// is found that has come good: on the demo pair a probe takes about the time of a step, so it comes every 300.
const PROBE_SHARE: f64 = 0.003;

/// Most steps' worth of time that is saved up for one probe (a draft whose cache is far behind).
const MAX_PROBE_STEPS: f64 = 64.0;

/// Tokens of a probe.
const PROBE_TOKENS: usize = 2;

/// A sequence with this many recent verifications needs no probe.
const KNOWN: f64 = 4.0;

/// Over how many steps at most the cost of catching up is spread: a sequence changes its source.
const DWELL_STEPS: f64 = 64.0;

/// Tokens less likely to stand than this are not considered.
const LEAST_STANDING: f64 = 0.01;

/// Rows a sequence over which the price of one is averaged to compare sources.
const ROWS_AHEAD: usize = 4;

/// Chooses sources and lengths.
#[derive(Clone, Debug)]
pub(crate) struct DraftPolicy {
    setting: DraftTokens,
    pub(super) costs: StepCosts,
    /// All sequences' experience, of greedy and of sampled ones; a new sequence starts from it.
    pub(super) pools: [Acceptance; 2],
    /// Of greedy and of sampled sequences.
    pub(super) calibrations: [Calibration; 2],
    /// Plans so far.
    pub(super) step: u64,
    /// Of the last plan, expected.
    pub(super) tokens_per_second: f64,
    /// Time saved up for probes, by source.
    probe_seconds: [f64; 3],
    pub(super) num_dropped: u32,
    scratch: Scratch,
}

#[derive(Clone, Debug, Default)]
struct Scratch {
    /// One a candidate: what it would draft from.
    choices: Vec<Option<Choice>>,
    /// All tokens that could be drafted.
    tokens: Vec<DraftToken>,
    /// One a candidate: the length in the prefix at hand.
    lengths: Vec<usize>,
    /// Of the target's pass with so many more rows.
    target_seconds: Vec<f64>,
    /// Of so many deep rows in a draft round.
    draft_seconds: Vec<f64>,
}

/// A sequence's source in one try of a plan.
#[derive(Clone, Copy, Debug)]
struct Choice {
    source: DraftSource,
    standing: Standing,
    limit: usize,
    /// Seconds that the first token costs beside passes: the share of catching up.
    charge: f64,
}

#[derive(Clone, Copy, Debug)]
struct DraftToken {
    /// Chance to stand less its price in tokens; falls within a sequence.
    worth: f64,
    standing: f64,
    /// Of the first token: seconds that it costs beside passes.
    charge: f64,
    sequence: usize,
    /// 0 is the first draft token of its sequence.
    place: usize,
    /// By the draft model, in round `place`.
    is_drafted: bool,
}

/// The passes of a step as planned so far.
#[derive(Clone, Copy, Debug)]
struct Passes {
    target_rows: usize,
    /// Deep rows of each draft round.
    draft_rows: [usize; MAX_DRAFT_TOKENS],
    num_fast: usize,
    /// Seconds of all draft rounds.
    draft_seconds: f64,
    /// What prompts add to the target's pass. It is spent whatever is drafted, so it must not make drafting
    /// look cheap: a draft token is to pay for itself in a pass of its own kind.
    prompt_seconds: f64,
}

impl Passes {
    fn add(&mut self, costs: &StepCosts, is_drafted: bool, place: usize) {
        self.target_rows += 1;
        if is_drafted {
            self.draft_seconds += costs.draft_beside(1, self.draft_rows[place] + self.num_fast);
            self.draft_rows[place] += 1;
        }
    }

    fn seconds(&self, costs: &StepCosts) -> f64 {
        (costs.target(self.target_rows) - self.prompt_seconds + self.draft_seconds).max(1e-9)
    }
}

impl DraftPolicy {
    /// A policy for the user's setting and the machine's costs.
    pub(crate) fn new(setting: DraftTokens, costs: StepCosts) -> Self {
        DraftPolicy {
            setting,
            costs,
            pools: [false, true].map(Acceptance::new),
            calibrations: Default::default(),
            step: 0,
            tokens_per_second: 0.0,
            probe_seconds: [0.0; 3],
            num_dropped: 0,
            scratch: Scratch::default(),
        }
    }

    /// What passes cost, to be corrected.
    pub(crate) fn costs_mut(&mut self) -> &mut StepCosts {
        &mut self.costs
    }

    /// True if the user has set a length.
    pub(crate) fn is_fixed(&self) -> bool {
        matches!(self.setting, DraftTokens::Fixed(_))
    }

    /// Notes what became of a proposal, for its sequence and for those to come.
    pub(crate) fn record(
        &mut self,
        acceptance: &mut Acceptance,
        kind: ProposalKind,
        num_draft_tokens: usize,
        num_accepted_tokens: usize,
    ) {
        let (step, pool) = (self.step, &mut self.pools[usize::from(acceptance.samples)]);
        acceptance.record(Scope::Own, kind, step, num_draft_tokens, num_accepted_tokens);
        pool.record(Scope::Pool, kind, step, num_draft_tokens, num_accepted_tokens);
    }

    /// Plans a step: in `out`, for each candidate, the source and how many tokens (at least one) it
    /// drafts; `None` is plain decoding.
    pub(crate) fn plan(
        &mut self,
        candidates: &[Candidate],
        load: &StepLoad,
        out: &mut Vec<Option<(DraftSource, usize)>>,
    ) {
        self.step += 1;
        let target_rows = load.num_prefill_rows + candidates.len();
        let mut base = Passes {
            target_rows,
            draft_rows: [0; MAX_DRAFT_TOKENS],
            num_fast: load.num_fast,
            draft_seconds: 0.0,
            prompt_seconds: self.costs.target(target_rows) - self.costs.target(candidates.len()),
        };
        out.clear();
        let mut num_free = 0;
        for candidate in candidates {
            let fixed = self.fixed_length(candidate);
            num_free += usize::from(fixed.is_none());
            let choice = fixed.and_then(|length| candidate.fixed_choice(length));
            for place in 0..choice.map_or(0, |c| c.1) {
                base.add(&self.costs, choice.is_some_and(|c| c.0 == DraftSource::Draft), place);
            }
            out.push(choice);
        }
        let mut best = candidates.len() as f64 / base.seconds(&self.costs);
        let mut passes = base;
        if num_free > 0 {
            self.scratch.target_seconds.clear();
            // A source's worth depends on what a second is worth, which depends on the sources.
            for _ in 0..2 {
                self.choose_sources(candidates, &base, best, num_free, None);
                self.take_best_prefix(&base, &mut best, &mut passes, out);
            }
            if num_free == 1 {
                for source in DraftSource::ALL {
                    self.choose_sources(candidates, &base, best, num_free, Some(source));
                    self.take_best_prefix(&base, &mut best, &mut passes, out);
                }
            }
            self.probe(candidates, &passes, out);
        }
        self.tokens_per_second = best;
    }

    fn fixed_length(&self, candidate: &Candidate) -> Option<u8> {
        candidate.fixed.or(match self.setting {
            DraftTokens::Fixed(length) => Some(length),
            DraftTokens::Auto => None,
        })
    }

    /// Gives each free sequence the source that is worth most to it when a second is worth
    /// `tokens_per_second`, or `only` that one.
    fn choose_sources(
        &mut self,
        candidates: &[Candidate],
        base: &Passes,
        tokens_per_second: f64,
        num_free: usize,
        only: Option<DraftSource>,
    ) {
        let costs = &self.costs;
        let ahead = ROWS_AHEAD * num_free;
        let row = (costs.target(base.target_rows + ahead) - costs.target(base.target_rows)) / ahead as f64;
        let round = costs.draft_beside(num_free, base.num_fast) / num_free as f64;
        // A token less likely than this costs more than it brings in any plan as good as the best so far.
        let least = costs.least_target_row(base.target_rows) * tokens_per_second;
        let least = if least.is_finite() { least.max(LEAST_STANDING) } else { LEAST_STANDING };
        self.scratch.choices.clear();
        self.scratch.tokens.clear();
        for (sequence, candidate) in candidates.iter().enumerate() {
            let mut best: Option<(f64, Choice)> = None;
            let free = self.fixed_length(candidate).is_none();
            for source in DraftSource::ALL {
                if !free || candidate.limit(source) == 0 || only.is_some_and(|only| only != source) {
                    continue;
                }
                let choice = self.choice(candidate, base.num_fast, source);
                let (mut net, mut most) = (-tokens_per_second * choice.charge, f64::NEG_INFINITY);
                let price = row + if source == DraftSource::Draft { round } else { 0.0 };
                for standing in choice.standings() {
                    net += standing - tokens_per_second * price;
                    most = most.max(net);
                }
                if best.is_none_or(|best| most > best.0) {
                    best = Some((most, choice));
                }
            }
            let choice = best.map(|best| best.1);
            self.scratch.choices.push(choice);
            let Some(choice) = choice else { continue };
            let price = if choice.source == DraftSource::Draft { round } else { 0.0 };
            let mut worth = f64::INFINITY;
            let standings = choice.standings().take_while(|&standing| standing >= least);
            for (place, standing) in standings.enumerate() {
                let charge = if place == 0 { choice.charge } else { 0.0 };
                worth = worth.min(standing - tokens_per_second * (price + charge));
                let is_drafted = choice.source == DraftSource::Draft;
                self.scratch.tokens.push(DraftToken { worth, standing, charge, sequence, place, is_drafted });
            }
        }
    }

    /// What a sequence may expect of a proposal now.
    pub(super) fn standing(&self, acceptance: &Acceptance, kind: ProposalKind) -> Standing {
        acceptance.standing(&self.pools[usize::from(acceptance.samples)], kind, self.step)
    }

    fn choice(&self, candidate: &Candidate, num_fast: usize, source: DraftSource) -> Choice {
        let standing = self.standing(&candidate.acceptance, candidate.kind(source));
        let charge = if source == DraftSource::Draft && candidate.catch_up > 0 {
            let catch_up = self.costs.draft_beside(candidate.catch_up, 1 + num_fast);
            let tokens_per_step = 1.0 + standing.first / (1.0 - standing.later).max(0.25);
            catch_up / (candidate.remaining as f64 / tokens_per_step).clamp(1.0, DWELL_STEPS)
        } else {
            0.0
        };
        Choice { source, standing, limit: candidate.limit(source), charge }
    }

    /// For every number of draft rounds, evaluates every prefix of the tokens in order of worth; if the
    /// best has more tokens per second than `best`, it becomes the plan. (Rounds are tried one by one,
    /// because the first sequence in a round pays for the pass and the others join for little.)
    fn take_best_prefix(
        &mut self,
        base: &Passes,
        best: &mut f64,
        best_passes: &mut Passes,
        out: &mut [Option<(DraftSource, usize)>],
    ) {
        let Scratch { choices, tokens, lengths, target_seconds, draft_seconds } = &mut self.scratch;
        tokens.sort_unstable_by(|a, b| {
            b.worth.total_cmp(&a.worth).then(a.sequence.cmp(&b.sequence)).then(a.place.cmp(&b.place))
        });
        let priced = target_seconds.len();
        target_seconds.extend((priced..=tokens.len()).map(|more| self.costs.target(base.target_rows + more)));
        draft_seconds.clear();
        draft_seconds.extend((0..=choices.len()).map(|rows| self.costs.draft_beside(rows, base.num_fast)));
        let most_rounds = tokens.iter().filter(|t| t.is_drafted).map(|t| t.place + 1).max().unwrap_or(0);
        let mut found = None;
        for rounds in 0..=most_rounds {
            let mut draft_rows = base.draft_rows;
            let mut seconds = base.draft_seconds;
            let mut expected = choices.len() as f64;
            let mut num_taken = 0;
            for (index, token) in tokens.iter().enumerate() {
                if token.is_drafted {
                    if token.place >= rounds {
                        continue;
                    }
                    let rows = &mut draft_rows[token.place];
                    seconds += draft_seconds[*rows + 1] - draft_seconds[*rows] + token.charge;
                    *rows += 1;
                }
                num_taken += 1;
                expected += token.standing;
                let target = target_seconds[num_taken] - base.prompt_seconds;
                let value = expected / (target + seconds).max(1e-9);
                if value > *best {
                    *best = value;
                    found = Some((rounds, index));
                }
            }
        }
        let Some((rounds, last)) = found else { return };
        lengths.clear();
        lengths.resize(choices.len(), 0);
        *best_passes = *base;
        for token in tokens[..=last].iter().filter(|t| !t.is_drafted || t.place < rounds) {
            lengths[token.sequence] += 1;
            best_passes.add(&self.costs, token.is_drafted, token.place);
        }
        for ((choice, &length), out) in choices.iter().zip(&*lengths).zip(out) {
            if let Some(choice) = choice {
                *out = (length > 0).then_some((choice.source, length));
            }
        }
    }

    /// Lets a sequence that would not draft try a source again, when the time saved up for it pays it.
    fn probe(&mut self, candidates: &[Candidate], passes: &Passes, out: &mut [Option<(DraftSource, usize)>]) {
        let step_seconds = passes.seconds(&self.costs);
        for source in DraftSource::ALL {
            let saved = &mut self.probe_seconds[source as usize];
            *saved = (*saved + PROBE_SHARE * step_seconds).min(MAX_PROBE_STEPS * step_seconds);
            let mut best: Option<(f64, f64, usize)> = None;
            for (index, candidate) in candidates.iter().enumerate() {
                let length = candidate.limit(source).min(PROBE_TOKENS);
                let fixed = candidate.fixed.is_some();
                let experience = candidate.acceptance.experience(candidate.kind(source), self.step);
                if fixed || length < PROBE_TOKENS || out[index].is_some() || experience >= KNOWN {
                    continue;
                }
                let mut with = *passes;
                for place in 0..length {
                    with.add(&self.costs, source == DraftSource::Draft, place);
                }
                let mut price = with.seconds(&self.costs) - step_seconds;
                if source == DraftSource::Draft && candidate.catch_up > 0 {
                    price += self.costs.draft_beside(candidate.catch_up, 1 + passes.num_fast);
                }
                let rank = price * (1.0 + experience);
                if best.is_none_or(|best| rank < best.0) {
                    best = Some((rank, price, index));
                }
            }
            if let Some((_, price, index)) = best
                && price <= *saved
            {
                *saved -= price;
                out[index] = Some((source, PROBE_TOKENS));
                return;
            }
        }
    }
}

impl Choice {
    /// The chances of its tokens to stand, falling, down to where nothing is to be gained.
    fn standings(&self) -> impl Iterator<Item = f64> {
        let later = self.standing.later;
        std::iter::successors(Some(self.standing.first), move |standing| Some(standing * later))
            .take(self.limit)
            .take_while(|&standing| standing >= LEAST_STANDING)
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
