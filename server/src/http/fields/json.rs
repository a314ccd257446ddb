//! What fields are read with: integers of any size, lists that stop at a cap, and the checks whose
//! faults name the field, what it holds and what it must hold.

use std::fmt;

use serde::de::{self, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

use crate::http::error::ApiError;

/// Where reading a list stops, whatever the request's limits are.
const MAX_LISTED: usize = 1024;

/// Any whole number that JSON can hold, also one written as `16.0` or too large for 64 bits: whoever
/// sends it is told about its range and not about its type.
#[derive(Clone, Copy, Debug)]
pub(in crate::http) struct Integer(pub(in crate::http) i128);

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
pub(in crate::http) fn integer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i128>, D::Error> {
    Ok(Option::<Integer>::deserialize(deserializer)?.map(|Integer(value)| value))
}

/// An object's entries as they stand there; one that repeats a key is not lost.
#[derive(Debug)]
pub(super) struct Entries(pub(super) Vec<(String, f64)>);

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

/// One string or several.
#[derive(Debug)]
pub(in crate::http) struct Strings(pub(in crate::http) Vec<String>);

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
pub(super) struct Ids(pub(super) Vec<Integer>);

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

/// A token id in plain digits, without a sign or leading zeros: each id has one spelling.
pub(super) fn canonical_id(text: &str) -> Option<u32> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if is_plain { text.parse().ok() } else { None }
}

/// Checks that `value` lies in `low..=high`.
pub(in crate::http) fn in_range(param: &str, value: i128, low: i128, high: i128) -> Result<i128, ApiError> {
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(ApiError::invalid(param, format!("{param} is {value}; it must be an integer from {low} to {high}")))
}

/// What one of a few words means.
pub(in crate::http) fn one_of<T: Copy>(param: &str, word: &str, known: &[(&str, T)]) -> Result<T, ApiError> {
    if let Some((_, meaning)) = known.iter().find(|(name, _)| *name == word) {
        return Ok(*meaning);
    }
    /// A message quotes no more of what the client wrote.
    const MAX_QUOTED_CHARS: usize = 64;
    let quoted: String = word.chars().take(MAX_QUOTED_CHARS).collect();
    let names: Vec<String> = known.iter().map(|(name, _)| format!("{name:?}")).collect();
    Err(ApiError::invalid(param, format!("{param} is {quoted:?}; it must be {}", names.join(" or "))))
}

pub(super) fn number(param: &str, value: Option<f64>, default: f32) -> Result<f32, ApiError> {
    let Some(value) = value else { return Ok(default) };
    let narrow = value as f32;
    if narrow.is_finite() {
        return Ok(narrow);
    }
    Err(ApiError::invalid(param, format!("{param} is {value:e}; it must be a smaller number")))
}
