//! The tensors of a GGUF model as a [`WeightStore`]: one file, or the parts that a large model is
//! split into (`name-00001-of-00003.gguf`), opened by any one of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::GgufFile;
use crate::ModelError;
use crate::weights::{TensorView, WeightStore};

/// Published models have up to a few hundred parts.
const MAX_PARTS: u64 = 1 << 12;
const PART_KEY: &str = "split.no";
const NUM_PARTS_KEY: &str = "split.count";

/// All tensors of a model, under their names in the file ("blk.0.attn_q.weight").
pub struct GgufStore {
    parts: Vec<Arc<GgufFile>>,
}

impl GgufStore {
    /// The tensors of `file`, and of the other parts if it is one of several.
    ///
    /// # Errors
    /// If a part is missing or damaged, or two parts have a tensor of one name.
    pub fn open(file: Arc<GgufFile>) -> Result<Self, ModelError> {
        let num_parts = file.u64(NUM_PARTS_KEY)?.unwrap_or(1);
        if num_parts <= 1 {
            return Ok(GgufStore { parts: vec![file] });
        }
        if num_parts > MAX_PARTS {
            return Err(file.wrong(NUM_PARTS_KEY, &format!("at most {MAX_PARTS}")));
        }
        let mut parts: Vec<Arc<GgufFile>> = Vec::new();
        for number in 0..num_parts {
            let path = part_path(file.path(), number, num_parts)?;
            let part = if path == file.path() { Arc::clone(&file) } else { Arc::new(GgufFile::open(&path)?) };
            if part.u64(PART_KEY)? != Some(number) {
                return Err(part.wrong(PART_KEY, &format!("{number}, as its name says")));
            }
            for name in part.tensor_names() {
                if let Some(other) = parts.iter().find(|other| other.has_tensor(name)) {
                    let other = other.path().display();
                    return Err(part.error(format!("tensor `{name}` is also in {other}")));
                }
            }
            parts.push(part);
        }
        Ok(GgufStore { parts })
    }

    fn holding(&self, name: &str) -> Option<&GgufFile> {
        self.parts.iter().map(Arc::as_ref).find(|part| part.has_tensor(name))
    }
}

/// Opens the first part of the model that `path` is a part of: it alone has the metadata.
///
/// # Errors
/// As [`GgufFile::open`].
pub fn open_first_part(path: &Path) -> Result<GgufFile, ModelError> {
    let file = GgufFile::open(path)?;
    let num_parts = file.u64(NUM_PARTS_KEY)?.unwrap_or(1);
    match file.u64(PART_KEY)? {
        None | Some(0) => Ok(file),
        Some(_) => GgufFile::open(&part_path(path, 0, num_parts)?),
    }
}

/// True if `path` is named like a part of a model that is not the first.
pub fn is_later_part(path: &Path) -> bool {
    let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let number = name.rsplit_once("-of-").and_then(|(rest, total)| {
        let (_, number) = rest.rsplit_once('-')?;
        (number.len() == 5 && total.len() == 5 && total.parse::<u32>().is_ok()).then_some(number)
    });
    number.and_then(|number| number.parse().ok()).is_some_and(|number: u32| number > 1)
}

/// The file of part `number`, counted from 0; names count from 1.
fn part_path(any: &Path, number: u64, num_parts: u64) -> Result<PathBuf, ModelError> {
    let ending = format!("-of-{num_parts:05}.gguf");
    let name = any.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let stem = name.strip_suffix(&ending).and_then(|rest| rest.rsplit_once('-')).map(|(stem, _)| stem);
    match stem {
        Some(stem) => Ok(any.with_file_name(format!("{stem}-{:05}{ending}", number + 1))),
        None => Err(ModelError::weights(
            any,
            format!("is one of {num_parts} parts of a model; wanted a name like model-00001{ending}"),
        )),
    }
}

impl WeightStore for GgufStore {
    fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        match self.holding(name).map(|part| part.tensor(name)).transpose()?.flatten() {
            Some(view) => Ok(view),
            None => Err(ModelError::MissingTensor {
                path: self.parts[0].path().to_owned(),
                name: name.to_owned(),
                num_tensors: self.parts.iter().map(|part| part.tensor_names().len()).sum(),
            }),
        }
    }

    fn release(&self) {
        self.parts.iter().for_each(|part| part.release());
    }

    fn contains(&self, name: &str) -> bool {
        self.holding(name).is_some()
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> =
            self.parts.iter().flat_map(|part| part.tensor_names()).map(str::to_owned).collect();
        names.sort_unstable();
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_by_any_ones_name() {
        let path = part_path(Path::new("/m/big-q4-00002-of-00003.gguf"), 0, 3).unwrap();
        assert_eq!(path, Path::new("/m/big-q4-00001-of-00003.gguf"));
        let error = part_path(Path::new("/m/big.gguf"), 0, 3).unwrap_err().to_string();
        assert!(error.contains("big.gguf") && error.contains("-of-00003.gguf"), "{error}");
        assert!(is_later_part(Path::new("m-00002-of-00003.gguf")));
        for first in ["m-00001-of-00003.gguf", "m.gguf", "m-2-of-3.gguf"] {
            assert!(!is_later_part(Path::new(first)), "{first}");
        }
    }
}
