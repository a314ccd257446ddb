//! `tandem bench pair`: what the pair gains over its target alone, over HTTP.
//!
//! The settings take turns on every prompt within one run, so that whatever else the machine does
//! hits all of them alike, and each ratio compares the same prompt a moment apart. The same run
//! checks that speculation changed nothing: for each prompt and temperature, every `deep` setting
//! must give the same text.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use super::client::{Client, Completion, Endpoint};
use super::prompts::{self, BenchPrompt};
use super::report::{self, Header};
use super::server::{LocalServer, configure};
use super::synthetic::SyntheticArgs;
use crate::cli::settings::ModelSettings;
use crate::runtime;
use summary::{Mismatch, Row};

mod summary;

const LONG_ABOUT: &str = "\
Measure what speculation gains on this machine.

Starts a server in this process and sends it prompts over HTTP, one stream at a time, under every setting \
in turn: deep with speculation (draft tokens chosen as it runs, and each fixed number of --fixed), deep \
without speculation, and fast. Speed is output tokens per second of the whole request, from sending it \
to the last byte. The ratio compares each prompt with deep without speculation on the same prompt.

The run also checks that speculation changed no answer; the exit status is 1 if it did. (With \
--synthetic-acceptance answers depend on a coin and are not compared.)";

const EXAMPLES: &str = "\
Examples:
  tandem bench pair
  tandem bench pair --threads 2 --rounds 5 --json pair.json
  tandem bench pair --target ./big --draft ./small --fixed 2,4,8 --prompts HumanEval.jsonl";

/// Arguments of `tandem bench pair`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(in crate::cli) struct PairArgs {
    /// Prompts as JSON lines with task_id and prompt, as in HumanEval [default: 24 built-in ones]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,

    /// Use only the first so many prompts
    #[arg(long, value_name = "N")]
    limit: Option<usize>,

    /// Times that everything is repeated
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    max_tokens: u32,

    /// Temperatures, comma-separated
    #[arg(long, value_name = "T,...", value_delimiter = ',', default_value = "0,0.8")]
    temperatures: Vec<f32>,

    /// Fixed numbers of draft tokens to measure beside auto, comma-separated
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "2,4", value_parser = clap::value_parser!(u8).range(1..=tandem_engine::MAX_DRAFT_TOKENS as i64))]
    fixed: Vec<u8>,

    /// Seed of the sampled answers
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,

    /// Write every sample and the summary to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    #[command(flatten)]
    synthetic: SyntheticArgs,

    #[command(flatten)]
    model: ModelSettings,
}

/// One way to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Setting {
    /// Deep, with as many draft tokens as the server's policy or `--draft-tokens` says.
    DeepAuto,
    /// Deep, with a fixed number of draft tokens.
    DeepFixed(u8),
    /// Deep without speculation.
    DeepPlain,
    /// The draft alone.
    Fast,
}

impl Setting {
    fn name(self) -> String {
        match self {
            Setting::DeepAuto => "deep, auto".to_owned(),
            Setting::DeepFixed(count) => format!("deep, {count} drafted"),
            Setting::DeepPlain => "deep, no speculation".to_owned(),
            Setting::Fast => "fast".to_owned(),
        }
    }

    fn is_deep(self) -> bool {
        self != Setting::Fast
    }

    /// The request body for a prompt. Requests with different salts share nothing.
    fn body(self, prompt: &str, temperature: f32, args: &PairArgs, salt: u64) -> Value {
        let mut body = json!({
            "model": if self.is_deep() { "deep" } else { "fast" },
            "prompt": prompt,
            "max_tokens": args.max_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "seed": args.seed,
            // What one setting has answered must not serve another.
            "cache_salt": format!("bench-{salt}"),
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        match self {
            Setting::DeepFixed(count) => body["speculative"] = json!({ "max_draft_tokens": count }),
            Setting::DeepPlain => body["speculative"] = json!({ "max_draft_tokens": 0 }),
            Setting::DeepAuto | Setting::Fast => {}
        }
        if args.synthetic.acceptance(args.seed).is_some() && self.is_deep() {
            // Where a coin decides, text proposers would win without any cost.
            body["speculative"]["sources"] = json!(["draft"]);
        }
        body
    }
}

/// One request.
#[derive(Clone, Debug, Serialize)]
struct Sample {
    setting: String,
    temperature: f32,
    prompt: String,
    round: u32,
    finish_reason: String,
    num_output_tokens: u64,
    num_accepted_tokens: u64,
    num_rejected_tokens: u64,
    ttft_ms: f64,
    total_ms: f64,
    tokens_per_second: f64,
    #[serde(skip)]
    key: Key,
}

/// What makes samples of one setting comparable with those of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    setting: Setting,
    /// Index into the temperatures.
    temperature: usize,
    /// Index into the prompts.
    prompt: usize,
}

/// What goes into the JSON file.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    header: Header,
    rounds: u32,
    max_tokens: u32,
    seed: u64,
    num_prompts: usize,
    /// `None` if a coin decides what the answers are.
    lossless: Option<bool>,
    num_compared: usize,
    mismatches: &'a [Mismatch],
    rows: &'a [Row],
    samples: &'a [Sample],
}

pub(super) fn run(args: &PairArgs) -> anyhow::Result<ExitCode> {
    let mut config = configure(&args.model)?;
    if let Some(wrong) = args.temperatures.iter().find(|t| !(0.0..=100.0).contains(*t)) {
        bail!("--temperatures holds {wrong}; they must be numbers from 0 to 100");
    }
    let prompts = prompts::load(args.prompts.as_deref(), args.limit)?;
    config.max_num_seqs = 1;
    let synthetic = args.synthetic.acceptance(args.seed);
    let runtime = match synthetic {
        Some(synthetic) => runtime::start_with(&config, |models| synthetic.adapt(models))?,
        None => runtime::start(&config)?,
    };
    let header = Header { synthetic, ..Header::of("pair", &runtime)? };
    header.print();

    let (samples, mismatches) = runtime::async_runtime()?.block_on(async {
        let server = LocalServer::start(runtime).await?;
        let measured = measure(args, &prompts, &server).await?;
        server.stop().await?;
        anyhow::Ok(measured)
    })?;

    let rows = summary::rows(args, &samples);
    println!("{}", summary::table(&rows));
    println!(
        "{} prompts, {} rounds, {} tokens each, one stream; medians; ratio to deep without speculation, \
         prompt by prompt",
        prompts.len(),
        args.rounds,
        args.max_tokens
    );
    let num_compared = samples.iter().filter(|sample| sample.key.setting.is_deep()).count();
    match synthetic {
        Some(_) => println!("lossless: not checked; a coin decides what the answers are"),
        None => println!("{}", summary::verdict(num_compared, &mismatches)),
    }
    if let Some(path) = &args.json {
        let report = Report {
            header,
            rounds: args.rounds,
            max_tokens: args.max_tokens,
            seed: args.seed,
            num_prompts: prompts.len(),
            lossless: synthetic.is_none().then_some(mismatches.is_empty()),
            num_compared,
            mismatches: &mismatches,
            rows: &rows,
            samples: &samples,
        };
        report::write_json(path, &report)?;
    }
    Ok(if mismatches.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn settings(args: &PairArgs) -> Vec<Setting> {
    let mut settings = vec![Setting::DeepPlain, Setting::DeepAuto];
    settings.extend(args.fixed.iter().map(|&count| Setting::DeepFixed(count)));
    settings.push(Setting::Fast);
    settings
}

async fn measure(
    args: &PairArgs,
    prompts: &[BenchPrompt],
    server: &LocalServer,
) -> anyhow::Result<(Vec<Sample>, Vec<Mismatch>)> {
    let mut client = Client::new(Endpoint::local(server.address));
    let settings = settings(args);
    // Caches, page tables and the policy's first guesses are not what is measured.
    for setting in &settings {
        client
            .complete(&setting.body(&prompts[0].prompt, 0.0, args, 0))
            .await
            .context("the first request failed")?;
    }
    let num_requests = args.rounds as usize * args.temperatures.len() * prompts.len() * settings.len();
    let progress = report::progress_bar(num_requests, "requests");
    let mut samples = Vec::new();
    let mut mismatches = Vec::new();
    // The first answer of each prompt and temperature on the deep lane: all others must equal it.
    let mut answers: HashMap<(usize, usize), (Setting, Completion)> = HashMap::new();
    for round in 0..args.rounds {
        for (temperature_index, &temperature) in args.temperatures.iter().enumerate() {
            for (prompt_index, prompt) in prompts.iter().enumerate() {
                for turn in 0..settings.len() {
                    // Nobody always goes first.
                    let setting = settings[(turn + prompt_index + round as usize) % settings.len()];
                    let salt = 1 + samples.len() as u64;
                    let body = setting.body(&prompt.prompt, temperature, args, salt);
                    let completion = client
                        .complete(&body)
                        .await
                        .with_context(|| format!("prompt {}, {}", prompt.id, setting.name()))?;
                    progress.inc(1);
                    if setting.is_deep() && args.synthetic.acceptance(args.seed).is_none() {
                        let (reference, wanted) = answers
                            .entry((temperature_index, prompt_index))
                            .or_insert_with(|| (setting, completion.clone()));
                        if !same_answer(wanted, &completion) {
                            mismatches.push(Mismatch {
                                prompt: prompt.id.clone(),
                                temperature,
                                setting: setting.name(),
                                reference: reference.name(),
                                wanted: wanted.text.clone(),
                                found: completion.text.clone(),
                            });
                        }
                    }
                    let key = Key { setting, temperature: temperature_index, prompt: prompt_index };
                    samples.push(sample(key, temperature, prompt, round, &completion));
                }
            }
        }
    }
    progress.finish_and_clear();
    Ok((samples, mismatches))
}

fn same_answer(wanted: &Completion, found: &Completion) -> bool {
    (&wanted.text, wanted.num_output_tokens, &wanted.finish_reason)
        == (&found.text, found.num_output_tokens, &found.finish_reason)
}

fn sample(key: Key, temperature: f32, prompt: &BenchPrompt, round: u32, completion: &Completion) -> Sample {
    let seconds = completion.total.as_secs_f64();
    Sample {
        setting: key.setting.name(),
        temperature,
        prompt: prompt.id.clone(),
        round,
        finish_reason: completion.finish_reason.clone(),
        num_output_tokens: completion.num_output_tokens,
        num_accepted_tokens: completion.num_accepted_tokens,
        num_rejected_tokens: completion.num_rejected_tokens,
        ttft_ms: 1e3 * completion.ttft().as_secs_f64(),
        total_ms: 1e3 * seconds,
        tokens_per_second: completion.num_output_tokens as f64 / seconds,
        key,
    }
}
