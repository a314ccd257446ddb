//! One sequence's text proposers, n-gram and prediction: what they see and what they offer for the next
//! step. They run before the policy, which weighs what each has found and how well it agrees.

use arrayvec::ArrayVec;

use super::ngram::NgramProposer;
use super::prediction::PredictionProposer;
use super::session::Session;
use crate::api::{DraftSource, MAX_DRAFT_TOKENS, SpeculationParams, TokenId};

/// What a source would propose now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offer {
    /// Tokens it has.
    pub(crate) num_tokens: usize,
    /// Tokens of the text so far that agree with where they were found; the longer, the surer.
    pub(crate) agreement: usize,
}

/// The n-gram and prediction proposers of one sequence, as far as its client wants them.
#[derive(Debug)]
pub(crate) struct TextProposers {
    num_prompt_tokens: usize,
    ngram: Option<NgramProposer>,
    prediction: Option<PredictionProposer>,
    /// The n-gram's tokens as of the last look.
    found: ArrayVec<TokenId, MAX_DRAFT_TOKENS>,
    found_agreement: usize,
}

impl TextProposers {
    /// For a sequence of at most `max_len` tokens, prompt included. Allocates all they need.
    pub(crate) fn new(params: &SpeculationParams, num_prompt_tokens: usize, max_len: usize) -> Self {
        let wanted = |source| params.max_draft_tokens != Some(0) && params.sources.contains(source);
        let predicts = wanted(DraftSource::Prediction) && !params.prediction.is_empty();
        TextProposers {
            num_prompt_tokens,
            ngram: wanted(DraftSource::Ngram).then(|| NgramProposer::new(max_len)),
            prediction: predicts.then(|| PredictionProposer::new(params.prediction.clone())),
            found: ArrayVec::new(),
            found_agreement: 0,
        }
    }

    /// Takes in what was committed since the last call, and looks for what may follow. `committed` is
    /// the prompt and the committed output. O(new tokens), and a look-up of a microsecond or so.
    pub(crate) fn observe(&mut self, committed: &[TokenId], session: Option<&Session>) {
        if let Some(ngram) = &mut self.ngram {
            ngram.observe(committed);
            self.found_agreement = ngram.propose(committed, session, &mut self.found);
        }
        if let Some(prediction) = &mut self.prediction {
            prediction.observe(&committed[self.num_prompt_tokens..]);
        }
    }

    /// What `source` would propose after the last [`TextProposers::observe`]; nothing for the draft model,
    /// which is not asked here.
    pub(crate) fn offer(&self, source: DraftSource) -> Offer {
        match (source, &self.prediction) {
            (DraftSource::Ngram, _) => {
                Offer { num_tokens: self.found.len(), agreement: self.found_agreement }
            }
            (DraftSource::Prediction, Some(prediction)) => Offer {
                num_tokens: prediction.expected().len().min(MAX_DRAFT_TOKENS),
                agreement: prediction.agreement(),
            },
            _ => Offer::default(),
        }
    }

    /// The first `max` tokens of what `source` offers.
    pub(crate) fn propose(&self, source: DraftSource, max: usize) -> &[TokenId] {
        let offered = match (source, &self.prediction) {
            (DraftSource::Ngram, _) => self.found.as_slice(),
            (DraftSource::Prediction, Some(prediction)) => prediction.expected(),
            _ => &[],
        };
        &offered[..max.min(MAX_DRAFT_TOKENS).min(offered.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::DraftSources;

    fn params(sources: DraftSources, prediction: &[TokenId]) -> SpeculationParams {
        SpeculationParams { max_draft_tokens: None, sources, prediction: prediction.into() }
    }

    const PROMPT: [TokenId; 7] = [1, 2, 3, 4, 5, 2, 3];

    #[test]
    fn each_source_offers_its_own() {
        let mut proposers = TextProposers::new(&params(DraftSources::ALL, &[50, 51, 52]), PROMPT.len(), 20);
        proposers.observe(&PROMPT, None);
        assert_eq!(proposers.propose(DraftSource::Ngram, 2), [4, 5]);
        assert_eq!(proposers.propose(DraftSource::Prediction, 16), [50, 51, 52]);
        assert_eq!(proposers.offer(DraftSource::Prediction).num_tokens, 3);
        assert_eq!(proposers.offer(DraftSource::Ngram).agreement, 2);
        assert_eq!(proposers.offer(DraftSource::Draft), Offer::default());
        assert!(proposers.propose(DraftSource::Draft, 4).is_empty());
    }

    #[test]
    fn the_prediction_follows_the_output_and_not_the_prompt() {
        let mut proposers = TextProposers::new(&params(DraftSources::ALL, &[3, 51, 52]), PROMPT.len(), 20);
        let mut committed = PROMPT.to_vec();
        proposers.observe(&committed, None);
        committed.extend([3, 51]);
        proposers.observe(&committed, None);
        assert_eq!(proposers.propose(DraftSource::Prediction, 16), [52]);
    }

    #[test]
    fn unwanted_sources_offer_nothing() {
        for params in [
            params(DraftSources::NONE.with(DraftSource::Draft), &[50]),
            SpeculationParams { max_draft_tokens: Some(0), ..params(DraftSources::ALL, &[50]) },
        ] {
            let mut proposers = TextProposers::new(&params, PROMPT.len(), 20);
            proposers.observe(&PROMPT, None);
            assert_eq!(proposers.offer(DraftSource::Ngram), Offer::default());
            assert_eq!(proposers.offer(DraftSource::Prediction), Offer::default());
        }
    }
}
