//! HTTP: the accept loop, the shared state, and one folder a protocol.
//!
//! A protocol turns its wire types into one [`generation::GenerationRequest`], by way of `intake`,
//! and the [`generation::Generation`]'s events back into its wire types, behind `wire::Wire`. Nothing
//! below this module knows text or JSON; nothing in a protocol's folder knows sequences or channels.

mod anthropic;
mod api;
mod auth;
mod body;
mod chat;
mod embeddings;
mod error;
mod error_shape;
mod fields;
mod gap;
pub mod generation;
mod grammars;
mod health;
mod heavy;
mod intake;
mod io;
pub mod lanes;
mod llamacpp;
pub mod metrics;
mod ollama;
pub mod openai;
mod origin;
mod prompt;
mod request_id;
mod response_end;
mod responses;
mod router;
mod server;
pub mod state;
mod stream;
mod tabby;
mod tenant;
mod tls;
pub mod traces;
mod wire;

pub use error::{ApiError, ErrorKind};
pub use router::router;
pub use server::{Listener, ServeOptions, serve, shutdown_signal};
pub use state::{AppConfig, AppState, LaneModel, Limits};
pub use tls::{Tls, TlsError};
