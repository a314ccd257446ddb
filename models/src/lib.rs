//! Weights, configuration, tokenizer, chat template and the forward pass.

pub mod batch;
pub mod config;

pub use batch::ForwardBatch;
pub use config::{DecoderConfig, RopeScaling};
