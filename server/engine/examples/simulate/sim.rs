//! Deterministic simulation: a seed is a scenario, a scenario runs on the engine under a fake clock, and
//! whatever a client saw is compared, bit for bit, with what the oracle says. Any failure is repeated by
//! its seed.

mod client;
mod clock;
mod mirror;
mod oracle;
mod pair;
mod rng;
mod scenario;
mod summary;
mod verdict;
mod workload;
mod world;

pub(crate) use summary::Summary;
pub(crate) use world::simulate;
