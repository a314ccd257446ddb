//! The fields that completions and chat completions share, and what they become.
//!
//! `null` is the same as absent. Fields not named here are ignored.

use std::fmt;
use std::time::Duration;

use rand::Rng;
use serde::de::{self, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};
use tandem_engine::{CacheSalt, Priority, SamplingParams, SpeculationParams};

use super::speculation::{Prediction, Speculative};
use crate::http::error::ApiError;
use crate::http::generation::{GenerationRequest, Prompt};
use crate::http::state::{Limits, ServedModel};

/// Any whole number that JSON can hold, also one written as `16.0` or too large for 64 bits: whoever
/// sends it is told about its range and not about its type.
#[derive(Clone, Copy, Debug)]
pub(super) struct Integer(pub(super) i128);

impl<'de> Deserialize<'de> for Integer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IntegerVisitor;
        impl Visitor<'_> for IntegerVisitor {
            type Value = Integer;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an integer")
            }

            fn visit_i64<E>(self, value: i64) -> Result<Integer, E> {
                Ok(Integer(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Integer, E> {
                Ok(Integer(value.into()))
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Integer, E> {
                if value.fract() != 0.0 {
                    return Err(E::invalid_value(Unexpected::Float(value), &self));
                }
                // Saturates, far outside of any range there is.
                Ok(Integer(value as i128))
            }
        }
        deserializer.deserialize_any(IntegerVisitor)
    }
}

/// An optional [`Integer`], for `deserialize_with`.
pub(super) fn integer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i128>, D::Error> {
    Ok(Option::<Integer>::deserialize(deserializer)?.map(|Integer(value)| value))
}

/// An object's entries as they stand there; one that repeats a key is not lost.
#[derive(Debug)]
struct Entries(Vec<(String, f64)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;
        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of token ids and numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(EntriesVisitor)
    }
}

/// A token id in plain digits, without a sign or leading zeros: each id has one spelling.
fn canonical_id(text: &str) -> Option<u32> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if is_plain { text.parse().ok() } else { None }
}

/// Longest `cache_salt`: a hash or a few ids in any notation.
const MAX_SALT_BYTES: usize = 256;

/// Longest `t_max_predict_ms`, a day.
const MAX_PREDICT_MS: i128 = 24 * 60 * 60 * 1000;

/// Where reading a list of ends stops, whatever [`Limits::max_stops`] is.
const MAX_LISTED: usize = 1024;

/// One string or several.
#[derive(Debug)]
pub(super) struct Strings(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StringsVisitor;
        impl<'de> Visitor<'de> for StringsVisitor {
            type Value = Strings;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a string or an array of strings")
            }

            fn visit_str<E>(self, stop: &str) -> Result<Strings, E> {
                Ok(Strings(vec![stop.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, elements: A) -> Result<Strings, A::Error> {
                listed(elements).map(Strings)
            }
        }
        deserializer.deserialize_any(StringsVisitor)
    }
}

/// A list of token ids, not yet checked.
#[derive(Debug)]
struct Ids(Vec<Integer>);

impl<'de> Deserialize<'de> for Ids {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IdsVisitor;
        impl<'de> Visitor<'de> for IdsVisitor {
            type Value = Ids;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an array of token ids")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, elements: A) -> Result<Ids, A::Error> {
                listed(elements).map(Ids)
            }
        }
        deserializer.deserialize_seq(IdsVisitor)
    }
}

fn listed<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(mut elements: A) -> Result<Vec<T>, A::Error> {
    let mut list = Vec::new();
    while let Some(element) = elements.next_element()? {
        if list.len() == MAX_LISTED {
            return Err(de::Error::custom(format_args!("the array has more than {MAX_LISTED} entries")));
        }
        list.push(element);
    }
    Ok(list)
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct StreamOptions {
    #[serde(default)]
    pub(super) include_usage: Option<bool>,
}

const PRIORITIES: &[(&str, Priority)] = &[("interactive", Priority::Interactive), ("batch", Priority::Batch)];

/// The shared fields.
#[derive(Debug, Default, Deserialize)]
pub(super) struct SharedFields {
    pub(super) model: Option<String>,
    #[serde(default, deserialize_with = "integer")]
    pub(super) max_tokens: Option<i128>,
    #[serde(default, deserialize_with = "integer")]
    pub(super) n: Option<i128>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    stop: Option<Strings>,
    #[serde(default, deserialize_with = "integer")]
    seed: Option<i128>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    #[serde(default, deserialize_with = "integer")]
    top_k: Option<i128>,
    min_p: Option<f64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    repetition_penalty: Option<f64>,
    logit_bias: Option<Entries>,
    #[serde(default, deserialize_with = "integer")]
    min_tokens: Option<i128>,
    ignore_eos: Option<bool>,
    stop_token_ids: Option<Ids>,
    priority: Option<String>,
    #[serde(default, deserialize_with = "integer")]
    t_max_predict_ms: Option<i128>,
    cache_salt: Option<String>,
    speculative: Option<Speculative>,
    prediction: Option<Prediction>,
}

/// What the shared fields become. `params.max_tokens` and the logprobs are left to the endpoint.
pub(super) struct Shared {
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
}

impl Shared {
    /// The request for these prompts.
    pub(super) fn into_request(self, prompts: Vec<Prompt>, cache_salt: CacheSalt) -> GenerationRequest {
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
        }
    }
}

/// Checks that `value` lies in `low..=high`.
pub(super) fn in_range(param: &str, value: i128, low: i128, high: i128) -> Result<i128, ApiError> {
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(ApiError::invalid(param, format!("{param} is {value}; it must be an integer from {low} to {high}")))
}

/// What one of a few words means.
pub(super) fn one_of<T: Copy>(param: &str, word: &str, known: &[(&str, T)]) -> Result<T, ApiError> {
    if let Some((_, meaning)) = known.iter().find(|(name, _)| *name == word) {
        return Ok(*meaning);
    }
    /// A message quotes no more of what the client wrote.
    const MAX_QUOTED_CHARS: usize = 64;
    let quoted: String = word.chars().take(MAX_QUOTED_CHARS).collect();
    let names: Vec<String> = known.iter().map(|(name, _)| format!("{name:?}")).collect();
    Err(ApiError::invalid(param, format!("{param} is {quoted:?}; it must be {}", names.join(" or "))))
}

fn number(param: &str, value: Option<f64>, default: f32) -> Result<f32, ApiError> {
    let Some(value) = value else { return Ok(default) };
    let narrow = value as f32;
    if narrow.is_finite() {
        return Ok(narrow);
    }
    Err(ApiError::invalid(param, format!("{param} is {value:e}; it must be a smaller number")))
}

impl SharedFields {
    /// Resolves defaults and checks ranges that the engine does not know.
    pub(super) fn resolve(
        &self,
        served: &ServedModel,
        limits: &Limits,
        extra_stop_token_ids: &[u32],
    ) -> Result<Shared, ApiError> {
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
        Ok(Shared {
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
        })
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

/// The tokens that an answer may have.
///
/// `strict`: a bound that the client set and that does not fit beside the prompt is an error, as with
/// OpenAI's chat; otherwise it is lowered to what fits.
pub(super) fn answer_tokens(
    param: &str,
    asked: Option<i128>,
    default: Option<u32>,
    num_prompt_tokens: usize,
    max_model_len: usize,
    strict: bool,
) -> Result<u32, ApiError> {
    let room = max_model_len.saturating_sub(num_prompt_tokens);
    let only_scores = asked == Some(0) && num_prompt_tokens <= max_model_len;
    if room == 0 && !only_scores {
        let error = tandem_engine::EngineError::PromptTooLong { num_prompt_tokens, max_model_len };
        return Err(error.into());
    }
    if let Some(asked) = asked
        && strict
        && asked > room as i128
    {
        let message = format!(
            "the prompt has {num_prompt_tokens} tokens and {param} is {asked}, together {}; \
             the context holds {max_model_len}",
            asked.saturating_add(num_prompt_tokens as i128)
        );
        return Err(ApiError::invalid(param, message).with_code("context_length_exceeded"));
    }
    let wanted = asked.or(default.map(i128::from)).unwrap_or(room as i128);
    Ok(wanted.min(room as i128) as u32)
}

#[cfg(test)]
mod tests {
    use super::answer_tokens;

    #[test]
    fn an_answer_is_bounded_by_what_the_prompt_leaves() {
        let tokens = |asked, default, prompt, strict| {
            answer_tokens("max_tokens", asked, default, prompt, 100, strict).map_err(|error| error.message)
        };
        assert_eq!(tokens(None, Some(16), 10, false), Ok(16));
        assert_eq!(tokens(None, Some(16), 95, false), Ok(5));
        assert_eq!(tokens(None, None, 60, true), Ok(40));
        assert_eq!(tokens(Some(40), None, 60, true), Ok(40));
        assert_eq!(tokens(Some(41), None, 60, false), Ok(40));
        let error = tokens(Some(41), None, 60, true).unwrap_err();
        assert!(error.contains("60") && error.contains("41") && error.contains("100"), "{error}");
        let error = tokens(Some(1), None, 100, false).unwrap_err();
        assert!(error.contains("100"), "{error}");
    }
}
