//! What `--draft` names: a model, or a head that drafts from the target's own hidden states.

use std::path::PathBuf;

use tandem_models::{Checkpoint, Head, HubOptions, ModelError, RopeOverride};

/// The name of the layer for multi-token prediction that a target carries. (A folder of that name is `./mtp`.)
const MTP: &str = "mtp";

/// What drafts for the deep lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Drafter {
    /// A model, which answers the fast lane too.
    Model(PathBuf),
    /// A head, which answers nobody by itself.
    Head(HeadPlace),
}

/// Where a head is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HeadPlace {
    /// In a folder of its own: an EAGLE-3 head.
    Folder(PathBuf),
    /// In the target's files: its layer for multi-token prediction.
    Target,
}

impl Drafter {
    /// What the setting's value names.
    ///
    /// # Errors
    /// As [`tandem_models::resolve`].
    pub(crate) fn find(spec: &str, options: &HubOptions) -> Result<Self, ModelError> {
        if spec == MTP {
            return Ok(Drafter::Head(HeadPlace::Target));
        }
        let path = tandem_models::resolve(spec, options)?;
        Ok(if Head::is_in(&path) { Drafter::Head(HeadPlace::Folder(path)) } else { Drafter::Model(path) })
    }
}

impl HeadPlace {
    /// The head, checked against its target. `rope` is what one in a folder of its own has for a rotary scaling
    /// instead of its files'; a target's layer has the target's, and there is none to give it.
    ///
    /// # Errors
    /// If there is none, or it is another target's.
    pub(crate) fn open(&self, target: &Checkpoint, rope: Option<&RopeOverride>) -> Result<Head, ModelError> {
        let head = match self {
            HeadPlace::Folder(dir) => Head::open(dir, target, rope),
            HeadPlace::Target => Head::of_target(target),
        };
        head.map(|mut head| {
            head.checkpoint.quantize = target.quantize;
            head
        })
    }
}
