//! Text on its way to the client: stop strings, what answers mean, and what form they are held to.

pub mod answer;
pub mod grammar;
pub mod stop;

pub use stop::StopMatcher;
