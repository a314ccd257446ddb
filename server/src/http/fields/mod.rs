//! The fields that every endpoint that generates takes under the same names, and what they become.
//!
//! `null` is the same as absent. Fields not named here are ignored, but those of `speculative` are all ours.

mod bounded;
mod format;
mod json;
mod schema;
mod speculation;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use serde::de::Visitor;
use serde::{Deserialize, Deserializer};
use tandem_engine::{CacheSalt, Priority, SamplingParams, SpeculationParams};

pub(super) use bounded::{Bounded, bounded_from_str, object, objects, wrong_type};
use format::FormatFields;
pub(super) use format::{AskedFormat, fault, response_format};
use json::{Entries, Ids, canonical_id, number};
pub(super) use json::{Integer, Strings, in_range, integer, one_of};
pub(super) use speculation::Prediction;
use speculation::Speculative;
use utoipa::ToSchema;

use super::error::ApiError;
use super::generation::{GenerationRequest, Prompt};
use super::grammars::GrammarPlan;
use super::lanes::{AUTO, Hints};
use super::state::{Limits, ServedModel};
use crate::keys::Client;
use crate::text::grammar::Grammar;

/// Longest `cache_salt`: a hash or a few ids in any notation.
const MAX_SALT_BYTES: usize = 256;

/// Longest `t_max_predict_ms`, a day.
const MAX_PREDICT_MS: i128 = 24 * 60 * 60 * 1000;

#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

/// The one common field of endpoints that do not generate.
#[derive(Deserialize, ToSchema)]
pub(super) struct ModelField {
    pub(super) model: Option<String>,
}

/// Whether an answer that fills a gap ends where it meets what follows.
const FILLS: &[(&str, bool)] = &[("fit", true), ("raw", false)];

const PRIORITIES: &[(&str, Priority)] = &[("interactive", Priority::Interactive), ("batch", Priority::Batch)];

/// A priority's name, not yet checked. Elsewhere it is a number: whoever sends one is told what it is here.
fn priority_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    struct NameVisitor;
    impl Visitor<'_> for NameVisitor {
        type Value = Option<String>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("\"interactive\" or \"batch\"")
        }

        fn visit_str<E>(self, name: &str) -> Result<Option<String>, E> {
            Ok(Some(name.to_owned()))
        }

        fn visit_unit<E>(self) -> Result<Option<String>, E> {
            Ok(None)
        }
    }
    deserializer.deserialize_any(NameVisitor)
}

/// The fields, as they stand in the body.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct CommonFields {
    pub(super) model: Option<String>,
    #[serde(default, deserialize_with = "integer")]
    pub(super) max_tokens: Option<i128>,
    #[serde(default, deserialize_with = "integer")]
    pub(super) n: Option<i128>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) stop: Option<Strings>,
    #[serde(default, deserialize_with = "integer")]
    pub(super) seed: Option<i128>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    #[serde(default, deserialize_with = "integer")]
    top_k: Option<i128>,
    min_p: Option<f64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    pub(super) repetition_penalty: Option<f64>,
    logit_bias: Option<Entries>,
    #[serde(default, deserialize_with = "integer")]
    min_tokens: Option<i128>,
    ignore_eos: Option<bool>,
    stop_token_ids: Option<Ids>,
    #[serde(default, deserialize_with = "priority_name")]
    priority: Option<String>,
    #[serde(default, deserialize_with = "integer")]
    t_max_predict_ms: Option<i128>,
    fill: Option<String>,
    cache_salt: Option<String>,
    speculative: Option<Speculative>,
    prediction: Option<Prediction>,
    /// What the rules for lanes look at, in whatever fields it stands.
    #[serde(skip)]
    hints: Hints,
    parallel_tool_calls: Option<bool>,
    response_format: Option<Bounded>,
    structured_outputs: Option<Bounded>,
    guided_json: Option<Bounded>,
    guided_regex: Option<Bounded>,
    guided_choice: Option<Bounded>,
    guided_grammar: Option<Bounded>,
    grammar: Option<Bounded>,
    json_schema: Option<Bounded>,
}

/// What they become. `params.max_tokens` and the logprobs are left to the endpoint.
#[derive(Default)]
pub(super) struct Common {
    pub(super) params: SamplingParams,
    /// As the client wrote it, or as it was drawn.
    pub(super) seed: i128,
    /// The client wrote it.
    pub(super) names_seed: bool,
    pub(super) num_choices: usize,
    pub(super) stop: Vec<String>,
    pub(super) priority: Priority,
    pub(super) max_predict_time: Option<Duration>,
    pub(super) speculation: SpeculationParams,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// Usage with every chunk.
    pub(super) continuous_usage: bool,
    /// Control tokens that show in the text.
    pub(super) markers: Arc<[u32]>,
    /// An answer that fills a gap ends where it meets what follows.
    pub(super) fits_gaps: bool,
    /// The form that the client asks for.
    pub(super) format: Option<AskedFormat>,
    /// What follows from it and from the tools of a chat.
    pub(super) grammar: Option<GrammarPlan>,
    /// The client takes one tool call at a time.
    pub(super) one_call: bool,
}

impl Common {
    /// The request for these prompts.
    pub(super) fn into_request(
        self,
        prompts: Vec<Prompt>,
        cache_salt: CacheSalt,
        client: Option<Arc<Client>>,
        grammar: Option<Arc<Grammar>>,
    ) -> GenerationRequest {
        GenerationRequest {
            prompts,
            num_choices: self.num_choices,
            params: self.params,
            stop: self.stop,
            names_seed: self.names_seed,
            priority: self.priority,
            cache_salt,
            max_predict_time: self.max_predict_time,
            speculation: self.speculation,
            markers: self.markers,
            fits_gaps: self.fits_gaps,
            client,
            grammar,
        }
    }
}

impl CommonFields {
    /// Resolves defaults and checks ranges that the engine does not know.
    pub(super) fn resolve(
        &self,
        served: &ServedModel,
        limits: &Limits,
        extra_stop_token_ids: &[u32],
    ) -> Result<Common, ApiError> {
        let num_choices = in_range("n", self.n.unwrap_or(1), 1, limits.max_choices as i128)? as usize;
        // 53 bits: the largest integers that every JSON reader keeps whole.
        let seed = self.seed.unwrap_or_else(|| i128::from(rand::rng().next_u64() >> 11));
        in_range("seed", seed, i128::from(i64::MIN), i128::from(u64::MAX))?;
        let params = SamplingParams {
            seed: seed as u64,
            stop_token_ids: self.stop_token_ids(served, limits, extra_stop_token_ids)?,
            min_tokens: in_range("min_tokens", self.min_tokens.unwrap_or(0), 0, i128::from(u32::MAX))? as u32,
            logit_bias: self.logit_bias()?,
            ..self.distribution(served)?
        };
        Ok(Common {
            params,
            seed,
            names_seed: self.seed.is_some(),
            num_choices,
            stop: self.stop(limits)?,
            priority: match &self.priority {
                Some(name) => one_of("priority", name, PRIORITIES)?,
                None => Priority::default(),
            },
            max_predict_time: self.max_predict_time()?,
            speculation: self.speculative.as_ref().map(Speculative::resolve).transpose()?.unwrap_or_default(),
            stream: self.stream.unwrap_or(false),
            include_usage: self.stream_options.as_ref().and_then(|o| o.include_usage).unwrap_or(false),
            continuous_usage: self
                .stream_options
                .as_ref()
                .and_then(|o| o.continuous_usage_stats)
                .unwrap_or(false),
            markers: Arc::from([]),
            fits_gaps: match &self.fill {
                Some(fill) => one_of("fill", fill, FILLS)?,
                None => true,
            },
            format: self.format()?,
            grammar: None,
            one_call: self.parallel_tool_calls == Some(false),
        })
    }

    /// Reads what the rules for lanes look at, unless the client names the model.
    pub(super) fn take_hints(&mut self, body: &[u8]) {
        if self.model.as_deref().is_none_or(|name| name == AUTO) {
            // What is wrong in it, the endpoint's own fields say.
            self.hints = serde_json::from_slice(body).unwrap_or_default();
        }
    }

    /// See [`CommonFields::take_hints`].
    pub(super) fn hints(&self) -> &Hints {
        &self.hints
    }

    fn format(&self) -> Result<Option<AskedFormat>, ApiError> {
        let fields = FormatFields {
            response_format: self.response_format.as_ref(),
            structured_outputs: self.structured_outputs.as_ref(),
            guided_json: self.guided_json.as_ref(),
            guided_regex: self.guided_regex.as_ref(),
            guided_choice: self.guided_choice.as_ref(),
            guided_grammar: self.guided_grammar.as_ref(),
            grammar: self.grammar.as_ref(),
            json_schema: self.json_schema.as_ref(),
        };
        fields.resolve()
    }

    /// What the client expects, for [`Prediction::encode`]. Taken, because it can be long.
    pub(super) fn take_prediction(&mut self) -> Option<Prediction> {
        self.prediction.take()
    }

    /// The client's own part of what separates its cached blocks from others'.
    pub(super) fn cache_salt(&self) -> Result<Option<&str>, ApiError> {
        let Some(salt) = &self.cache_salt else { return Ok(None) };
        if salt.is_empty() || salt.len() > MAX_SALT_BYTES {
            let message = format!("cache_salt has {} bytes; it must have 1 to {MAX_SALT_BYTES}", salt.len());
            return Err(ApiError::invalid("cache_salt", message));
        }
        Ok(Some(salt))
    }

    /// As with llama.cpp, what is not positive is no limit.
    fn max_predict_time(&self) -> Result<Option<Duration>, ApiError> {
        let Some(limit_ms) = self.t_max_predict_ms else { return Ok(None) };
        let limit_ms = in_range("t_max_predict_ms", limit_ms, -1, MAX_PREDICT_MS)?;
        Ok((limit_ms > 0).then(|| Duration::from_millis(limit_ms as u64)))
    }

    /// The fields that shape the distribution; what is not given comes from the model's
    /// `generation_config.json`, else from OpenAI's defaults.
    fn distribution(&self, served: &ServedModel) -> Result<SamplingParams, ApiError> {
        let defaults = &served.model.generation;
        let top_k = match self.top_k {
            // -1 is how some clients say "all".
            Some(value) => in_range("top_k", value, -1, i128::from(u32::MAX))?.max(0) as u32,
            None => defaults.top_k.unwrap_or(0),
        };
        Ok(SamplingParams {
            temperature: number("temperature", self.temperature, defaults.temperature.unwrap_or(1.0))?,
            top_k,
            top_p: number("top_p", self.top_p, defaults.top_p.unwrap_or(1.0))?,
            min_p: number("min_p", self.min_p, 0.0)?,
            repetition_penalty: number(
                "repetition_penalty",
                self.repetition_penalty,
                defaults.repetition_penalty.unwrap_or(1.0),
            )?,
            presence_penalty: number("presence_penalty", self.presence_penalty, 0.0)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, 0.0)?,
            ..SamplingParams::default()
        })
    }

    fn stop_token_ids(
        &self,
        served: &ServedModel,
        limits: &Limits,
        extra: &[u32],
    ) -> Result<Vec<u32>, ApiError> {
        let mut ids = Vec::new();
        if !self.ignore_eos.unwrap_or(false) {
            ids.extend_from_slice(&served.stop_token_ids);
            ids.extend_from_slice(extra);
        }
        let given = self.stop_token_ids.as_ref().map_or(&[][..], |Ids(ids)| ids);
        if given.len() > limits.max_stops {
            return Err(too_many("stop_token_ids", given.len(), limits.max_stops));
        }
        let last = served.model.tokenizer.vocab_size() as i128 - 1;
        for &Integer(id) in given {
            ids.push(in_range("stop_token_ids", id, 0, last)? as u32);
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    fn stop(&self, limits: &Limits) -> Result<Vec<String>, ApiError> {
        let stops = self.stop.as_ref().map_or(&[][..], |Strings(stops)| stops);
        if stops.len() > limits.max_stops {
            return Err(too_many("stop", stops.len(), limits.max_stops));
        }
        for stop in stops {
            if stop.is_empty() || stop.len() > limits.max_stop_bytes {
                let message = format!(
                    "a stop string has {} bytes; it must have 1 to {}",
                    stop.len(),
                    limits.max_stop_bytes
                );
                return Err(ApiError::invalid("stop", message));
            }
        }
        Ok(stops.to_vec())
    }

    fn logit_bias(&self) -> Result<Vec<(u32, f32)>, ApiError> {
        let invalid = |message| ApiError::invalid("logit_bias", message);
        let mut biases: Vec<(u32, f32)> = Vec::new();
        for (token, bias) in self.logit_bias.iter().flat_map(|Entries(entries)| entries) {
            let id = canonical_id(token).ok_or_else(|| {
                invalid(format!("logit_bias has the key {token:?}; keys must be token ids in plain digits"))
            })?;
            biases.push((id, number("logit_bias", Some(*bias), 0.0)?));
        }
        biases.sort_unstable_by_key(|(id, _)| *id);
        if let Some(pair) = biases.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(invalid(format!("logit_bias has the key \"{}\" more than once", pair[0].0)));
        }
        Ok(biases)
    }
}

fn too_many(param: &str, count: usize, limit: usize) -> ApiError {
    ApiError::invalid(param, format!("{param} has {count} entries; at most {limit} are taken"))
}
