//! Text on its way to the client: stop strings, and what answers mean.

pub mod answer;
pub mod stop;

pub use stop::StopMatcher;
