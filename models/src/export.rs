//! A Hugging Face folder as a GGUF file: the configuration in GGUF's words, tensors renamed, rearranged and
//! encoded, tokenizer and chat template put in. Tensors pass through memory one at a time.
//!
//! What was written is opened again and must be the same model: where GGUF has no word for an option, the
//! result is an error and not a file that computes something else.
//! Source: llama.cpp's converter, whose files these are like.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use serde_json::Value;

use crate::config::{Experts, NormKind, QkNorm, RopeScaling};
use crate::decoder::tensors::Part;
use crate::family::gguf_write::Written;
use crate::family::{ExpertLayout, Role, WeightNames, text_options};
use crate::rope::row_order;
use crate::text::add_tokenizer;
use crate::weights::Dtype;
use crate::weights::gguf::{ConvertError, FileType, GgufBuilder, Place, write_as};
use crate::{Checkpoint, DecoderConfig, ModelError, Rope, TensorView, Tokenizer};

/// A text with what tokenizers differ in: a file's must cut it as the folder's does.
const SAMPLE: &str =
    "def naïve(x_1, y2):\n\treturn  x_1*12345 + y2 // 7   # 世界 \u{1f600}\r\n\r\n  \"It's\" DON'T";

/// Writes the checkpoint in `dir` to `path` as a file of the given kind. Matrices that the folder has in blocks
/// stay in these. Returns the bytes of the tensors before and after.
///
/// # Errors
/// If the folder is damaged, if GGUF has no word for an option of it, or if writing fails. What was written
/// then is left where it is.
pub fn to_gguf(dir: &Path, kind: FileType, path: &Path) -> Result<(u64, u64), ConvertError> {
    let checkpoint = Checkpoint::open(dir)?;
    let refuse = |reason: String| ConvertError::Model(ModelError::weights(dir, reason));
    let json = text_options(&checkpoint.json);
    let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let written = Written::find(model_type).ok_or_else(|| {
        refuse(format!("is of type {model_type:?}; GGUF files are written of {}", Written::known()))
    })?;
    let mut builder = GgufBuilder::new();
    let factors = written
        .describe(&checkpoint.config, &json, &mut builder)
        .map_err(|what| refuse(format!("has {what}, for which GGUF has no word")))?;
    builder.string("general.name", &checkpoint.name).u32("general.file_type", kind.id());
    let tokenizer = Tokenizer::from_dir(dir)?;
    add_tokenizer(dir, &tokenizer, checkpoint.config.vocab_size, &mut builder)?;
    add_ends(&checkpoint, &mut builder);

    let exporter = Exporter { checkpoint: &checkpoint, written: &written, kind };
    let items = exporter.items();
    let (mut before, mut after) = (0, 0);
    for (name, factors) in &factors {
        builder.tensor(name, Dtype::F32, &[factors.len()]);
    }
    for item in &items {
        let part = exporter.read(item)?;
        let view = part.view();
        let dtype = exporter.dtype(item, &view);
        builder.tensor(&item.name, dtype, view.shape);
        before += view.data.len() as u64;
        after += dtype.bytes_for(view.num_elements()).unwrap_or(0) as u64;
    }
    let file = File::create(path).map_err(ConvertError::Io)?;
    let mut writer = builder.begin(BufWriter::with_capacity(1 << 20, file))?;
    for (_, factors) in &factors {
        writer.write(&factors.iter().flat_map(|factor| factor.to_le_bytes()).collect::<Vec<u8>>())?;
    }
    for item in &items {
        let part = exporter.read(item)?;
        let dtype = exporter.dtype(item, &part.view());
        write_as(&mut writer, &part.view(), dtype)?;
    }
    writer.finish()?;
    check(&checkpoint, &tokenizer, &written, path)?;
    Ok((before, after))
}

/// Ends of an answer that the tokenizer's configuration does not name.
fn add_ends(checkpoint: &Checkpoint, builder: &mut GgufBuilder) {
    let ends = &checkpoint.generation.eos_token_ids;
    for (key, id) in ["eot", "eom"].into_iter().zip(ends) {
        builder.u32(&format!("tokenizer.ggml.{key}_token_id"), *id);
    }
}

/// A tensor of the file and where it comes from.
struct Item {
    name: String,
    /// Tensors of the folder; several are stacked.
    sources: Vec<String>,
    change: Change,
}

/// What is done to a tensor on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    None,
    /// Norms that the folder has less one.
    AddOffset,
    /// Rows of query or key.
    Permute,
    /// The gates (0) or ups (1) of all experts, from a tensor of both.
    Half(usize),
    /// The downs of all experts, from a tensor that may be transposed.
    Downs,
    /// Every head's way from a query to the latent, from a tensor of keys and values.
    KeysOfLatents,
    /// Every head's way from the latent to the value, from the same.
    ValuesOfLatents,
}

struct Exporter<'a> {
    checkpoint: &'a Checkpoint,
    written: &'a Written,
    kind: FileType,
}

impl Exporter<'_> {
    fn items(&self) -> Vec<Item> {
        let config = &self.checkpoint.config;
        let mut items = Vec::new();
        self.add(&mut items, Role::Embed, 0, Change::None, false);
        for layer in 0..config.num_layers {
            self.add_layer(&mut items, layer);
        }
        self.add_norm(&mut items, Role::FinalNorm, 0);
        if !config.tie_word_embeddings {
            self.add(&mut items, Role::LmHead, 0, Change::None, false);
        }
        items
    }

    fn add_layer(&self, items: &mut Vec<Item>, layer: usize) {
        let (config, names) = (&self.checkpoint.config, &self.checkpoint.names);
        let placement = config.norm_placement;
        for (role, wanted) in [
            (Role::AttnNorm, placement.has_pre()),
            (Role::AttnPostNorm, placement.has_post()),
            (Role::FfnNorm, placement.has_pre()),
            (Role::FfnPostNorm, placement.has_post()),
        ] {
            if wanted {
                self.add_norm(items, role, layer);
            }
        }
        if config.latent.is_some() {
            self.add_latent(items, layer);
        } else {
            self.add_heads(items, layer);
        }
        if config.attn_sinks {
            self.add(items, Role::Sinks, layer, Change::None, false);
        }
        self.add(items, Role::O, layer, Change::None, config.o_bias);
        match config.experts.filter(|_| !config.layer(layer).dense) {
            Some(experts) => self.add_experts(items, layer, &experts),
            None => {
                let roles: &[Role] = match config.gated {
                    true if names.has(Role::GateUp) => &[Role::GateUp, Role::Down],
                    true => &[Role::Gate, Role::Up, Role::Down],
                    false => &[Role::Up, Role::Down],
                };
                for role in roles {
                    self.add(items, *role, layer, Change::None, config.mlp_bias);
                }
            }
        }
    }

    fn add_heads(&self, items: &mut Vec<Item>, layer: usize) {
        let (config, names) = (&self.checkpoint.config, &self.checkpoint.names);
        let permute = if self.written.permuted { Change::Permute } else { Change::None };
        if names.has(Role::Qkv) {
            self.add(items, Role::Qkv, layer, Change::None, config.qkv_bias);
        } else {
            self.add(items, Role::Q, layer, permute, config.qkv_bias);
            self.add(items, Role::K, layer, permute, config.qkv_bias);
            self.add(items, Role::V, layer, Change::None, config.qkv_bias);
        }
        if config.qk_norm != QkNorm::None {
            self.add(items, Role::QNorm, layer, Change::AddOffset, false);
            self.add(items, Role::KNorm, layer, Change::AddOffset, false);
        }
    }

    fn add_latent(&self, items: &mut Vec<Item>, layer: usize) {
        let config = &self.checkpoint.config;
        if config.latent.is_some_and(|latent| latent.q_rank.is_some()) {
            self.add(items, Role::QDown, layer, Change::None, config.qkv_bias);
            self.add(items, Role::QDownNorm, layer, Change::None, false);
            self.add(items, Role::QUp, layer, Change::None, false);
        } else {
            self.add(items, Role::Q, layer, Change::None, false);
        }
        self.add(items, Role::KvDown, layer, Change::None, config.qkv_bias);
        self.add(items, Role::KvDownNorm, layer, Change::None, false);
        for (role, change) in [(Role::KUp, Change::KeysOfLatents), (Role::VUp, Change::ValuesOfLatents)] {
            let sources = vec![self.checkpoint.names.layer(Role::KvUp, layer)];
            items.push(Item { name: self.written.names.layer(role, layer), sources, change });
        }
    }

    fn add_experts(&self, items: &mut Vec<Item>, layer: usize, experts: &Experts) {
        let names = &self.checkpoint.names;
        self.add(items, Role::Router, layer, Change::None, experts.bias);
        if experts.choice_bias {
            self.add(items, Role::RouterChoiceBias, layer, Change::None, false);
        }
        if experts.shared_intermediate_size > 0 {
            for role in [Role::SharedGate, Role::SharedUp, Role::SharedDown] {
                self.add(items, role, layer, Change::None, self.checkpoint.config.mlp_bias);
            }
        }
        for (role, half) in [(Role::ExpertGate, Some(0)), (Role::ExpertUp, Some(1)), (Role::ExpertDown, None)]
        {
            let (from, change) = match half {
                Some(half) if names.has(Role::ExpertGateUp) => (Role::ExpertGateUp, Change::Half(half)),
                None if !names.is_per_expert(role) => (role, Change::Downs),
                _ => (role, Change::None),
            };
            let of = |expert: usize| names.expert(from, layer, expert);
            let count = if names.is_per_expert(from) { experts.num_experts } else { 1 };
            let name = self.written.names.layer(role, layer);
            if experts.bias {
                let sources = (0..count).map(|expert| WeightNames::bias(&of(expert))).collect();
                items.push(Item { name: WeightNames::bias(&name), sources, change });
            }
            items.push(Item { name, sources: (0..count).map(of).collect(), change });
        }
    }

    fn add_norm(&self, items: &mut Vec<Item>, role: Role, layer: usize) {
        self.add(items, role, layer, Change::AddOffset, self.checkpoint.config.norm == NormKind::Layer);
    }

    /// A tensor and its bias.
    fn add(&self, items: &mut Vec<Item>, role: Role, layer: usize, change: Change, bias: bool) {
        let source = self.checkpoint.names.layer(role, layer);
        let name = self.written.names.layer(role, layer);
        if bias {
            let change = if change == Change::AddOffset { Change::None } else { change };
            let sources = vec![WeightNames::bias(&source)];
            items.push(Item { name: WeightNames::bias(&name), sources, change });
        }
        items.push(Item { name, sources: vec![source], change });
    }

    fn dtype(&self, item: &Item, view: &TensorView<'_>) -> Dtype {
        if matches!(view.dtype, Dtype::Quantized(_)) {
            return view.dtype;
        }
        let config = &self.checkpoint.config;
        let (num_layers, tied) = (config.num_layers, config.tie_word_embeddings);
        // A stack of biases has two extents and is a vector all the same.
        if item.name.ends_with(".bias") {
            return Dtype::F32;
        }
        self.kind.dtype_of(Place { name: &item.name, shape: view.shape, num_layers, tied })
    }

    /// The tensor as it goes into the file.
    fn read(&self, item: &Item) -> Result<Part<'_>, ModelError> {
        let weights = &self.checkpoint.weights;
        let mut parts = Vec::new();
        for source in &item.sources {
            parts.push(Part::of(weights.read(source)?));
        }
        let mut part = if parts.len() == 1 { parts.remove(0) } else { Part::stack(&parts) };
        match item.change {
            Change::None => {}
            Change::AddOffset => part.add(self.checkpoint.config.norm_weight_offset),
            Change::Permute => part.reorder_rows(&permutation(&self.checkpoint.config)),
            Change::Half(_) | Change::Downs => part = self.experts(&part, item.change),
            Change::KeysOfLatents | Change::ValuesOfLatents => part = self.heads(part, item.change),
        }
        Ok(part)
    }

    /// All heads' keys, transposed, or values.
    fn heads(&self, both: Part<'_>, change: Change) -> Part<'static> {
        let config = &self.checkpoint.config;
        let latent = config.latent.expect("only latents have such tensors: this is a bug");
        let head = [latent.content_dim, latent.value_dim];
        let cuts: Vec<usize> = (0..config.num_heads).flat_map(|_| head).collect();
        let wanted = usize::from(change == Change::ValuesOfLatents);
        let mut parts: Vec<Part<'_>> = both.split(&cuts).into_iter().skip(wanted).step_by(2).collect();
        if change == Change::KeysOfLatents {
            parts.iter_mut().for_each(Part::transpose);
        }
        Part::stack(&parts)
    }

    /// A share of a tensor of all experts, as rows.
    fn experts(&self, stack: &Part<'_>, change: Change) -> Part<'static> {
        let layout = self.checkpoint.names.expert_layout;
        let shape = stack.view().shape.to_vec();
        let experts: Vec<Part<'_>> = (0..shape[0])
            .map(|expert| {
                let mut part = stack.item(expert);
                if layout == ExpertLayout::Columns && shape.len() == 3 {
                    part.transpose();
                }
                let Change::Half(half) = change else { return part };
                let rows = part.view().shape[0];
                let order: Vec<usize> = match layout {
                    ExpertLayout::Rows => (0..rows).collect(),
                    _ => (0..rows).step_by(2).chain((1..rows).step_by(2)).collect(),
                };
                part.reorder_rows(&order);
                part.split(&[rows / 2, rows - rows / 2]).remove(half)
            })
            .collect();
        Part::stack(&experts)
    }
}

/// Row `i` of a head in the file is that of the folder with this number.
fn permutation(config: &DecoderConfig) -> Vec<usize> {
    let order = row_order(&Rope { interleaved: true, ..config.rope.clone() }, config.head_dim)
        .expect("an interleaved rotation has an order: this is a bug");
    let mut inverse = vec![0; order.len()];
    for (to, from) in order.into_iter().enumerate() {
        inverse[from] = to;
    }
    inverse
}

/// Fails unless the file at `path` is the model of `checkpoint`.
fn check(
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    written: &Written,
    path: &Path,
) -> Result<(), ModelError> {
    let refuse =
        |what: String| ModelError::weights(&checkpoint.dir, format!("has {what} that GGUF cannot say"));
    let found = Checkpoint::open(path)?;
    let mut wanted = checkpoint.config.clone();
    wanted.norm_weight_offset = 0.0;
    wanted.rope.interleaved |= written.permuted;
    if matches!(wanted.rope.scaling, RopeScaling::Llama3 { .. }) {
        // Written as its factors.
        wanted.rope.scaling = found.config.rope.scaling.clone();
    }
    if (0..wanted.num_layers).any(|layer| wanted.layer(layer) != found.config.layer(layer)) {
        return Err(refuse("layers that differ (windows, positions or dense ones)".to_owned()));
    }
    wanted.layers.clone_from(&found.config.layers);
    if wanted != found.config {
        let (wanted, found) = (fields(&wanted), fields(&found.config));
        let differs = wanted.iter().zip(&found).find(|(wanted, found)| wanted != found);
        let (wanted, found) = differs.map_or(("", ""), |(wanted, found)| (wanted.as_str(), found.as_str()));
        return Err(refuse(format!("`{}` (it would be read as `{}`)", wanted.trim(), found.trim())));
    }
    let read = Tokenizer::from_dir(path)?;
    for special in [true, false] {
        let (wanted, found) = (tokenizer.encode(SAMPLE, special)?, read.encode(SAMPLE, special)?);
        if wanted != found {
            return Err(refuse("a tokenizer".to_owned()));
        }
    }
    let ends = &checkpoint.generation.eos_token_ids;
    match ends.iter().find(|end| !found.generation.eos_token_ids.contains(end)) {
        Some(end) => Err(refuse(format!("the end token {end} among {}", ends.len()))),
        None => Ok(()),
    }
}

/// A configuration, a line a field.
fn fields(config: &DecoderConfig) -> Vec<String> {
    format!("{config:#?}").lines().map(str::to_owned).collect()
}
