//! Text on its way to the client: where answers end, what they mean, and what form they are held to.

pub mod answer;
pub mod ending;
pub mod gap;
pub mod grammar;
pub mod stop;

pub use ending::Ending;
pub use gap::GapRules;
pub use stop::StopMatcher;
