//! `tandem bench NAME`: measurements that a user can repeat.
//!
//! One file a benchmark. What they share: [`client`] (HTTP, as any client speaks it), [`server`] (a
//! server in this process), [`prompts`], [`stats`], [`scrape`] (the server's own counters) and
//! [`report`]. Whatever is compared takes turns within one run, because the speed of a shared machine
//! drifts by more than what is measured. The exit status tells right from wrong, never fast from slow.

mod client;
mod deep;
mod edits;
mod http;
mod isolation;
mod kernels;
mod pair;
mod peer;
mod policy;
mod prompts;
mod random_draft;
mod report;
mod scrape;
mod server;
mod soak;
mod stats;
mod synthetic;

use std::process::ExitCode;

use clap::Subcommand;

/// The benchmarks there are.
#[derive(Subcommand, Debug)]
pub(super) enum BenchCommand {
    /// What speculation gains: deep with and without it, and fast, in turns
    Pair(pair::PairArgs),
    /// The deep lane end to end on random weights too, and beside llama.cpp's speculative decoding
    Deep(deep::DeepArgs),
    /// Whether deep work delays the fast lane: time to first token, idle and under load
    Isolation(isolation::IsolationArgs),
    /// What Predicted Outputs save: target passes a token, with and without `prediction`
    Edits(edits::EditsArgs),
    /// Whether the speculation policy is ever slower than the best fixed setting
    Policy(policy::PolicyArgs),
    /// Each kernel against what this machine allows: reading, and arithmetic
    Kernels(kernels::KernelsArgs),
    /// Passes of Tandem and of llama.cpp over the same GGUF file, in turns
    Peer(peer::PeerArgs),
    /// What HTTP costs beside the engine, and what idle connections do to it
    Http(http::HttpArgs),
    /// Load any OpenAI-compatible server with streams and cancels, and look for faults and leaks
    Soak(soak::SoakArgs),
}

pub(super) fn run(command: &BenchCommand) -> anyhow::Result<ExitCode> {
    match command {
        BenchCommand::Pair(args) => pair::run(args),
        BenchCommand::Deep(args) => deep::run(args),
        BenchCommand::Isolation(args) => isolation::run(args),
        BenchCommand::Edits(args) => edits::run(args),
        BenchCommand::Policy(args) => policy::run(args),
        BenchCommand::Kernels(args) => kernels::run(args),
        BenchCommand::Peer(args) => peer::run(args),
        BenchCommand::Http(args) => http::run(args),
        BenchCommand::Soak(args) => soak::run(args),
    }
}
