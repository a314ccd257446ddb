//! JSON of any shape, bounded in how many values it holds.
//!
//! A value costs about a hundred bytes however short it is written, so that a body of empty objects
//! would take fifty times its size. Strings are bounded by the body; the number of values is bounded
//! here.

use std::fmt;

use serde::de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Number, Value};

use crate::http::error::ApiError;

/// Most values in one field: the largest tool schemas and longest conversations seen have some tens
/// of thousands. About 30 MiB.
const MAX_VALUES: usize = 1 << 18;

/// JSON inside of a string.
///
/// # Errors
/// If it is not JSON, or holds too many values.
pub(in crate::http) fn bounded_from_str(text: &str) -> Result<Value, serde_json::Error> {
    let mut room = MAX_VALUES;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Seed { room: &mut room }.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

/// A field of any shape.
#[derive(Clone, Debug, Default)]
pub(in crate::http) struct Bounded(pub(in crate::http) Value);

impl<'de> Deserialize<'de> for Bounded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut room = MAX_VALUES;
        Seed { room: &mut room }.deserialize(deserializer).map(Bounded)
    }
}

/// An array of objects.
///
/// # Errors
/// If it is something else.
pub(in crate::http) fn objects(
    param: &str,
    field: Option<Bounded>,
) -> Result<Vec<Map<String, Value>>, ApiError> {
    let items = match field.map(|Bounded(value)| value) {
        None | Some(Value::Null) => return Ok(vec![]),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type(param, "an array", &other)),
    };
    items
        .into_iter()
        .enumerate()
        .map(|(i, item)| match item {
            Value::Object(object) => Ok(object),
            other => Err(wrong_type(&format!("{param}[{i}]"), "an object", &other)),
        })
        .collect()
}

/// An object; empty if absent.
///
/// # Errors
/// If it is something else.
pub(in crate::http) fn object(param: &str, field: Option<Bounded>) -> Result<Map<String, Value>, ApiError> {
    match field.map(|Bounded(value)| value) {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(object)) => Ok(object),
        Some(other) => Err(wrong_type(param, "an object", &other)),
    }
}

/// The 400 for a value of another type.
pub(in crate::http) fn wrong_type(param: &str, wanted: &str, found: &Value) -> ApiError {
    let found = match found {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    ApiError::invalid(param, format!("{param} is {found}; it must be {wanted}"))
}

struct Seed<'a> {
    room: &'a mut usize,
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        match self.room.checked_sub(1) {
            Some(room) => *self.room = room,
            None => {
                let message = format_args!("more than {MAX_VALUES} values; so many are taken in one field");
                return Err(de::Error::custom(message));
            }
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::from(text))
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::String(text))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = elements.next_element_seed(Seed { room: &mut *self.room })? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(Seed { room: &mut *self.room })?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_VALUES, bounded_from_str};

    #[test]
    fn json_is_read_as_it_stands_up_to_a_number_of_values() {
        let text = "{\"a\":[1,-2,1.5,true,null,\"x\\n\"],\"b\":{}}";
        assert_eq!(bounded_from_str(text).expect("JSON").to_string(), text);
        assert!(bounded_from_str("1 2").is_err());
        let list = |count: usize| format!("[{}]", vec!["{}"; count].join(","));
        assert!(bounded_from_str(&list(MAX_VALUES - 1)).is_ok());
        let error = bounded_from_str(&list(MAX_VALUES)).expect_err("one too many").to_string();
        assert!(error.contains("262144 values"), "{error}");
    }
}
