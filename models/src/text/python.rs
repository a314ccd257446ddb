//! Values printed as Python prints them, because templates are written for Python's Jinja: `True`,
//! `None`, `{'a': [1]}`, and `json.dumps` for the `tojson` filter of transformers (which, unlike
//! minijinja's, neither escapes HTML nor sorts keys). Every byte goes through the meter.

use minijinja::value::{ObjectRepr, Value, ValueKind};
use minijinja::{Error, ErrorKind};

use super::meter::{LimitedString, MAX_DEPTH};

/// `str(value)`
pub(super) fn print(value: &Value, out: &mut LimitedString<'_>) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.push(text),
        None if value.is_undefined() => Ok(()),
        None => repr(value, out, 0),
    }
}

fn repr(value: &Value, out: &mut LimitedString<'_>, depth: usize) -> Result<(), Error> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::None => out.push("None"),
        ValueKind::Undefined => out.push("Undefined"),
        ValueKind::Bool => out.push(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => number(value, out),
        ValueKind::String => repr_string(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { ("(", ")") } else { ("[", "]") };
            out.push(open)?;
            let mut len = 0;
            for item in value.try_iter()? {
                if len > 0 {
                    out.push(", ")?;
                }
                repr(&item, out, depth + 1)?;
                len += 1;
            }
            if value.is_tuple() && len == 1 {
                out.push(",")?;
            }
            out.push(close)
        }
        ValueKind::Map => {
            out.push("{")?;
            for (index, (key, item)) in pairs(value).enumerate() {
                if index > 0 {
                    out.push(", ")?;
                }
                repr(&key, out, depth + 1)?;
                out.push(": ")?;
                repr(&item, out, depth + 1)?;
            }
            out.push("}")
        }
        _ => out.push_fmt(format_args!("{value}")),
    }
}

fn repr_string(text: &str, out: &mut LimitedString<'_>) -> Result<(), Error> {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push_fmt(format_args!("{quote}"))?;
    for char in text.chars() {
        match char {
            '\n' => out.push("\\n")?,
            '\r' => out.push("\\r")?,
            '\t' => out.push("\\t")?,
            '\\' => out.push("\\\\")?,
            char if char == quote => out.push_fmt(format_args!("\\{char}"))?,
            char if (char as u32) < 0x20 || char == '\x7F' => {
                out.push_fmt(format_args!("\\x{:02x}", char as u32))?;
            }
            char => out.push(char.encode_utf8(&mut [0; 4]))?,
        }
    }
    out.push_fmt(format_args!("{quote}"))
}

/// Integers as they are; floats with the shortest digits that read back the same, and an exponent
/// outside 1e-4..1e16, as Python chooses.
fn number(value: &Value, out: &mut LimitedString<'_>) -> Result<(), Error> {
    if value.is_integer() {
        return out.push_fmt(format_args!("{value}"));
    }
    let float = f64::try_from(value.clone())?;
    let magnitude = float.abs();
    if !float.is_finite() {
        let text = if float.is_nan() {
            "nan"
        } else if float > 0.0 {
            "inf"
        } else {
            "-inf"
        };
        return out.push(text);
    }
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{float:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
        return out.push_fmt(format_args!("{digits}e{sign}{exponent:0>2}"));
    }
    out.push_fmt(format_args!("{float:?}"))
}

/// The options of `json.dumps` that templates use.
pub(super) struct JsonStyle {
    /// What one level is indented by; `None` writes one line.
    pub(super) indent: Option<String>,
    pub(super) item_separator: String,
    pub(super) key_separator: String,
    pub(super) ensure_ascii: bool,
    pub(super) sort_keys: bool,
}

/// `json.dumps(value)`
pub(super) fn json(
    value: &Value,
    style: &JsonStyle,
    out: &mut LimitedString<'_>,
    depth: usize,
) -> Result<(), Error> {
    check_depth(depth)?;
    let new_line = |out: &mut LimitedString<'_>, depth: usize| match &style.indent {
        None => Ok(()),
        Some(indent) => {
            out.push("\n")?;
            (0..depth).try_for_each(|_| out.push(indent))
        }
    };
    match value.kind() {
        ValueKind::None => out.push("null"),
        ValueKind::Bool => out.push(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => number(value, out),
        ValueKind::String => json_string(value.as_str().unwrap_or_default(), style, out),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push("[")?;
            let mut is_empty = true;
            for item in value.try_iter()? {
                if !is_empty {
                    out.push(&style.item_separator)?;
                }
                is_empty = false;
                new_line(out, depth + 1)?;
                json(&item, style, out, depth + 1)?;
            }
            if !is_empty {
                new_line(out, depth)?;
            }
            out.push("]")
        }
        ValueKind::Map => {
            let mut entries: Vec<(Value, Value)> = pairs(value).collect();
            if style.sort_keys {
                entries.sort_by(|left, right| left.0.cmp(&right.0));
            }
            out.push("{")?;
            for (index, (key, item)) in entries.iter().enumerate() {
                if index > 0 {
                    out.push(&style.item_separator)?;
                }
                new_line(out, depth + 1)?;
                match key.as_str() {
                    Some(key) => json_string(key, style, out)?,
                    None => {
                        out.push("\"")?;
                        json(key, style, out, depth + 1)?;
                        out.push("\"")?;
                    }
                }
                out.push(&style.key_separator)?;
                json(item, style, out, depth + 1)?;
            }
            if !entries.is_empty() {
                new_line(out, depth)?;
            }
            out.push("}")
        }
        kind => Err(Error::new(ErrorKind::InvalidOperation, format!("a value of kind {kind} is not JSON"))),
    }
}

fn json_string(text: &str, style: &JsonStyle, out: &mut LimitedString<'_>) -> Result<(), Error> {
    out.push("\"")?;
    for char in text.chars() {
        match char {
            '"' => out.push("\\\"")?,
            '\\' => out.push("\\\\")?,
            '\n' => out.push("\\n")?,
            '\r' => out.push("\\r")?,
            '\t' => out.push("\\t")?,
            '\x08' => out.push("\\b")?,
            '\x0C' => out.push("\\f")?,
            char if (char as u32) < 0x20 => out.push_fmt(format_args!("\\u{:04x}", char as u32))?,
            char if style.ensure_ascii && !char.is_ascii() => {
                for unit in char.encode_utf16(&mut [0; 2]) {
                    out.push_fmt(format_args!("\\u{unit:04x}"))?;
                }
            }
            char => out.push(char.encode_utf8(&mut [0; 4]))?,
        }
    }
    out.push("\"")
}

fn pairs(value: &Value) -> impl Iterator<Item = (Value, Value)> {
    value
        .as_object()
        .filter(|object| object.repr() == ObjectRepr::Map)
        .and_then(|object| object.try_iter_pairs())
        .into_iter()
        .flatten()
}

fn check_depth(depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(Error::new(ErrorKind::InvalidOperation, "a value nests too deeply to be printed"));
    }
    Ok(())
}
