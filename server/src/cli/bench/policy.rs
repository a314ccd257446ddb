//! `tandem bench policy`: is the speculation policy ever slower than the best fixed draft length?
//!
//! Every setting runs the same group of prompts in its turn, as many at a time as the batch is large,
//! and every request has a `cache_salt` of its own, so that neither the prefix cache nor the session's
//! text remembers the other settings' answers. A ratio compares the sums of one round, whose parts ran
//! moments apart; the median over the rounds is shown. All settings must give the same answers.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::client::{Client, Completion, Endpoint};
use super::prompts::{self, BenchPrompt};
use super::random_draft::RandomDraft;
use super::report::{self, Header};
use super::server::{LocalServer, configure};
use crate::cli::settings::ModelSettings;
use crate::config::Config;
use crate::runtime::{self, Runtime};
use summary::{Cell, Report, Run};

mod summary;

const LONG_ABOUT: &str = "\
Measure whether the speculation policy is ever slower than the best fixed setting on this machine.

Starts a server in this process and sends it prompts over HTTP, as many at a time as --batches says, with \
the policy (auto) and with each fixed number of draft tokens of --fixed, 0 included, in turns; then the same \
with a draft whose weights are noise. Speed is the output tokens of the whole batch over the time until its \
last stream has ended. The ratio is auto to the best fixed setting: the median over the rounds of the ratio \
within a round, least of all fixed settings. The first fixed setting takes its turn twice a round: the ratio of \
these two (control) is what the machine's noise makes of an even match. Nothing is cached or shared between \
requests.

The run also checks that all settings gave the same answers; the exit status is 1 if they did not. Rounds \
are short: on a machine that does other things too, use --rounds 10 or more.";

const EXAMPLES: &str = "\
Examples:
  tandem bench policy
  tandem bench policy --prompts HumanEval.jsonl --limit 48 --rounds 10 --json policy.json
  tandem bench policy --batches 1 --temperatures 0 --fixed 0,4 --only-real
  tandem bench policy --batches 16 --temperatures 0.8 --only-random";

/// Arguments of `tandem bench policy`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(in crate::cli) struct PolicyArgs {
    /// Prompts as JSON lines with task_id and prompt, as in HumanEval [default: 24 built-in ones]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,

    /// Use only the first so many prompts
    #[arg(long, value_name = "N")]
    limit: Option<usize>,

    /// Times that everything is repeated
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    max_tokens: u32,

    /// Streams at a time, comma-separated
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,4,16", value_parser = clap::value_parser!(u16).range(1..=1024))]
    batches: Vec<u16>,

    /// Fixed numbers of draft tokens to compare auto with, comma-separated
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "0,1,2,3,4,6,8", value_parser = clap::value_parser!(u8).range(0..=tandem_engine::MAX_DRAFT_TOKENS as i64))]
    fixed: Vec<u8>,

    /// Temperatures, comma-separated
    #[arg(long, value_name = "T,...", value_delimiter = ',', default_value = "0,0.8")]
    temperatures: Vec<f32>,

    /// Leave the draft of random weights out
    #[arg(long)]
    only_real: bool,

    /// Leave the pair's own draft out
    #[arg(long, conflicts_with = "only_real")]
    only_random: bool,

    /// Seed of the sampled answers and of the random weights
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,

    /// Write the report to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    #[command(flatten)]
    model: ModelSettings,
}

pub(super) fn run(args: &PolicyArgs) -> anyhow::Result<ExitCode> {
    let config = configure(&args.model)?;
    if let Some(wrong) = args.temperatures.iter().find(|t| !(0.0..=100.0).contains(*t)) {
        bail!("--temperatures holds {wrong}; they must be numbers from 0 to 100");
    }
    let prompts = prompts::load(args.prompts.as_deref(), args.limit)?;
    let most = args.batches.iter().copied().max().unwrap_or(1);
    let config = Config { max_num_seqs: most.into(), sharing: false, prefix_cache: false, ..config };
    let tokio = runtime::async_runtime()?;

    let runtime = runtime::start(&config)?;
    let header = Header::of("policy", &runtime)?;
    header.print();
    let random = random_pair(args, &config, &runtime)?;
    ensure!(
        !args.only_random || random.is_some(),
        "--only-random leaves nothing to measure: a draft of random weights takes the place of a draft model, and \
         there is no pair of target and draft here"
    );
    let mut cells = Vec::new();
    if args.only_random {
        runtime.engine.shutdown();
        runtime.engine_thread.join().map_err(|_| anyhow::anyhow!("the engine's thread panicked"))?;
    } else {
        cells.extend(tokio.block_on(measure(args, "the pair's", runtime, &prompts))?);
    }
    if let Some((_folder, config)) = &random {
        cells.extend(tokio.block_on(measure(args, "random", runtime::start(config)?, &prompts))?);
    }

    let report = Report::new(header, args, prompts.len(), cells);
    report.print();
    if let Some(path) = &args.json {
        report::write_json(path, &report)?;
    }
    Ok(if report.num_mismatches == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The same target with a draft of noise.
fn random_pair(
    args: &PolicyArgs,
    config: &Config,
    runtime: &Runtime,
) -> anyhow::Result<Option<(RandomDraft, Config)>> {
    let (Some((target, _)), Some((draft, _)), false) = (&runtime.target, &runtime.draft, args.only_real)
    else {
        return Ok(None);
    };
    let folder = RandomDraft::like(&draft.dir, args.seed).context("cannot make the random draft")?;
    let config = Config {
        target: Some(target.dir.to_string_lossy().into_owned()),
        draft: Some(folder.dir().to_string_lossy().into_owned()),
        ..config.clone()
    };
    Ok(Some((folder, config)))
}

/// Auto (`None`), the fixed settings, and the first of them once more, as a control.
fn settings(args: &PolicyArgs) -> Vec<Option<u8>> {
    let fixed = args.fixed.iter().chain(args.fixed.first());
    std::iter::once(None).chain(fixed.copied().map(Some)).collect()
}

/// All rounds with one draft.
async fn measure(
    args: &PolicyArgs,
    draft: &'static str,
    runtime: Runtime,
    prompts: &[BenchPrompt],
) -> anyhow::Result<Vec<Cell>> {
    let server = LocalServer::start(runtime).await?;
    let mut streams = Streams::new(Endpoint::local(server.address), args);
    let settings = settings(args);
    let mut cells = Vec::new();
    for &temperature in &args.temperatures {
        cells.extend(args.batches.iter().map(|&batch| Cell::new(draft, temperature, batch)));
    }
    // First passes at every size are not what is measured.
    for cell in &cells {
        let group = groups(prompts, cell.batch.into()).swap_remove(0);
        for &setting in &settings {
            streams.run(&group, cell.temperature, setting).await?;
        }
    }
    let num_groups: usize = cells.iter().map(|cell| groups(prompts, cell.batch.into()).len()).sum();
    let progress = report::progress_bar(args.rounds as usize * num_groups * settings.len(), "batches");
    progress.set_message(format!("({draft} draft)"));
    for round in 0..args.rounds as usize {
        for cell in &mut cells {
            let runs = round_of(&mut streams, cell, prompts, &settings, round, &progress).await?;
            cell.rounds.push(runs);
        }
    }
    progress.finish_and_clear();
    drop(streams);
    server.stop().await?;
    Ok(cells)
}

/// Every group of prompts under every setting; one sum a setting.
async fn round_of(
    streams: &mut Streams<'_>,
    cell: &mut Cell,
    prompts: &[BenchPrompt],
    settings: &[Option<u8>],
    round: usize,
    progress: &ProgressBar,
) -> anyhow::Result<Vec<Run>> {
    let mut runs = vec![Run::default(); settings.len()];
    for (index, group) in groups(prompts, cell.batch.into()).iter().enumerate() {
        let mut wanted: Option<Vec<Completion>> = None;
        for turn in 0..settings.len() {
            // Nobody always goes first.
            let setting = (turn + index + round) % settings.len();
            let start = Instant::now();
            let answers = streams.run(group, cell.temperature, settings[setting]).await?;
            runs[setting].seconds += start.elapsed().as_secs_f64();
            runs[setting].num_tokens += answers.iter().map(|answer| answer.num_output_tokens).sum::<u64>();
            let wanted = wanted.get_or_insert_with(|| answers.clone());
            let is_same = |(a, b): &(&Completion, &Completion)| {
                (&a.text, a.num_output_tokens) == (&b.text, b.num_output_tokens)
            };
            cell.num_mismatches += wanted.iter().zip(&answers).filter(|pair| !is_same(pair)).count();
            progress.inc(1);
        }
    }
    Ok(runs)
}

/// The prompts in groups of `batch`. The last group is filled up from the beginning; if there are fewer
/// prompts than that, repeated ones get a line of their own, so that no two of a group are equal.
fn groups(prompts: &[BenchPrompt], batch: usize) -> Vec<Vec<String>> {
    let num_groups = prompts.len().div_ceil(batch);
    let nth = |index: usize, place: usize| {
        let prompt = &prompts[index % prompts.len()].prompt;
        match place / prompts.len() {
            0 => prompt.clone(),
            lap => format!("# variant {lap}\n{prompt}"),
        }
    };
    (0..num_groups).map(|group| (0..batch).map(|place| nth(group * batch + place, place)).collect()).collect()
}

/// Connections that are kept from batch to batch.
struct Streams<'a> {
    endpoint: Endpoint,
    args: &'a PolicyArgs,
    idle: Vec<Client>,
    num_requests: u64,
}

impl<'a> Streams<'a> {
    fn new(endpoint: Endpoint, args: &'a PolicyArgs) -> Self {
        Streams { endpoint, args, idle: Vec::new(), num_requests: 0 }
    }

    /// Streams all prompts at the same time; their answers in the prompts' order.
    async fn run(
        &mut self,
        prompts: &[String],
        temperature: f32,
        setting: Option<u8>,
    ) -> anyhow::Result<Vec<Completion>> {
        let mut tasks = JoinSet::new();
        for (index, prompt) in prompts.iter().enumerate() {
            let mut client = self.idle.pop().unwrap_or_else(|| Client::new(self.endpoint.clone()));
            let body = self.body(prompt, temperature, setting);
            tasks.spawn(async move { (index, client.complete(&body).await, client) });
        }
        let mut answers = vec![Completion::default(); prompts.len()];
        while let Some(ended) = tasks.join_next().await {
            let (index, answer, client) = ended?;
            answers[index] =
                answer.with_context(|| format!("draft tokens {setting:?}, {:?}", prompts[index]))?;
            self.idle.push(client);
        }
        Ok(answers)
    }

    fn body(&mut self, prompt: &str, temperature: f32, setting: Option<u8>) -> Value {
        self.num_requests += 1;
        let mut body = json!({
            "model": "deep",
            "prompt": prompt,
            "max_tokens": self.args.max_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "seed": self.args.seed,
            "cache_salt": format!("bench-{}", self.num_requests),
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        if let Some(count) = setting {
            body["speculative"] = json!({ "max_draft_tokens": count });
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_full_hold_everything_and_repeat_nothing() {
        let prompts: Vec<BenchPrompt> = prompts::built_in().into_iter().take(5).collect();
        for batch in 1..=12 {
            let groups = groups(&prompts, batch);
            let mut seen = std::collections::BTreeSet::new();
            for group in &groups {
                let distinct: std::collections::BTreeSet<&String> = group.iter().collect();
                assert_eq!((group.len(), distinct.len()), (batch, batch));
                seen.extend(group.iter().cloned());
            }
            assert!(prompts.iter().all(|prompt| seen.contains(&prompt.prompt)), "batch {batch}");
        }
    }
}
