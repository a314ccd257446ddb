//! What a tenant's recent sequences said, so that the next one can be drafted from it: the function
//! completed a minute ago, the file that an agent reads again.
//!
//! Tenants are told apart by [`CacheSalt`] and never see each other's text. Bounds: [`MAX_SALTS`]
//! sessions (the one recorded to longest ago goes first) of [`SESSION_TOKENS`] tokens (when full, the
//! older half goes). Memory: 640 KiB a session, so at most 40 MiB. Cost: recording is O(tokens of
//! the sequence), of which the last [`RECORDED_TOKENS`] count; tokens that the session already holds
//! are not recorded again, because every keystroke sends nearly the same prompt.

use super::suffix_index::{Match, SuffixIndex};
use crate::api::{CacheSalt, TokenId};

/// Most tenants whose text is kept.
const MAX_SALTS: usize = 64;

/// Most tokens kept of a tenant's text.
const SESSION_TOKENS: usize = 32_768;

/// Tokens at the end of a sequence that are worth keeping: what led to the output, and the output.
const RECORDED_TOKENS: usize = 2_048;

/// Text is recorded, or found to be known, in pieces of this many tokens.
const PIECE: usize = 16;

/// Tokens before a new piece that are kept with it, so that its beginning can be matched.
const LEAD: usize = 8;

/// Stands between records. No vocabulary has it, so it matches nothing and no proposal runs over it.
const BORDER: TokenId = TokenId::MAX;

/// The sessions of all tenants.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    sessions: Vec<Session>,
    /// Counts records; orders sessions by use.
    clock: u64,
}

impl Sessions {
    /// The tenant's session, if it has one.
    pub(crate) fn get(&self, salt: CacheSalt) -> Option<&Session> {
        self.sessions.iter().find(|session| session.salt == salt)
    }

    /// Keeps what is new in a finished sequence's tokens (prompt and output).
    pub(crate) fn record(&mut self, salt: CacheSalt, tokens: &[TokenId]) {
        if tokens.len() < PIECE {
            return;
        }
        self.clock += 1;
        let index = match self.sessions.iter().position(|session| session.salt == salt) {
            Some(index) => index,
            None if self.sessions.len() < MAX_SALTS => {
                self.sessions.push(Session::new(salt));
                self.sessions.len() - 1
            }
            None => {
                let oldest = (0..self.sessions.len()).min_by_key(|&i| self.sessions[i].last_record);
                let oldest = oldest.expect("MAX_SALTS is not 0: this is a bug");
                self.sessions[oldest].restart(salt);
                oldest
            }
        };
        let session = &mut self.sessions[index];
        session.last_record = self.clock;
        session.record(&tokens[tokens.len().saturating_sub(RECORDED_TOKENS)..]);
    }
}

/// One tenant's recent text.
#[derive(Debug)]
pub(crate) struct Session {
    salt: CacheSalt,
    last_record: u64,
    text: Vec<TokenId>,
    index: SuffixIndex,
}

impl Session {
    fn new(salt: CacheSalt) -> Self {
        Session {
            salt,
            last_record: 0,
            text: Vec::with_capacity(SESSION_TOKENS),
            index: SuffixIndex::with_capacity(SESSION_TOKENS),
        }
    }

    fn restart(&mut self, salt: CacheSalt) {
        self.salt = salt;
        self.text.clear();
        self.index.clear();
    }

    /// The place in the session's text that agrees longest with the end of `suffix`.
    pub(crate) fn longest_match(&self, suffix: &[TokenId]) -> Option<Match> {
        self.index.longest_match(&self.text, suffix)
    }

    /// What followed a match, up to the end of its record.
    pub(crate) fn continuation(&self, found: Match) -> &[TokenId] {
        let rest = &self.text[found.end..];
        let len = rest.iter().position(|&token| token == BORDER).unwrap_or(rest.len());
        &rest[..len]
    }

    fn record(&mut self, tokens: &[TokenId]) {
        if self.text.len() + 2 * RECORDED_TOKENS > SESSION_TOKENS {
            self.text.drain(..self.text.len() / 2);
            self.index.clear();
            self.index.extend(&self.text);
        }
        let mut recorded_to = None;
        for start in (0..tokens.len()).step_by(PIECE) {
            let end = (start + PIECE).min(tokens.len());
            let known = self.longest_match(&tokens[..end]).is_some_and(|found| found.len >= end - start);
            if known {
                continue;
            }
            // Right after the last new piece: one record. Else a lead-in ties it to what came before.
            let from = if recorded_to == Some(start) { start } else { start.saturating_sub(LEAD) };
            if from < start && recorded_to.is_some() {
                self.text.push(BORDER);
            }
            self.text.extend_from_slice(&tokens[from..end]);
            recorded_to = Some(end);
        }
        if recorded_to.is_some() {
            self.text.push(BORDER);
        }
        self.index.extend(&self.text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALICE: CacheSalt = CacheSalt(1);
    const BOB: CacheSalt = CacheSalt(2);

    fn text(from: u32, len: u32) -> Vec<TokenId> {
        (from..from + len).collect()
    }

    #[test]
    fn a_recorded_text_is_continued() {
        let mut sessions = Sessions::default();
        sessions.record(ALICE, &text(100, 40));
        let session = sessions.get(ALICE).expect("recorded");
        let found = session.longest_match(&[7, 110, 111, 112]).expect("three tokens occurred");
        assert_eq!(found.len, 3);
        assert_eq!(session.continuation(found), text(113, 27));
    }

    #[test]
    fn tenants_do_not_see_each_other() {
        let mut sessions = Sessions::default();
        sessions.record(ALICE, &text(100, 40));
        sessions.record(BOB, &text(500, 40));
        let bob = sessions.get(BOB).expect("recorded");
        assert_eq!(bob.longest_match(&text(100, 10)), None);
        assert!(bob.longest_match(&text(500, 10)).is_some());
        assert!(sessions.get(CacheSalt(3)).is_none());
    }

    #[test]
    fn a_continuation_ends_with_its_record() {
        let mut sessions = Sessions::default();
        sessions.record(ALICE, &text(100, 20));
        sessions.record(ALICE, &text(500, 20));
        let session = sessions.get(ALICE).expect("recorded");
        let found = session.longest_match(&text(110, 5)).expect("recorded");
        assert_eq!(session.continuation(found), text(115, 5));
    }

    #[test]
    fn the_same_prompt_is_recorded_once() {
        let mut sessions = Sessions::default();
        let mut prompt = text(100, 512);
        sessions.record(ALICE, &prompt);
        let before = sessions.get(ALICE).expect("recorded").text.len();
        for keystroke in 0..50 {
            prompt.push(10_000 + keystroke);
            sessions.record(ALICE, &prompt);
        }
        let after = sessions.get(ALICE).expect("recorded").text.len();
        assert!(after - before < 50 * (PIECE + LEAD + 2), "{before} tokens grew to {after}");
        let session = sessions.get(ALICE).expect("recorded");
        assert!(session.longest_match(&[10_040, 10_041, 10_042]).is_some());
    }

    #[test]
    fn the_oldest_session_goes_first() {
        let mut sessions = Sessions::default();
        for salt in 0..MAX_SALTS as u128 {
            sessions.record(CacheSalt(salt), &text(100, 20));
        }
        sessions.record(CacheSalt(0), &text(300, 20));
        sessions.record(CacheSalt(1_000), &text(500, 20));
        assert_eq!(sessions.sessions.len(), MAX_SALTS);
        assert!(sessions.get(CacheSalt(0)).is_some());
        assert!(sessions.get(CacheSalt(1)).is_none());
        let new = sessions.get(CacheSalt(1_000)).expect("recorded");
        assert_eq!(new.longest_match(&text(100, 10)), None, "the old tenant's text is still there");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Bounded memory, no allocation after the first record, and no border in a continuation.
        #[test]
        fn a_session_is_bounded(
            records in proptest::collection::vec((0u32..50_000, 0u32..4_000), 1..40),
        ) {
            let mut sessions = Sessions::default();
            for (from, len) in records {
                let tokens = text(from, len);
                sessions.record(ALICE, &tokens);
                let Some(session) = sessions.get(ALICE) else { continue };
                prop_assert!(session.text.len() <= SESSION_TOKENS);
                prop_assert_eq!(session.text.capacity(), SESSION_TOKENS);
                if let Some(found) = session.longest_match(&tokens) {
                    prop_assert!(!session.continuation(found).contains(&BORDER));
                }
            }
        }
    }
}
