//! Chat templates: messages in, prompt out, as transformers' `apply_chat_template` renders them.
//!
//! **Architecture Invariant**: a template comes with a model from the internet and is untrusted. It
//! has no loader, no files, no clock but the date; its instructions are bounded by fuel, its output
//! and memory by a [`Meter`], its recursion by the engine's limit.
//!
//! Costs: one compilation at load, then tens of microseconds a rendering of a short chat.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use minijinja::machinery::{eval, make_string_output};
use minijinja::{AutoEscape, Error, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use super::bytecode::{Program, without_constant_products};
use super::environment::{Refusal, environment};
use super::meter::Meter;
use super::tokenizer::{TOKENIZER_CONFIG_FILE, Tokenizer, model_dir, read_tokenizer_config};
use crate::ModelError;
use crate::files::{read_json, read_text};

const TEMPLATE_FILE: &str = "chat_template.jinja";
const TEMPLATE_JSON_FILE: &str = "chat_template.json";
/// The files, beside `tokenizer_config.json`, that a template may be in.
pub(crate) const CHAT_TEMPLATE_FILES: [&str; 2] = [TEMPLATE_FILE, TEMPLATE_JSON_FILE];

/// The longest published template has about 20 kB.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
/// Instructions of one rendering: a fixed part and a part for each byte of the request. Real
/// templates use about 200 a message.
const FUEL_BASE: u64 = 1_000_000;
const FUEL_PER_BYTE: u64 = 16;
/// Bytes printed, in total and into any one string: a fixed part and some for each byte of the request.
const OUTPUT_BASE: usize = 1 << 20;
const OUTPUT_PER_BYTE: usize = 8;
/// Bytes of all values made on the way.
const MEMORY_BASE: usize = 16 << 20;
const MEMORY_PER_BYTE: usize = 64;
/// A compiled chat template.
pub struct ChatTemplate {
    default: Template,
    /// Used when a request brings tools, where a model has one for that.
    tool_use: Option<Template>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    clock: fn() -> SystemTime,
}

/// Why a template did not render.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The template itself refused the messages with `raise_exception`, so the client is at fault.
    #[error("the chat template refuses these messages: {0}")]
    Refused(String),
    /// The template failed, or went past a limit.
    #[error("the chat template failed: {0}")]
    Failed(String),
}

impl ChatTemplate {
    /// The template of the checkpoint folder `dir`: `chat_template.jinja`, else `chat_template.json`,
    /// else `chat_template` in `tokenizer_config.json`. Of a GGUF file it is the one in these files beside
    /// it, else its own. `None` if there is none.
    ///
    /// # Errors
    /// If a file is damaged or a template does not compile.
    pub fn from_dir(dir: &Path, tokenizer: &Tokenizer) -> Result<Option<Self>, ModelError> {
        let (path, value) = read_template(dir)?;
        let error = |reason: String| ModelError::Template { path: path.clone(), reason };
        let compile = |source: &str| Template::compile(source).map_err(|source| error(describe(&source)));
        let named = match &value {
            Json::Null => return Ok(None),
            Json::String(source) => vec![("default", source.as_str())],
            Json::Array(list) => list.iter().filter_map(named_template).collect(),
            _ => vec![],
        };
        let find = |wanted: &str| named.iter().find(|(name, _)| *name == wanted).map(|(_, source)| *source);
        let Some(default) = find("default") else {
            let wanted = "wanted a string, or a list of {name, template} with one named \"default\"";
            return Err(error(format!("`chat_template` cannot be used; {wanted}")));
        };
        Ok(Some(ChatTemplate {
            default: compile(default)?,
            tool_use: find("tool_use").map(compile).transpose()?,
            bos_token: tokenizer.bos_token().map(str::to_owned),
            eos_token: tokenizer.eos_token().map(str::to_owned),
            clock: SystemTime::now,
        }))
    }

    /// Compiles a template that comes from elsewhere than a checkpoint folder.
    ///
    /// # Errors
    /// If it does not compile.
    pub fn from_source(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TemplateError> {
        Ok(ChatTemplate {
            default: Template::compile(source).map_err(|error| TemplateError::Failed(describe(&error)))?,
            tool_use: None,
            bos_token: bos.map(str::to_owned),
            eos_token: eos.map(str::to_owned),
            clock: SystemTime::now,
        })
    }

    /// True if both write the same prompt for the same messages.
    pub fn writes_like(&self, other: &ChatTemplate) -> bool {
        let source = |template: &Option<Template>| template.as_ref().map(|template| template.source);
        self.default.source == other.default.source
            && source(&self.tool_use) == source(&other.tool_use)
            && (&self.bos_token, &self.eos_token) == (&other.bos_token, &other.eos_token)
    }

    /// Replaces the clock behind `strftime_now`, which makes renderings repeatable.
    pub fn with_clock(mut self, clock: fn() -> SystemTime) -> Self {
        self.clock = clock;
        self
    }

    /// Renders `messages`, a JSON list, to a prompt. `extra` holds further variables of the template.
    ///
    /// # Errors
    /// If the template refuses the messages, fails, or goes past a limit.
    pub fn render(
        &self,
        messages: &Json,
        tools: Option<&Json>,
        add_generation_prompt: bool,
        extra: &Map<String, Json>,
    ) -> Result<String, TemplateError> {
        let template = match (&self.tool_use, tools) {
            (Some(tool_use), Some(_)) => tool_use,
            _ => &self.default,
        };
        let mut size = json_size(messages) + tools.map_or(0, json_size);
        let mut variables: Vec<(Value, Value)> = vec![
            (Value::from("messages"), to_value(messages)),
            (Value::from("tools"), tools.map_or(Value::from(()), to_value)),
            (Value::from("documents"), Value::from(())),
            (Value::from("add_generation_prompt"), Value::from(add_generation_prompt)),
        ];
        for (name, token) in [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)] {
            variables.extend(token.as_ref().map(|token| (Value::from(name), Value::from(token.as_str()))));
        }
        for (name, value) in extra {
            size += json_size(value);
            variables.push((Value::from(name.as_str()), to_value(value)));
        }
        let output_limit = OUTPUT_BASE.saturating_add(size.saturating_mul(OUTPUT_PER_BYTE));
        let meter =
            Meter::new(MEMORY_BASE.saturating_add(size.saturating_mul(MEMORY_PER_BYTE)), output_limit);
        let fuel = FUEL_BASE.saturating_add((size as u64).saturating_mul(FUEL_PER_BYTE));
        template.render(Value::from_pairs(variables), Arc::new(meter), fuel, self.clock)
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("has_tool_use", &self.tool_use.is_some()).finish_non_exhaustive()
    }
}

/// The template of a model, a string or a list of named ones, and the file that it is in.
pub(super) fn read_template(dir: &Path) -> Result<(PathBuf, Json), ModelError> {
    let jinja = model_dir(dir).join(TEMPLATE_FILE);
    let json = model_dir(dir).join(TEMPLATE_JSON_FILE);
    if jinja.exists() {
        let source = read_text(&jinja, MAX_TEMPLATE_BYTES)?;
        return Ok((jinja, Json::String(source)));
    }
    if json.exists() {
        let mut file: Map<String, Json> = read_json(&json, MAX_TEMPLATE_BYTES)?;
        return Ok((json, file.remove("chat_template").unwrap_or_default()));
    }
    let mut file = read_tokenizer_config(dir)?;
    Ok((dir.join(TOKENIZER_CONFIG_FILE), file.remove("chat_template").unwrap_or_default()))
}

pub(super) fn named_template(entry: &Json) -> Option<(&str, &str)> {
    Some((entry["name"].as_str()?, entry["template"].as_str()?))
}

struct Template {
    source: &'static str,
    program: Program<'static>,
}

impl Template {
    fn compile(source: &str) -> Result<Self, Error> {
        // The compiled program borrows its source. A process loads a template or two of some
        // kilobytes and keeps them until it ends, so the source is simply never freed.
        let source = without_constant_products(&without_generation_tags(source))?;
        let source: &'static str = Box::leak(source.into_boxed_str());
        Ok(Template { source, program: Program::compile(source)? })
    }

    fn render(
        &self,
        variables: Value,
        meter: Arc<Meter>,
        fuel: u64,
        clock: fn() -> SystemTime,
    ) -> Result<String, TemplateError> {
        let mut env = environment(&meter, clock);
        env.set_fuel(Some(fuel));
        let mut text = String::new();
        let result = eval(
            &env,
            &self.program.instructions,
            variables,
            &self.program.blocks,
            &mut make_string_output(&mut text),
            AutoEscape::None,
        );
        match result {
            Ok(_) => Ok(text),
            Err(error) => Err(match refusal(&error) {
                Some(message) => TemplateError::Refused(message),
                None => TemplateError::Failed(describe(&error)),
            }),
        }
    }
}

fn refusal(error: &Error) -> Option<String> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(Refusal(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        source = error.source();
    }
    None
}

fn describe(error: &Error) -> String {
    match error.kind() {
        ErrorKind::OutOfFuel => "it takes more steps than the limit for a request of this size".to_owned(),
        _ => error.to_string(),
    }
}

/// `{% generation %}` marks the assistant's part for training; it prints nothing and minijinja does
/// not know it. It becomes a block that minijinja does know, with the same whitespace control.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        // Behind the opening: `{%}` is no tag that closes itself.
        let Some(len) = rest[start + 2..].find("%}").map(|len| len + 4) else { break };
        let (before, tag, after) = (&rest[..start], &rest[start..start + len], &rest[start + len..]);
        result.push_str(before);
        let content = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        match content {
            "generation" => result.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => result.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => result.push_str(tag),
        }
        rest = after;
    }
    result.push_str(rest);
    result
}

/// Bytes of the strings in `value` and a few for everything else.
fn json_size(value: &Json) -> usize {
    const BYTES_PER_NODE: usize = 16;
    BYTES_PER_NODE
        + match value {
            Json::String(text) => text.len(),
            Json::Array(items) => items.iter().map(json_size).sum(),
            Json::Object(map) => map.iter().map(|(key, item)| key.len() + json_size(item)).sum(),
            _ => 0,
        }
}

fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(value), _, _) => Value::from(value),
            (_, Some(value), _) => Value::from(value),
            (_, _, value) => Value::from(value.unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, item)| (Value::from(key.as_str()), to_value(item))))
        }
    }
}
