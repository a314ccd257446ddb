//! `tandem bench soak`: many streams and many cancels against a running server, and what is left of
//! it afterwards.
//!
//! Each stream is a task with a connection of its own that sends one request after the other until
//! time is up. What happens is a function of `--seed`, as far as the server's speed allows. Nothing is
//! kept of an answer but two numbers, so hours cost little memory here.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use indicatif::ProgressBar;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};

use super::client::{Client, Endpoint, Failure, is_out_of_files};
use super::prompts::Dealer;
use super::report;
use super::scrape::{Blocks, Scrape, wait_for_idle};
use crate::runtime;
use summary::{Memory, Report, Tally};

mod summary;

const LONG_ABOUT: &str = "\
Load a running server with concurrent streams, cancel a part of them, and look for faults and leaks.

The server can be any that speaks OpenAI's completions over plain HTTP. Each of --streams connections \
sends one streamed completion after the other for --seconds: prompts, lengths, temperatures and seeds are \
drawn from --seed, and the models fast and deep take turns where the server lists both (else its first \
model is used). A part of the requests is cancelled at a random moment by closing the connection, before \
the first byte of the answer too. A 429 or 503 makes its stream wait as Retry-After says.

Against Tandem the run ends by waiting until the server is idle: every block of the KV cache must then be \
free or cached. With --pid the memory of the server, on this machine, is read every second.

The exit status is 1 after any status from 500 up, any stream that broke off, a leak, or if nothing \
succeeded.";

const EXAMPLES: &str = "\
Examples:
  tandem bench soak --seconds 60
  tandem bench soak --url http://127.0.0.1:8080 --seconds 600 --streams 500 --cancel 0.3 --pid $(pidof tandem)
  tandem bench soak --url http://gpu7:8000/v1 --api-key $KEY --streams 32 --json soak.json";

/// Arguments of `tandem bench soak`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(in crate::cli) struct SoakArgs {
    /// The server, with or without /v1
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    url: String,

    /// How long new requests are sent
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,

    /// Requests under way at a time
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    streams: u32,

    /// Share of requests that are cancelled, from 0 to 1
    #[arg(long, value_name = "P", default_value_t = 0.3)]
    cancel: f64,

    /// Most tokens of an answer; each request draws its own bound up to this
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,

    /// Most characters of a prompt; each request draws its own length up to this
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(8..))]
    max_prompt_chars: u32,

    /// Key to send; of several, separated by commas as for the server, the first. Prefer the environment,
    /// flags show in process lists
    #[arg(long, value_name = "KEY", env = "TANDEM_API_KEY", hide_env_values = true)]
    api_key: Option<String>,

    /// Process of the server, if it runs on this machine: its memory is watched
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,

    /// Seed of everything that is drawn
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,

    /// Write the report to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// How long requests under way may take when time is up; later ones count as broken.
const LAST_ANSWERS: Duration = Duration::from_secs(120);

/// How long the server may take to settle after the last request.
const SETTLING: Duration = Duration::from_secs(30);

pub(super) fn run(args: &SoakArgs) -> anyhow::Result<ExitCode> {
    if !(0.0..=1.0).contains(&args.cancel) {
        bail!("--cancel is {}; it must be a number from 0 to 1", args.cancel);
    }
    let api_key = args.api_key.as_deref().and_then(|keys| keys.split(',').next()).map(str::trim);
    let endpoint = Endpoint::parse(&args.url, api_key.filter(|key| !key.is_empty()).map(str::to_owned))?;
    runtime::async_runtime()?.block_on(async {
        let mut client = Client::new(endpoint.clone());
        let models =
            list_models(&mut client).await.with_context(|| format!("is a server at {}?", args.url))?;
        if let Some(pid) = args.pid {
            memory_of(pid).with_context(|| format!("cannot read the memory of process {pid}"))?;
        }
        println!(
            "{}: {}; {} streams, {} s, {:.0} % cancelled, seed {}",
            args.url,
            models.join(" and "),
            args.streams,
            args.seconds,
            100.0 * args.cancel,
            args.seed
        );
        let is_tandem = Scrape::take(&mut client).await.is_ok();
        let (tally, memory, elapsed) = load(args, &endpoint, &models).await?;
        // The connection has been idle all the time; the server may have closed it.
        client.close();
        let blocks = if is_tandem { blocks_at_rest(&mut client).await } else { Ok(None) };
        let report = Report::new(args, &models, tally, memory, blocks, elapsed);
        report.print();
        if let Some(path) = &args.json {
            report::write_json(path, &report)?;
        }
        Ok(if report.faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })
}

/// fast and deep if both are there, else the first model.
async fn list_models(client: &mut Client) -> anyhow::Result<Vec<String>> {
    let list: Value =
        serde_json::from_slice(&client.get("/v1/models").await?).context("/v1/models is no JSON")?;
    let ids: Vec<&str> =
        list["data"].as_array().into_iter().flatten().filter_map(|m| m["id"].as_str()).collect();
    if ["fast", "deep"].iter().all(|lane| ids.contains(lane)) {
        return Ok(vec!["fast".to_owned(), "deep".to_owned()]);
    }
    let first = ids.first().context("/v1/models lists no model")?;
    Ok(vec![(*first).to_owned()])
}

/// Tandem's account of its KV cache at the end.
async fn blocks_at_rest(client: &mut Client) -> anyhow::Result<Option<Blocks>> {
    let scrape = tokio::time::timeout(2 * SETTLING, wait_for_idle(client, SETTLING)).await;
    Ok(scrape.context("no answer")??.blocks())
}

/// Runs all streams to their end.
async fn load(
    args: &SoakArgs,
    endpoint: &Endpoint,
    models: &[String],
) -> anyhow::Result<(Tally, Option<Memory>, Duration)> {
    let start = Instant::now();
    let until = start + Duration::from_secs(args.seconds);
    let progress = report::progress_bar(args.seconds as usize, "s");
    let watch = tokio::spawn(watch(args.pid, start, until, progress.clone()));
    let mut streams = tokio::task::JoinSet::new();
    for index in 0..args.streams {
        let seed = args.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(index.into());
        let stream = Stream {
            client: Client::new(endpoint.clone()),
            models: models.to_vec(),
            rng: StdRng::seed_from_u64(seed),
            dealer: Dealer::new(seed),
            cancel: args.cancel,
            max_tokens: args.max_tokens,
            max_prompt_chars: args.max_prompt_chars,
            tally: Tally::new(models.len()),
        };
        streams.spawn(stream.run(until));
    }
    let mut tally = Tally::new(models.len());
    while let Some(ended) = streams.join_next().await {
        tally.merge(ended??);
    }
    let elapsed = start.elapsed();
    progress.finish_and_clear();
    Ok((tally, watch.await?, elapsed))
}

/// Moves the bar and reads the server's memory, once a second.
async fn watch(pid: Option<u32>, start: Instant, until: Instant, progress: ProgressBar) -> Option<Memory> {
    let mut samples = Vec::new();
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    while Instant::now() < until {
        ticks.tick().await;
        progress.set_position(start.elapsed().as_secs());
        samples.extend(pid.and_then(memory_of));
    }
    Memory::of(&samples)
}

/// Bytes of main memory that a process occupies.
fn memory_of(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// When a request is given up.
#[derive(Clone, Copy, Debug)]
enum Cancel {
    /// After so long, which is mostly before the answer begins.
    Time(Duration),
    /// After so many pieces of text.
    Pieces(usize),
}

/// One connection's share of the load.
struct Stream {
    client: Client,
    models: Vec<String>,
    rng: StdRng,
    dealer: Dealer,
    cancel: f64,
    max_tokens: u32,
    max_prompt_chars: u32,
    tally: Tally,
}

impl Stream {
    /// # Errors
    /// If this process cannot open the connections that were asked for.
    async fn run(mut self, until: Instant) -> anyhow::Result<Tally> {
        // All at once is one spike and then silence; real clients come as they come.
        tokio::time::sleep(Duration::from_micros(self.rng.random_range(0..1_000_000))).await;
        while Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now()) + LAST_ANSWERS;
            match tokio::time::timeout(left, self.request()).await {
                Ok(None) => {}
                Ok(Some(Failure::Connect(error))) if is_out_of_files(&error) => {
                    bail!(Failure::Connect(error));
                }
                Ok(Some(failure)) => {
                    // A server that closed after its refusal, or half an answer, must not be met again.
                    self.client.close();
                    let wait = self.tally.failure(&failure);
                    tokio::time::sleep(wait.min(until.saturating_duration_since(Instant::now()))).await;
                }
                Err(_) => {
                    self.tally.broken(format!("no end of the answer after {} s", left.as_secs()));
                    self.client.close();
                }
            }
        }
        Ok(self.tally)
    }

    /// One request; `None` if it went as it should, cancelled or not.
    async fn request(&mut self) -> Option<Failure> {
        let model = self.rng.random_range(0..self.models.len());
        let (body, max_tokens) = self.body(model);
        let cancel = self.rng.random_bool(self.cancel).then(|| self.moment(max_tokens));
        let outcome = match cancel {
            None => self.client.complete(&body).await,
            Some(Cancel::Time(time)) => {
                let answer = tokio::time::timeout(time, self.client.complete(&body)).await;
                let Ok(answer) = answer else {
                    self.client.close();
                    self.tally.models[model].cancelled += 1;
                    return None;
                };
                answer
            }
            Some(Cancel::Pieces(pieces)) => {
                let mut was_cut = false;
                let outcome = self.client.complete_while(&body, |completion| {
                    was_cut = completion.arrivals.len() > pieces;
                    if was_cut { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                });
                let outcome = outcome.await;
                if let (true, Ok(completion)) = (was_cut, &outcome) {
                    self.tally.models[model].cancelled += 1;
                    self.tally.models[model].num_output_tokens += completion.num_output_tokens;
                    return None;
                }
                outcome
            }
        };
        match outcome {
            Ok(completion) => {
                self.tally.models[model].ok(&completion);
                None
            }
            Err(failure) => Some(failure),
        }
    }

    fn body(&mut self, model: usize) -> (Value, u32) {
        let max_tokens = between(&mut self.rng, 1, self.max_tokens);
        let num_chars = between(&mut self.rng, 8, self.max_prompt_chars) as usize;
        // Half of the prompts share their beginnings with others, as a prefix cache would like.
        let prompt = if self.rng.random_bool(0.5) {
            self.dealer.text(num_chars)
        } else {
            self.dealer.new_text(num_chars)
        };
        let body = json!({
            "model": self.models[model],
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": if self.rng.random_bool(0.5) { 0.0 } else { 0.8 },
            "seed": self.rng.random_range(0..1u32 << 31),
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        (body, max_tokens)
    }

    /// Half of the cancels come soon, the others anywhere in the answer.
    fn moment(&mut self, max_tokens: u32) -> Cancel {
        if self.rng.random_bool(0.5) {
            Cancel::Time(Duration::from_micros(between(&mut self.rng, 1, 200_000).into()))
        } else {
            Cancel::Pieces(self.rng.random_range(0..max_tokens) as usize)
        }
    }
}

/// A number from `least` to `most`, small ones as likely as large ones: each doubling has its share.
fn between(rng: &mut StdRng, least: u32, most: u32) -> u32 {
    let (low, high) = (f64::from(least).ln(), f64::from(most + 1).ln());
    (rng.random_range(low..high).exp() as u32).clamp(least, most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawn_lengths_reach_both_ends_and_never_pass_them() {
        let mut rng = StdRng::seed_from_u64(1);
        let drawn: Vec<u32> = (0..10_000).map(|_| between(&mut rng, 1, 16)).collect();
        assert_eq!((drawn.iter().min(), drawn.iter().max()), (Some(&1), Some(&16)));
        let small = drawn.iter().filter(|&&n| n < 4).count();
        assert!((3_000..7_000).contains(&small), "{small} of 10000 are below 4");
        assert_eq!(between(&mut rng, 1, 1), 1);
    }

    #[test]
    fn this_process_has_memory() {
        if cfg!(target_os = "linux") {
            assert!(memory_of(std::process::id()).expect("readable") > 1 << 20);
        }
    }
}
