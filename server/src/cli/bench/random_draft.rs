//! A draft that is good for nothing: another draft's folder with every weight replaced by noise. It
//! costs what the real one costs and is right only by chance.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::Value;

/// The folder of a random draft; gone when dropped.
pub(super) struct RandomDraft {
    dir: PathBuf,
}

impl RandomDraft {
    /// Of the same shape and vocabulary as the checkpoint in `real`.
    ///
    /// # Errors
    /// If a file cannot be read or written, or its weights are no safetensors.
    pub(super) fn like(real: &Path, seed: u64) -> anyhow::Result<Self> {
        let dir = std::env::temp_dir().join(format!("tandem-random-draft-{:016x}", rand::random::<u64>()));
        std::fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let draft = RandomDraft { dir };
        let mut rng = StdRng::seed_from_u64(seed);
        let mut paths: Vec<PathBuf> = Vec::new();
        for entry in std::fs::read_dir(real).with_context(|| format!("cannot read {}", real.display()))? {
            paths.push(entry?.path());
        }
        // A folder lists its files in any order; the noise should not depend on it.
        paths.sort();
        for path in paths.iter().filter(|path| path.is_file()) {
            let Some(name) = path.file_name() else { continue };
            let mut bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                randomise(&mut bytes, &mut rng).with_context(|| path.display().to_string())?;
            }
            let copy = draft.dir.join(name);
            std::fs::write(&copy, bytes).with_context(|| format!("cannot write {}", copy.display()))?;
        }
        Ok(draft)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for RandomDraft {
    fn drop(&mut self) {
        // A temporary folder that stays is no fault of the measurement.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Replaces the floating-point tensors of a safetensors file: an eight-byte length, a JSON header with
/// types and offsets, the data.
fn randomise(file: &mut [u8], rng: &mut StdRng) -> anyhow::Result<()> {
    const DAMAGED: &str = "the header is damaged";
    let (length, rest) = file.split_first_chunk_mut::<8>().context(DAMAGED)?;
    let length = usize::try_from(u64::from_le_bytes(*length))?;
    let (header, data) = rest.split_at_mut_checked(length).context(DAMAGED)?;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(header).context(DAMAGED)?;
    for tensor in header.iter().filter(|(name, _)| *name != "__metadata__").map(|(_, tensor)| tensor) {
        let offset =
            |index: usize| tensor["data_offsets"][index].as_u64().and_then(|n| usize::try_from(n).ok());
        let range: Range<usize> = offset(0).context(DAMAGED)?..offset(1).context(DAMAGED)?;
        let data = data.get_mut(range).context(DAMAGED)?;
        ensure!(tensor["dtype"].is_string(), DAMAGED);
        match tensor["dtype"].as_str() {
            Some("BF16") => fill(data, |noise| ((noise.to_bits() >> 16) as u16).to_le_bytes(), rng),
            Some("F32") => fill(data, f32::to_le_bytes, rng),
            Some("F16") => fill(data, |noise| to_f16(noise).to_le_bytes(), rng),
            // Buffers of integers are no weights.
            _ => {}
        }
    }
    Ok(())
}

/// Noise of either sign and a magnitude from 1/8 to 1/2, which is a normal number in every format.
fn fill<const N: usize>(data: &mut [u8], encode: impl Fn(f32) -> [u8; N], rng: &mut StdRng) {
    for element in data.chunks_exact_mut(N) {
        let magnitude: f32 = rng.random_range(0.125..0.5);
        element.copy_from_slice(&encode(if rng.random() { magnitude } else { -magnitude }));
    }
}

/// Truncates to half precision; only for numbers that are normal there.
fn to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let exponent = (bits >> 23 & 0xFF) + 15 - 127;
    (bits >> 16 & 0x8000 | exponent << 10 | bits >> 13 & 0x3FF) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_of_normal_numbers() {
        for (value, bits) in [(0.125, 0x3000), (-0.25, 0xB400), (0.375, 0x3600), (0.499_755_86, 0x37FF)] {
            assert_eq!(to_f16(value), bits, "{value}");
        }
    }

    #[test]
    fn weights_become_noise_and_all_else_stays() {
        let header = r#"{"__metadata__": {"format": "pt"},
            "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
            "ids": {"dtype": "I32", "shape": [1], "data_offsets": [4, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.bytes());
        let start = file.len();
        file.extend([0; 12]);
        let before = file.clone();
        randomise(&mut file, &mut StdRng::seed_from_u64(1)).expect("a sound file");
        assert_eq!(file[..start], before[..start]);
        assert_eq!(file[start + 4..start + 8], [0; 4]);
        let float = f32::from_le_bytes(file[start + 8..].try_into().expect("four bytes"));
        assert!((0.125..0.5).contains(&float.abs()), "{float}");
        assert_ne!(file[start..start + 2], file[start + 2..start + 4]);
        assert!(randomise(&mut before[..20].to_vec(), &mut StdRng::seed_from_u64(1)).is_err());
    }

    #[test]
    fn the_demo_drafts_folder_is_complete_while_it_is_needed() {
        let real = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/draft");
        let draft = RandomDraft::like(&real, 1).expect("written");
        let dir = draft.dir().to_owned();
        let size = |dir: &Path| std::fs::metadata(dir.join("model.safetensors")).expect("there").len();
        assert_eq!(size(&dir), size(&real));
        assert!(dir.join("tokenizer.json").is_file() && dir.join("config.json").is_file());
        drop(draft);
        assert!(!dir.exists());
    }
}
