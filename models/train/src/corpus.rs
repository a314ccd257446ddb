//! The corpus: which files of a folder are training text, and which are held out.
//!
//! The walk is in path order and a file is held out by a hash of its relative path, so a run on
//! another machine, or after files were added, sees the same split. Text stays in memory.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{CorpusOptions, CorpusSummary, TrainError};

/// Folders that hold no source of the user's own.
const SKIPPED_DIRS: [&str; 6] = ["node_modules", "target", "__pycache__", "venv", "dist", "build"];
/// Lines longer than this on average are minified or data.
const MAX_MEAN_LINE: usize = 200;
/// Where a "do not edit" notice would stand.
const NOTICE_BYTES: usize = 2000;

/// One file.
#[derive(Clone, Debug)]
pub(crate) struct Document {
    /// Relative to the corpus folder, with `/` on every system.
    pub(crate) path: String,
    pub(crate) text: String,
}

/// The files of a corpus folder.
#[derive(Debug)]
pub(crate) struct Corpus {
    pub(crate) train: Vec<Document>,
    pub(crate) held_out: Vec<Document>,
    pub(crate) skipped: usize,
}

impl Corpus {
    /// Reads every file that qualifies.
    pub(crate) fn read(options: &CorpusOptions) -> Result<Self, TrainError> {
        let mut files = Vec::new();
        walk(&options.dir, &mut files)?;
        let mut corpus = Self { train: Vec::new(), held_out: Vec::new(), skipped: 0 };
        let mut seen = HashSet::new();
        let seen_files = files.len();
        for path in files {
            let Some(text) = read_text(&path, options)?.filter(|text| seen.insert(hash(text))) else {
                corpus.skipped += 1;
                continue;
            };
            let relative = path.strip_prefix(&options.dir).unwrap_or(&path);
            let parts: Vec<_> = relative.iter().map(|part| part.to_string_lossy()).collect();
            let document = Document { path: parts.join("/"), text };
            if is_held_out(&document.path, options.held_out) {
                corpus.held_out.push(document);
            } else {
                corpus.train.push(document);
            }
        }
        if corpus.train.is_empty() {
            let extensions = match &options.extensions[..] {
                [] => "any".to_owned(),
                some => some.join(" "),
            };
            return Err(TrainError::EmptyCorpus {
                dir: options.dir.clone(),
                looked_at: seen_files,
                extensions,
            });
        }
        Ok(corpus)
    }

    pub(crate) fn train_bytes(&self) -> u64 {
        self.train.iter().map(|document| document.text.len() as u64).sum()
    }

    pub(crate) fn summary(&self) -> CorpusSummary {
        CorpusSummary {
            train_files: self.train.len(),
            train_bytes: self.train_bytes(),
            held_out_files: self.held_out.len(),
            held_out_bytes: self.held_out.iter().map(|document| document.text.len() as u64).sum(),
            skipped_files: self.skipped,
        }
    }
}

/// Appends the regular files under `dir`, sorted by name level by level.
fn walk(dir: &Path, files: &mut Vec<PathBuf>) -> Result<(), TrainError> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir).map_err(TrainError::io(dir))? {
        let entry = entry.map_err(TrainError::io(dir))?;
        entries.push((entry.path(), entry.file_type().map_err(TrainError::io(&entry.path()))?));
    }
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    for (path, kind) in entries {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if kind.is_dir() && !name.starts_with('.') && !SKIPPED_DIRS.contains(&name.as_str()) {
            walk(&path, files)?;
        } else if kind.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

/// The text of a file that qualifies.
fn read_text(path: &Path, options: &CorpusOptions) -> Result<Option<String>, TrainError> {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    let wanted =
        |extension: &String| options.extensions.iter().any(|wanted| wanted.eq_ignore_ascii_case(extension));
    if !options.extensions.is_empty() && !extension.as_ref().is_some_and(wanted) {
        return Ok(None);
    }
    let size = fs::metadata(path).map_err(TrainError::io(path))?.len();
    if size < options.min_file_bytes || size > options.max_file_bytes {
        return Ok(None);
    }
    let bytes = fs::read(path).map_err(TrainError::io(path))?;
    let Ok(text) = String::from_utf8(bytes) else { return Ok(None) };
    if text.contains('\0') || is_generated(&text) {
        return Ok(None);
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text).replace("\r\n", "\n");
    Ok((!text.trim().is_empty()).then_some(text))
}

fn is_generated(text: &str) -> bool {
    if text.len() / (text.lines().count().max(1)) > MAX_MEAN_LINE {
        return true;
    }
    let head = text[..floor_boundary(text, NOTICE_BYTES)].to_ascii_lowercase();
    let notices = ["@generated", "do not edit", "automatically generated", "auto-generated", "autogenerated"];
    notices.iter().any(|notice| head.contains(notice))
}

/// FNV-1a with a final mix: stable over releases and machines, which the split needs. FNV alone
/// leaves the high bits of paths that differ in their last byte almost equal.
fn hash(text: &str) -> u64 {
    let mut x = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |x, byte| (x ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

fn is_held_out(path: &str, share: f64) -> bool {
    (hash(path) >> 11) as f64 / (1u64 << 53) as f64 <= share && share > 0.0
}

/// The largest character boundary at or below `at`.
pub(crate) fn floor_boundary(text: &str, at: usize) -> usize {
    let at = at.min(text.len());
    (0..=at).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(dir: &Path) -> CorpusOptions {
        CorpusOptions { dir: dir.to_owned(), min_file_bytes: 1, ..Default::default() }
    }

    #[test]
    fn takes_source_and_leaves_the_rest() {
        let dir = tempfile::tempdir().expect("tempdir");
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
            fs::write(path, bytes).expect("write");
        };
        write("b.py", b"def f():\r\n    return 1\n");
        write("a/z.rs", b"fn main() {}\n");
        write("a/copy.rs", b"fn main() {}\n");
        write("binary.py", b"\0\x01");
        write("latin.py", b"# caf\xe9\n");
        write("gen.py", b"# @generated by a tool\nx = 1\n");
        write("min.js", "x=1;".repeat(500).as_bytes());
        write("photo.png", b"text after all");
        write("node_modules/dep.js", b"let a = 1;\n");
        write(".git/hook.py", b"x = 2\n");
        let corpus = Corpus::read(&CorpusOptions { held_out: 0.0, ..options(dir.path()) }).expect("corpus");
        let paths: Vec<_> = corpus.train.iter().map(|document| document.path.as_str()).collect();
        assert_eq!(paths, ["a/copy.rs", "b.py"]);
        assert_eq!(corpus.train[1].text, "def f():\n    return 1\n");
        assert_eq!(corpus.skipped, 6);
    }

    #[test]
    fn an_empty_corpus_says_what_was_wanted() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::write(dir.path().join("a.txt"), "words").expect("write");
        let message = Corpus::read(&options(dir.path())).expect_err("no source").to_string();
        assert!(message.contains("1 files seen") && message.contains(" py "), "{message}");
        let missing = Corpus::read(&options(&dir.path().join("none"))).expect_err("missing").to_string();
        assert!(missing.contains("none"), "{missing}");
    }

    #[test]
    fn the_split_is_near_its_share() {
        let held = (0..20_000).filter(|i| is_held_out(&format!("src/mod{i}.rs"), 0.02)).count();
        assert!((300..500).contains(&held), "{held}");
        assert!(!is_held_out("src/lib.rs", 0.0));
    }
}
