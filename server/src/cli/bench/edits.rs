//! `tandem bench edits`: what a `prediction` saves where the answer is an edited file.
//!
//! The answer is forced ([`forced`]), so the figures do not depend on how clever the target is: each pass
//! costs what it costs, and each answer is the file after the edit, to the token. The draft proposes
//! unaided. The engine is driven directly, one sequence at a time, because a forced answer must not
//! reach a real client.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use serde::Deserialize;
use tandem_engine::{
    CacheSalt, DraftSource, DraftSources, DraftTokens, Engine, EngineConfig, Event, Finished, Lane,
    MAX_DRAFT_TOKENS, Models, Priority, SamplingParams, SequenceId, SpeculationParams, SubmitRequest,
    TokenId,
};
use tandem_models::{Checkpoint, Model, Tokenizer};

use super::report::{self, Header};
use super::server::configure;
use crate::cli::settings::ModelSettings;
use crate::config::Config;
use crate::runtime::{self, Runtime};
use forced::{Forced, Script};
use summary::{Report, Total};

mod forced;
mod summary;

const BUILT_IN: &str = include_str!("edits/edits.jsonl");

const LONG_ABOUT: &str = "\
Measure what Predicted Outputs save on this machine: target passes and time for an answer that is an edited \
file, with the file before the edit as `prediction` and without.

The answer is forced: the target computes every pass as it is, and then the token that the edited file has at \
each position is made the likeliest. So the figures say what speculation does with edits, and not how clever \
the target is. The draft proposes unaided. All ways to speculate take turns on each edit; --fixed adds drafts of \
fixed lengths, to see which is the fastest.

The run checks that every answer is the edited file, token for token; the exit status is 1 if one is not.";

const EXAMPLES: &str = "\
Examples:
  tandem bench edits
  tandem bench edits --data edit_eval.jsonl --json edits.json
  tandem bench edits --target ./big --draft ./small --limit 20

Data: JSON lines with task_id, instruction, input (the file before) and output (after), as in EditEval.";

/// Arguments of `tandem bench edits`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(in crate::cli) struct EditsArgs {
    /// Edits as JSON lines [default: 12 built-in ones, Python and Rust]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,

    /// Use only the first so many edits
    #[arg(long, value_name = "N")]
    limit: Option<usize>,

    /// Times that everything is repeated
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Also with the prediction and always so many draft tokens, no draft model; comma-separated
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(1..=MAX_DRAFT_TOKENS as i64))]
    fixed: Vec<u8>,

    /// Write the report to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    #[command(flatten)]
    model: ModelSettings,
}

/// A file before and after.
#[derive(Clone, Debug, Deserialize)]
struct Edit {
    #[serde(rename = "task_id")]
    id: String,
    instruction: String,
    #[serde(rename = "input")]
    before: String,
    #[serde(rename = "output")]
    after: String,
}

/// One way to speculate.
#[derive(Clone, Debug)]
struct Setting {
    name: String,
    /// Most draft tokens; `None` leaves it to the policy.
    max_draft_tokens: Option<u8>,
    sources: DraftSources,
    has_prediction: bool,
}

/// What the headline compares.
const NO_SPECULATION: usize = 0;
const DRAFT_ONLY: usize = 1;
const WITHOUT_PREDICTION: usize = 3;
const WITH_PREDICTION: usize = 4;

/// The policy's choices, the longest drafts (what the proposals are worth where rows cost nothing), and those of
/// `fixed` lengths.
fn settings(fixed: &[u8]) -> Vec<Setting> {
    let only = |source| DraftSources::NONE.with(source);
    let setting = |name: &str, max_draft_tokens, sources, has_prediction| Setting {
        name: name.to_owned(),
        max_draft_tokens,
        sources,
        has_prediction,
    };
    let draft_and_ngram = only(DraftSource::Draft).with(DraftSource::Ngram);
    let most = Some(MAX_DRAFT_TOKENS as u8);
    let mut settings = vec![
        setting("no speculation", Some(0), DraftSources::NONE, false),
        setting("draft", None, only(DraftSource::Draft), false),
        setting("n-gram", None, only(DraftSource::Ngram), false),
        setting("draft, n-gram (default without a prediction)", None, draft_and_ngram, false),
        setting("draft, n-gram, prediction (default with one)", None, DraftSources::ALL, true),
        setting("prediction", None, only(DraftSource::Prediction), true),
        setting("default without a prediction, longest drafts", most, draft_and_ngram, false),
        setting("default with a prediction, longest drafts", most, DraftSources::ALL, true),
    ];
    let texts = only(DraftSource::Ngram).with(DraftSource::Prediction);
    settings.extend(fixed.iter().map(|&length| {
        let name = format!("n-gram, prediction, {length} drafted");
        setting(&name, Some(length), texts, true)
    }));
    settings
}

/// An edit in tokens.
struct Task {
    prompt: Arc<[TokenId]>,
    prediction: Arc<[TokenId]>,
    answer: Vec<TokenId>,
}

/// Tokens of one forward pass, as the server has it.
const MAX_NUM_BATCHED_TOKENS: usize = 512;

pub(super) fn run(args: &EditsArgs) -> anyhow::Result<ExitCode> {
    let config = Config { max_num_seqs: 1, ..configure(&args.model)? };
    let edits = load_edits(args.data.as_deref(), args.limit)?;
    let runtime = runtime::start(&config)?;
    let header = Header::of("edits", &runtime)?;
    header.print();
    let mut bench = Bench::start(&config, runtime)?;

    let mut tasks = Vec::new();
    for edit in &edits {
        tasks.extend(bench.task(edit).with_context(|| format!("edit {}", edit.id))?);
    }
    ensure!(!tasks.is_empty(), "none of the {} edits fits the context", edits.len());
    let settings = settings(&args.fixed);
    let mut totals: Vec<Total> = settings.iter().map(|setting| Total::new(&setting.name)).collect();
    let progress = report::progress_bar(args.rounds as usize * tasks.len() * settings.len(), "answers");
    for round in 0..args.rounds as usize {
        for (index, task) in tasks.iter().enumerate() {
            for turn in 0..settings.len() {
                // Nobody always goes first.
                let setting = (turn + index + round) % settings.len();
                let (answer, finished) = bench.run(task, &settings[setting])?;
                totals[setting].add(&finished, answer == task.answer);
                progress.inc(1);
            }
        }
    }
    progress.finish_and_clear();

    let report = Report::new(header, edits.len(), tasks.len(), &totals);
    report.print();
    if let Some(path) = &args.json {
        report::write_json(path, &report)?;
    }
    Ok(if report.num_wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn load_edits(file: Option<&Path>, limit: Option<usize>) -> anyhow::Result<Vec<Edit>> {
    let mut edits = match file {
        Some(path) => {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            parse(&text).with_context(|| path.display().to_string())?
        }
        None => parse(BUILT_IN).expect("the built-in edits are well-formed: this is a bug"),
    };
    edits.truncate(limit.unwrap_or(usize::MAX).max(1));
    Ok(edits)
}

fn parse(text: &str) -> anyhow::Result<Vec<Edit>> {
    let mut edits = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let edit = serde_json::from_str(line)
            .with_context(|| format!("line {}: wanted task_id, instruction, input and output", index + 1))?;
        edits.push(edit);
    }
    if edits.is_empty() {
        bail!("holds no edit");
    }
    Ok(edits)
}

/// The engine with the forced target.
struct Bench {
    engine: Engine,
    script: Script,
    tokenizer: Arc<Tokenizer>,
    max_model_len: usize,
    start: Instant,
    num_requests: u64,
}

impl Bench {
    /// Takes the place of a runtime that has found and checked the pair.
    fn start(config: &Config, runtime: Runtime) -> anyhow::Result<Self> {
        runtime.engine.shutdown();
        runtime.engine_thread.join().map_err(|_| anyhow::anyhow!("the engine's thread panicked"))?;
        let (Some((target_info, text)), Some((draft_info, _))) = (runtime.target, runtime.draft) else {
            bail!("this benchmark measures a pair: name both --target and --draft");
        };
        let pool = runtime::thread_pool(runtime.threads)?;
        let load = |dir: &Path| -> anyhow::Result<Box<dyn Model>> {
            let mut checkpoint = Checkpoint::open(dir)?;
            checkpoint.quantize = config.quantize;
            Ok(tandem_models::load_with(&checkpoint, config.backend, config.kv_dtype, Arc::clone(&pool))?)
        };
        let (target, draft) = (load(&target_info.dir)?, load(&draft_info.dir)?);
        let engine_config = EngineConfig {
            block_size: runtime.kv.block_size,
            num_blocks: runtime.kv.num_blocks,
            max_num_seqs: 1,
            max_num_batched_tokens: MAX_NUM_BATCHED_TOKENS,
            max_waiting: 1,
            max_model_len: runtime.max_model_len,
            num_token_ids: runtime.num_token_ids,
            vocab_map: runtime.vocab_map,
            draft_tokens: DraftTokens::Auto,
            draft_head: config.draft_head,
            // An answer must not begin where the last one has been.
            prefix_cache: false,
            hash_key: [0; 2],
            hash_bits: 64,
            lane_isolation: true,
        };
        let script = Script::default();
        let target: Box<dyn Model> = Box::new(Forced::new(target, script.clone()));
        let mut engine = Engine::new(&engine_config, Models { target: Some(target), draft: Some(draft) })?;
        let start = Instant::now();
        engine.profile(DraftTokens::Auto, &|| start.elapsed())?;
        let tokenizer = text.tokenizer;
        Ok(Bench { engine, script, tokenizer, max_model_len: runtime.max_model_len, start, num_requests: 0 })
    }

    /// The edit in tokens; `None` if it does not fit the context.
    fn task(&self, edit: &Edit) -> anyhow::Result<Option<Task>> {
        let prompt = format!("{}\n\nBefore:\n\n{}\n\nAfter:\n\n", edit.instruction.trim(), edit.before);
        let prompt = self.tokenizer.encode_text(&prompt, true)?;
        let prediction = self.tokenizer.encode_text(&edit.before, false)?;
        let answer = self.tokenizer.encode_text(&edit.after, false)?;
        let fits = !answer.is_empty() && prompt.len() + answer.len() <= self.max_model_len;
        Ok(fits.then(|| Task { prompt: prompt.into(), prediction: prediction.into(), answer }))
    }

    /// One answer, and its account.
    fn run(&mut self, task: &Task, setting: &Setting) -> anyhow::Result<(Vec<TokenId>, Finished)> {
        self.num_requests += 1;
        self.script.set(task.prompt.len(), &task.answer);
        let (events, answer) = mpsc::sync_channel(task.answer.len() + 2);
        let prediction = if setting.has_prediction { Arc::clone(&task.prediction) } else { Arc::default() };
        let request = SubmitRequest {
            id: SequenceId(self.num_requests),
            lane: Lane::Deep,
            prompt: Arc::clone(&task.prompt),
            params: SamplingParams { max_tokens: task.answer.len() as u32, ..SamplingParams::default() },
            priority: Priority::default(),
            // A session of its own: what the other settings have answered would be the best proposal.
            cache_salt: CacheSalt(self.num_requests.into()),
            max_predict_time: None,
            speculation: SpeculationParams {
                max_draft_tokens: setting.max_draft_tokens,
                sources: setting.sources,
                prediction,
            },
            constraint: None,
            events: Box::new(events),
        };
        let start = self.start;
        let clock = move || -> Duration { start.elapsed() };
        self.engine.submit(request, clock());
        while !(self.engine.is_idle() && self.engine.is_delivered()) {
            self.engine.step(&clock)?;
        }
        let mut tokens = Vec::with_capacity(task.answer.len());
        for event in answer.try_iter() {
            match event {
                Event::Tokens(chunk) => tokens.extend(chunk.tokens.iter().map(|token| token.id)),
                Event::Finished(finished) => return Ok((tokens, finished)),
                Event::Failed(error) => return Err(error.into()),
                Event::PromptLogprobs(_) | Event::Embedding(_) => {}
            }
        }
        bail!("the engine ended without an answer")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_edits_are_files_that_change_a_little() {
        let edits = parse(BUILT_IN).expect("valid");
        assert!(edits.len() >= 12);
        for Edit { id, instruction, before, after } in &edits {
            assert!(!instruction.is_empty() && before != after, "{id}");
            for text in [before, after] {
                assert!((30..=120).contains(&text.lines().count()), "{id}: {} lines", text.lines().count());
            }
            let kept = after.lines().filter(|line| before.lines().any(|old| old == *line)).count();
            assert!(2 * kept > after.lines().count(), "{id}: more than half is new");
        }
        let python = edits.iter().filter(|edit| edit.id.starts_with("py/")).count();
        assert!(python >= 5 && edits.len() - python >= 5, "{python} of {}", edits.len());
    }

    #[test]
    fn a_wrong_line_is_named() {
        let ok = r#"{"task_id": "a", "instruction": "b", "context": "", "input": "c", "output": "d"}"#;
        assert_eq!(parse(&format!("{ok}\n\n{ok}")).expect("valid").len(), 2);
        let error = parse(&format!("{ok}\n{{}}\n")).unwrap_err();
        assert!(format!("{error:#}").contains("line 2"), "{error:#}");
    }

    #[test]
    fn the_headline_compares_what_it_says() {
        let settings = settings(&[4]);
        assert_eq!(settings[DRAFT_ONLY].name, "draft");
        assert!(settings[WITHOUT_PREDICTION].name.contains("default without"));
        assert!(settings[WITH_PREDICTION].name.contains("default with one"));
        assert_eq!(settings[NO_SPECULATION].max_draft_tokens, Some(0));
        assert!(settings[WITH_PREDICTION].has_prediction && !settings[WITHOUT_PREDICTION].has_prediction);
    }
}
