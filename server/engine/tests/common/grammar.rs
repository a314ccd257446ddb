//! A form for tests: a small random automaton over the model's vocabulary, with states that leave one
//! token, states where the output may end, and one where it must.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tandem_engine::{Constraint, ConstraintError, Ending, TokenId, TokenMask};

use super::{STOP, VOCAB_SIZE};

const NUM_STATES: u64 = 19;
const START: u64 = 0;
const LAST: u64 = NUM_STATES - 1;

/// Which automaton.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Grammar {
    pub(crate) seed: u64,
    /// It cannot go back and has to begin anew.
    pub(crate) forgets: bool,
    /// The state that it cannot be in.
    pub(crate) breaks_at: Option<u64>,
}

impl Grammar {
    pub(crate) fn new(seed: u64) -> Self {
        Grammar { seed, forgets: false, breaks_at: None }
    }

    fn hash(&self, state: u64, id: u64) -> u64 {
        let mixed =
            (self.seed ^ state << 32 ^ id.wrapping_mul(0x9E37_79B9)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed ^ mixed >> 29).wrapping_mul(0x94D0_49BB_1331_11EB) >> 33
    }

    /// The tokens that may follow in `state`.
    pub(crate) fn allows(&self, state: u64, id: TokenId) -> bool {
        let only = self.hash(state, 1000) % VOCAB_SIZE as u64;
        let only = if only == u64::from(STOP) { only + 1 } else { only };
        match self.hash(state, 2000) % 3 {
            // No alternative.
            0 => u64::from(id) == only,
            _ => u64::from(id) == only || (id != STOP && self.hash(state, id.into()).is_multiple_of(4)),
        }
    }

    pub(crate) fn next(&self, state: u64, id: TokenId) -> u64 {
        self.hash(state, 3000 + u64::from(id)) % NUM_STATES
    }

    fn ending(&self, state: u64) -> Ending {
        match state {
            LAST => Ending::Forced,
            _ if self.hash(state, 4000).is_multiple_of(3) => Ending::Allowed,
            _ => Ending::Forbidden,
        }
    }

    /// Says what is wrong with an output. `ended`: by a stop token, or because nothing could follow.
    pub(crate) fn check(&self, output: &[TokenId], ended: Option<Ending>) -> Result<(), String> {
        let mut state = START;
        for (i, &id) in output.iter().enumerate() {
            if state == LAST || !self.allows(state, id) {
                return Err(format!("token {i}, {id}, is not allowed in state {state}"));
            }
            state = self.next(state, id);
        }
        match ended {
            Some(Ending::Allowed) if self.ending(state) == Ending::Forbidden => {
                Err(format!("it ended in state {state}"))
            }
            Some(Ending::Forced) if state != LAST => Err(format!("state {state} could be left")),
            _ => Ok(()),
        }
    }

    pub(crate) fn start(&self) -> Box<dyn Constraint> {
        let num_masks = Arc::default();
        Box::new(Automaton { grammar: self.clone(), states: vec![START], is_broken: false, num_masks })
    }

    /// The same, and a count of its masks.
    pub(crate) fn start_counted(&self) -> (Box<dyn Constraint>, Arc<AtomicU64>) {
        let num_masks = Arc::<AtomicU64>::default();
        let counted = num_masks.clone();
        (
            Box::new(Automaton { grammar: self.clone(), states: vec![START], is_broken: false, num_masks }),
            counted,
        )
    }
}

struct Automaton {
    grammar: Grammar,
    /// One more than tokens taken.
    states: Vec<u64>,
    is_broken: bool,
    num_masks: Arc<AtomicU64>,
}

impl Automaton {
    fn state(&self) -> Result<u64, ConstraintError> {
        let state = *self.states.last().expect("the first is never left");
        if self.is_broken || self.grammar.breaks_at == Some(state) {
            return Err(ConstraintError(format!("state {state} is broken")));
        }
        Ok(state)
    }
}

impl Constraint for Automaton {
    fn mask(&mut self, mask: &mut TokenMask) -> Result<(), ConstraintError> {
        let state = self.state()?;
        assert!(mask.is_empty());
        self.num_masks.fetch_add(1, Ordering::Relaxed);
        (0..VOCAB_SIZE as TokenId).filter(|&id| self.grammar.allows(state, id)).for_each(|id| mask.allow(id));
        Ok(())
    }

    fn ending(&mut self) -> Result<Ending, ConstraintError> {
        self.state().map(|state| self.grammar.ending(state))
    }

    fn advance(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        let state = self.state()?;
        if state == LAST || !self.grammar.allows(state, token) {
            self.is_broken = true;
            return Err(ConstraintError(format!("token {token} in state {state}")));
        }
        self.states.push(self.grammar.next(state, token));
        Ok(())
    }

    fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError> {
        if self.grammar.forgets || self.is_broken {
            return Err(ConstraintError("there is no way back".to_owned()));
        }
        self.states.truncate(self.states.len() - num_tokens);
        Ok(())
    }

    fn reset(&mut self) {
        self.states.truncate(1);
        self.is_broken = false;
    }
}
