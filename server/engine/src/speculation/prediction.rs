//! Proposes the output that the client expects (OpenAI's Predicted Outputs), for instance the file
//! that is being edited. Costs no forward pass.
//!
//! A cursor stands where the output's next token is expected in the prediction. While the output follows, it
//! advances. When the output departs, the cursor is found again from the output's last tokens, as a
//! diff would: the nearest place ahead that agrees with them, so that a changed line, inserted lines
//! and deleted lines each cost a few steps and not the speculation. How many tokens agree before the cursor
//! ([`PredictionProposer::agreement`]) tells how far to trust the proposal.
//!
//! Cost: O(1) a token while the output follows; else a scan of [`NEAR`] tokens and one look-up. Memory:
//! the suffix index of the prediction.

use std::sync::Arc;

use super::suffix_index::{MAX_MATCH, SuffixIndex, common_suffix};
use crate::api::TokenId;

/// Tokens around the cursor that are scanned for any agreement at all. Further away, three tokens have
/// to agree, and the index finds them.
const NEAR_AHEAD: usize = 512;
const NEAR_BEHIND: usize = 128;

/// From this agreement on the cursor is believed, and no better place is looked for.
const SURE: usize = 8;

/// One sequence's place in its prediction.
#[derive(Debug)]
pub(crate) struct PredictionProposer {
    prediction: Arc<[TokenId]>,
    index: SuffixIndex,
    /// Where the next output token is expected.
    cursor: usize,
    /// Tokens before the cursor that equal the output's last ones.
    agreement: usize,
    /// The cursor when the output last departed from it for sure.
    anchor: usize,
    /// Output tokens since then.
    departed: usize,
    num_observed: usize,
}

impl PredictionProposer {
    /// Indexes the prediction: O(its tokens), once.
    pub(crate) fn new(prediction: Arc<[TokenId]>) -> Self {
        let mut index = SuffixIndex::with_capacity(prediction.len());
        index.extend(&prediction);
        // The beginning agrees with the beginning.
        PredictionProposer {
            prediction,
            index,
            cursor: 0,
            agreement: SURE,
            anchor: 0,
            departed: 0,
            num_observed: 0,
        }
    }

    /// Follows the output, all of which is passed each time.
    pub(crate) fn observe(&mut self, output: &[TokenId]) {
        for seen in self.num_observed..output.len() {
            let output = &output[..=seen];
            let follows = self.prediction.get(self.cursor) == output.last();
            if follows {
                self.cursor += 1;
                self.agreement = (self.agreement + 1).min(MAX_MATCH);
            } else if self.agreement >= SURE {
                self.anchor = self.cursor;
                self.departed = 0;
            }
            self.departed += 1;
            if !follows || self.agreement < SURE {
                self.resynchronise(output);
            }
        }
        self.num_observed = output.len();
    }

    /// What is expected next; empty at the end of the prediction.
    pub(crate) fn expected(&self) -> &[TokenId] {
        &self.prediction[self.cursor..]
    }

    /// Tokens before the cursor that equal the output's last ones: 0 is a guess.
    pub(crate) fn agreement(&self) -> usize {
        self.agreement
    }

    fn resynchronise(&mut self, output: &[TokenId]) {
        let from = self.anchor.saturating_sub(NEAR_BEHIND);
        let to = (self.anchor + NEAR_AHEAD).min(self.prediction.len());
        let last = output[output.len() - 1];
        let mut best = (0, (self.anchor + self.departed).min(self.prediction.len()), f32::NEG_INFINITY);
        for end in from + 1..=to {
            if self.prediction[end - 1] != last {
                continue;
            }
            let agreement = common_suffix(&self.prediction[..end], output);
            let score = score(agreement, end, self.anchor);
            if score > best.2 {
                best = (agreement, end, score);
            }
        }
        if let Some(found) = self.index.longest_match(&self.prediction, output)
            && found.len >= 3
            && found.len > best.0
        {
            best = (found.len, found.end, 0.0);
        }
        self.agreement = best.0;
        self.cursor = best.1;
    }
}

/// How plausible a place is: one more token in common weighs as much as sixteen times the distance from where the
/// output departed, and to jump back as much as one less. (On EditEval the weights hardly matter.)
fn score(agreement: usize, end: usize, anchor: usize) -> f32 {
    let behind = if end > anchor { 0.0 } else { 2.0 };
    2.0 * agreement.min(SURE) as f32 - 0.5 * (1.0 + end.abs_diff(anchor) as f32).log2() - behind
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A prediction of 40 different tokens; its lines end with 0.
    fn before() -> Vec<TokenId> {
        (0..40).map(|i| if i % 8 == 7 { 0 } else { 100 + i }).collect()
    }

    /// Steps that a forced output takes when 16 tokens may be drafted.
    fn steps(prediction: &[TokenId], output: &[TokenId]) -> usize {
        let mut proposer = PredictionProposer::new(prediction.into());
        let (mut committed, mut steps) = (0, 0);
        while committed < output.len() {
            proposer.observe(&output[..committed]);
            let expected = proposer.expected().iter().take(16);
            let standing = expected.zip(&output[committed..]).take_while(|(a, b)| a == b).count();
            committed += standing + 1;
            steps += 1;
        }
        steps
    }

    #[test]
    fn an_output_as_predicted_takes_full_steps() {
        assert_eq!(steps(&before(), &before()), 40usize.div_ceil(17));
    }

    #[test]
    fn a_replaced_token_costs_a_step() {
        let mut after = before();
        after[19] = 999;
        assert!(steps(&before(), &after) <= 4);
    }

    #[test]
    fn a_changed_line_is_followed_by_the_rest() {
        let mut after = before();
        after.splice(8..15, [900, 901, 902, 903]);
        assert!(steps(&before(), &after) <= 3 + 5);
    }

    #[test]
    fn inserted_lines_are_followed_by_the_rest() {
        let mut after = before();
        after.splice(16..16, [900, 901, 902, 0, 904, 905, 906, 0]);
        assert!(steps(&before(), &after) <= 3 + 8 + 1);
    }

    #[test]
    fn deleted_lines_are_skipped() {
        let mut after = before();
        after.drain(8..24);
        assert!(steps(&before(), &after) <= 4);
    }

    #[test]
    fn a_far_jump_needs_three_tokens() {
        let prediction: Vec<TokenId> = (0..5_000).collect();
        let after: Vec<TokenId> = (0..20).chain(4_000..4_100).chain(1_000..1_050).collect();
        assert!(steps(&prediction, &after) <= 2 + 3 + 6 + 3 + 3 + 3);
    }

    #[test]
    fn an_unrelated_output_takes_a_step_a_token() {
        let output: Vec<TokenId> = (1_000..1_050).collect();
        assert_eq!(steps(&before(), &output), 50);
        assert_eq!(steps(&[], &output), 50);
    }

    proptest! {
        /// Whatever the output does, the cursor stays inside and the agreement is real.
        #[test]
        fn agreement_is_real(
            prediction in proptest::collection::vec(0u32..6, 1..60),
            output in proptest::collection::vec(0u32..6, 1..90),
            step in 1usize..5,
        ) {
            let mut proposer = PredictionProposer::new(prediction.clone().into());
            for len in (1..=output.len()).step_by(step) {
                proposer.observe(&output[..len]);
                let end = prediction.len() - proposer.expected().len();
                let agreement = proposer.agreement();
                prop_assert!(agreement <= common_suffix(&prediction[..end], &output[..len])
                    // The beginning counts as agreement.
                    || (end == len && prediction[..end] == output[..len]));
            }
        }
    }
}
