//! Prompts to measure with: openings of small Python and Rust functions, written for this purpose and
//! compiled in, or a file of the user's in HumanEval's format.

use std::path::Path;

use anyhow::{Context as _, bail};
use serde::Deserialize;

const BUILT_IN: &str = include_str!("prompts.jsonl");

/// One prompt.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct BenchPrompt {
    #[serde(rename = "task_id")]
    pub(super) id: String,
    pub(super) prompt: String,
}

/// The built-in prompts.
pub(super) fn built_in() -> Vec<BenchPrompt> {
    parse(BUILT_IN).expect("the built-in prompts are well-formed: this is a bug")
}

/// Prompts from a file of JSON lines with `task_id` and `prompt`.
///
/// # Errors
/// Names the file and the line that is wrong.
pub(super) fn from_file(path: &Path) -> anyhow::Result<Vec<BenchPrompt>> {
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
}
