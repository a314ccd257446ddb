//! Speculative decoding: who proposes, how many tokens, and which of them stand.

mod acceptance;
mod costs;
mod draft_rounds;
mod head;
mod ngram;
mod policy;
mod prediction;
mod proposers;
mod session;
mod suffix_index;
mod trial;
mod verifier;

pub(crate) use acceptance::{Acceptance, ProposalKind};
pub(crate) use costs::{PROFILED_ROWS, StepCosts};
pub(crate) use draft_rounds::{Drafting, MAX_MODEL_DRAFT_TOKENS};
pub use head::DraftHead;
pub(crate) use head::HeadPolicy;
pub use policy::DraftTokens;
pub(crate) use policy::{Candidate, DraftPolicy, StepLoad};
pub(crate) use proposers::{Offer, TextProposers};
pub(crate) use session::Sessions;
pub(crate) use trial::{Arm, BatchKind, Trials};
pub(crate) use verifier::verify;
