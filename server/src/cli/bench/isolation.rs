//! `tandem bench isolation`: how much deep work delays the fast lane.
//!
//! Four phases take turns: idle and loaded, on a server with lane isolation and on one without. In
//! every phase the same kind of short fast requests is timed; in the loaded ones deep streams run
//! without end and a long deep prompt is prefilled again and again. No two prompts begin alike, so
//! that no cache answers.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::json;
use tandem_models::Tokenizer;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::client::{Client, Endpoint};
use super::prompts::Dealer;
use super::report::{self, Header};
use super::scrape::{Scrape, wait_for_idle};
use super::server::{LocalServer, configure};
use crate::cli::settings::ModelSettings;
use crate::config::Config;
use crate::runtime;
use summary::{Phase, Report};

mod summary;

const LONG_ABOUT: &str = "\
Measure whether deep work delays the fast lane on this machine.

Starts two servers in this process, one with lane isolation (a waiting fast step runs between two layers \
of the target's pass) and one without, and sends short fast requests over HTTP, one at a time with small \
pauses. Four phases take turns, --rounds times: idle and loaded on the one, idle and loaded on the other. \
Loaded means: --deep-streams deep answers stream without end, and a deep prompt of --deep-prompt tokens \
(or what the context holds) is prefilled again and again. Every prompt begins differently, so that no \
cache answers it.

Prints the fast lane's time to first token and time between tokens, idle and loaded, and the deep lane's \
own speed in the same time, so that the price is seen too. Both models are loaded twice.";

const EXAMPLES: &str = "\
Examples:
  tandem bench isolation
  tandem bench isolation --requests 2000 --rounds 50 --json isolation.json
  tandem bench isolation --target ./big --draft ./small --only-on";

/// Arguments of `tandem bench isolation`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(in crate::cli) struct IsolationArgs {
    /// Fast requests a phase, over all rounds: a p99 of few is the luck of one or two
    #[arg(long, value_name = "N", default_value_t = 800, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,

    /// Times that the phases take turns
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Deep answers that stream while the server is loaded
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    deep_streams: u32,

    /// Tokens of the deep prompt that is in prefill while the server is loaded
    #[arg(long, value_name = "N", default_value_t = 4000, value_parser = clap::value_parser!(u32).range(1..))]
    deep_prompt: u32,

    /// Most tokens of a fast answer
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..))]
    fast_tokens: u32,

    /// Do not start the second server, without isolation
    #[arg(long)]
    only_on: bool,

    /// Seed of the prompts
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,

    /// Write the report to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    #[command(flatten)]
    model: ModelSettings,
}

/// Tokens that stay free behind the long prompt where the context is too short for all of it.
const CONTEXT_RESERVE: usize = 16;

/// Longest pause between two fast requests; long enough that the deep lane's speed is seen beside them.
const MAX_PAUSE: Duration = Duration::from_millis(50);

/// Rest before the first request.
const SETTLING: Duration = Duration::from_secs(3);

/// How long deep streams may take to begin, and the server to come to rest.
const PATIENCE: Duration = Duration::from_secs(120);

/// Characters of a fast prompt: some lines of code before a cursor.
const FAST_PROMPT_CHARS: usize = 200;

/// Characters of a deep stream's prompt.
const DEEP_PROMPT_CHARS: usize = 400;

pub(super) fn run(args: &IsolationArgs) -> anyhow::Result<ExitCode> {
    let config = configure(&args.model)?;
    runtime::async_runtime()?.block_on(async {
        let (on, header) = Subject::start(args, &config, true).await?;
        header.print();
        if on.long_prompt.len() < args.deep_prompt as usize {
            println!(
                "the context holds {} tokens, so the deep prompt has {} instead of {}",
                on.context_len,
                on.long_prompt.len(),
                args.deep_prompt
            );
        }
        let mut subjects = vec![on];
        if !args.only_on {
            subjects.push(Subject::start(args, &config, false).await?.0);
        }
        // Two phases a server: idle, loaded.
        let mut phases = vec![[Phase::default(), Phase::default()]; subjects.len()];
        measure(args, &mut subjects, &mut phases).await?;
        let report = Report::new(header, args, subjects[0].long_prompt.len(), &phases);
        report.print();
        if let Some(path) = &args.json {
            report::write_json(path, &report)?;
        }
        for subject in subjects {
            drop(subject.client);
            subject.server.stop().await?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

async fn measure(
    args: &IsolationArgs,
    subjects: &mut [Subject],
    phases: &mut [[Phase; 2]],
) -> anyhow::Result<()> {
    // What a server does ahead of its first client, such as making memory ready, is not what is measured either.
    tokio::time::sleep(SETTLING).await;
    for subject in &mut *subjects {
        // First passes and caches are not what is measured.
        for _ in 0..5 {
            subject.fast_request(&mut Phase::default()).await?;
        }
    }
    let progress = report::progress_bar(args.requests as usize * 2 * subjects.len(), "fast requests");
    for round in 0..args.rounds {
        // The remainder goes to the first rounds.
        let share = args.requests / args.rounds + u32::from(round < args.requests % args.rounds);
        for (subject, phases) in subjects.iter_mut().zip(&mut *phases) {
            for (is_loaded, phase) in phases.iter_mut().enumerate() {
                let load = if is_loaded == 1 { Some(subject.load().await?) } else { None };
                subject.phase(share, phase).await?;
                progress.inc(share.into());
                if let Some(load) = load {
                    load.end().await?;
                }
                let scrape = wait_for_idle(&mut subject.client, PATIENCE).await?;
                let at_rest = scrape.blocks().is_some_and(|blocks| blocks.running + blocks.waiting == 0);
                ensure!(at_rest, "the server has not come to rest: {:?}", scrape.blocks());
            }
        }
    }
    progress.finish_and_clear();
    Ok(())
}

/// A server that is measured.
struct Subject {
    server: LocalServer,
    client: Client,
    dealer: Dealer,
    rng: StdRng,
    num_deep_streams: u32,
    num_fast_tokens: u32,
    /// In tokens.
    long_prompt: Vec<u32>,
    context_len: usize,
}

impl Subject {
    async fn start(
        args: &IsolationArgs,
        config: &Config,
        lane_isolation: bool,
    ) -> anyhow::Result<(Self, Header)> {
        let config = Config { lane_isolation, sharing: false, ..config.clone() };
        let runtime = runtime::start(&config)?;
        let header = Header::of("isolation", &runtime)?;
        let context_len = runtime.max_model_len;
        let (_, text) = runtime.target.as_ref().expect("the header has seen both models: this is a bug");
        let most = context_len.saturating_sub(CONTEXT_RESERVE).max(1);
        let mut dealer = Dealer::new(args.seed);
        let long_prompt = long_prompt(&mut dealer, &text.tokenizer, (args.deep_prompt as usize).min(most))?;
        let server = LocalServer::start(runtime).await?;
        let subject = Subject {
            client: Client::new(Endpoint::local(server.address)),
            server,
            dealer,
            rng: StdRng::seed_from_u64(args.seed),
            num_deep_streams: args.deep_streams,
            num_fast_tokens: args.fast_tokens,
            long_prompt,
            context_len,
        };
        Ok((subject, header))
    }

    /// `count` fast requests, with what the deep lane does meanwhile.
    async fn phase(&mut self, count: u32, phase: &mut Phase) -> anyhow::Result<()> {
        let before = Scrape::take(&mut self.client).await?;
        let start = Instant::now();
        for _ in 0..count {
            tokio::time::sleep(self.rng.random_range(Duration::ZERO..MAX_PAUSE)).await;
            self.fast_request(phase).await?;
        }
        phase.seconds += start.elapsed().as_secs_f64();
        let after = Scrape::take(&mut self.client).await?;
        let grown = |name: &str| {
            let missing = || format!("/metrics does not show tandem_{name}");
            anyhow::Ok(after.get(name).with_context(missing)? - before.get(name).with_context(missing)?)
        };
        phase.num_deep_tokens += grown("output_tokens_total{lane=\"deep\"}")?;
        phase.num_prompt_tokens += grown("prompt_tokens_total")?;
        Ok(())
    }

    async fn fast_request(&mut self, phase: &mut Phase) -> anyhow::Result<()> {
        // It may end before its last token: what a model says behind its end has no text, and would look late.
        let body = json!({
            "model": "fast",
            "prompt": self.dealer.new_text(FAST_PROMPT_CHARS),
            "max_tokens": self.num_fast_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        phase.add(&self.client.complete(&body).await.context("a fast request failed")?);
        Ok(())
    }

    /// Starts the deep work, and returns when all of it runs.
    async fn load(&mut self) -> anyhow::Result<Load> {
        let mut tasks = JoinSet::new();
        let (begun, mut begins) = mpsc::unbounded_channel();
        let endpoint = Endpoint::local(self.server.address);
        for _ in 0..self.num_deep_streams {
            let dealer = Dealer::new(self.rng.random());
            tasks.spawn(deep_stream(endpoint.clone(), dealer, self.context_len, begun.clone()));
        }
        for _ in 0..self.num_deep_streams {
            tokio::select! {
                begin = tokio::time::timeout(PATIENCE, begins.recv()) => {
                    begin.context("the deep streams do not all begin; is --kv-memory enough for them?")?;
                }
                Some(ended) = tasks.join_next() => ended??,
            }
        }
        let rng = StdRng::seed_from_u64(self.rng.random());
        tasks.spawn(deep_prompts(endpoint, self.long_prompt.clone(), rng));
        Ok(Load { tasks })
    }
}

/// Deep work under way.
struct Load {
    tasks: JoinSet<anyhow::Result<()>>,
}

impl Load {
    /// Hangs up everywhere.
    ///
    /// # Errors
    /// If a part of the load had failed by itself: then the server was not loaded.
    async fn end(mut self) -> anyhow::Result<()> {
        if let Some(ended) = self.tasks.try_join_next() {
            ended?.context("the deep load broke off")?;
        }
        self.tasks.shutdown().await;
        Ok(())
    }
}

/// One deep answer after the other, each as long as the context allows.
async fn deep_stream(
    endpoint: Endpoint,
    mut dealer: Dealer,
    context_len: usize,
    begun: mpsc::UnboundedSender<()>,
) -> anyhow::Result<()> {
    let mut client = Client::new(endpoint);
    let mut seed = 0;
    loop {
        seed += 1;
        let body = json!({
            "model": "deep",
            "prompt": dealer.new_text(DEEP_PROMPT_CHARS.min(context_len / 4)),
            // A character is a token at most, so this fits.
            "max_tokens": (context_len - DEEP_PROMPT_CHARS.min(context_len / 4)).max(1),
            "temperature": 0.8,
            "seed": seed,
            "ignore_eos": true,
            "stream": true,
        });
        let mut is_first = seed == 1;
        client
            .complete_while(&body, |completion| {
                if is_first && !completion.arrivals.is_empty() {
                    is_first = false;
                    // Nobody listens once all have begun.
                    let _ = begun.send(());
                }
                ControlFlow::Continue(())
            })
            .await
            .context("a deep stream failed")?;
    }
}

/// One long prompt after the other; a single token of answer, so that all the work is prefill. They are
/// the same code from another place on behind a few tokens drawn anew: cheap to make, because this
/// process must not spend the time that it measures, and of no use to a prefix cache.
async fn deep_prompts(endpoint: Endpoint, mut prompt: Vec<u32>, mut rng: StdRng) -> anyhow::Result<()> {
    let mut client = Client::new(endpoint);
    loop {
        let len = prompt.len();
        prompt.rotate_left(rng.random_range(0..len));
        for place in 0..len.min(8) {
            prompt.swap(place, rng.random_range(0..len));
        }
        let body = json!({
            "model": "deep",
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "stream": true,
        });
        client.complete(&body).await.context("the long deep prompt failed")?;
    }
}

/// Code of exactly `len` tokens.
fn long_prompt(dealer: &mut Dealer, tokenizer: &Tokenizer, len: usize) -> anyhow::Result<Vec<u32>> {
    let mut tokens = Vec::new();
    while tokens.len() < len {
        // Code has some three characters a token; what is missing is added until it is enough.
        let text = if tokens.is_empty() { dealer.new_text(4 * len) } else { dealer.text(4 * len) };
        tokens.extend(tokenizer.encode(&text, false)?);
    }
    tokens.truncate(len);
    Ok(tokens)
}
