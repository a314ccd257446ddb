//! Published vocabularies: every `*.gguf` in the folder that `TANDEM_VOCABULARIES` names, with the texts in
//! its `.inp` and the expected ids in its `.out`, in the form of llama.cpp's `models/ggml-vocab-*`. They are
//! not ours to ship, so without the variable the test says so and passes.

use std::path::{Path, PathBuf};

use tandem_models::Tokenizer;

const FOLDER: &str = "TANDEM_VOCABULARIES";
const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

#[test]
fn every_published_vocabulary_gives_the_published_ids() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        eprintln!("skipped: {FOLDER} names no folder with vocabularies");
        return;
    };
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "gguf"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} holds no .gguf file", Path::new(&folder).display());
    let mut failures = Vec::new();
    for file in &files {
        match check(file) {
            Ok(texts) => eprintln!("{}: {texts} texts", file.display()),
            Err(failure) => failures.push(format!("{}: {failure}", file.display())),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn check(file: &Path) -> Result<usize, String> {
    let beside = |ending: &str| std::fs::read_to_string(format!("{}.{ending}", file.display())).unwrap();
    let (texts, ids) = (beside("inp"), beside("out"));
    // Every text is closed by a separator.
    let texts: Vec<&str> = texts.strip_suffix(SEPARATOR).unwrap_or(&texts).split(SEPARATOR).collect();
    let ids: Vec<Vec<u32>> =
        ids.lines().map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect()).collect();
    let tokenizer = Tokenizer::from_dir(file).map_err(|error| error.to_string())?;
    let mut failures = Vec::new();
    for (index, (text, wanted)) in texts.iter().zip(&ids).enumerate() {
        let found = tokenizer.encode_text(text, false).map_err(|error| error.to_string())?;
        if found != *wanted {
            failures.push(format!("text {index} {text:?}\n  gives  {found:?}\n  wanted {wanted:?}"));
        }
        // Decoding gives the text back, whole or token by token.
        let decoded = tokenizer.decode(&found, false).map_err(|error| error.to_string())?;
        if decoded != *text {
            failures.push(format!("text {index} {text:?} comes back as {decoded:?}"));
        }
    }
    if texts.len() != ids.len() {
        failures.push(format!("{} texts, {} lines of ids", texts.len(), ids.len()));
    }
    if failures.is_empty() { Ok(texts.len()) } else { Err(failures.join("\n")) }
}
