//! The loop: mutate, write, load, judge.

pub(crate) mod memory;
mod mutate;
mod random;
mod seeds;
mod targets;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use random::Random;

/// A kind of file and what reads it.
pub(crate) struct Target {
    /// Its name on the command line.
    pub(crate) name: &'static str,
    /// The files of a good model, of which there may be several; the first is the one that is mutated.
    files: fn(usize) -> seeds::Files,
    mutate: fn(&[u8], &mut Random) -> Vec<u8>,
    /// Reads all that can be read of the folder; true if it is accepted.
    load: fn(&Path) -> bool,
    /// Bytes that may be held at once beyond twice the mutated file's.
    constant: usize,
}

/// Everything that reads files which somebody else wrote.
pub(crate) static TARGETS: [Target; 5] = [
    Target { name: "gguf", files: seeds::gguf, mutate: mutate::gguf, load: targets::gguf, constant: 1 << 20 },
    Target {
        name: "safetensors",
        files: seeds::safetensors,
        mutate: mutate::safetensors,
        load: targets::checkpoint,
        constant: 1 << 20,
    },
    Target {
        name: "config",
        files: seeds::config,
        mutate: mutate::json,
        load: targets::checkpoint,
        constant: 1 << 20,
    },
    Target {
        name: "tokenizer",
        files: seeds::tokenizer,
        mutate: mutate::json,
        load: targets::tokenizer,
        constant: 2 << 20,
    },
    // A rendering may use 16 MiB and 64 bytes for each byte of the request by its own limits.
    Target {
        name: "template",
        files: seeds::template,
        mutate: mutate::template,
        load: targets::template,
        constant: 20 << 20,
    },
];

/// What a run has found.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    /// Executions.
    pub(crate) executions: u64,
    /// Those of which a model came.
    pub(crate) accepted: u64,
    /// Those that panicked or took too much.
    pub(crate) failures: u64,
    /// The most memory that one took beyond twice its file.
    pub(crate) largest_excess: isize,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { executions, accepted, failures, largest_excess } = self;
        write!(
            f,
            "{executions} executions, {accepted} accepted, {failures} failures, at most {} KiB beyond twice the file",
            largest_excess / 1024
        )
    }
}

/// Executions on one thread, and of one good model: the tokenizers crate keeps something of every tokenizer for as
/// long as its thread lives.
const EXECUTIONS_A_THREAD: u64 = 200;

/// Runs `count` executions of `target`; each failure is described to `report`.
pub(crate) fn run(target: &Target, seed: u64, count: u64, mut report: impl FnMut(String) + Send) -> Summary {
    let folder = scratch(target.name);
    let mut summary = Summary { largest_excess: isize::MIN, ..Summary::default() };
    for (turn, first) in (0..count).step_by(EXECUTIONS_A_THREAD as usize).enumerate() {
        let files = (target.files)(turn);
        for (name, bytes) in &files {
            std::fs::write(folder.join(name), bytes).expect("the scratch folder can be written");
        }
        assert!((target.load)(&folder), "{}: good files, number {turn}, are refused", target.name);
        let (name, good) = &files[0];
        let path = folder.join(name);
        let mut execute = |execution: u64| {
            let mut random = Random::new(seed, execution);
            let bytes = (target.mutate)(good, &mut random);
            std::fs::write(&path, &bytes).expect("the scratch folder can be written");
            let mut outcome = Ok(false);
            let load = || outcome = catch_unwind(AssertUnwindSafe(|| (target.load)(&folder)));
            let peak = memory::peak_of(load);
            let excess = peak - 2 * bytes.len() as isize;
            summary.executions += 1;
            summary.accepted += u64::from(matches!(outcome, Ok(true)));
            summary.largest_excess = summary.largest_excess.max(excess);
            let problem = match outcome {
                Err(_) => "panics".to_owned(),
                Ok(_) if excess > target.constant as isize => {
                    format!("takes {peak} bytes for {}", bytes.len())
                }
                Ok(_) => return,
            };
            summary.failures += 1;
            let kept = folder.join(format!("failure-{seed}-{execution}"));
            std::fs::write(&kept, &bytes).expect("the scratch folder can be written");
            report(format!("{} {execution} of seed {seed} {problem}: {}", target.name, kept.display()));
        };
        let executions = first..count.min(first + EXECUTIONS_A_THREAD);
        std::thread::scope(|scope| scope.spawn(|| executions.for_each(&mut execute)).join())
            .expect("panics are caught: this is a bug");
    }
    if summary.failures == 0 {
        let _ = std::fs::remove_dir_all(&folder);
    }
    summary
}

/// A folder of this process's own, in memory where the system has that.
fn scratch(name: &str) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let folder = parent.join(format!("tandem-fuzz-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a scratch folder can be made");
    folder
}
