//! What an output may be, when its client asked for a form: which tokens can come next, and where the
//! output may or must end. What the form is, JSON or a grammar, the engine does not know.
//!
//! A mask is a function of the output's tokens alone, so it can be asked for along a drafted path, after
//! a rejected draft and after a preemption, and is the same each time. [`Constrained`] sees to that: it
//! moves the constraint to whatever output is asked about, and keeps the masks of the path, so that what
//! was computed to draft a token serves to verify it. A constraint that panics has failed, as one that errs has:
//! masks are asked for outside passes too, where nobody else would catch it.
//!
//! Costs: a mask a position, computed once (with a real grammar some ten microseconds, now and then a
//! few hundred), one `advance` a token, and a bit a token of the vocabulary for each mask that is kept.

use std::sync::Arc;

use crate::api::{EngineError, MAX_DRAFT_TOKENS, SamplingParams, TokenId};
use crate::pass::guard;

/// A set of token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenMask {
    /// Bit `i` of word `w` is token `32 w + i`; bits beyond the vocabulary are 0. Shared with the passes that choose
    /// under the mask.
    words: Arc<Vec<u32>>,
    num_token_ids: usize,
}

impl TokenMask {
    /// The empty set, of ids below `num_token_ids`.
    pub fn new(num_token_ids: usize) -> Self {
        TokenMask { words: Arc::new(vec![0; num_token_ids.div_ceil(32)]), num_token_ids }
    }

    /// Makes it empty.
    pub fn clear(&mut self) {
        match Arc::get_mut(&mut self.words) {
            Some(words) => words.fill(0),
            // A pass still has what was in it.
            None => *self = TokenMask::new(self.num_token_ids),
        }
    }

    /// Adds a token; one outside the vocabulary is ignored.
    pub fn allow(&mut self, id: TokenId) {
        if (id as usize) < self.num_token_ids {
            Arc::make_mut(&mut self.words)[id as usize / 32] |= 1 << (id % 32);
        }
    }

    /// Takes a token out.
    pub fn forbid(&mut self, id: TokenId) {
        if (id as usize) < self.num_token_ids {
            Arc::make_mut(&mut self.words)[id as usize / 32] &= !(1 << (id % 32));
        }
    }

    /// True if the token is in the set.
    pub fn allows(&self, id: TokenId) -> bool {
        (id as usize) < self.num_token_ids && self.words[id as usize / 32] >> (id % 32) & 1 == 1
    }

    /// Takes over a set of bits in the same order: bit `i` of word `w` is token `32 w + i`. Words that are
    /// missing are empty, bits beyond the vocabulary are ignored.
    pub fn copy_from_words(&mut self, words: &[u32]) {
        let own = Arc::make_mut(&mut self.words);
        let num_given = words.len().min(own.len());
        own[..num_given].copy_from_slice(&words[..num_given]);
        own[num_given..].fill(0);
        let num_last = self.num_token_ids % 32;
        if num_last > 0
            && let Some(last) = own.last_mut()
        {
            *last &= (1 << num_last) - 1;
        }
    }

    /// The set as bits: bit `i` of word `w` is token `32 w + i`.
    pub(crate) fn words(&self) -> &Arc<Vec<u32>> {
        &self.words
    }

    /// True if no token is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The one token in the set, if there is just one.
    pub fn only(&self) -> Option<TokenId> {
        let mut words = self.words.iter().enumerate().filter(|(_, word)| **word != 0);
        let (index, word) = words.next()?;
        let is_single = word.is_power_of_two() && words.next().is_none();
        is_single.then(|| index as TokenId * 32 + word.trailing_zeros())
    }

    /// The tokens in the set, in order.
    pub fn iter(&self) -> impl Iterator<Item = TokenId> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            let bits = (0..32).filter(move |bit| word >> bit & 1 == 1);
            bits.map(move |bit| index as TokenId * 32 + bit)
        })
    }
}

/// Whether the output may end where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It is not whole.
    Forbidden,
    /// It is whole, and could go on.
    Allowed,
    /// It is whole, and nothing can follow.
    Forced,
}

/// A constraint cannot say what may come next, or has run past its limits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConstraintError(pub String);

impl From<ConstraintError> for EngineError {
    fn from(ConstraintError(reason): ConstraintError) -> Self {
        EngineError::Constraint(reason)
    }
}

/// The form of one output. Begins before the output's first token.
///
/// Whatever it answers must be a function of the tokens taken so far. Stop tokens are the engine's
/// business: a constraint never sees one, and says by [`Ending`] where they may stand.
pub trait Constraint: Send {
    /// Puts the tokens that may come next into `mask`, which is empty.
    ///
    /// # Errors
    /// If that cannot be computed, or only beyond the constraint's limits.
    fn mask(&mut self, mask: &mut TokenMask) -> Result<(), ConstraintError>;

    /// Whether the output may end here.
    ///
    /// # Errors
    /// As [`Constraint::mask`].
    fn ending(&mut self) -> Result<Ending, ConstraintError>;

    /// Takes the next token, which the mask allowed.
    ///
    /// # Errors
    /// If it was not allowed, or beyond the constraint's limits.
    fn advance(&mut self, token: TokenId) -> Result<(), ConstraintError>;

    /// Forgets the last `num_tokens` tokens.
    ///
    /// # Errors
    /// If it cannot go back; it is reset then.
    fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError>;

    /// Goes back to before the first token, after an error too.
    fn reset(&mut self);
}

/// What is known of an output's continuation.
struct Known {
    /// Tokens of that output.
    len: usize,
    ending: Ending,
    /// Stop tokens included, where they may stand. Not empty.
    mask: TokenMask,
}

/// A sequence's constraint, and where it is.
pub(crate) struct Constrained {
    constraint: Box<dyn Constraint>,
    num_token_ids: usize,
    /// What the constraint has taken.
    taken: Vec<TokenId>,
    /// Of outputs that `taken` begins with.
    known: Vec<Known>,
    spare: Vec<TokenMask>,
}

impl Constrained {
    pub(crate) fn new(constraint: Box<dyn Constraint>, num_token_ids: usize) -> Self {
        Constrained { constraint, num_token_ids, taken: Vec::new(), known: Vec::new(), spare: Vec::new() }
    }

    /// What may follow `output`, stop tokens included.
    ///
    /// # Errors
    /// What the constraint says when it is asked for this output from its beginning: what was drafted
    /// meanwhile cannot make a sequence fail. [`EngineError::Forward`] if it panics.
    pub(crate) fn allowed(
        &mut self,
        output: &[TokenId],
        params: &SamplingParams,
    ) -> Result<&TokenMask, EngineError> {
        self.known(output, params).map(|known| &known.mask)
    }

    /// True if nothing can follow `output`.
    ///
    /// # Errors
    /// As [`Constrained::allowed`].
    pub(crate) fn is_complete(
        &mut self,
        output: &[TokenId],
        params: &SamplingParams,
    ) -> Result<bool, EngineError> {
        self.known(output, params).map(|known| known.ending == Ending::Forced)
    }

    fn known(&mut self, output: &[TokenId], params: &SamplingParams) -> Result<&Known, EngineError> {
        let is_on_path = self.taken.starts_with(output);
        let found = self.known.iter().position(|known| is_on_path && known.len == output.len());
        let index = match found {
            Some(index) => index,
            None => {
                let known = guard(|| self.look(output, params)).or_else(|_| {
                    guard(|| {
                        self.restart();
                        self.look(output, params)
                    })
                });
                let known = known.or_else(|error| {
                    guard(|| {
                        self.restart();
                        Err(error)
                    })
                })?;
                self.make_room();
                self.known.push(known);
                self.known.len() - 1
            }
        };
        Ok(&self.known[index])
    }

    fn restart(&mut self) {
        self.constraint.reset();
        self.taken.clear();
        self.spare.extend(self.known.drain(..).map(|known| known.mask));
    }

    /// Keeps the masks of one draft.
    fn make_room(&mut self) {
        if self.known.len() > MAX_DRAFT_TOKENS {
            let oldest = (0..self.known.len()).min_by_key(|&index| self.known[index].len);
            self.spare.extend(oldest.map(|index| self.known.swap_remove(index).mask));
        }
    }

    /// Moves the constraint to `output` and asks it.
    fn look(&mut self, output: &[TokenId], params: &SamplingParams) -> Result<Known, EngineError> {
        let num_common = self.taken.iter().zip(output).take_while(|(a, b)| a == b).count();
        if num_common < self.taken.len() {
            self.constraint.rollback(self.taken.len() - num_common)?;
            self.taken.truncate(num_common);
            let spare = &mut self.spare;
            self.known.retain_mut(|known| {
                let stands = known.len <= num_common;
                if !stands {
                    spare.push(std::mem::replace(&mut known.mask, TokenMask::new(0)));
                }
                stands
            });
        }
        for &token in &output[num_common..] {
            self.constraint.advance(token)?;
            self.taken.push(token);
        }
        let ending = self.constraint.ending()?;
        let mut mask = self.spare.pop().unwrap_or_else(|| TokenMask::new(self.num_token_ids));
        mask.clear();
        if ending != Ending::Forced {
            self.constraint.mask(&mut mask)?;
        }
        if output.len() < params.min_tokens as usize {
            params.stop_token_ids.iter().for_each(|&id| mask.forbid(id));
        }
        // An output that can only end does, however long it was to be.
        let may_end = output.len() >= params.min_tokens as usize || mask.is_empty();
        if ending != Ending::Forbidden && may_end {
            params.stop_token_ids.iter().for_each(|&id| mask.allow(id));
        }
        if mask.is_empty() && ending != Ending::Forced {
            let reason = "no token of the vocabulary can continue the answer";
            return Err(EngineError::Constraint(reason.to_owned()));
        }
        Ok(Known { len: output.len(), ending, mask })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_holds_what_was_put_in() {
        let mut mask = TokenMask::new(70);
        assert!(mask.is_empty() && mask.only().is_none());
        mask.allow(69);
        mask.allow(70);
        assert_eq!(mask.only(), Some(69));
        mask.allow(3);
        assert_eq!(mask.iter().collect::<Vec<_>>(), [3, 69]);
        assert_eq!(mask.only(), None);
        assert!(mask.allows(3) && !mask.allows(4) && !mask.allows(1000));
        mask.forbid(3);
        assert_eq!(mask.only(), Some(69));
        mask.copy_from_words(&[0b100, 0, u32::MAX, 7]);
        assert_eq!(mask.iter().collect::<Vec<_>>(), [2, 64, 65, 66, 67, 68, 69]);
        mask.copy_from_words(&[1]);
        assert_eq!(mask.only(), Some(0));
    }

    /// Counts what it is asked, allows `last + 1 ..= last + 3`, breaks at 40, and panics at 44.
    #[derive(Default)]
    struct Steps {
        tokens: Vec<TokenId>,
        is_broken: bool,
        num_masks: std::sync::Arc<std::sync::atomic::AtomicUsize>,
    }

    impl Constraint for Steps {
        fn mask(&mut self, mask: &mut TokenMask) -> Result<(), ConstraintError> {
            self.num_masks.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let last = self.tokens.last().copied().unwrap_or(0);
            (last + 1..=last + 3).for_each(|id| mask.allow(id));
            Ok(())
        }

        fn ending(&mut self) -> Result<Ending, ConstraintError> {
            Ok(if self.tokens.len() >= 2 { Ending::Allowed } else { Ending::Forbidden })
        }

        fn advance(&mut self, token: TokenId) -> Result<(), ConstraintError> {
            self.is_broken |= token >= 40;
            if token == 44 {
                // Not `panic!`, whose message would be printed although somebody catches it.
                std::panic::resume_unwind(Box::new("no such step"));
            }
            if self.is_broken {
                return Err(ConstraintError("too far".to_owned()));
            }
            self.tokens.push(token);
            Ok(())
        }

        fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError> {
            if self.is_broken {
                return Err(ConstraintError("broken".to_owned()));
            }
            self.tokens.truncate(self.tokens.len() - num_tokens);
            Ok(())
        }

        fn reset(&mut self) {
            self.tokens.clear();
            self.is_broken = false;
        }
    }

    fn steps() -> (Constrained, std::sync::Arc<std::sync::atomic::AtomicUsize>) {
        let steps = Steps::default();
        let num_masks = steps.num_masks.clone();
        (Constrained::new(Box::new(steps), 48), num_masks)
    }

    fn ids(mask: &TokenMask) -> Vec<TokenId> {
        mask.iter().collect()
    }

    #[test]
    fn a_path_is_computed_once_and_a_departure_from_it_is_followed() {
        let params = SamplingParams { stop_token_ids: vec![47], ..SamplingParams::default() };
        let (mut constrained, num_masks) = steps();
        for _ in 0..2 {
            assert_eq!(ids(constrained.allowed(&[], &params).expect("a mask")), [1, 2, 3]);
            assert_eq!(ids(constrained.allowed(&[2], &params).expect("a mask")), [3, 4, 5]);
            assert_eq!(ids(constrained.allowed(&[2, 5], &params).expect("a mask")), [6, 7, 8, 47]);
        }
        assert_eq!(num_masks.load(std::sync::atomic::Ordering::Relaxed), 3);
        assert_eq!(ids(constrained.allowed(&[3], &params).expect("a mask")), [4, 5, 6]);
        assert_eq!(ids(constrained.allowed(&[], &params).expect("a mask")), [1, 2, 3]);
        assert_eq!(num_masks.load(std::sync::atomic::Ordering::Relaxed), 4);
    }

    #[test]
    fn what_breaks_on_a_drafted_path_does_not_break_the_output() {
        let params = SamplingParams::default();
        let (mut constrained, _) = steps();
        assert!(constrained.allowed(&[1, 2], &params).is_ok());
        assert_eq!(constrained.allowed(&[1, 2, 41], &params), Err(EngineError::Constraint("too far".into())));
        assert_eq!(ids(constrained.allowed(&[1, 2, 3], &params).expect("a mask")), [4, 5, 6]);
    }

    #[test]
    fn a_panic_is_an_error_and_forgotten_as_one() {
        let params = SamplingParams::default();
        let (mut constrained, _) = steps();
        assert!(constrained.allowed(&[1, 2], &params).is_ok());
        let panicked = EngineError::Forward("internal error: no such step".into());
        assert_eq!(constrained.allowed(&[1, 2, 44], &params), Err(panicked));
        assert_eq!(ids(constrained.allowed(&[1, 2, 3], &params).expect("a mask")), [4, 5, 6]);
    }

    #[test]
    fn stop_tokens_stand_where_the_output_may_end() {
        let params =
            SamplingParams { stop_token_ids: vec![4, 47], min_tokens: 3, ..SamplingParams::default() };
        let (mut constrained, _) = steps();
        // 4 is text, too, but not before `min_tokens`.
        assert_eq!(ids(constrained.allowed(&[1], &params).expect("a mask")), [2, 3]);
        assert_eq!(ids(constrained.allowed(&[1, 2], &params).expect("a mask")), [3, 5]);
        assert_eq!(ids(constrained.allowed(&[1, 2, 3], &params).expect("a mask")), [4, 5, 6, 47]);
    }
}
