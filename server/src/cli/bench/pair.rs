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
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

use super::client::{Client, Completion};
use super::prompts::{self, BenchPrompt};
use super::report::{self, Row};
use super::{LocalServer, Machine, write_json};
use crate::cli::settings::ModelSettings;
use crate::cli::terminal;
use crate::config::Loaded;
use crate::runtime;

const LONG_ABOUT: &str = "\
Measure what speculation gains on this machine.

Starts a server in this process and sends it prompts over HTTP, one stream at a time, under every setting \
in turn: deep with speculation (draft tokens chosen as it runs, and each fixed number of --fixed), deep \
without speculation, and fast. Speed is output tokens per second of the whole request, from sending it \
to the last byte. The ratio compares each prompt with deep without speculation on the same prompt.

The run also checks that speculation changed no answer; the exit status is 1 if it did.";

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
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "2,4", value_parser = clap::value_parser!(u8).range(1..=16))]
    fixed: Vec<u8>,

    /// Seed of the sampled answers
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,

    /// Write every sample and the summary to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

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

    /// The request body for a prompt.
    fn body(self, prompt: &str, temperature: f32, args: &PairArgs) -> Value {
        let mut body = json!({
            "model": if self.is_deep() { "deep" } else { "fast" },
            "prompt": prompt,
            "max_tokens": args.max_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "seed": args.seed,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        match self {
            Setting::DeepFixed(count) => body["speculative"] = json!({ "max_draft_tokens": count }),
            Setting::DeepPlain => body["speculative"] = json!({ "max_draft_tokens": 0 }),
            Setting::DeepAuto | Setting::Fast => {}
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

/// Answers shorter than this say more about the first token than about speed; they are compared and
/// not timed.
const MIN_TIMED_TOKENS: u64 = 16;

/// A prompt whose answer changed with speculation.
#[derive(Clone, Debug, Serialize)]
struct Mismatch {
    prompt: String,
    temperature: f32,
    setting: String,
    reference: String,
    wanted: String,
    found: String,
}

/// What goes into the JSON file.
#[derive(Serialize)]
struct Report<'a> {
    benchmark: &'static str,
    machine: Machine,
    target: String,
    draft: String,
    rounds: u32,
    max_tokens: u32,
    seed: u64,
    num_prompts: usize,
    lossless: bool,
    num_compared: usize,
    mismatches: &'a [Mismatch],
    rows: &'a [Row],
    samples: &'a [Sample],
}

pub(super) fn run(args: &PairArgs) -> anyhow::Result<ExitCode> {
    let Loaded { mut config, warnings, .. } = args.model.load()?;
    terminal::init_logging(config.log.as_deref(), "warn");
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    if let Some(wrong) = args.temperatures.iter().find(|t| !(0.0..=100.0).contains(*t)) {
        bail!("--temperatures holds {wrong}; they must be numbers from 0 to 100");
    }
    let mut prompts = match &args.prompts {
        Some(path) => prompts::from_file(path)?,
        None => prompts::built_in(),
    };
    prompts.truncate(args.limit.unwrap_or(usize::MAX).max(1));
    config.max_num_seqs = 1;
    let runtime = runtime::start(&config)?;
    let names = match (&runtime.target, &runtime.draft) {
        (Some((target, _)), Some((draft, _))) => [target, draft]
            .map(|info| format!("{} ({} parameters)", info.name, terminal::count(info.num_parameters))),
        _ => bail!("this benchmark measures a pair: name both --target and --draft"),
    };
    let [target, draft] = names;
    let machine = Machine::this(runtime.threads);
    println!("{target} with draft {draft}");
    println!(
        "{}, {} threads, {} kernels, tandem {}",
        machine.cpu, machine.threads, machine.kernels, machine.tandem
    );

    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (samples, mismatches) = tokio.block_on(async {
        let server = LocalServer::start(runtime).await?;
        let measured = measure(args, &prompts, &server).await?;
        server.stop().await?;
        anyhow::Ok(measured)
    })?;

    let rows = summarise(args, &samples);
    println!("{}", report::table(&rows));
    println!(
        "{} prompts, {} rounds, {} tokens each, one stream; medians; ratio to deep without speculation, \
         prompt by prompt",
        prompts.len(),
        args.rounds,
        args.max_tokens
    );
    let num_compared = samples.iter().filter(|sample| sample.key.setting.is_deep()).count();
    println!("{}", verdict(num_compared, &mismatches));
    if let Some(path) = &args.json {
        let report = Report {
            benchmark: "pair",
            machine,
            target,
            draft,
            rounds: args.rounds,
            max_tokens: args.max_tokens,
            seed: args.seed,
            num_prompts: prompts.len(),
            lossless: mismatches.is_empty(),
            num_compared,
            mismatches: &mismatches,
            rows: &rows,
            samples: &samples,
        };
        write_json(path, &report)?;
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
    let mut client = Client::connect(server.address).await?;
    let settings = settings(args);
    // Caches, page tables and the policy's first guesses are not what is measured.
    for setting in &settings {
        client
            .complete(&setting.body(&prompts[0].prompt, 0.0, args))
            .await
            .context("the first request failed")?;
    }
    let progress =
        progress_bar(args.rounds as usize * args.temperatures.len() * prompts.len() * settings.len());
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
                    let body = setting.body(&prompt.prompt, temperature, args);
                    let completion = client
                        .complete(&body)
                        .await
                        .with_context(|| format!("prompt {}, {}", prompt.id, setting.name()))?;
                    progress.inc(1);
                    if setting.is_deep() {
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

fn progress_bar(length: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} requests, {eta} left")
        .expect("the template is well-formed: this is a bug");
    ProgressBar::with_draw_target(Some(length as u64), ProgressDrawTarget::stderr()).with_style(style)
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
        ttft_ms: 1e3 * completion.first_text.as_secs_f64(),
        total_ms: 1e3 * seconds,
        tokens_per_second: completion.num_output_tokens as f64 / seconds,
        key,
    }
}

fn summarise(args: &PairArgs, samples: &[Sample]) -> Vec<Row> {
    let mut speeds: HashMap<Key, Vec<f64>> = HashMap::new();
    for sample in samples.iter().filter(|sample| sample.num_output_tokens >= MIN_TIMED_TOKENS) {
        speeds.entry(sample.key).or_default().push(sample.tokens_per_second);
    }
    let medians: HashMap<Key, f64> =
        speeds.into_iter().map(|(key, speeds)| (key, report::median(speeds))).collect();
    let mut rows = Vec::new();
    for (temperature_index, &temperature) in args.temperatures.iter().enumerate() {
        for setting in settings(args) {
            let own = || {
                samples.iter().filter(|s| (s.key.setting, s.key.temperature) == (setting, temperature_index))
            };
            let ratios = medians
                .iter()
                .filter(|(key, _)| (key.setting, key.temperature) == (setting, temperature_index))
                .filter_map(|(key, speed)| {
                    Some(speed / medians.get(&Key { setting: Setting::DeepPlain, ..*key })?)
                });
            rows.push(row(setting, temperature, own, ratios.collect()));
        }
    }
    rows
}

fn row<'a, I: Iterator<Item = &'a Sample>>(
    setting: Setting,
    temperature: f32,
    samples: impl Fn() -> I,
    ratios: Vec<f64>,
) -> Row {
    let timed = || samples().filter(|sample| sample.num_output_tokens >= MIN_TIMED_TOKENS);
    let sum = |field: fn(&Sample) -> u64| samples().map(field).sum::<u64>();
    let accepted = sum(|sample| sample.num_accepted_tokens);
    let drafted = accepted + sum(|sample| sample.num_rejected_tokens);
    // The prefill gives the first token. Each verification after it gives the accepted draft tokens
    // and one of the target's own.
    let decoded = sum(|sample| sample.num_output_tokens.saturating_sub(1));
    let verifications = decoded.saturating_sub(accepted);
    let is_speculative = setting.is_deep() && drafted > 0;
    Row {
        setting: setting.name(),
        temperature,
        num_samples: timed().count(),
        tokens_per_second: report::Spread::of(timed().map(|sample| sample.tokens_per_second)),
        ttft_ms: report::Spread::of(timed().map(|sample| sample.ttft_ms)),
        ratio: report::Spread::of(ratios.into_iter()),
        acceptance: is_speculative.then(|| accepted as f64 / drafted as f64),
        tokens_per_verification: is_speculative.then(|| decoded as f64 / verifications.max(1) as f64),
    }
}

fn verdict(num_compared: usize, mismatches: &[Mismatch]) -> String {
    let Some(first) = mismatches.first() else {
        return format!(
            "lossless: all {num_compared} deep answers are the same with and without speculation"
        );
    };
    format!(
        "NOT LOSSLESS: {} of {num_compared} deep answers differ. First: prompt {}, temperature {}, {:?} against \
         {:?}\n  wanted {:?}\n  found  {:?}",
        mismatches.len(),
        first.prompt,
        first.temperature,
        first.setting,
        first.reference,
        first.wanted,
        first.found
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn completion(text: &str, tokens: u64, accepted: u64, rejected: u64, seconds: f64) -> Completion {
        Completion {
            text: text.to_owned(),
            finish_reason: "length".to_owned(),
            num_output_tokens: tokens,
            num_accepted_tokens: accepted,
            num_rejected_tokens: rejected,
            first_text: Duration::from_millis(10),
            total: Duration::from_secs_f64(seconds),
        }
    }

    fn args() -> PairArgs {
        use clap::Parser as _;
        #[derive(clap::Parser)]
        struct Only {
            #[command(flatten)]
            args: PairArgs,
        }
        Only::parse_from(["pair", "--temperatures", "0", "--fixed", "4"]).args
    }

    #[test]
    fn ratios_compare_the_same_prompt() {
        let prompt = |id: &str| BenchPrompt { id: id.to_owned(), prompt: id.to_owned() };
        let mut samples = Vec::new();
        // Prompt 0 is easy and twice as fast with speculation; prompt 1 is slow and gains half.
        for (index, plain, speculative) in [(0, 1.0, 0.5), (1, 4.0, 8.0 / 3.0)] {
            for (setting, seconds) in [(Setting::DeepPlain, plain), (Setting::DeepAuto, speculative)] {
                let key = Key { setting, temperature: 0, prompt: index };
                let accepted = if setting == Setting::DeepAuto { 66 } else { 0 };
                samples.push(sample(key, 0.0, &prompt("p"), 0, &completion("t", 100, accepted, 22, seconds)));
            }
        }
        let rows = summarise(&args(), &samples);
        let auto = rows.iter().find(|row| row.setting == "deep, auto").expect("a row");
        let ratio = auto.ratio.expect("a ratio");
        assert!((ratio.median - 1.75).abs() < 1e-9 && (ratio.min - 1.5).abs() < 1e-9, "{ratio:?}");
        assert_eq!(auto.acceptance, Some(0.75));
        assert_eq!(auto.tokens_per_verification, Some(3.0));
        let plain = rows.iter().find(|row| row.setting == "deep, no speculation").expect("a row");
        assert!((plain.ratio.expect("a ratio").median - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_different_text_count_or_end_is_a_mismatch() {
        let wanted = completion("same", 5, 0, 0, 1.0);
        assert!(same_answer(&wanted, &completion("same", 5, 3, 1, 9.0)));
        assert!(!same_answer(&wanted, &completion("other", 5, 0, 0, 1.0)));
        assert!(!same_answer(&wanted, &completion("same", 6, 0, 0, 1.0)));
        let stopped = Completion { finish_reason: "stop".to_owned(), ..wanted.clone() };
        assert!(!same_answer(&wanted, &stopped));
    }

    #[test]
    fn the_verdict_shows_the_first_difference() {
        assert!(verdict(8, &[]).starts_with("lossless: all 8"));
        let mismatch = Mismatch {
            prompt: "p1".to_owned(),
            temperature: 0.8,
            setting: "deep, auto".to_owned(),
            reference: "deep, no speculation".to_owned(),
            wanted: "a".to_owned(),
            found: "b".to_owned(),
        };
        let text = verdict(8, &[mismatch]);
        assert!(text.starts_with("NOT LOSSLESS: 1 of 8") && text.contains("p1"), "{text}");
    }
}
