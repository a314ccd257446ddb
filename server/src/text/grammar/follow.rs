//! A compiled grammar at work on one sequence: llguidance's matcher as the engine's [`Constraint`].
//!
//! Costs: see `compile.rs`. A position is asked once; going back some tokens costs microseconds.

use std::sync::Arc;

use llguidance::Matcher;
use tandem_engine::{Constraint, ConstraintError, Ending, TokenId, TokenMask};
use toktrie::SimpleVob;

use super::compile::{Template, reason};

pub(super) struct Follower {
    template: Arc<Template>,
    matcher: Matcher,
    /// What may follow here, the end included; computed when it is asked for.
    next: Option<SimpleVob>,
}

impl Follower {
    pub(super) fn new(template: Arc<Template>) -> Self {
        let matcher = template.matcher.deep_clone();
        Follower { template, matcher, next: None }
    }

    fn next(&mut self) -> Result<&SimpleVob, ConstraintError> {
        if self.next.is_none() {
            self.next = Some(self.matcher.compute_mask().map_err(fault)?);
        }
        Ok(self.next.as_ref().expect("it was just computed: this is a bug"))
    }
}

fn fault(error: impl std::fmt::Display) -> ConstraintError {
    ConstraintError(reason(&error.to_string()))
}

impl Constraint for Follower {
    fn mask(&mut self, mask: &mut TokenMask) -> Result<(), ConstraintError> {
        let end = self.template.end;
        mask.copy_from_words(self.next()?.as_slice());
        mask.forbid(end);
        Ok(())
    }

    fn ending(&mut self) -> Result<Ending, ConstraintError> {
        if self.matcher.is_error() {
            return Err(fault(self.matcher.get_error().unwrap_or_default()));
        }
        if self.matcher.is_stopped() {
            return Ok(Ending::Forced);
        }
        let end = self.template.end;
        let next = self.next()?;
        Ok(match (next.is_allowed(end), next.num_set()) {
            (false, _) => Ending::Forbidden,
            (true, 1) => Ending::Forced,
            (true, _) => Ending::Allowed,
        })
    }

    fn advance(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        self.next = None;
        self.matcher.consume_token(token).map_err(fault)
    }

    fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError> {
        self.next = None;
        self.matcher.rollback(num_tokens).map_err(fault)
    }

    fn reset(&mut self) {
        self.next = None;
        self.matcher = self.template.matcher.deep_clone();
    }
}
