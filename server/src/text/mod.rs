//! Text rules of a response that no model knows about.

pub mod stop;

pub use stop::StopMatcher;
