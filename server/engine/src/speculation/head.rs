//! How much of the vocabulary the draft model chooses among while it proposes. A small model's head is a
//! quarter to two fifths of the bytes of its pass, most of them for tokens that hardly occur: vocabularies
//! of byte-pair encoding are in the order of their merges, so the first ids are the frequent ones, and
//! the last third of a large one is for scripts that code is not written in. Verification does not care
//! where proposals come from, so a *short head*, over the first ids alone, changes no answer: it cannot
//! propose the other tokens, and it costs less. (The fast lane, which answers with the draft, always has
//! all of it.)
//!
//! The length is the one with the most tokens per second by the same measures that the rest of the policy
//! goes by: what passes cost here, how often draft tokens stand, and how many of the tokens that the target
//! commits a head of that length has. The last is counted whatever head is in use, so text of another kind
//! changes the choice. O(1) a token, and a few hundred operations a [`PERIOD`].

use arrayvec::ArrayVec;

use super::acceptance::Acceptance;
use super::costs::StepCosts;
use super::policy::DraftPolicy;

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DraftHead {
    /// The length that pays, from measured costs and the text.
    Auto,
    /// Every token.
    #[default]
    Whole,
    /// Always the first so many tokens.
    First(usize),
}

/// Lengths to choose from, and how many of a code's tokens lie in them: of Python, Rust, JavaScript and C++ in
/// the vocabularies of Qwen2.5 and Llama 3 (1.9 million tokens); it is believed until the text at hand
/// says otherwise.
const LENGTHS: [(usize, f64); 3] = [(32_768, 0.935), (65_536, 0.978), (98_304, 0.999)];

/// A head longer than this share of the vocabulary saves too little to be tried.
const LONGEST_SHARE: f64 = 0.85;

/// Tokens that the priors count for.
const PRIOR_WEIGHT: f64 = 1024.0;

/// Committed tokens from one choice to the next.
const PERIOD: u32 = 512;

/// Weight of the past after each period: about the last ten thousand tokens count.
const DECAY: f64 = 0.95;

/// By how much another head must be faster to be taken.
const MARGIN: f64 = 1.01;

/// The longest draft that is looked at.
const MOST_ROUNDS: i32 = 8;

/// A head to choose.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    num_tokens: usize,
    /// Seconds that it takes off a draft pass.
    saving: f64,
    prior: f64,
    /// Committed tokens that are in it and in none that is shorter: of the past, and of this period.
    seen: f64,
    new: u32,
}

/// The choice of the draft's head; without candidates always the whole.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeadPolicy {
    /// Ascending in length.
    candidates: ArrayVec<Candidate, { HeadPolicy::MOST_LENGTHS }>,
    is_fixed: bool,
    current: Option<usize>,
    /// Committed tokens of the past, and of this period.
    seen: f64,
    new: u32,
}

impl HeadPolicy {
    /// Of [`HeadPolicy::lengths`].
    pub(crate) const MOST_LENGTHS: usize = LENGTHS.len();

    /// Lengths worth measuring for a vocabulary of `num_token_ids` tokens.
    pub(crate) fn lengths(
        setting: DraftHead,
        num_token_ids: usize,
    ) -> ArrayVec<usize, { HeadPolicy::MOST_LENGTHS }> {
        match setting {
            DraftHead::Whole => ArrayVec::new(),
            DraftHead::First(length) => {
                (length > 0 && length < num_token_ids).then_some(length).into_iter().collect()
            }
            DraftHead::Auto => LENGTHS
                .iter()
                .map(|&(length, _)| length)
                .filter(|&length| (length as f64) < LONGEST_SHARE * num_token_ids as f64)
                .collect(),
        }
    }

    /// From `(length, seconds saved in a draft pass)` of the lengths that the model can do, ascending.
    pub(crate) fn new(setting: DraftHead, measured: &[(usize, f64)], policy: &DraftPolicy) -> Self {
        let prior = |length| LENGTHS.iter().find(|l| l.0 == length).map_or(1.0, |l| l.1);
        let candidates = measured.iter().map(|&(num_tokens, saving)| Candidate {
            num_tokens,
            saving,
            prior: prior(num_tokens),
            seen: 0.0,
            new: 0,
        });
        let mut heads = HeadPolicy {
            candidates: candidates.take(Self::MOST_LENGTHS).collect(),
            is_fixed: setting != DraftHead::Auto,
            ..HeadPolicy::default()
        };
        heads.choose(policy);
        heads
    }

    /// Tokens of the head in use and what it saves of a pass; `None`: the whole.
    pub(crate) fn current(&self) -> Option<(usize, f64)> {
        self.current.map(|index| (self.candidates[index].num_tokens, self.candidates[index].saving))
    }

    /// Notes tokens that the target committed.
    pub(crate) fn observe(&mut self, tokens: &[u32]) {
        if self.candidates.is_empty() || self.is_fixed {
            return;
        }
        self.new += tokens.len() as u32;
        for &id in tokens {
            if let Some(shortest) = self.candidates.iter_mut().find(|c| (id as usize) < c.num_tokens) {
                shortest.new += 1;
            }
        }
    }

    /// Chooses anew once a period; true if the choice has changed.
    pub(crate) fn review(&mut self, policy: &DraftPolicy) -> bool {
        if self.new < PERIOD {
            return false;
        }
        self.seen = DECAY * self.seen + f64::from(std::mem::take(&mut self.new));
        for candidate in &mut self.candidates {
            candidate.seen = DECAY * candidate.seen + f64::from(std::mem::take(&mut candidate.new));
        }
        let before = self.current;
        self.choose(policy);
        self.current != before
    }

    fn choose(&mut self, policy: &DraftPolicy) {
        if self.is_fixed {
            self.current = (!self.candidates.is_empty()).then_some(0);
            return;
        }
        let standing = policy.later_standing(&Acceptance::default());
        let rate = |index: Option<usize>| {
            let (share, saving) =
                index.map_or((1.0, 0.0), |index| (self.share(index), self.candidates[index].saving));
            tokens_per_second(&policy.costs, standing * share, saving)
        };
        let mut best = self.current;
        for index in std::iter::once(None).chain((0..self.candidates.len()).map(Some)) {
            if rate(index) > MARGIN * rate(best) {
                best = index;
            }
        }
        self.current = best;
    }

    /// The share of committed tokens that the candidate has.
    fn share(&self, index: usize) -> f64 {
        let seen: f64 = self.candidates[..=index].iter().map(|candidate| candidate.seen).sum();
        (seen + PRIOR_WEIGHT * self.candidates[index].prior) / (self.seen + PRIOR_WEIGHT)
    }
}

/// Of one sequence that drafts as many tokens as pay, each of which stands with probability `standing` if
/// those before it do, in passes that take `saving` seconds less than with the whole head.
fn tokens_per_second(costs: &StepCosts, standing: f64, saving: f64) -> f64 {
    let draft = (costs.whole_draft(1) - saving).max(0.0);
    let mut best: f64 = 0.0;
    let mut tokens = 1.0;
    for rounds in 0..=MOST_ROUNDS {
        let seconds = costs.target(1 + rounds as usize) + f64::from(rounds) * draft;
        best = best.max(tokens / seconds.max(1e-9));
        tokens += standing.powi(rounds + 1);
    }
    best
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::policy::DraftTokens;
    use super::*;

    const QWEN: usize = 151_665;

    /// A target and a draft whose passes take these milliseconds, whatever the rows.
    fn costs(target: u64, draft: u64) -> DraftPolicy {
        let flat = |ms| [1, 16].map(|rows| (rows, Duration::from_millis(ms))).to_vec();
        DraftPolicy::new(DraftTokens::Auto, StepCosts::from_measured(flat(target), flat(draft)))
    }

    fn heads(savings: [f64; 3], policy: &DraftPolicy) -> HeadPolicy {
        let lengths = HeadPolicy::lengths(DraftHead::Auto, QWEN);
        let measured: Vec<_> = lengths.iter().copied().zip(savings).collect();
        HeadPolicy::new(DraftHead::Auto, &measured, policy)
    }

    #[test]
    fn lengths_fit_the_vocabulary_and_the_setting() {
        let lengths = |setting, size| -> Vec<usize> { HeadPolicy::lengths(setting, size).to_vec() };
        assert_eq!(lengths(DraftHead::Auto, QWEN), [32_768, 65_536, 98_304]);
        assert!(lengths(DraftHead::Auto, 32_000).is_empty());
        assert_eq!(lengths(DraftHead::Auto, 49_152), [32_768]);
        assert!(lengths(DraftHead::Whole, QWEN).is_empty());
        assert_eq!(lengths(DraftHead::First(1000), QWEN), [1000]);
        assert!(lengths(DraftHead::First(QWEN), QWEN).is_empty(), "that is all of them");
    }

    #[test]
    fn what_a_head_saves_is_weighed_against_what_it_misses() {
        // 10 ms a draft pass, of which 3 ms the head. Where drafts are most of the step a shorter head pays.
        let small = heads([0.0024, 0.0017, 0.001], &costs(20, 10));
        assert!(small.current().is_some_and(|(length, _)| length < 98_304), "{small:?}");
        // Where the target is, only one that misses next to nothing does.
        let large = heads([0.0024, 0.0017, 0.001], &costs(300, 10));
        assert!(large.current().is_none_or(|(length, _)| length == 98_304), "{large:?}");
        // A head that saves nothing is never taken.
        assert!(heads([0.0; 3], &costs(20, 10)).current().is_none());
    }

    #[test]
    fn text_of_rare_tokens_takes_the_whole_head_and_code_the_short_one_again() {
        let policy = costs(30, 10);
        let mut heads = heads([0.0024, 0.0017, 0.001], &policy);
        assert!(heads.current().is_some());
        let read = |heads: &mut HeadPolicy, id| {
            for _ in 0..60_000 {
                heads.observe(&[id]);
                heads.review(&policy);
            }
        };
        read(&mut heads, 120_000);
        assert!(heads.current().is_none(), "{heads:?}");
        read(&mut heads, 100);
        assert_eq!(heads.current().map(|head| head.0), Some(32_768));
    }

    #[test]
    fn a_fixed_length_stays() {
        let policy = costs(30, 10);
        let mut heads = HeadPolicy::new(DraftHead::First(1000), &[(1000, 0.0)], &policy);
        heads.observe(&[5000; 2000]);
        assert!(!heads.review(&policy));
        assert_eq!(heads.current(), Some((1000, 0.0)));
    }
}
