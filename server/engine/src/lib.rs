//! The engine: scheduler, block manager, speculation and sampler, synchronous and deterministic.
//!
//! Architecture invariants: no async, HTTP, JSON, text or global state; no clock but the one passed
//! in; one thread owns [`Engine`] by value, so there is no lock inside it. A sequence's tokens are
//! a function of (answering model's weights, prompt, sampling parameters, seed) only.

mod api;
mod batch;
mod block_manager;
mod constraint;
mod drain;
mod embedding;
mod engine;
mod handle;
mod kv_events;
mod limits;
mod outbox;
mod params;
mod pass;
mod plan;
mod prefill;
mod prefix_cache;
mod profile;
mod rows;
mod sampler;
mod scheduler;
mod sequence;
mod speculation;
mod step;

pub use api::*;
pub use constraint::{Constraint, ConstraintError, Ending, TokenMask};
pub use embedding::EmbedRequest;
pub use engine::{Engine, EngineConfig, Models};
pub use handle::EngineHandle;
pub use kv_events::{KvEvent, KvEventSink, KvEvents};
pub use speculation::{DraftHead, DraftTokens};

#[cfg(test)]
extern crate self as tandem_engine;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;
