//! `tandem generate`: one answer in the terminal, as it comes. Tokens that the draft proposed and the
//! target accepted are coloured, so that speculation can be watched.

use std::io::{IsTerminal as _, Read as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use serde_json::json;
use tandem::http::lanes::LanePolicy;
use tandem::http::state::ServedModel;
use tandem::keys::Keyring;
use tandem_engine::{
    CacheSalt, Event, FinishReason, Finished, Lane, Priority, SamplingParams, SpeculationParams,
    SubmitRequest,
};
use tandem_models::Detokenizer;

use super::settings::ModelSettings;
use super::terminal;
use crate::config::Loaded;
use crate::runtime;

const LONG_ABOUT: &str = "\
Generate once in the terminal, streaming.

The prompt is the argument, a file, or what comes on standard input; the answer goes to standard output \
and nothing else does, so it can be piped. On a terminal, tokens that the draft proposed and the target \
accepted are coloured (NO_COLOR switches that off). A closing line on standard error tells the speed, the \
share of draft tokens accepted and the tokens that one verification yielded.";

const EXAMPLES: &str = "\
Examples:
  tandem generate 'def fibonacci(n):'
  tandem generate --lane fast --max-tokens 32 'fn main() {'
  tandem generate $'def area(radius):\\n    ' --suffix $'\\n    return result\\n'    # fills the gap
  tandem generate --file src/lib.rs --temperature 0.8 --seed 7
  echo 'Write a binary search' | tandem generate --chat
  tandem generate --draft-tokens 0 'def fibonacci(n):'        # the same text without speculation";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LaneChoice {
    /// The draft alone
    Fast,
    /// The target, accelerated by the draft
    Deep,
}

/// Arguments of `tandem generate`.
#[derive(Args, Debug)]
#[command(long_about = LONG_ABOUT, after_long_help = EXAMPLES)]
pub(super) struct GenerateArgs {
    /// The text to continue, as it is (most shells write a newline as $'...\n'). Without it and without
    /// --file, standard input is read
    #[arg(value_name = "PROMPT", conflicts_with = "file")]
    prompt: Option<String>,

    /// Take the prompt from this file, as it is
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Text after the gap: the model fills in between PROMPT and this
    #[arg(long, value_name = "TEXT", conflicts_with = "chat")]
    suffix: Option<String>,

    /// Treat the prompt as a user's message and apply the model's chat template
    #[arg(long)]
    chat: bool,

    /// Which model answers [default: deep, if there is a target]
    #[arg(long, value_enum)]
    lane: Option<LaneChoice>,

    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Sampling")]
    max_tokens: u32,

    /// 0 always takes the likeliest token; higher is more varied
    #[arg(long, value_name = "T", default_value_t = 0.0, help_heading = "Sampling")]
    temperature: f32,

    /// Sample from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Sampling")]
    top_p: f32,

    /// Sample from this many likeliest tokens; 0 is all
    #[arg(long, value_name = "K", default_value_t = 0, help_heading = "Sampling")]
    top_k: u32,

    /// Sample from tokens at least this fraction as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0, help_heading = "Sampling")]
    min_p: f32,

    /// Equal seeds give equal answers [default: drawn, and told in the closing line]
    #[arg(long, value_name = "SEED", help_heading = "Sampling")]
    seed: Option<u64>,

    #[command(flatten)]
    model: ModelSettings,
}

pub(super) fn run(args: &GenerateArgs) -> anyhow::Result<ExitCode> {
    let Loaded { mut config, warnings, .. } = args.model.load()?;
    terminal::init_logging(config.log.as_deref(), "warn");
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let text = read_prompt(args)?;
    // One sequence needs one context.
    config.max_num_seqs = 1;
    let (state, engine_thread) =
        runtime::start(&config)?.into_state(Arc::new(Keyring::new(&[], false)), LanePolicy::default(), false);
    let lane = match args.lane {
        Some(LaneChoice::Fast) => Lane::Fast,
        Some(LaneChoice::Deep) => Lane::Deep,
        None if state.target.is_some() => Lane::Deep,
        None => Lane::Fast,
    };
    let Some(served) = state.served(lane) else {
        match lane {
            Lane::Fast => bail!("there is no fast lane without a draft model; name one with --draft"),
            Lane::Deep => bail!("there is no deep lane without a target; name one with --target"),
        }
    };
    let prompt = encode(args, served, &text)?;
    let seed = args.seed.unwrap_or_else(rand::random);
    let mut stop_token_ids = served.stop_token_ids.clone();
    if args.suffix.is_some() {
        stop_token_ids.extend(&served.fim_stop_token_ids);
    }
    let params = SamplingParams {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        min_p: args.min_p,
        seed,
        stop_token_ids,
        max_tokens: args.max_tokens,
        ..SamplingParams::default()
    };
    let detokenizer = Detokenizer::continuing(Arc::clone(&served.model.tokenizer), &prompt, true);
    let (sender, events) = mpsc::sync_channel(64);
    state.engine.submit(SubmitRequest {
        id: state.engine.next_id(),
        lane,
        prompt: prompt.into(),
        params,
        priority: Priority::default(),
        // Nobody else is here to be kept apart from.
        cache_salt: CacheSalt::default(),
        max_predict_time: None,
        speculation: SpeculationParams::default(),
        constraint: None,
        events: Box::new(sender),
    })?;
    let finished = show(&events, detokenizer)?;
    if let Some(finished) = finished {
        eprintln!("{}", closing_line(&finished, lane, (args.temperature > 0.0).then_some(seed)));
    }
    state.engine.shutdown();
    // A panic of the engine's thread has been reported as the failed event already.
    let _ = engine_thread.join();
    Ok(ExitCode::SUCCESS)
}

fn read_prompt(args: &GenerateArgs) -> anyhow::Result<String> {
    if let Some(prompt) = &args.prompt {
        return Ok(prompt.clone());
    }
    if let Some(path) = &args.file {
        return std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    }
    let mut stdin = std::io::stdin();
    if stdin.is_terminal() {
        eprintln!("reading the prompt from standard input; end it with Ctrl-D");
    }
    let mut text = String::new();
    stdin.read_to_string(&mut text).context("cannot read the prompt from standard input")?;
    Ok(text)
}

fn encode(args: &GenerateArgs, served: &ServedModel, text: &str) -> anyhow::Result<Vec<u32>> {
    let tokenizer = &served.model.tokenizer;
    if let Some(suffix) = &args.suffix {
        let unknown = || {
            format!("{} was not trained to fill gaps: it has no fill-in-the-middle tokens", served.model.name)
        };
        let fim = served.model.fim.as_ref().with_context(unknown)?;
        return Ok(fim.encode(tokenizer, text, suffix)?);
    }
    if args.chat {
        let template = served.model.chat_template.as_ref().with_context(|| {
            format!("{} has no chat template; leave --chat out to continue plain text", served.model.name)
        })?;
        let messages = json!([{ "role": "user", "content": text.trim_end() }]);
        let rendered = template.render(&messages, None, true, &serde_json::Map::new())?;
        return Ok(tokenizer.encode(&rendered, false)?);
    }
    Ok(tokenizer.encode_text(text, true)?)
}

/// Writes the answer as it comes; `None` if whoever read our output has gone.
fn show(events: &mpsc::Receiver<Event>, mut detokenizer: Detokenizer) -> anyhow::Result<Option<Finished>> {
    let mut out =
        Painter { out: std::io::stdout().lock(), colour: terminal::colour_stdout(), painted: false };
    loop {
        match events.recv().context("the engine ended without an answer")? {
            Event::PromptLogprobs(_) | Event::Embedding(_) => {}
            Event::Tokens(chunk) => {
                for token in &chunk.tokens {
                    if let Some(text) = detokenizer.push(token.id)?
                        && out.write(&text, token.drafted).is_err()
                    {
                        return Ok(None);
                    }
                }
                if out.flush().is_err() {
                    return Ok(None);
                }
            }
            Event::Finished(finished) => {
                let rest = detokenizer.flush().unwrap_or_default();
                let written = out.write(&rest, false).and_then(|()| out.end());
                return Ok(written.is_ok().then_some(finished));
            }
            Event::Failed(error) => bail!(error),
        }
    }
}

/// Standard output with a second colour.
struct Painter<W> {
    out: W,
    colour: bool,
    /// The colour is switched on at the moment.
    painted: bool,
}

impl<W: std::io::Write> Painter<W> {
    fn write(&mut self, text: &str, drafted: bool) -> std::io::Result<()> {
        if self.colour && drafted != self.painted {
            self.out.write_all(if drafted { b"\x1b[36m" } else { b"\x1b[0m" })?;
            self.painted = drafted;
        }
        self.out.write_all(text.as_bytes())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }

    /// The colour off, and the line ended.
    fn end(&mut self) -> std::io::Result<()> {
        self.write("\n", false)?;
        self.flush()
    }
}

fn closing_line(finished: &Finished, lane: Lane, seed: Option<u64>) -> String {
    let usage = &finished.usage;
    // The first token is the prefill's.
    let num_decoded = usage.num_output_tokens.saturating_sub(1);
    let mut parts = vec![format!("{} tokens", usage.num_output_tokens)];
    if num_decoded > 0 && !usage.decode_time.is_zero() {
        parts.push(format!("{:.0} tokens/s", f64::from(num_decoded) / usage.decode_time.as_secs_f64()));
    }
    let to_first = usage.queue_time + usage.prefill_time;
    parts.push(format!("first after {:.1} ms", 1e3 * to_first.as_secs_f64()));
    let (drafted, accepted) = (usage.total_draft_tokens(), usage.total_accepted_tokens());
    if drafted > 0 {
        let share = 100.0 * f64::from(accepted) / f64::from(drafted);
        parts.push(format!("{accepted} of {drafted} draft tokens accepted ({share:.0} %)"));
    }
    if lane == Lane::Deep && usage.num_decode_steps > 0 {
        let tokens = f64::from(num_decoded) / f64::from(usage.num_decode_steps);
        parts.push(format!("{tokens:.2} tokens a verification"));
    }
    if let Some(seed) = seed {
        parts.push(format!("seed {seed}"));
    }
    parts.push(match finished.reason {
        FinishReason::Stop(_) | FinishReason::Complete => "ended by itself".to_owned(),
        FinishReason::Length => "stopped at the length limit".to_owned(),
        FinishReason::Deadline => "stopped at the time limit".to_owned(),
        FinishReason::Aborted => "aborted".to_owned(),
    });
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tandem_engine::Usage;

    use super::*;

    #[test]
    fn only_accepted_draft_tokens_are_coloured_and_the_colour_ends() {
        let paint = |colour| {
            let mut painter = Painter { out: Vec::new(), colour, painted: false };
            for (text, drafted) in [("a", false), ("b", true), ("c", true), ("d", false), ("e", true)] {
                painter.write(text, drafted).expect("a Vec takes everything");
            }
            painter.end().expect("a Vec takes everything");
            String::from_utf8(painter.out).expect("UTF-8")
        };
        assert_eq!(paint(true), "a\x1b[36mbc\x1b[0md\x1b[36me\x1b[0m\n");
        assert_eq!(paint(false), "abcde\n");
    }

    #[test]
    fn the_closing_line_accounts_for_speculation() {
        let usage = Usage {
            num_output_tokens: 101,
            num_draft_tokens: [70, 10, 0],
            num_accepted_tokens: [55, 5, 0],
            num_decode_steps: 40,
            decode_time: Duration::from_millis(500),
            prefill_time: Duration::from_millis(4),
            ..Usage::default()
        };
        let finished = Finished { reason: FinishReason::Length, usage };
        assert_eq!(
            closing_line(&finished, Lane::Deep, Some(7)),
            "101 tokens, 200 tokens/s, first after 4.0 ms, 60 of 80 draft tokens accepted (75 %), \
             2.50 tokens a verification, seed 7, stopped at the length limit"
        );
    }
}
