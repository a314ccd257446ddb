//! The models that are to run: where they are, whether they fit together, and their weights.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use tandem::http::LaneModel;
use tandem_kernels::ThreadPool;
use tandem_models::{
    BackendKind, ChatTemplate, Checkpoint, Dtype, FileType, FimTokens, Head, HubOptions, KvType, Model,
    RopeOverride, Tokenizer, VocabMap, WeightMemory,
};

use super::{HeadInfo, ModelInfo};
use crate::config::Config;
use crate::drafter::{Drafter, HeadPlace};

const HEAD_ALONE: &str = "--draft names a head, which drafts from the hidden states of a target and answers nobody by \
                          itself; name its target with --target";

const MTP_SCALED: &str = "--draft-rope-scaling is set and --draft is mtp, a layer of the target, which has the target's \
                          rotary scaling; set --rope-scaling for both and leave --draft-rope-scaling out";

/// What is to be loaded; at least one of the two models is there.
pub(super) struct OpenedPair {
    pub(super) target: Option<Opened>,
    pub(super) draft: Option<Opened>,
    /// For a draft of another vocabulary.
    pub(super) vocab_map: Option<Arc<VocabMap>>,
}

impl OpenedPair {
    /// Finds and opens what `config` names, and checks that it fits together. Before the weights: a wrong pair
    /// should not cost the minutes that large ones take.
    pub(super) fn open(config: &Config) -> anyhow::Result<Self> {
        let (target_dir, drafter) = find_pair(config)?;
        let (draft_dir, head) = match drafter {
            None => (None, None),
            Some(Drafter::Model(dir)) => (Some(dir), None),
            Some(Drafter::Head(place)) => (None, Some(place)),
        };
        if head == Some(HeadPlace::Target) && config.draft_rope_scaling.is_some() {
            bail!(MTP_SCALED);
        }
        let target = target_dir.map(|dir| (dir, config.rope_scaling.as_ref()));
        let draft_scaling = config.draft_rope_scaling.as_ref().unwrap_or(&config.rope_scaling);
        let draft = draft_dir.map(|dir| (dir, draft_scaling.as_ref()));
        let open = |(dir, rope): (PathBuf, Option<&RopeOverride>)| Opened::open(&dir, config.quantize, rope);
        let (mut target, draft) = side_by_side(target, draft, open)?;
        if let Some(place) = head {
            target.as_mut().context(HEAD_ALONE)?.add_head(&place, draft_scaling.as_ref())?;
        }
        let vocab_map = match (&target, &draft) {
            (Some(target), Some(draft)) => tandem_models::check_pair(
                (&target.checkpoint, &target.text.tokenizer),
                (&draft.checkpoint, &draft.text.tokenizer),
            )?
            .map(Arc::new),
            _ => None,
        };
        if let Some(map) = &vocab_map {
            tracing::warn!(
                "target and draft have different vocabularies: the draft proposes the {} of its {} tokens that \
                 the target has too, and each lane reads and writes its own model's; `tandem pair` says more",
                map.num_shared(),
                map.num_draft_ids()
            );
        }
        Ok(OpenedPair { target, draft, vocab_map })
    }
}

/// One model, loaded.
pub(super) struct Loaded {
    pub(super) model: Box<dyn Model>,
    pub(super) info: ModelInfo,
    pub(super) head: Option<HeadInfo>,
    pub(super) text: LaneModel,
}

/// A model folder read as far as text goes; the weights are mapped and not yet loaded.
pub(super) struct Opened {
    checkpoint: Checkpoint,
    /// What is to draft from its hidden states.
    head: Option<Head>,
    text: LaneModel,
    rope_scaling: Option<RopeOverride>,
}

impl Opened {
    fn open(dir: &Path, quantize: Option<FileType>, rope: Option<&RopeOverride>) -> anyhow::Result<Self> {
        let mut checkpoint = Checkpoint::open_with(dir, rope)?;
        checkpoint.quantize = quantize;
        checkpoint.name = display_name(&checkpoint);
        let tokenizer = Arc::new(Tokenizer::from_dir(dir)?);
        let chat_template = ChatTemplate::from_dir(dir, &tokenizer)?.map(Arc::new);
        let fim = FimTokens::from_dir(dir, &tokenizer)?;
        let text = LaneModel {
            name: checkpoint.name.clone(),
            tokenizer,
            chat_template,
            fim,
            generation: checkpoint.generation.clone(),
        };
        Ok(Opened { checkpoint, head: None, text, rope_scaling: rope.cloned() })
    }

    /// Before the weights: a wrong head should not cost the minutes that large ones take.
    fn add_head(&mut self, place: &HeadPlace, rope: Option<&RopeOverride>) -> anyhow::Result<()> {
        self.head = Some(place.open(&self.checkpoint, rope)?);
        Ok(())
    }

    pub(super) fn load(
        self,
        backend: BackendKind,
        kv_type: KvType,
        pool: &Arc<ThreadPool>,
    ) -> anyhow::Result<Loaded> {
        let pool = Arc::clone(pool);
        let mut model = match &self.head {
            None => tandem_models::load_with(&self.checkpoint, backend, kv_type, pool),
            Some(head) => tandem_models::load_with_head(&self.checkpoint, head, backend, kv_type, pool),
        }
        .with_context(|| format!("cannot load {}", self.checkpoint.name))?;
        let memory = model.weight_memory();
        if let Some(note) = self.checkpoint.repacking(&memory) {
            tracing::info!("{}: {note}", self.checkpoint.name);
        }
        let info = ModelInfo { rope_scaling: self.rope_scaling, ..describe(&self.checkpoint, &memory) };
        let head = self.head.as_ref().zip(model.drafting_head()).map(|(head, model)| HeadInfo {
            kind: head.kind,
            info: describe(&head.checkpoint, &model.weight_memory()),
            has_own_outputs: head.to_target.is_some(),
        });
        Ok(Loaded { model, info, head, text: self.text })
    }
}

/// Runs `work` for both models at the same time.
pub(super) fn side_by_side<T: Send, U: Send>(
    target: Option<T>,
    draft: Option<T>,
    work: impl Fn(T) -> anyhow::Result<U> + Sync,
) -> anyhow::Result<(Option<U>, Option<U>)> {
    std::thread::scope(|scope| {
        let draft = draft.map(|draft| scope.spawn(|| work(draft)));
        let target = target.map(&work).transpose();
        let draft =
            draft.map(|thread| thread.join().expect("loading does not panic: this is a bug")).transpose();
        Ok((target?, draft?))
    })
}

/// The checkpoint's own name, with its parent's where that says more: pairs often lie in
/// `NAME/target` and `NAME/draft`.
fn display_name(checkpoint: &Checkpoint) -> String {
    let parent = || {
        let full = std::path::absolute(&checkpoint.dir).ok()?;
        Some(full.parent()?.file_name()?.to_str()?.to_owned())
    };
    match (checkpoint.name.as_str(), parent()) {
        ("target" | "draft", Some(parent)) => format!("{parent}/{}", checkpoint.name),
        (name, _) => name.to_owned(),
    }
}

fn describe(checkpoint: &Checkpoint, memory: &WeightMemory) -> ModelInfo {
    ModelInfo {
        name: checkpoint.name.clone(),
        dir: checkpoint.dir.clone(),
        num_parameters: memory.num_parameters(),
        size_bytes: memory.size_bytes(),
        dtype: memory.main_type().unwrap_or(Dtype::F32),
        rope_scaling: None,
    }
}

/// The target's folder, and what drafts; at least one is there.
fn find_pair(config: &Config) -> anyhow::Result<(Option<PathBuf>, Option<Drafter>)> {
    if config.target.is_none() && config.draft.is_none() {
        let demo = find_demo_pair()?;
        return Ok((Some(demo.join("target")), Some(Drafter::Model(demo.join("draft")))));
    }
    let options = HubOptions::from_env();
    let target = config.target.as_deref().map(|spec| tandem_models::resolve(spec, &options)).transpose()?;
    let drafter = config.draft.as_deref().map(|spec| Drafter::find(spec, &options)).transpose()?;
    Ok((target, drafter))
}

/// The folder of the pair that is shipped with Tandem.
///
/// # Errors
/// Names the folders that were looked at and says how to name models.
pub(crate) fn find_demo_pair() -> anyhow::Result<PathBuf> {
    let candidates = demo_candidates(std::env::current_exe().ok().as_deref());
    match candidates.iter().find(|folder| is_pair(folder)) {
        Some(folder) => Ok(folder.clone()),
        None => {
            let looked_at: String =
                candidates.iter().map(|folder| format!("\n  {}", folder.display())).collect();
            bail!(
                "no model was named and the demo pair is in none of these folders:{looked_at}\n\
                 Name a pair with --target FOLDER --draft FOLDER (or hub ids such as \
                 Qwen/Qwen2.5-Coder-7B-Instruct), or one model alone with either of the two."
            )
        }
    }
}

fn is_pair(folder: &Path) -> bool {
    ["target", "draft"].iter().all(|role| folder.join(role).join("config.json").is_file())
}

/// Where the demo pair may lie: the working directory, beside the binary, where packages put it, and
/// the source tree that the binary was built from.
fn demo_candidates(executable: Option<&Path>) -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from("models/demo")];
    if let Some(beside) = executable.and_then(Path::parent) {
        folders.push(beside.join("models/demo"));
        folders.push(beside.join("../share/tandem/demo"));
    }
    folders.extend(Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(|tree| tree.join("models/demo")));
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_pair_is_looked_for_where_it_may_lie() {
        let folders = demo_candidates(Some(Path::new("/opt/tandem/bin/tandem")));
        assert_eq!(folders[0], Path::new("models/demo"));
        assert_eq!(folders[1], Path::new("/opt/tandem/bin/models/demo"));
        assert_eq!(folders[2], Path::new("/opt/tandem/bin/../share/tandem/demo"));
        assert!(folders[3].is_absolute() && folders[3].ends_with("models/demo"));
    }
}
