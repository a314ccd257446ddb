//! `tandem pair TARGET DRAFT`: whether two models work as a pair, and what it would gain here.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;

use anyhow::{Context as _, bail};
use clap::Args;
use tandem_engine::{
    CacheSalt, DraftSource, DraftSources, DraftTokens, Event, Lane, Priority, SamplingParams,
    SpeculationParams, SubmitRequest,
};
use tandem_models::pair::Comparison;
use tandem_models::{Checkpoint, Head, HubOptions, Tokenizer, check_pair};

use super::passes::Passes;
use super::terminal;
use crate::config::Config;
use crate::drafter::{Drafter, HeadPlace};
use crate::runtime::{self, Described, Runtime};

const LONG_ABOUT: &str = "\
Say whether a target and a draft work as a pair, and what the pair would gain on this machine.

Compares their vocabularies, times passes of both models, drafts for a few prompts to see how often draft \
tokens stand, and estimates from that the speed of the deep lane against plain decoding. A draft of another \
vocabulary works too, through the tokens that both have; so does a head that drafts for the target. The exit \
status is 1 if the two are no pair.";

const EXAMPLES: &str = "\
Examples:
  tandem pair ./big ./small
  tandem pair Qwen/Qwen2.5-Coder-7B-Instruct Qwen/Qwen2.5-Coder-0.5B-Instruct
  tandem pair ./big ./big-eagle3
  tandem pair ./mimo-7b mtp
  tandem pair target.gguf draft.gguf --threads 8";

/// Tokens drafted to see how often they stand.
const DRAFTED: u8 = 4;

/// The longest draft that the estimate looks at.
const LONGEST: usize = 8;

/// Context of the timed passes.
const CONTEXT: usize = 128;

/// What drafting is tried on: openings of small functions, as an editor's cursor stands in them.
const PROMPTS: [&str; 4] = [
    "def is_prime(n: int) -> bool:\n    \"\"\"Return True if n is a prime number.\"\"\"\n",
    "fn reverse_words(text: &str) -> String {\n    // Keeps single spaces between words.\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "// Returns the sum of the even numbers in `numbers`.\nfunction sumEven(numbers) {\n",
];

/// Arguments of `tandem pair`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(super) struct PairArgs {
    /// The large model: a folder, a GGUF file or a hub id
    #[arg(value_name = "TARGET")]
    target: String,

    /// The small model, or the folder of an EAGLE-3 head, or `mtp` for the target's own layer
    #[arg(value_name = "DRAFT")]
    draft: String,

    /// Tokens of an answer that drafting is tried on
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(8..=4096))]
    max_tokens: u32,

    /// Threads that compute [default: one a CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

pub(super) fn run(args: &PairArgs) -> anyhow::Result<ExitCode> {
    terminal::init_logging(None, "error");
    let options = HubOptions::from_env();
    let target = tandem_models::resolve(&args.target, &options)?;
    let drafter = Drafter::find(&args.draft, &options)?;
    let threads = args.threads.map_or_else(runtime::default_threads, usize::from);
    let costs = match &drafter {
        Drafter::Model(draft) if explain_vocabularies(&target, draft)? => {
            Costs::measure(&target, draft, threads)?
        }
        Drafter::Model(_) => return Ok(ExitCode::FAILURE),
        Drafter::Head(place) => {
            let checkpoint = Checkpoint::open(&target)?;
            let Some(head) = explain_head(&checkpoint, place)? else { return Ok(ExitCode::FAILURE) };
            Costs::measure_head(&checkpoint, &head, threads)?
        }
    };
    costs.print();
    let path = |dir: PathBuf| -> anyhow::Result<String> {
        dir.into_os_string().into_string().ok().context("a model's path is no Unicode text")
    };
    let config = Config {
        target: Some(path(target)?),
        draft: Some(match drafter {
            Drafter::Model(dir) | Drafter::Head(HeadPlace::Folder(dir)) => path(dir)?,
            Drafter::Head(HeadPlace::Target) => args.draft.clone(),
        }),
        threads: Some(threads),
        max_num_seqs: 1,
        prefix_cache: false,
        // So that nothing is measured at start.
        lane_isolation: false,
        draft_tokens: DraftTokens::Fixed(DRAFTED),
        ..Config::default()
    };
    let runtime = runtime::start(&config)?;
    print_sizes(&runtime);
    let tried = Tried::run(runtime, args.max_tokens)?;
    let standing = standing(tried.tokens_per_step(), DRAFTED.into());
    println!(
        "tried      {} of {} draft tokens stood on {} prompts, {DRAFTED} at a time, greedy: {:.2} tokens a step, \
         {:.0} % a token",
        tried.accepted,
        tried.drafted,
        PROMPTS.len(),
        tried.tokens_per_step(),
        100.0 * standing
    );
    let (length, gain) = costs.best(standing);
    match length {
        0 => println!("estimate   drafting does not pay here with this draft: plain decoding is faster"),
        _ => println!(
            "estimate   {gain:.2} times the speed of plain decoding, one stream, drafting {length} at a time; \
             `tandem bench pair` measures it"
        ),
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints what the vocabularies have in common. False if the two are no pair.
fn explain_vocabularies(target: &Path, draft: &Path) -> anyhow::Result<bool> {
    let open = |dir: &Path| anyhow::Ok((Checkpoint::open(dir)?, Tokenizer::from_dir(dir)?));
    let (target, draft) = (open(target)?, open(draft)?);
    for (role, (checkpoint, tokenizer)) in [("target", &target), ("draft", &draft)] {
        println!(
            "{role:<10} {}: {} tokens, {} rows of embedding",
            checkpoint.name,
            tokenizer.vocab_size(),
            checkpoint.config.vocab_size
        );
    }
    let comparison = Comparison::of(&target.1, &draft.1);
    for (role, theirs, ours) in &comparison.special {
        let spell = |token: &Option<String>| token.clone().unwrap_or_else(|| "none".to_owned());
        println!(
            "special    the {role} token is {} in the target and {} in the draft",
            spell(theirs),
            spell(ours)
        );
    }
    match check_pair((&target.0, &target.1), (&draft.0, &draft.1)) {
        Ok(None) if target.0.config.vocab_size == draft.0.config.vocab_size => {
            println!("vocabulary the same");
        }
        Ok(None) => println!("vocabulary the same; the embeddings are padded differently, which is fine"),
        Ok(Some(map)) => {
            if let Some(difference) = &comparison.first_difference {
                println!("vocabulary different: {} ids, the first: {difference}", comparison.num_different);
            }
            println!(
                "           the draft can propose {} of its {} tokens, those that the target has too, and reads the \
                 target's others as the nearest of its own",
                map.num_shared(),
                map.num_draft_ids()
            );
        }
        Err(error) => {
            println!("no pair    {error}");
            return Ok(false);
        }
    }
    Ok(true)
}

/// Prints what the head is and reads. `None` if it is not the target's.
fn explain_head(target: &Checkpoint, place: &HeadPlace) -> anyhow::Result<Option<Head>> {
    let config = &target.config;
    println!(
        "target     {}: {} layers, {} wide, {} rows of embedding",
        target.name, config.num_layers, config.hidden_size, config.vocab_size
    );
    let head = match place.open(target, None) {
        Ok(head) => head,
        Err(error) => {
            println!("no pair    {error}");
            return Ok(None);
        }
    };
    println!("head       {}: {} that reads {}", head.checkpoint.name, head.kind.name(), head.features);
    match head.num_outputs() {
        all if all == config.vocab_size => println!("vocabulary the target's"),
        some => println!(
            "vocabulary {some} of the target's {} tokens: the others it cannot propose",
            config.vocab_size
        ),
    }
    println!("lanes      deep only: a head answers nobody by itself");
    Ok(Some(head))
}

fn print_sizes(runtime: &Runtime) {
    let of = |model: &Option<Described>| model.as_ref().map(|(info, _)| info.clone());
    let head = runtime.head.as_ref().map(|head| head.info.clone());
    for (role, model) in [("target", of(&runtime.target)), ("draft", of(&runtime.draft)), ("head", head)] {
        if let Some(info) = model {
            println!(
                "{role:<10} {} parameters, {} of weights, mostly {}",
                terminal::count(info.num_parameters),
                terminal::bytes(info.size_bytes),
                info.dtype.name().to_lowercase()
            );
        }
    }
}

/// Milliseconds of passes.
struct Costs {
    /// `[rows - 1]`: of the target, every row with its logits.
    target: Vec<f64>,
    /// Of the draft over one row.
    draft: f64,
}

impl Costs {
    fn measure(target: &Path, draft: &Path, threads: usize) -> anyhow::Result<Self> {
        let pool = runtime::thread_pool(threads)?;
        let mut passes = Passes::load(draft, pool.clone(), CONTEXT, LONGEST + 1)?;
        let draft = fastest(&passes.times_ms(1, 1)?);
        drop(passes);
        let mut passes = Passes::load(target, pool, CONTEXT, LONGEST + 1)?;
        Ok(Costs { target: Self::of_target(&mut passes)?, draft })
    }

    /// The target's passes with what they leave for the head.
    fn measure_head(target: &Checkpoint, head: &Head, threads: usize) -> anyhow::Result<Self> {
        let pool = runtime::thread_pool(threads)?;
        let mut passes = Passes::load_with_head(target, head, pool, CONTEXT, LONGEST + 1)?;
        let target = Self::of_target(&mut passes)?;
        Ok(Costs { target, draft: fastest(&passes.of_head()?.times_ms(1, 1)?) })
    }

    fn of_target(passes: &mut Passes) -> anyhow::Result<Vec<f64>> {
        (1..=LONGEST + 1).map(|rows| Ok(fastest(&passes.times_ms(rows, rows)?))).collect()
    }

    fn print(&self) {
        println!(
            "passes     target {:.2} ms for one token, {:.2} ms to verify {DRAFTED} more ({:.2} times); draft {:.2} ms \
             a token",
            self.target[0],
            self.target[usize::from(DRAFTED)],
            self.target[usize::from(DRAFTED)] / self.target[0],
            self.draft
        );
    }

    /// The best number of draft tokens, and the speed with it over that without.
    fn best(&self, standing: f64) -> (usize, f64) {
        (0..=LONGEST)
            .map(|length| {
                let step = self.target[length] + length as f64 * self.draft;
                (length, tokens_per_step(standing, length) * self.target[0] / step)
            })
            .fold((0, 1.0), |best, found| if found.1 > best.1 { found } else { best })
    }
}

/// The one that counts: whatever else runs here only ever adds to it.
fn fastest(times: &[f64]) -> f64 {
    times.iter().copied().fold(f64::INFINITY, f64::min)
}

/// Tokens of a step that drafts `length` tokens, each of which stands with probability `standing` if those
/// before it do; one is the target's own.
fn tokens_per_step(standing: f64, length: usize) -> f64 {
    (0..=length as i32).map(|stood| standing.powi(stood)).sum()
}

/// The probability with which a step of `length` draft tokens brings so many.
fn standing(found: f64, length: usize) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..50 {
        let middle = (low + high) / 2.0;
        if tokens_per_step(middle, length) < found { low = middle } else { high = middle }
    }
    low
}

/// What became of draft tokens.
#[derive(Default)]
struct Tried {
    drafted: u32,
    accepted: u32,
    /// Verifications.
    steps: u32,
}

impl Tried {
    fn tokens_per_step(&self) -> f64 {
        1.0 + f64::from(self.accepted) / f64::from(self.steps.max(1))
    }

    fn run(runtime: Runtime, max_tokens: u32) -> anyhow::Result<Self> {
        let Some((_, text)) = &runtime.target else { bail!("a pair has a target: this is a bug") };
        let mut tried = Tried::default();
        for prompt in PROMPTS {
            let prompt = text.tokenizer.encode_text(prompt, true)?;
            let (sender, events) = mpsc::sync_channel(64);
            runtime.engine.submit(SubmitRequest {
                id: runtime.engine.next_id(),
                lane: Lane::Deep,
                prompt: prompt.into(),
                params: SamplingParams { max_tokens, ..SamplingParams::default() },
                priority: Priority::default(),
                cache_salt: CacheSalt::default(),
                max_predict_time: None,
                speculation: SpeculationParams {
                    sources: DraftSources::NONE.with(DraftSource::Draft),
                    ..SpeculationParams::default()
                },
                constraint: None,
                events: Box::new(sender),
            })?;
            loop {
                match events.recv().context("the engine ended without an answer")? {
                    Event::PromptLogprobs(_) | Event::Embedding(_) | Event::Tokens(_) => {}
                    Event::Finished(finished) => {
                        tried.drafted += finished.usage.total_draft_tokens();
                        tried.accepted += finished.usage.total_accepted_tokens();
                        tried.steps += finished.usage.num_decode_steps;
                        break;
                    }
                    Event::Failed(error) => bail!(error),
                }
            }
        }
        runtime.engine.shutdown();
        // A panic of the engine's thread has been reported as a failed event already.
        let _ = runtime.engine_thread.join();
        Ok(tried)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_is_found_from_what_steps_bring() {
        for standing_wanted in [0.0, 0.3, 0.8, 0.99] {
            let found = standing(tokens_per_step(standing_wanted, 4), 4);
            assert!((found - standing_wanted).abs() < 1e-6, "{found} for {standing_wanted}");
        }
    }

    #[test]
    fn the_estimate_weighs_passes_against_tokens() {
        // Verification is free, a draft pass a tenth of the target's.
        let costs = Costs { target: vec![10.0; LONGEST + 1], draft: 1.0 };
        let (length, gain) = costs.best(0.8);
        assert!((3..=6).contains(&length) && gain > 2.0, "{length}, {gain}");
        assert_eq!(costs.best(0.0), (0, 1.0));
        // A draft as slow as its target.
        assert_eq!(Costs { target: vec![10.0; LONGEST + 1], draft: 10.0 }.best(0.8).0, 0);
    }
}
