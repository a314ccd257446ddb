//! Speculative decoding: how many tokens to draft, and which of them stand.

mod policy;
mod verifier;

pub use policy::DraftTokens;
pub(crate) use policy::PROFILED_ROWS;
pub(crate) use policy::{AcceptanceRate, DraftPolicy, StepCosts};
pub(crate) use verifier::verify;
