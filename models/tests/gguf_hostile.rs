//! Hostile GGUF files: whatever bytes they hold, opening one, building its tokenizer and reading its
//! tensors gives a model or an error, never a panic, and allocates in proportion to the file, not to what
//! it claims.

#[path = "../examples/fuzz/memory.rs"]
mod memory;
#[allow(dead_code, reason = "the fuzzer's other targets need the rest")]
#[path = "../examples/fuzz/seeds.rs"]
mod seeds;

use std::path::Path;

use memory::peak_of;
use tandem_models::weights::gguf::GgufFile;
use tandem_models::{Checkpoint, Tokenizer};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// A small file with every part that readers look at; without a layer, so that it is quick to go through.
fn good_file() -> Vec<u8> {
    seeds::gguf_with(Vec::new())
}

/// Reads all that can be read of `path`.
fn read_all(path: &Path) -> Result<(), String> {
    let file = GgufFile::open(path).map_err(|error| error.to_string())?;
    for key in file.keys() {
        let _ = format!("{:?}", file.get(key)).len();
    }
    for name in file.tensor_names() {
        if let Ok(Some(view)) = file.tensor(name) {
            assert_eq!(Some(view.data.len()), view.dtype.bytes_for(view.num_elements()));
            assert_eq!(view.to_f32().len(), view.num_elements());
        }
    }
    drop(file);
    Checkpoint::open(path).map_err(|error| error.to_string())?;
    let tokenizer = Tokenizer::from_dir(path).map_err(|error| error.to_string())?;
    let ids = tokenizer.encode_text("ab a\n", true).map_err(|error| error.to_string())?;
    tokenizer.decode(&ids, false).map_err(|error| error.to_string())?;
    Ok(())
}

/// What a file of this size may cost. The fixed part is what the tokenizer's crate keeps for itself.
fn allowed(file_len: usize) -> isize {
    (64 * file_len + (4 << 20)) as isize
}

fn check(path: &Path, bytes: &[u8], what: &str) -> bool {
    std::fs::write(path, bytes).unwrap();
    let peak = peak_of(|| drop(GgufFile::open(path)));
    assert!(peak <= (2 * bytes.len() + (16 << 10)) as isize, "{what}: {peak} bytes to open {}", bytes.len());
    let mut good = false;
    let peak = peak_of(|| good = read_all(path).is_ok());
    assert!(peak <= allowed(bytes.len()), "{what}: {peak} bytes for a file of {}", bytes.len());
    good
}

#[test]
fn the_untouched_file_is_good() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("good.gguf");
    std::fs::write(&path, good_file()).unwrap();
    read_all(&path).unwrap();
}

#[test]
fn every_truncation_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.gguf");
    let file = good_file();
    for len in 0..file.len() {
        assert!(!check(&path, &file[..len], "truncated"), "{len} of {} bytes pass for a model", file.len());
    }
}

#[test]
fn changed_bytes_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.gguf");
    let file = good_file();
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % below as u64) as usize
    };
    for round in 0..6000 {
        let mut bytes = file.clone();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            bytes[at] = match random(4) {
                0 => 0,
                1 => 0xFF,
                2 => bytes[at] ^ 1 << random(8),
                _ => random(256) as u8,
            };
        }
        check(&path, &bytes, &format!("round {round}"));
    }
}

#[test]
fn giant_numbers_anywhere_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("giant.gguf");
    let file = good_file();
    for number in [u64::MAX, 1 << 63, 1 << 40, u64::from(u32::MAX), 1 << 31] {
        for at in 4..file.len() - 8 {
            let mut bytes = file.clone();
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            check(&path, &bytes, &format!("{number} at {at}"));
        }
    }
}

#[test]
fn errors_name_the_file_what_is_wrong_and_what_is_wanted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.gguf");
    let file = good_file();
    let message = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        GgufFile::open(&path).unwrap_err().to_string()
    };
    let with = |at: usize, new: &[u8]| {
        let mut bytes = file.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        bytes
    };
    let place = |text: &str| file.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
    let norm = place("output_norm.weight") + "output_norm.weight".len();
    let cases = [
        (with(0, b"GGML"), "no GGUF file"),
        (with(4, &1u32.to_le_bytes()), "version 1; wanted 2 or 3"),
        (with(4, &3u32.to_be_bytes()), "big-endian"),
        (with(8, &u64::MAX.to_le_bytes()), "tensors; wanted at most"),
        (with(16, &(1u64 << 40).to_le_bytes()), "metadata keys; wanted at most"),
        (with(norm, &9u32.to_le_bytes()), "tensor `output_norm.weight` 9 dimensions; wanted at most 4"),
        (with(norm + 4, &(1u64 << 62).to_le_bytes()), "whose size overflows"),
        (with(norm + 4, &0u64.to_le_bytes()), "wanted no extent of 0"),
        (with(norm + 16, &7u64.to_le_bytes()), "multiple of the alignment 32"),
        (file[..file.len() - 4].to_vec(), "truncated or damaged"),
        (file[..60].to_vec(), "bytes are wanted at byte"),
    ];
    for (bytes, wanted) in cases {
        let message = message(&bytes);
        assert!(message.contains(wanted) && message.contains("bad.gguf"), "{message} lacks {wanted}");
    }
}
