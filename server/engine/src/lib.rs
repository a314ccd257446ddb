//! The engine: scheduler, block manager, speculation and sampler, synchronous and deterministic.
//!
//! Architecture invariants: no async, HTTP, JSON, text or global state; no clock but the one passed
//! in; one thread owns [`Engine`] by value, so there is no lock inside it. A sequence's tokens are
//! a function of (answering model's weights, prompt, sampling parameters, seed) only.

mod api;
mod block_manager;
mod engine;
mod handle;
mod sampler;
mod scheduler;
mod sequence;
mod speculation;

pub use api::*;
pub use engine::{Engine, EngineConfig, Models};
pub use handle::EngineHandle;
pub use speculation::DraftTokens;
