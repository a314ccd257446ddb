//! HTTP: the accept loop, the shared state, and one folder a protocol.
//!
//! A protocol turns its wire types into one [`generation::GenerationRequest`] and the
//! [`generation::Generation`]'s events back into its wire types. Nothing below this module knows
//! text or JSON; nothing in a protocol's folder knows sequences or channels.

mod auth;
mod body;
mod error;
pub mod generation;
mod health;
mod heavy;
mod io;
pub mod lanes;
pub mod metrics;
pub mod openai;
mod origin;
mod router;
mod server;
mod sse;
pub mod state;
mod tenant;

pub use error::{ApiError, ErrorKind};
pub use router::router;
pub use server::{ServeOptions, serve, shutdown_signal};
pub use state::{AppConfig, AppState, LaneModel, Limits};
