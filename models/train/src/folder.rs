//! The output folder of a run: may it be written to, its checkpoint, files that appear whole or not
//! at all.
//!
//! `training.json` marks a folder as ours. `state.safetensors` holds weights, optimiser moments and
//! the step of an unfinished run, and is removed when the run ends.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Map, Value, json};

use crate::model::Decoder;
use crate::optim::Optimizer;
use crate::{RunOptions, TrainError};

const MARKER: &str = "training.json";
const STATE: &str = "state.safetensors";
const METADATA: &str = "tandem";
pub(crate) const TOKENIZER: &str = "tokenizer.json";

/// An output folder that this run may write to.
pub(crate) struct RunFolder {
    dir: PathBuf,
    resume: bool,
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Progress {
    /// Steps done.
    pub(crate) step: u64,
    /// Running mean of the loss.
    pub(crate) loss: f32,
}

impl RunFolder {
    /// Makes the folder, or checks that it is ours and that resuming was asked for where it holds an
    /// unfinished run.
    pub(crate) fn open(dir: &Path, run: &RunOptions) -> Result<Self, TrainError> {
        fs::create_dir_all(dir).map_err(TrainError::io(dir))?;
        let empty = fs::read_dir(dir).map_err(TrainError::io(dir))?.next().is_none();
        let marker = dir.join(MARKER);
        if !empty && !is_marker(&marker) {
            return Err(TrainError::ForeignOutput { dir: dir.to_owned() });
        }
        let unfinished = dir.join(STATE).is_file();
        let finished = dir.join("model.safetensors").is_file() && !unfinished;
        if unfinished && !run.resume {
            return Err(TrainError::OutputExists { dir: dir.to_owned() });
        }
        if finished && run.resume {
            return Err(TrainError::Finished { dir: dir.to_owned() });
        }
        let folder = Self { dir: dir.to_owned(), resume: unfinished };
        let text =
            format!("{:#}\n", json!({ "trainer": "tandem-train", "version": env!("CARGO_PKG_VERSION") }));
        folder.write(MARKER, text.as_bytes())?;
        Ok(folder)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// True where a checkpoint is to be continued.
    pub(crate) fn resumes(&self) -> bool {
        self.resume
    }

    /// Writes a file under a temporary name and moves it into place.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), TrainError> {
        let path = self.dir.join(name);
        let temporary = self.dir.join(format!(".{name}.partial"));
        let written = File::create(&temporary).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
        if let Err(error) = written {
            // On a full disk the half-written file is the first thing to go.
            let _ = fs::remove_file(&temporary);
            return Err(TrainError::io(&temporary)(error));
        }
        fs::rename(&temporary, &path).map_err(TrainError::io(&path))
    }

    /// Saves everything the next step depends on.
    pub(crate) fn save(
        &self,
        decoder: &Decoder,
        optimizer: &Optimizer,
        progress: Progress,
        fingerprint: &Map<String, Value>,
    ) -> Result<(), TrainError> {
        let mut tensors = Vec::new();
        for (parameter, state) in decoder.parameters.iter().zip(&optimizer.states) {
            let weights = parameter.var.flatten_all()?.to_vec1::<f32>()?;
            for (part, values) in [("model", &weights), ("first", &state.first), ("second", &state.second)] {
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                tensors.push((format!("{part}.{}", parameter.name), values.len(), bytes));
            }
        }
        let views = tensors
            .iter()
            .map(|(name, count, bytes)| {
                Ok((name.as_str(), TensorView::new(Dtype::F32, vec![*count], bytes)?))
            })
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
        // The loss goes as bits: a decimal would be enough, but this cannot be wrong.
        let metadata =
            json!({ "step": progress.step, "loss_bits": progress.loss.to_bits(), "options": fingerprint });
        let metadata = HashMap::from([(METADATA.to_owned(), metadata.to_string())]);
        let bytes = views
            .and_then(|views| safetensors::serialize(views, Some(metadata)))
            .map_err(|error| self.broken(error.to_string()))?;
        self.write(STATE, &bytes)
    }

    /// Restores a saved run.
    ///
    /// # Errors
    /// [`TrainError::Mismatch`] where it was made with other options.
    pub(crate) fn restore(
        &self,
        decoder: &Decoder,
        optimizer: &mut Optimizer,
        fingerprint: &Map<String, Value>,
    ) -> Result<Progress, TrainError> {
        let path = self.dir.join(STATE);
        let bytes = fs::read(&path).map_err(TrainError::io(&path))?;
        let (_, header) =
            SafeTensors::read_metadata(&bytes).map_err(|error| self.broken(error.to_string()))?;
        let metadata: Value = header
            .metadata()
            .as_ref()
            .and_then(|metadata| serde_json::from_str(metadata.get(METADATA)?).ok())
            .ok_or_else(|| self.broken("has no record of its run".into()))?;
        for (key, wanted) in fingerprint {
            let found = &metadata["options"][key];
            if found != wanted {
                let (found, wanted) = (found.to_string(), wanted.to_string());
                return Err(TrainError::Mismatch { path, key: key.clone(), found, wanted });
            }
        }
        let store = SafeTensors::deserialize(&bytes).map_err(|error| self.broken(error.to_string()))?;
        let read = |name: String, count: usize| -> Result<Vec<f32>, TrainError> {
            let view = store.tensor(&name).map_err(|error| self.broken(format!("{name}: {error}")))?;
            let (chunks, rest) = view.data().as_chunks::<4>();
            if view.dtype() != Dtype::F32 || chunks.len() != count || !rest.is_empty() {
                return Err(self.broken(format!("{name} holds {} numbers; wanted {count}", chunks.len())));
            }
            Ok(chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        };
        for (parameter, state) in decoder.parameters.iter().zip(&mut optimizer.states) {
            let weights = read(format!("model.{}", parameter.name), parameter.var.elem_count())?;
            parameter.var.set(&Tensor::from_vec(weights, parameter.var.shape(), &Device::Cpu)?)?;
            state.first = read(format!("first.{}", parameter.name), state.first.len())?;
            state.second = read(format!("second.{}", parameter.name), state.second.len())?;
        }
        let number =
            |key: &str| metadata[key].as_u64().ok_or_else(|| self.broken(format!("{key} is missing")));
        let step = number("step")?;
        optimizer.steps = step;
        Ok(Progress { step, loss: f32::from_bits(number("loss_bits")? as u32) })
    }

    /// Removes the checkpoint of a run that is complete.
    pub(crate) fn finish(&self) -> Result<(), TrainError> {
        let path = self.dir.join(STATE);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(TrainError::io(&path)(error)),
            _ => Ok(()),
        }
    }

    fn broken(&self, problem: String) -> TrainError {
        TrainError::Checkpoint { path: self.dir.join(STATE), problem }
    }
}

fn is_marker(path: &Path) -> bool {
    let text = fs::read_to_string(path).unwrap_or_default();
    serde_json::from_str::<Value>(&text).is_ok_and(|marker| marker["trainer"] == "tandem-train")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_folders_are_written_to() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::write(dir.path().join("thesis.tex"), "years of work").expect("write");
        let open = |resume| RunFolder::open(dir.path(), &RunOptions { resume, ..Default::default() });
        assert!(matches!(open(false), Err(TrainError::ForeignOutput { .. })));
        fs::remove_file(dir.path().join("thesis.tex")).expect("remove");
        assert!(!open(false).expect("empty").resumes());
        fs::write(dir.path().join(STATE), "state").expect("write");
        assert!(matches!(open(false), Err(TrainError::OutputExists { .. })));
        assert!(open(true).expect("resume").resumes());
        fs::remove_file(dir.path().join(STATE)).expect("remove");
        fs::write(dir.path().join("model.safetensors"), "weights").expect("write");
        assert!(matches!(open(true), Err(TrainError::Finished { .. })));
        assert!(!open(false).expect("again").resumes());
    }
}
