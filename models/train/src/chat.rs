//! Small chats made from documented Python functions: the docstring asks, the function answers.
//!
//! The functions are found by indentation, without a parser: a `def` at the left margin whose first
//! statement is a docstring. What does not fit is left out; nothing depends on finding them all.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::corpus::Document;

/// A function and what it is for.
pub(crate) struct ChatExample<'a> {
    name: &'a str,
    signature: &'a str,
    purpose: String,
    pub(crate) code: &'a str,
}

impl ChatExample<'_> {
    /// One of three ways to ask for it.
    pub(crate) fn question(&self, rng: &mut ChaCha8Rng) -> String {
        let Self { name, signature, purpose, .. } = self;
        match rng.random_range(0..10) {
            0..4 => format!("Write a Python function `{name}`. {purpose}"),
            4..7 => format!("Write a function that does this: {purpose}"),
            _ => format!("Complete this function:\n```python\n{signature}\n    \"\"\"{purpose}\"\"\"\n```"),
        }
    }
}

/// Every function of the Python files that makes a good answer.
pub(crate) fn chat_examples(documents: &[Document]) -> Vec<ChatExample<'_>> {
    let python = documents.iter().filter(|document| document.path.ends_with(".py"));
    python.flat_map(|document| top_level_functions(&document.text)).filter_map(example).collect()
}

/// The texts of the top-level functions, without trailing blank lines.
fn top_level_functions(text: &str) -> Vec<&str> {
    let mut functions = Vec::new();
    let mut open: Option<usize> = None;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        // A closing bracket of the signature may stand at the margin.
        let margin = !line.starts_with([' ', '\t', '\n', ')', '#']);
        if margin {
            functions.extend(open.take().map(|start| text[start..at].trim_end()));
            if line.starts_with("def ") {
                open = Some(at);
            }
        }
        at += line.len();
    }
    functions.extend(open.map(|start| text[start..].trim_end()));
    functions
}

fn example(code: &str) -> Option<ChatExample<'_>> {
    let lines = code.lines().count();
    if !(4..=29).contains(&lines) || !code.is_ascii() {
        return None;
    }
    let signature = code.lines().next()?;
    let name = signature.strip_prefix("def ")?.split('(').next()?;
    if !signature.trim_end().ends_with(':') {
        return None;
    }
    let body = code[signature.len()..].trim_start();
    let body = body.strip_prefix('r').unwrap_or(body);
    let (documentation, _) = body.strip_prefix("\"\"\"")?.split_once("\"\"\"")?;
    let paragraph = documentation.split("\n\n").next()?;
    let purpose = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
    (16..240).contains(&purpose.len()).then_some(ChatExample { name, signature, purpose, code })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_documented_functions_only() {
        let text = "import os\n\ndef good(a):\n    \"\"\"Return a sorted copy\n    of the list.\n\n    More.\n    \"\"\"\n    return sorted(a)\n\ndef bare(a):\n    x = a\n    y = x\n    return y\n\nclass C:\n    def method(self):\n        \"\"\"Not at the left margin at all.\"\"\"\n        a = 1\n        return a\n";
        let documents = [
            Document { path: "m.py".into(), text: text.into() },
            Document { path: "m.rs".into(), text: text.into() },
        ];
        let examples = chat_examples(&documents);
        assert_eq!(examples.len(), 1);
        assert_eq!(examples[0].name, "good");
        assert_eq!(examples[0].purpose, "Return a sorted copy of the list.");
        assert!(examples[0].code.ends_with("return sorted(a)"));
    }
}
