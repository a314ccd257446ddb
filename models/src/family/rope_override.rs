//! A scaling of the rotary embedding that is asked for when a model is loaded, in the place of the one in its
//! files: so a model made for 32K tokens is served with 128K. It is written into the options that the family
//! reads, so a model loaded with it is the model whose `config.json` says the same, bit for bit.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde_json::{Map, Value, json};

use super::options::describe;
use super::rope::stretched;
use crate::ModelError;

const SCALING: &str = "rope_scaling";
const PARAMETERS: &str = "rope_parameters";
const FULL_ATTENTION: &str = "full_attention";
const LONGEST: &str = "max_position_embeddings";
const ORIGINAL: &str = "original_max_position_embeddings";
/// What stands beside a scaling in the same object and is not part of it.
const BESIDE: [&str; 2] = ["rope_theta", "partial_rotary_factor"];

/// A rotary scaling in the place of a model's own: `none`, a kind with its factor such as `yarn:4`, or the
/// object of a `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeOverride {
    /// As it was asked for.
    text: String,
    /// The object of a `config.json`, with `rope_type`.
    scaling: Map<String, Value>,
}

/// A text is no [`RopeOverride`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "wanted `none`, a kind and its factor such as `yarn:4` (linear, dynamic, yarn or llama3, and a number from 1 \
     up), or an object as in config.json"
)]
pub struct NoRopeOverride;

impl fmt::Display for RopeOverride {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for RopeOverride {
    type Err = NoRopeOverride;

    fn from_str(text: &str) -> Result<Self, NoRopeOverride> {
        let text = text.trim();
        let scaling = match text.split_once(':') {
            _ if text.starts_with('{') => serde_json::from_str(text).ok().and_then(object),
            None if text == "none" => Some(fields(json!({"rope_type": "default"}))),
            Some((kind, factor)) => {
                factor.trim().parse().ok().and_then(|factor| of_kind(kind.trim(), factor))
            }
            None => None,
        };
        Ok(RopeOverride { text: text.to_owned(), scaling: scaling.ok_or(NoRopeOverride)? })
    }
}

/// A kind with nothing but its factor. Llama 3's bounds are those of all its published models.
fn of_kind(kind: &str, factor: f64) -> Option<Map<String, Value>> {
    match kind {
        "linear" | "dynamic" | "yarn" => object(json!({"rope_type": kind, "factor": factor})),
        "llama3" => object(json!({
            "rope_type": kind, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        })),
        _ => None,
    }
}

/// An object whose kind is known and whose factor stretches; the rest is for the family to read.
fn object(value: Value) -> Option<Map<String, Value>> {
    let Value::Object(mut scaling) = value else { return None };
    let old = scaling.remove("type");
    let kind = scaling.get("rope_type").or(old.as_ref())?.as_str()?.to_owned();
    let stretches =
        || scaling.get("factor").and_then(Value::as_f64).is_some_and(|f| f.is_finite() && f >= 1.0);
    let is_sound = match kind.as_str() {
        "default" => true,
        "linear" | "dynamic" | "llama3" | "yarn" | "longrope" | "su" => stretches(),
        _ => false,
    };
    scaling.insert("rope_type".to_owned(), kind.into());
    is_sound.then_some(scaling)
}

fn fields(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// A context without the scaling that made it; as it is if either is no number.
fn shrunk(context: &Value, factor: Option<&Value>) -> Value {
    let factor = factor.and_then(Value::as_f64).filter(|&factor| factor >= 1.0);
    match (context.as_u64(), factor) {
        (Some(context), Some(factor)) => ((context as f64 / factor) as u64).max(1).into(),
        _ => context.clone(),
    }
}

impl RopeOverride {
    /// The object of a `config.json`, with `rope_type`.
    pub fn scaling(&self) -> &Map<String, Value> {
        &self.scaling
    }

    /// True if it says for which context the model was made.
    pub(super) fn names_original(&self) -> bool {
        self.scaling.contains_key(ORIGINAL) || self.kind() == "default"
    }

    fn kind(&self) -> &str {
        self.scaling.get("rope_type").and_then(Value::as_str).unwrap_or_default()
    }

    /// Writes the scaling over the one in `options`, and the context that it makes over theirs.
    ///
    /// # Errors
    /// If the files do not say for which context the model was made, nor does the override.
    pub(super) fn apply(&self, path: &Path, options: &mut Map<String, Value>) -> Result<(), ModelError> {
        let stated = options.get(LONGEST).cloned().unwrap_or_default();
        let beside = options.get(ORIGINAL).cloned();
        let own = own_scaling(options);
        let mut scaling = self.scaling.clone();
        for key in BESIDE {
            if let (Some(value), false) = (own.get(key), scaling.contains_key(key)) {
                scaling.insert(key.to_owned(), value.clone());
            }
        }
        let named = scaling.remove(ORIGINAL).or(beside.clone()).or_else(|| own.get(ORIGINAL).cloned());
        let own_kind = own.get("rope_type").or(own.get("type")).and_then(Value::as_str);
        let original = match (named, own_kind) {
            (Some(named), _) => named,
            // The file says how far the model goes with its scaling, not what it was made for.
            // Linear scaling stretches what the model was made for by its factor, and nothing else.
            (None, Some("linear")) if self.kind() == "default" => shrunk(&stated, own.get("factor")),
            (None, Some("linear" | "longrope" | "su")) => return Err(self.unknown_original(path)),
            (None, _) => stated,
        };
        let factor = scaling.get("factor").and_then(Value::as_f64);
        if let Some(original) = original.as_u64().and_then(|original| usize::try_from(original).ok()) {
            let longest = factor.map_or(original, |factor| stretched(original, factor as f32));
            options.insert(LONGEST.to_owned(), longest.into());
        }
        if !["linear", "default"].contains(&self.kind()) {
            scaling.insert(ORIGINAL.to_owned(), original.clone());
        }
        if beside.is_some() {
            options.insert(ORIGINAL.to_owned(), original);
        }
        put_scaling(options, scaling);
        Ok(())
    }

    /// The error that the file at `path` does not say what the model was made for.
    pub(super) fn unknown_original(&self, path: &Path) -> ModelError {
        ModelError::Config {
            path: path.to_owned(),
            key: format!("{SCALING}.{ORIGINAL}"),
            found: describe(None),
            wanted: format!(
                "the context that the model was made for before its own scaling, which the file does not \
                 say: ask for {{\"rope_type\": \"{}\", \"factor\": F, \"{ORIGINAL}\": N}}",
                self.kind()
            ),
        }
    }

    /// What went wrong when a model was read with this, which without it reads well.
    pub(super) fn fault(&self, error: ModelError) -> ModelError {
        ModelError::RopeOverride { asked: self.text.clone(), error: Box::new(error) }
    }
}

/// True if `options` has an object at `key` that says something.
fn has_object(options: &Map<String, Value>, key: &str) -> bool {
    options.get(key).and_then(Value::as_object).is_some_and(|object| !object.is_empty())
}

/// The object that the families read the scaling from: see `Options::rope_object`.
fn own_scaling(options: &Map<String, Value>) -> Map<String, Value> {
    let object = |options: &Map<String, Value>, key: &str| {
        options.get(key).and_then(Value::as_object).cloned().unwrap_or_default()
    };
    if has_object(options, SCALING) {
        return object(options, SCALING);
    }
    let parameters = object(options, PARAMETERS);
    if has_object(&parameters, FULL_ATTENTION) { object(&parameters, FULL_ATTENTION) } else { parameters }
}

/// Puts `scaling` where [`own_scaling`] looks.
fn put_scaling(options: &mut Map<String, Value>, scaling: Map<String, Value>) {
    let is_old = has_object(options, SCALING) || !has_object(options, PARAMETERS);
    let parameters = options.get_mut(PARAMETERS).and_then(Value::as_object_mut);
    match parameters.filter(|_| !is_old) {
        None => options.insert(SCALING.to_owned(), scaling.into()),
        Some(both) if has_object(both, FULL_ATTENTION) => {
            both.insert(FULL_ATTENTION.to_owned(), scaling.into())
        }
        Some(_) => options.insert(PARAMETERS.to_owned(), scaling.into()),
    };
}
