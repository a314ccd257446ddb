//! The engine: scheduler, block manager, speculation and sampler, synchronous and deterministic.

pub mod api;

pub use api::*;
