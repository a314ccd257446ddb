//! Prompts to measure with: openings of small Python and Rust functions, written for this purpose and
//! compiled in, or a file of the user's in HumanEval's format; and as many more as are wanted, made of
//! pieces of the built-in ones.

use std::path::Path;

use anyhow::{Context as _, bail};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::Deserialize;

const BUILT_IN: &str = include_str!("prompts.jsonl");

/// One prompt.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct BenchPrompt {
    #[serde(rename = "task_id")]
    pub(super) id: String,
    pub(super) prompt: String,
}

/// The prompts of `file`, or the built-in ones; the first `limit` of them.
///
/// # Errors
/// Names the file and the line that is wrong.
pub(super) fn load(file: Option<&Path>, limit: Option<usize>) -> anyhow::Result<Vec<BenchPrompt>> {
    let mut prompts = match file {
        Some(path) => from_file(path)?,
        None => built_in(),
    };
    prompts.truncate(limit.unwrap_or(usize::MAX).max(1));
    Ok(prompts)
}

/// The built-in prompts.
pub(super) fn built_in() -> Vec<BenchPrompt> {
    parse(BUILT_IN).expect("the built-in prompts are well-formed: this is a bug")
}

/// Prompts from a file of JSON lines with `task_id` and `prompt`.
fn from_file(path: &Path) -> anyhow::Result<Vec<BenchPrompt>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| path.display().to_string())
}

fn parse(text: &str) -> anyhow::Result<Vec<BenchPrompt>> {
    let mut prompts = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let prompt: BenchPrompt = serde_json::from_str(line).with_context(|| {
            format!("line {}: wanted {{\"task_id\": \"...\", \"prompt\": \"...\"}}", index + 1)
        })?;
        prompts.push(prompt);
    }
    if prompts.is_empty() {
        bail!("holds no prompt");
    }
    Ok(prompts)
}

/// Prompts without end, the same ones for the same seed.
pub(super) struct Dealer {
    rng: StdRng,
    pieces: Vec<BenchPrompt>,
}

impl Dealer {
    pub(super) fn new(seed: u64) -> Self {
        Dealer { rng: StdRng::seed_from_u64(seed), pieces: built_in() }
    }

    /// Code of `num_chars` characters. It often begins as others do, as files of one project would.
    pub(super) fn text(&mut self, num_chars: usize) -> String {
        let mut text = String::new();
        let mut missing = num_chars;
        while missing > 0 {
            let piece = &self.pieces[self.rng.random_range(0..self.pieces.len())].prompt;
            text.extend(piece.chars().take(missing));
            missing -= piece.chars().count().min(missing);
        }
        text
    }

    /// The same behind a line of its own, so that no cache has seen its beginning.
    pub(super) fn new_text(&mut self, num_chars: usize) -> String {
        let mark: u64 = self.rng.random();
        let mut text = format!("# {mark:016x}\n");
        text.push_str(&self.text(num_chars.saturating_sub(text.len())));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_prompts_are_many_and_distinct() {
        let prompts = built_in();
        assert!(prompts.len() >= 24);
        let mut ids: Vec<&str> = prompts.iter().map(|prompt| prompt.id.as_str()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), prompts.len());
        assert!(prompts.iter().all(|prompt| !prompt.prompt.trim().is_empty()));
    }

    #[test]
    fn a_wrong_line_is_named_and_other_fields_are_ignored() {
        let ok = r#"{"task_id": "a", "prompt": "def f():", "canonical_solution": "pass"}"#;
        assert_eq!(parse(&format!("{ok}\n\n{ok}\n")).expect("valid").len(), 2);
        let error = parse(&format!("{ok}\n{{}}\n")).unwrap_err();
        assert!(format!("{error:#}").contains("line 2"), "{error:#}");
        assert!(parse("\n").is_err());
    }

    #[test]
    fn dealt_prompts_repeat_with_their_seed_and_new_ones_begin_differently() {
        let deal = |seed| {
            let mut dealer = Dealer::new(seed);
            (dealer.text(300), dealer.new_text(300), dealer.new_text(300))
        };
        assert_eq!(deal(1), deal(1));
        assert_ne!(deal(1), deal(2));
        let (text, first, second) = deal(1);
        assert_eq!([&text, &first, &second].map(|text| text.chars().count()), [300; 3]);
        assert_ne!(first[..16], second[..16]);
        assert!(Dealer::new(1).text(0).is_empty());
    }
}
