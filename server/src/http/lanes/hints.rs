//! What the rules for lanes look at in a body, whatever the protocol: how much text it holds, how long the
//! answer may be, tools and effort.
//!
//! Nothing is refused here and next to nothing is kept: the endpoint's own fields say what is wrong.

use std::fmt;

use http::HeaderMap;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::{ENDPOINT_HEADER, LANE_HEADER, Traits, Work};

/// Of a body's fields, under all the names that protocols have for them.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(in crate::http) struct Hints {
    prompt: Text,
    suffix: Text,
    messages: Text,
    system: Text,
    input: Text,
    instructions: Text,
    input_prefix: Text,
    input_suffix: Text,
    input_extra: Text,
    segments: Text,
    tools: Value,
    reasoning_effort: Value,
    reasoning: Value,
    max_tokens: Value,
    max_completion_tokens: Value,
    max_output_tokens: Value,
    n_predict: Value,
}

impl Hints {
    /// What the rules look at.
    pub(in crate::http) fn traits<'a>(
        &'a self,
        headers: &'a HeaderMap,
        work: Work,
        key: Option<&'a str>,
    ) -> Traits<'a> {
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let texts = [
            &self.prompt,
            &self.suffix,
            &self.messages,
            &self.system,
            &self.input,
            &self.instructions,
            &self.input_prefix,
            &self.input_suffix,
            &self.input_extra,
            &self.segments,
        ];
        let bounds =
            [&self.max_completion_tokens, &self.max_output_tokens, &self.n_predict, &self.max_tokens];
        let asked = bounds.into_iter().find_map(|bound| bound.number);
        Traits {
            endpoint: header(ENDPOINT_HEADER).unwrap_or(""),
            work,
            prompt_bytes: texts.into_iter().map(|text| text.num_bytes).sum(),
            max_tokens: match work {
                // It knows its endpoint's default.
                Work::Completion { max_tokens } => max_tokens,
                Work::Gap | Work::Chat => asked.unwrap_or(u64::MAX),
            },
            tools: self.tools.num_items > 0,
            reasoning_effort: self.reasoning_effort.text.as_deref().or(self.reasoning.effort.as_deref()),
            header: header(LANE_HEADER),
            key,
        }
    }
}

/// Any JSON, by the bytes of its strings. A number counts as a token id, of four bytes.
#[derive(Debug, Default)]
struct Text {
    num_bytes: u64,
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextVisitor).map(|num_bytes| Text { num_bytes })
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = u64;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any JSON")
    }

    fn visit_unit<E>(self) -> Result<u64, E> {
        Ok(0)
    }

    fn visit_bool<E>(self, _: bool) -> Result<u64, E> {
        Ok(0)
    }

    fn visit_i64<E>(self, _: i64) -> Result<u64, E> {
        Ok(4)
    }

    fn visit_u64<E>(self, _: u64) -> Result<u64, E> {
        Ok(4)
    }

    fn visit_f64<E>(self, _: f64) -> Result<u64, E> {
        Ok(4)
    }

    fn visit_str<E>(self, text: &str) -> Result<u64, E> {
        Ok(text.len() as u64)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<u64, A::Error> {
        let mut sum = 0;
        while let Some(Text { num_bytes }) = items.next_element()? {
            sum += num_bytes;
        }
        Ok(sum)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<u64, A::Error> {
        let mut sum = 0;
        while let Some((IgnoredAny, Text { num_bytes })) = entries.next_entry()? {
            sum += num_bytes;
        }
        Ok(sum)
    }
}

/// Any JSON, by what may be wanted of it.
#[derive(Debug, Default)]
struct Value {
    number: Option<u64>,
    /// A short string.
    text: Option<String>,
    /// Elements of a list.
    num_items: usize,
    /// The short string of this name in an object.
    effort: Option<String>,
}

/// Longest string that is kept: efforts are words.
const MAX_WORD_BYTES: usize = 32;

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::default())
    }

    fn visit_bool<E>(self, _: bool) -> Result<Value, E> {
        Ok(Value::default())
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        // Below zero is how some clients say "no bound".
        Ok(Value { number: u64::try_from(number).ok(), ..Value::default() })
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(Value { number: Some(number), ..Value::default() })
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(Value { number: (number >= 0.0).then_some(number as u64), ..Value::default() })
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value { text: (text.len() <= MAX_WORD_BYTES).then(|| text.to_owned()), ..Value::default() })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut value = Value::default();
        while items.next_element::<IgnoredAny>()?.is_some() {
            value.num_items += 1;
        }
        Ok(value)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut value = Value::default();
        while let Some(name) = entries.next_key::<Name>()? {
            match name {
                Name::Effort => value.effort = entries.next_value::<Value>()?.text,
                Name::Other => drop(entries.next_value::<IgnoredAny>()?),
            }
        }
        Ok(value)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Name {
    Effort,
    #[serde(other)]
    Other,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traits(body: &str, check: impl FnOnce(Traits<'_>)) {
        let hints: Hints = serde_json::from_str(body).unwrap_or_else(|error| panic!("{body}: {error}"));
        check(hints.traits(&HeaderMap::new(), Work::Chat, None));
    }

    #[test]
    fn every_protocol_is_read() {
        let body = r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "four"}]}],
                       "max_completion_tokens": 7, "tools": [{}], "reasoning_effort": "low", "other": 1}"#;
        traits(body, |traits| {
            // "user", "text" and "four".
            assert_eq!((traits.prompt_bytes, traits.max_tokens, traits.tools), (12, 7, true));
            assert_eq!(traits.reasoning_effort, Some("low"));
        });
        traits(r#"{"input": "abc", "reasoning": {"effort": "high", "x": [1]}, "tools": []}"#, |traits| {
            assert_eq!((traits.prompt_bytes, traits.max_tokens, traits.tools), (3, u64::MAX, false));
            assert_eq!(traits.reasoning_effort, Some("high"));
        });
        traits(r#"{"prompt": [1, 2, 3], "n_predict": -1}"#, |traits| {
            assert_eq!((traits.prompt_bytes, traits.max_tokens), (12, u64::MAX));
        });
    }

    #[test]
    fn nothing_is_refused_here() {
        for value in ["null", "true", "-1", "1e300", "\"x\"", "[[]]", "{\"effort\": {}}"] {
            let body = format!(
                r#"{{"tools": {value}, "reasoning": {value}, "prompt": {value}, "max_tokens": {value}}}"#
            );
            traits(&body, |_| {});
        }
    }
}
