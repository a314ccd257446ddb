//! One GGUF file into another of a different kind: metadata copied, tensors encoded anew, some rows at a
//! time, so that a model of any size needs little memory.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use super::{FileType, GgufBuilder, GgufStore, GgufWriter, Place, open_first_part};
use crate::ModelError;
use crate::weights::quantize::reencode;
use crate::weights::{Dtype, TensorView, WeightStore};

/// Elements widened at a time.
const CHUNK_ELEMENTS: usize = 1 << 24;
/// Keys that speak of the file and not of the model.
const OF_THE_FILE: [&str; 5] =
    ["general.alignment", "general.file_type", "split.no", "split.count", "split.tensors.count"];

/// Writes the model in `input`, which may be one of several parts, to `out` as a file of the given kind.
/// Returns the bytes of the tensors before and after.
///
/// # Errors
/// If `input` is damaged or quantised already (quantising twice loses more than the format says), or if
/// `out` fails.
pub fn convert(input: &Path, kind: FileType, out: impl Write) -> Result<(u64, u64), ConvertError> {
    let file = Arc::new(open_first_part(input)?);
    let weights = GgufStore::open(Arc::clone(&file))?;
    let mut builder = GgufBuilder::new();
    for key in file.keys().into_iter().filter(|key| !OF_THE_FILE.contains(key)) {
        builder.copy(&file, key);
    }
    builder.u32("general.file_type", kind.id());
    let names = weights.names();
    let num_layers = num_layers(&names);
    let tied = !weights.contains("output.weight");
    let (mut before, mut after) = (0, 0);
    let mut plan = Vec::new();
    for name in &names {
        let view = weights.tensor(name)?;
        // Vectors stay what they are.
        let dtype = match view.shape.len() {
            0 | 1 => view.dtype,
            _ => kind.dtype_of(Place { name, shape: view.shape, num_layers, tied }),
        };
        if dtype != view.dtype && matches!(view.dtype, Dtype::Quantized(_)) {
            let found = view.dtype.name();
            return Err(ConvertError::Model(ModelError::weights(
                input,
                format!(
                    "tensor `{name}` is {found} already; wanted a file in F32, F16 or BF16 to start from"
                ),
            )));
        }
        builder.tensor(name, dtype, view.shape);
        before += view.data.len() as u64;
        after += dtype.bytes_for(view.num_elements()).unwrap_or(0) as u64;
        plan.push(dtype);
    }
    let mut writer = builder.begin(out)?;
    for (name, dtype) in names.iter().zip(plan) {
        let view = weights.tensor(name)?;
        write_as(&mut writer, &view, dtype)?;
    }
    writer.finish()?;
    Ok((before, after))
}

/// Why a file was not converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The input cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The output failed.
    #[error("cannot write: {0}")]
    Io(#[from] io::Error),
}

fn num_layers(names: &[String]) -> usize {
    let layer = |name: &String| name.strip_prefix("blk.")?.split('.').next()?.parse::<usize>().ok();
    names.iter().filter_map(layer).max().map_or(0, |last| last.saturating_add(1))
}

/// Writes the elements of `view` as `dtype`, some whole rows at a time.
pub(crate) fn write_as(
    writer: &mut GgufWriter<impl Write>,
    view: &TensorView<'_>,
    dtype: Dtype,
) -> io::Result<()> {
    if dtype == view.dtype {
        return writer.write(view.data);
    }
    let row = view.shape.last().copied().unwrap_or(1);
    let row_bytes = view.dtype.bytes_for(row).unwrap_or(1).max(1);
    for data in view.data.chunks((CHUNK_ELEMENTS / row.max(1)).max(1) * row_bytes) {
        let shape = [data.len() / row_bytes, row];
        writer.write(&reencode(&TensorView { dtype: view.dtype, shape: &shape, data }, dtype))?;
    }
    Ok(())
}
