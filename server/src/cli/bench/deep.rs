//! `tandem bench deep`: the deep lane end to end, against its own plain decode and, if a build of
//! llama.cpp is named, against that one's speculative decoding of the same files.
//!
//! Everything takes turns within a round. What is compared is decoding: output tokens after the first over
//! the time from the first to the last, as clients see it (over HTTP here; the peer's own clock there).

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::{Value, json};

use super::client::{Client, Completion, Endpoint};
use super::prompts::{self, BenchPrompt};
use super::report::{self, Header};
use super::server::{LocalServer, configure};
use super::synthetic::SyntheticArgs;
use crate::cli::settings::ModelSettings;
use crate::runtime;
use peer::Peer;
use summary::{Report, Run};

mod peer;
mod summary;

const LONG_ABOUT: &str = "\
Measure the deep lane end to end on this machine: decoding with the draft against plain decoding.

Starts a server in this process and streams answers over HTTP, one at a time: without speculation, with the \
policy's draft lengths (auto) and with each fixed length of --fixed, in turns. All proposals are the draft \
model's. With --synthetic-acceptance random weights (tandem synth) will do, so that hardware can be judged \
before any weights are on it.

With --llama-bin the same GGUF files are decoded by llama.cpp (or ik_llama.cpp), built outside this \
repository, in the same rounds: plainly (llama-bench) and speculatively (llama-speculative-simple, greedy, \
the same draft length). On random weights hardly a draft token of its stands, but what a step costs does \
not depend on that: it drafts as many tokens, verifies them in one batch and feeds that batch to the draft. \
So its speed is composed: the time of its steps, measured, and the tokens a step brings in Tandem's \
answers of the same round at the same draft length.";

const EXAMPLES: &str = "\
Examples:
  tandem synth --like qwen2.5-coder-7b --format q4_k_m --out target.gguf
  tandem synth --like qwen2.5-coder-0.5b --format q4_0 --out draft.gguf
  tandem bench deep --target target.gguf --draft draft.gguf --synthetic-acceptance 0.8
  tandem bench deep --target target.gguf --draft draft.gguf --synthetic-acceptance 0.8 \\
      --llama-bin ~/llama.cpp/build/bin";

/// Arguments of `tandem bench deep`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(in crate::cli) struct DeepArgs {
    #[command(flatten)]
    synthetic: SyntheticArgs,

    /// Folder that holds llama-speculative-simple and llama-bench; target and draft must be GGUF files
    #[arg(long, value_name = "DIR")]
    llama_bin: Option<PathBuf>,

    /// Fixed numbers of draft tokens to measure beside auto, comma-separated
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "4", value_parser = clap::value_parser!(u8).range(1..=tandem_engine::MAX_DRAFT_TOKENS as i64))]
    fixed: Vec<u8>,

    /// Times that everything is repeated, each time with the next prompt
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(8..=65_536))]
    max_tokens: u32,

    /// Prompts as JSON lines with task_id and prompt, as in HumanEval [default: 24 built-in ones]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,

    /// Seed of the coin of --synthetic-acceptance
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,

    /// Write the report to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    #[command(flatten)]
    model: ModelSettings,
}

/// One way to decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Setting {
    Plain,
    /// As the policy chooses.
    Auto,
    Fixed(u8),
}

impl Setting {
    fn name(self) -> String {
        match self {
            Setting::Plain => "no speculation".to_owned(),
            Setting::Auto => "auto".to_owned(),
            Setting::Fixed(count) => format!("{count} drafted"),
        }
    }

    /// Requests with different salts share nothing.
    fn body(self, prompt: &str, max_tokens: u32, salt: usize) -> Value {
        let mut body = json!({
            "model": "deep",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": true,
            "cache_salt": format!("bench-{salt}"),
            "stream": true,
            "stream_options": { "include_usage": true },
            // Noise repeats nothing; where a coin decides, text proposers would win without any cost.
            "speculative": { "sources": ["draft"] },
        });
        match self {
            Setting::Plain => body["speculative"]["max_draft_tokens"] = 0.into(),
            Setting::Fixed(count) => body["speculative"]["max_draft_tokens"] = count.into(),
            Setting::Auto => {}
        }
        body
    }
}

pub(super) fn run(args: &DeepArgs) -> anyhow::Result<ExitCode> {
    let mut config = configure(&args.model)?;
    let prompts = prompts::load(args.prompts.as_deref(), None)?;
    let synthetic = args.synthetic.acceptance(args.seed);
    config.max_num_seqs = 1;
    let runtime = match synthetic {
        Some(synthetic) => runtime::start_with(&config, |models| synthetic.adapt(models))?,
        None => runtime::start(&config)?,
    };
    let header = Header { synthetic, ..Header::of("deep", &runtime)? };
    header.print();
    let peer = args.llama_bin.as_ref().map(|dir| Peer::new(dir, &runtime)).transpose()?;

    let rounds = runtime::async_runtime()?.block_on(async {
        let server = LocalServer::start(runtime).await?;
        let rounds = measure(args, &prompts, &server, peer.as_ref()).await?;
        server.stop().await?;
        anyhow::Ok(rounds)
    })?;
    let report = Report::new(header, args, &rounds);
    report.print();
    if let Some(path) = &args.json {
        report::write_json(path, &report)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn settings(args: &DeepArgs) -> Vec<Setting> {
    let mut settings = vec![Setting::Plain, Setting::Auto];
    settings.extend(args.fixed.iter().map(|&count| Setting::Fixed(count)));
    settings
}

/// What one round measured.
#[derive(Clone, Debug, Default)]
struct Round {
    /// One a setting.
    tandem: Vec<Run>,
    /// The peer's tokens a second without speculation.
    peer_plain: Option<f64>,
    /// Seconds of the peer's steps, one a fixed length.
    peer_steps: Vec<f64>,
}

async fn measure(
    args: &DeepArgs,
    prompts: &[BenchPrompt],
    server: &LocalServer,
    peer: Option<&Peer>,
) -> anyhow::Result<Vec<Round>> {
    let mut client = Client::new(Endpoint::local(server.address));
    let settings = settings(args);
    let mut num_requests = 0;
    // First passes and the policy's first guesses are not what is measured.
    for &setting in &settings {
        num_requests += 1;
        let body = setting.body(&prompts[0].prompt, args.max_tokens.min(32), num_requests);
        client.complete(&body).await.context("the first request failed")?;
    }
    let progress = report::progress_bar(args.rounds as usize, "rounds");
    let mut rounds = Vec::new();
    for index in 0..args.rounds as usize {
        let prompt = &prompts[index % prompts.len()].prompt;
        let mut round = Round { tandem: vec![Run::default(); settings.len()], ..Round::default() };
        for turn in 0..settings.len() {
            // Nobody always goes first.
            let place = (turn + index) % settings.len();
            num_requests += 1;
            let body = settings[place].body(prompt, args.max_tokens, num_requests);
            let completion = client
                .complete(&body)
                .await
                .with_context(|| format!("setting {}", settings[place].name()))?;
            round.tandem[place] = run_of(&completion)?;
        }
        if let Some(peer) = peer {
            // The server is idle meanwhile: nobody asks it anything.
            round.peer_plain = Some(peer.plain_tokens_per_second(args.max_tokens)?);
            for &length in &args.fixed {
                round.peer_steps.push(peer.step_seconds(prompt, length, args.max_tokens)?);
            }
        }
        rounds.push(round);
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(rounds)
}

fn run_of(completion: &Completion) -> anyhow::Result<Run> {
    let num_decoded = completion.num_output_tokens.saturating_sub(1);
    let seconds = completion.total.saturating_sub(completion.ttft()).as_secs_f64();
    if num_decoded == 0 || seconds <= 0.0 {
        bail!("an answer had {} tokens; nothing can be timed", completion.num_output_tokens);
    }
    Ok(Run {
        num_decoded,
        num_accepted: completion.num_accepted_tokens,
        num_drafted: completion.num_accepted_tokens + completion.num_rejected_tokens,
        seconds,
    })
}
