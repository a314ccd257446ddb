//! Text on its way to the client: where answers end, and what they mean.

pub mod answer;
pub mod ending;
pub mod gap;
pub mod stop;

pub use ending::Ending;
pub use gap::GapRules;
pub use stop::StopMatcher;
