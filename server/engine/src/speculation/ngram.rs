//! Proposes what followed when the sequence's last tokens occurred before: in its own prompt and
//! output, or in its tenant's session if the match there is longer. Costs no forward pass; the match's
//! length tells how far to trust it.

use arrayvec::ArrayVec;

use super::session::Session;
use super::suffix_index::{Match, SuffixIndex};
use crate::api::{MAX_DRAFT_TOKENS, TokenId};

/// One sequence's index of its own text.
#[derive(Debug)]
pub(crate) struct NgramProposer {
    index: SuffixIndex,
}

impl NgramProposer {
    /// For a sequence of at most `max_len` tokens, prompt included.
    pub(crate) fn new(max_len: usize) -> Self {
        NgramProposer { index: SuffixIndex::with_capacity(max_len) }
    }

    /// Indexes what was committed since the last call. O(new tokens).
    pub(crate) fn observe(&mut self, committed: &[TokenId]) {
        self.index.extend(committed);
    }

    /// Fills `out` with the continuation of the longest match of the end of `committed`, all of which
    /// has been observed, and returns the match's length: 0, and `out` empty, if nothing matches.
    pub(crate) fn propose(
        &self,
        committed: &[TokenId],
        session: Option<&Session>,
        out: &mut ArrayVec<TokenId, MAX_DRAFT_TOKENS>,
    ) -> usize {
        out.clear();
        let own = self.index.longest_match(committed, committed);
        let own_len = own.map_or(0, |found| found.len);
        if let Some(session) = session
            && let Some(found) = session.longest_match(committed)
            && found.len > own_len
        {
            out.extend(session.continuation(found).iter().copied().take(MAX_DRAFT_TOKENS));
            if !out.is_empty() {
                return found.len;
            }
        }
        let Some(Match { end, len }) = own else { return 0 };
        // Where the text ends, the copy goes on with what it has copied itself, as in LZ77: a text that
        // repeats every few tokens is continued as far as asked.
        let source = &committed[end..];
        out.extend(source.iter().cycle().copied().take(MAX_DRAFT_TOKENS));
        len
    }
}

#[cfg(test)]
mod tests {
    use super::super::session::Sessions;
    use super::*;
    use crate::api::CacheSalt;
    use proptest::prelude::*;

    fn propose(committed: &[TokenId], session: Option<&Session>) -> (usize, Vec<TokenId>) {
        let mut proposer = NgramProposer::new(committed.len());
        proposer.observe(committed);
        let mut out = ArrayVec::new();
        let len = proposer.propose(committed, session, &mut out);
        (len, out.to_vec())
    }

    #[test]
    fn continues_as_before() {
        let mut text: Vec<TokenId> = (10..40).collect();
        text.extend([1, 2, 12, 13, 14]);
        let (len, tokens) = propose(&text, None);
        assert_eq!(len, 3);
        assert_eq!(tokens[..25], (15..40).collect::<Vec<_>>());
        assert_eq!(tokens.len(), MAX_DRAFT_TOKENS);
    }

    #[test]
    fn a_repeating_text_is_continued_beyond_its_end() {
        let (_, tokens) = propose(&[1, 2, 3, 1, 2, 3, 1], None);
        assert_eq!(tokens, [2, 3, 1].into_iter().cycle().take(MAX_DRAFT_TOKENS).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_matches_nothing() {
        assert_eq!(propose(&[1, 2, 3, 4], None), (0, vec![]));
        assert_eq!(propose(&[1], None), (0, vec![]));
    }

    #[test]
    fn the_session_wins_only_with_a_longer_match() {
        let mut sessions = Sessions::default();
        sessions.record(CacheSalt(1), &(100..130).collect::<Vec<_>>());
        let session = sessions.get(CacheSalt(1));
        let (len, tokens) = propose(&[1, 102, 103, 104, 9, 9, 101, 102, 103, 104], session);
        assert_eq!((len, tokens[0]), (4, 105));
        let (len, tokens) = propose(&[1, 102, 103, 104, 9, 9, 5, 102, 103, 104], session);
        assert_eq!((len, tokens[0]), (3, 9));
        assert_eq!(propose(&[127, 128, 129], session), (0, vec![]), "nothing followed");
    }

    proptest! {
        /// What is proposed follows a real occurrence of the text's last `len` tokens.
        #[test]
        fn a_proposal_is_a_continuation(text in proptest::collection::vec(0u32..5, 0..80)) {
            let (len, tokens) = propose(&text, None);
            prop_assert_eq!(len == 0, tokens.is_empty());
            if len > 0 {
                let suffix = &text[text.len() - len..];
                let follows = |end: usize| {
                    text[end..].iter().zip(&tokens).all(|(a, b)| a == b)
                };
                let found = (len..text.len()).any(|end| &text[end - len..end] == suffix && follows(end));
                prop_assert!(found);
            }
        }
    }
}
