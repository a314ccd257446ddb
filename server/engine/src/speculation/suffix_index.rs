//! Where in a growing text did its last few tokens occur before? An LZ77-style hash chain: the last
//! place of every hashed triple of tokens, and from each place the one before it with the same hash.
//!
//! Invariants: a place is indexed only once a token follows it, so the text's own end never matches
//! itself; a match is made by comparing tokens, so a hash collision costs time and is never a match.
//! Cost: `extend` is O(new tokens), `longest_match` at most [`MAX_CANDIDATES`] comparisons of
//! [`MAX_MATCH`] tokens. Memory: 4 bytes a token for the chain and three tables of 4 bytes times the
//! capacity's next power of two, reserved at construction.

use std::num::NonZeroU32;

use crate::api::TokenId;

/// Longest match that is told from a longer one.
pub(crate) const MAX_MATCH: usize = 32;

/// Places looked at for one match, most recent first.
const MAX_CANDIDATES: usize = 16;

/// Buckets of a table: at least enough to be worth hashing, at most 256 KiB.
const MIN_BUCKETS: usize = 64;
const MAX_BUCKETS: usize = 1 << 16;

/// A place in a text after which the tokens looked for also occurred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Match {
    /// Tokens of the text up to and including the match; the continuation starts here.
    pub(crate) end: usize,
    /// Tokens that match, counted backwards from `end`; at most [`MAX_MATCH`].
    pub(crate) len: usize,
}

/// The number of tokens before the place, which is never 0.
type Place = Option<NonZeroU32>;

/// The index. The text itself stays with its owner, who passes the same text, grown, every time.
#[derive(Debug)]
pub(crate) struct SuffixIndex {
    /// Hash of three tokens -> the last place they end at.
    triples: Vec<Place>,
    /// Hash of two tokens -> the last place they end at; looked at when no triple matches.
    pairs: Vec<Place>,
    /// Hash of a token -> the last place it ends at; looked at when no pair matches.
    singles: Vec<Place>,
    /// Place -> the place before it with the same triple's hash. As long as what is indexed.
    previous: Vec<Place>,
}

impl SuffixIndex {
    /// An index for a text of `capacity` tokens. A longer one is indexed too, but allocates.
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        let buckets = capacity.next_power_of_two().clamp(MIN_BUCKETS, MAX_BUCKETS);
        SuffixIndex {
            triples: vec![None; buckets],
            pairs: vec![None; buckets],
            singles: vec![None; buckets],
            previous: Vec::with_capacity(capacity),
        }
    }

    /// Forgets everything and keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.triples.fill(None);
        self.pairs.fill(None);
        self.singles.fill(None);
        self.previous.clear();
    }

    /// Indexes what is new in `text`, which begins with the text of the last call.
    pub(crate) fn extend(&mut self, text: &[TokenId]) {
        debug_assert!(text.len() >= self.previous.len(), "an indexed text shrank: this is a bug");
        for end in self.previous.len()..text.len() {
            let place = u32::try_from(end).ok().and_then(NonZeroU32::new);
            let mut previous = None;
            if let Some(key) = text[..end].last_chunk::<3>() {
                let bucket = self.bucket(key);
                previous = std::mem::replace(&mut self.triples[bucket], place);
            }
            if let Some(key) = text[..end].last_chunk::<2>() {
                let bucket = self.bucket(key);
                self.pairs[bucket] = place;
            }
            if let Some(key) = text[..end].last_chunk::<1>() {
                let bucket = self.bucket(key);
                self.singles[bucket] = place;
            }
            self.previous.push(previous);
        }
    }

    /// The place in `text`, as it was when last indexed, whose tokens before it agree longest with the
    /// end of `suffix`; of equally long ones the most recent. At least one token agrees.
    pub(crate) fn longest_match(&self, text: &[TokenId], suffix: &[TokenId]) -> Option<Match> {
        let mut best: Option<Match> = None;
        let mut place = suffix.last_chunk::<3>().and_then(|key| self.triples[self.bucket(key)]);
        for _ in 0..MAX_CANDIDATES {
            let Some(end) = place.map(|p| p.get() as usize) else { break };
            let len = common_suffix(&text[..end], suffix);
            if len >= 3 && best.is_none_or(|best| len > best.len) {
                best = Some(Match { end, len });
                if len == MAX_MATCH {
                    break;
                }
            }
            place = self.previous[end];
        }
        best.or_else(|| self.last_place(text, suffix, self.pairs[self.bucket(suffix.last_chunk::<2>()?)]))
            .or_else(|| self.last_place(text, suffix, self.singles[self.bucket(suffix.last_chunk::<1>()?)]))
    }

    /// The match at a table's place, if the tokens there are not others of the same hash.
    fn last_place(&self, text: &[TokenId], suffix: &[TokenId], place: Place) -> Option<Match> {
        let end = place?.get() as usize;
        let len = common_suffix(&text[..end], suffix);
        (len > 0).then_some(Match { end, len })
    }

    fn bucket<const N: usize>(&self, key: &[TokenId; N]) -> usize {
        // Multiplication mixes towards the high bits (Knuth's multiplicative hashing).
        let hash = key.iter().fold(0u64, |hash, &token| {
            (hash.rotate_left(23) ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
        });
        (hash >> 40) as usize & (self.triples.len() - 1)
    }
}

/// How many tokens, counted from the end, two texts have in common; at most [`MAX_MATCH`].
pub(crate) fn common_suffix(a: &[TokenId], b: &[TokenId]) -> usize {
    a.iter().rev().zip(b.iter().rev()).take(MAX_MATCH).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn indexed(text: &[TokenId]) -> SuffixIndex {
        let mut index = SuffixIndex::with_capacity(text.len());
        index.extend(text);
        index
    }

    fn own_match(text: &[TokenId]) -> Option<Match> {
        indexed(text).longest_match(text, text)
    }

    #[test]
    fn the_end_does_not_match_itself() {
        assert_eq!(own_match(&[1, 2, 3, 4, 5]), None);
        assert_eq!(own_match(&[]), None);
        assert_eq!(own_match(&[7]), None);
        assert_eq!(own_match(&[7, 7]), Some(Match { end: 1, len: 1 }));
    }

    #[test]
    fn the_longest_match_wins_then_the_most_recent() {
        assert_eq!(own_match(&[9, 1, 2, 3, 4, 8, 1, 2, 3, 5, 9, 1, 2, 3]), Some(Match { end: 4, len: 4 }));
        assert_eq!(own_match(&[1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]), Some(Match { end: 7, len: 3 }));
    }

    #[test]
    fn two_tokens_are_enough_when_three_do_not_match() {
        assert_eq!(own_match(&[5, 1, 2, 9, 6, 1, 2]), Some(Match { end: 3, len: 2 }));
    }

    #[test]
    fn a_run_of_one_token_matches_one_earlier() {
        assert_eq!(own_match(&[4; 6]), Some(Match { end: 5, len: 5 }));
        assert_eq!(own_match(&[4; 100]), Some(Match { end: 99, len: MAX_MATCH }));
    }

    #[test]
    fn a_cleared_index_knows_nothing() {
        let text = [1, 2, 3, 1, 2, 3];
        let mut index = indexed(&text);
        index.clear();
        assert_eq!(index.longest_match(&text, &text), None);
        index.extend(&text);
        assert_eq!(index.longest_match(&text, &text), Some(Match { end: 3, len: 3 }));
    }

    /// What the index should find, by looking everywhere.
    fn naive(text: &[TokenId]) -> Option<Match> {
        (1..text.len())
            .rev()
            .map(|end| Match { end, len: common_suffix(&text[..end], text) })
            .filter(|m| m.len > 0)
            .fold(None, |best: Option<Match>, m| Some(best.filter(|b| b.len >= m.len).unwrap_or(m)))
    }

    proptest! {
        /// Few candidates: exactly the naive answer, however the text arrived.
        #[test]
        fn short_texts_match_as_naively(
            text in proptest::collection::vec(0u32..6, 0..16),
            cuts in proptest::collection::vec(0usize..16, 0..4),
        ) {
            let mut index = SuffixIndex::with_capacity(4);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).collect();
            cuts.sort_unstable();
            for cut in cuts {
                index.extend(&text[..cut]);
            }
            index.extend(&text);
            let found = index.longest_match(&text, &text);
            match naive(&text) {
                // These tables hold one place a bucket, so a collision may hide a match.
                Some(m) if m.len <= 2 => prop_assert!(found.is_none_or(|f| f.len <= m.len)),
                naive => prop_assert_eq!(found, naive),
            }
        }

        /// Many candidates and full buckets: what is found is there, and something follows it.
        #[test]
        fn a_match_is_real(text in proptest::collection::vec(0u32..3, 0..600)) {
            if let Some(found) = indexed(&text).longest_match(&text, &text) {
                prop_assert!(found.end < text.len() && found.len > 0 && found.len <= found.end);
                prop_assert_eq!(&text[found.end - found.len..found.end], &text[text.len() - found.len..]);
            }
        }
    }
}
