//! llama.cpp's side: its own programs on the same files, in processes of their own.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use serde::Deserialize;

use crate::cli::bench::stats::median;
use crate::runtime::Runtime;

/// Tokens of context behind which plain decoding is timed, about what the built-in prompts have.
const CONTEXT: u32 = 64;

/// Steps that are timed of a speculative run: enough for a mean, whatever the answers' length.
const STEPS: u32 = 24;

/// The programs and the models.
pub(super) struct Peer {
    bin: PathBuf,
    target: PathBuf,
    draft: PathBuf,
    threads: usize,
}

impl Peer {
    /// # Errors
    /// If the pair is not in GGUF files, or the programs are not in `bin`.
    pub(super) fn new(bin: &Path, runtime: &Runtime) -> anyhow::Result<Self> {
        let file = |model: &Option<crate::runtime::Described>| -> anyhow::Result<PathBuf> {
            let (info, _) = model.as_ref().context("a pair has two models: this is a bug")?;
            if !info.dir.is_file() {
                bail!("{} is no GGUF file, which --llama-bin needs; see tandem quantize", info.dir.display());
            }
            Ok(info.dir.clone())
        };
        for program in [SPECULATIVE, BENCH] {
            if !bin.join(program).is_file() {
                bail!("--llama-bin: there is no {program} in {}", bin.display());
            }
        }
        Ok(Peer {
            bin: bin.to_owned(),
            target: file(&runtime.target)?,
            draft: file(&runtime.draft)?,
            threads: runtime.threads,
        })
    }

    /// Decoding one token at a time.
    ///
    /// # Errors
    /// If llama-bench fails or says nothing that this knows.
    pub(super) fn plain_tokens_per_second(&self, num_tokens: u32) -> anyhow::Result<f64> {
        let mut command = self.command(BENCH);
        command.args(["-p", "0", "-n", &num_tokens.to_string(), "-d", &CONTEXT.to_string()]);
        command.args(["-r", "1", "-o", "json"]);
        let output = run(&mut command)?;
        parse_bench(&output.stdout).with_context(|| format!("{BENCH} wrote no times that this knows"))
    }

    /// The mean time of a step: `length` passes of the draft, verification, and whatever else its loop does.
    ///
    /// # Errors
    /// If llama-speculative-simple fails or says nothing that this knows.
    pub(super) fn step_seconds(&self, prompt: &str, length: u8, max_tokens: u32) -> anyhow::Result<f64> {
        let mut command = self.command(SPECULATIVE);
        command.arg("-md").arg(&self.draft).args(["-p", prompt, "--temp", "0"]);
        command.args(["--spec-type", "draft-simple", "--spec-draft-p-min", "0"]);
        command.args(["--spec-draft-n-max", &length.to_string()]);
        // A token a step, if none stands.
        command.args(["-n", &STEPS.min(max_tokens).to_string(), "-c", "4096"]);
        let output = run(&mut command)?;
        let mut text = output.stdout;
        text.extend_from_slice(&output.stderr);
        let steps = parse_steps(&String::from_utf8_lossy(&text))
            .with_context(|| format!("{SPECULATIVE} wrote no account that this knows"))?;
        // The last steps may draft less than the others, where the answer's end is near.
        if steps.num_drafted + f64::from(length) * f64::from(length) < steps.count * f64::from(length) {
            bail!(
                "{SPECULATIVE} drafted {} tokens in {} steps, not {length} in each",
                steps.num_drafted,
                steps.count
            );
        }
        Ok(steps.seconds / steps.count)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.arg("-m").arg(&self.target).args(["-t", &self.threads.to_string()]);
        command
    }
}

const SPECULATIVE: &str = "llama-speculative-simple";
const BENCH: &str = "llama-bench";

fn run(command: &mut Command) -> anyhow::Result<std::process::Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{program} ended with {}: {}",
            output.status,
            errors.lines().last().unwrap_or("and said nothing")
        );
    }
    Ok(output)
}

/// What llama-bench says of a test.
#[derive(Deserialize)]
struct Test {
    n_gen: u32,
    samples_ns: Vec<f64>,
}

fn parse_bench(json: &[u8]) -> Option<f64> {
    let tests: Vec<Test> = serde_json::from_slice(json).ok()?;
    let test = tests.into_iter().find(|test| test.n_gen > 0 && !test.samples_ns.is_empty())?;
    Some(f64::from(test.n_gen) * 1e9 / median(test.samples_ns))
}

#[derive(Debug, PartialEq)]
struct Steps {
    count: f64,
    num_drafted: f64,
    seconds: f64,
}

/// From the account at the end: `decoded N tokens in S seconds`, `n_drafted = N`, `n_accept = N`. Every
/// step gives the tokens that stand and one more.
fn parse_steps(text: &str) -> Option<Steps> {
    let line = text.lines().rev().find_map(|line| line.split_once("decoded "))?.1;
    let mut words = line.split_whitespace();
    let num_decoded: f64 = words.next()?.parse().ok()?;
    let seconds: f64 = words.nth(2)?.parse().ok()?;
    let value = |name: &str| -> Option<f64> {
        let line = text.lines().rev().find(|line| line.contains(name))?;
        line.rsplit('=').next()?.trim().parse().ok()
    };
    let steps = Steps { count: num_decoded - value("n_accept")?, num_drafted: value("n_drafted")?, seconds };
    (steps.count >= 1.0).then_some(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_read() {
        let text = "1.06 I encoded   25 tokens in    4.174 seconds, speed:    5.989 t/s\n\
            1.06 I decoded   25 tokens in   45.500 seconds, speed:    0.551 t/s\n\
            1.06 I n_draft   = 4\n1.06 I n_predict = 25\n1.06 I n_drafted = 94\n1.06 I n_accept  = 2\n\
            1.06 I accept    = 0.000%\n";
        assert_eq!(parse_steps(text), Some(Steps { count: 23.0, num_drafted: 94.0, seconds: 45.5 }));
        assert_eq!(parse_steps("decoded nothing"), None);
        let json = br#"[{"n_prompt": 0, "n_gen": 32, "samples_ns": [4000000000], "avg_ts": 8.0}]"#;
        assert_eq!(parse_bench(json), Some(8.0));
        assert_eq!(parse_bench(b"[]"), None);
    }
}
