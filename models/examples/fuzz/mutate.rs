//! Changes that keep most of a file's structure, so that what is wrong lies deep in it: fields get values that
//! mean something, parts vanish, come twice or change places. Now and then bytes change blindly.

#[path = "mutate/safetensors.rs"]
mod safetensors;

use serde_json::Value;

use super::random::Random;
pub(crate) use safetensors::safetensors;

/// Numbers at which sizes, counts and offsets go wrong.
const NUMBERS: [u64; 24] = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    16,
    31,
    32,
    33,
    63,
    64,
    127,
    255,
    256,
    65_535,
    1 << 20,
    1 << 31,
    u32::MAX as u64,
    1 << 40,
    1 << 63,
    u64::MAX,
];

/// A few changes, more of them rarely.
fn times(random: &mut Random) -> usize {
    1 + [0, 0, 0, 1, 1, 2, 4, 8][random.below(8)]
}

fn change_bytes(bytes: &mut Vec<u8>, random: &mut Random) {
    if bytes.is_empty() {
        return;
    }
    let at = random.below(bytes.len());
    match random.below(6) {
        0 => bytes.truncate(at),
        1 => bytes[at] ^= 1 << random.below(8),
        2 => bytes[at] = random.pick(&[0, 1, 0x7f, 0x80, 0xff, b'{', b'"']),
        3 => {
            let number = random.pick(&NUMBERS).to_le_bytes();
            let width = random.pick(&[1, 2, 4, 8]).min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&number[..width]);
        }
        4 => {
            let end = (at + 1 + random.below(16)).min(bytes.len());
            bytes.drain(at..end);
        }
        _ => {
            let end = (at + 1 + random.below(16)).min(bytes.len());
            let again = bytes[at..end].to_vec();
            bytes.splice(at..at, again);
        }
    }
}

/// The header of a GGUF file as its fields, one after the other, and what follows it.
fn gguf_fields(file: &[u8]) -> Option<(Vec<Vec<u8>>, Vec<u8>)> {
    let mut at = 0usize;
    let mut fields = Vec::new();
    let mut take = |fields: &mut Vec<Vec<u8>>, len: usize| -> Option<u64> {
        let field = file.get(at..at.checked_add(len)?)?;
        at += len;
        fields.push(field.to_vec());
        let mut number = [0; 8];
        number[..len.min(8)].copy_from_slice(&field[..len.min(8)]);
        Some(u64::from_le_bytes(number))
    };
    let size = |kind: u64| {
        [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8].get(kind as usize).copied().filter(|size| *size > 0)
    };
    take(&mut fields, 4)?;
    take(&mut fields, 4)?;
    let (tensors, keys) = (take(&mut fields, 8)?, take(&mut fields, 8)?);
    for _ in 0..keys {
        let len = take(&mut fields, 8)?;
        take(&mut fields, len as usize)?;
        let mut kind = take(&mut fields, 4)?;
        let mut count = 1;
        if kind == 9 {
            kind = take(&mut fields, 4)?;
            count = take(&mut fields, 8)?;
        }
        for _ in 0..count {
            let len = if kind == 8 { take(&mut fields, 8)? as usize } else { size(kind)? };
            take(&mut fields, len)?;
        }
    }
    for _ in 0..tensors {
        let len = take(&mut fields, 8)?;
        take(&mut fields, len as usize)?;
        let dimensions = take(&mut fields, 4)?;
        (0..dimensions).try_for_each(|_| take(&mut fields, 8).map(|_| ()))?;
        take(&mut fields, 4)?;
        take(&mut fields, 8)?;
    }
    Some((fields, file[at..].to_vec()))
}

/// A GGUF file with some fields changed.
pub(crate) fn gguf(file: &[u8], random: &mut Random) -> Vec<u8> {
    let (mut fields, mut rest) = gguf_fields(file).expect("the good file is well-formed");
    for _ in 0..times(random) {
        let at = random.below(fields.len());
        match random.below(10) {
            0 => drop(fields.remove(at)),
            1 => {
                let field = fields[at].clone();
                fields.insert(at, field);
            }
            2 => {
                let other = random.below(fields.len());
                fields.swap(at, other);
            }
            3 => {
                let other = random.below(fields.len());
                fields[at] = fields[other].clone();
            }
            4 => change_bytes(&mut rest, random),
            5 => change_bytes(&mut fields[at], random),
            _ => {
                // A number of the field's own width, or a text of another length with its length before it.
                let width = fields[at].len();
                let number = random.pick(&NUMBERS).to_le_bytes();
                match width {
                    1 | 2 | 4 | 8 => fields[at].copy_from_slice(&number[..width]),
                    _ => {
                        fields[at].resize(random.below(64), b'a');
                        let len = (fields[at].len() as u64).to_le_bytes().to_vec();
                        if at > 0 {
                            fields[at - 1] = len;
                        }
                    }
                }
            }
        }
        if fields.is_empty() {
            break;
        }
    }
    fields.push(rest);
    fields.concat()
}

/// A JSON file of which some values are changed.
pub(crate) fn json(file: &[u8], random: &mut Random) -> Vec<u8> {
    let mut value: Value = serde_json::from_slice(file).expect("the good file is well-formed");
    for _ in 0..times(random) {
        let count = nodes(&value);
        let other = node(&mut value, &mut random.below(count)).cloned().unwrap_or(Value::Null);
        let Some(target) = node(&mut value, &mut random.below(count)) else { continue };
        change_value(target, other, random);
    }
    let mut bytes = value.to_string().into_bytes();
    if random.below(32) == 0 {
        change_bytes(&mut bytes, random);
    }
    bytes
}

fn nodes(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(nodes).sum::<usize>(),
        Value::Object(fields) => fields.values().map(nodes).sum(),
        _ => 0,
    }
}

/// The value with that number, counted from the outermost.
fn node<'a>(value: &'a mut Value, number: &mut usize) -> Option<&'a mut Value> {
    if *number == 0 {
        return Some(value);
    }
    *number -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| node(item, number)),
        Value::Object(fields) => fields.values_mut().find_map(|item| node(item, number)),
        _ => None,
    }
}

fn change_value(target: &mut Value, other: Value, random: &mut Random) {
    let scalar = |random: &mut Random| match random.below(8) {
        0 => Value::Null,
        1 => Value::Bool(random.below(2) == 0),
        2 => Value::from(random.pick(&[-1.0, 0.0, 0.5, 1e-300, 1e300, -0.0])),
        3 => Value::from(
            random
                .pick(&["", "a", "\u{0}", "Ġ", "😀", "F8_E4M3", "I32", "BF16", "linear", "yarn", "(?:a|b)+"]),
        ),
        4 => Value::from(-(random.pick(&NUMBERS) as i64 >> 1)),
        _ => Value::from(random.pick(&NUMBERS)),
    };
    match (target, random.below(8)) {
        (target, 0) => *target = other,
        (target, 1) => *target = scalar(random),
        (Value::Array(items), 2..=4) if !items.is_empty() => {
            let at = random.below(items.len());
            match random.below(3) {
                0 => drop(items.remove(at)),
                1 => items.push(other),
                _ => items[at] = scalar(random),
            }
        }
        (Value::Object(fields), 2..=4) if !fields.is_empty() => {
            let key = fields.keys().nth(random.below(fields.len())).expect("there are keys").clone();
            match random.below(3) {
                0 => drop(fields.remove(&key)),
                1 => drop(fields.insert(format!("{key}_"), other)),
                _ => drop(fields.insert(key, scalar(random))),
            }
        }
        (Value::String(text), 2..=4) => match random.below(3) {
            0 => {
                text.pop();
            }
            1 => text.push('é'),
            _ => *text = text.repeat(1 + random.below(4)),
        },
        (target @ Value::Number(_), 2..=5) => {
            let number = target.as_u64().unwrap_or(0);
            *target = Value::from(random.pick(&[
                number.wrapping_add(1),
                number.wrapping_sub(1),
                number / 2,
                number.wrapping_mul(2),
            ]));
        }
        (target, 5) => {
            for _ in 0..random.pick(&[1, 2, 8, 100, 200]) {
                *target = Value::Array(vec![target.take()]);
            }
        }
        (target, _) => *target = scalar(random),
    }
}

/// Pieces of templates that do something.
const PIECES: [&str; 28] = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{%- for x in messages %}",
    "{% endfor %}",
    "{% if true %}",
    "{% endif %}",
    "{% set a = [a, a] %}",
    "{{ a * 99999999 }}",
    "{{ messages | tojson }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ range(999999999) }}",
    "{{ 'x' * 999999999 }}",
    "{{ [1] * 99999999 }}",
    "{{ -9223372036854775808 // -1 }}",
    "{{ 1 // 0 }}",
    "{{ 1 % 0 }}",
    "{{ 2 ** 9999 }}",
    "{{ 'a'.split('') }}",
    "{{ 'ab'[5:1:-1] }}",
    "{{ [][0] }}",
    "{{ x.y.z }}",
    "{{ messages[::0] }}",
    "{{ 'é'[1:] }}",
    "{% set ns = namespace(v=1) %}{% set ns.v = ns %}{{ ns }}",
    "{{ strftime_now('%Q%') }}",
    "{# ",
];

/// A template of which pieces are moved, doubled, dropped or replaced.
pub(crate) fn template(file: &[u8], random: &mut Random) -> Vec<u8> {
    let text = String::from_utf8_lossy(file);
    let mut pieces: Vec<&str> = text.split_inclusive(|c: char| !c.is_alphanumeric()).collect();
    for _ in 0..times(random) {
        if pieces.is_empty() {
            break;
        }
        let (at, other) = (random.below(pieces.len()), random.below(pieces.len()));
        match random.below(6) {
            0 => {
                pieces.remove(at);
            }
            1 => pieces.swap(at, other),
            2 => pieces[at] = pieces[other],
            3 => {
                let end = (at + random.below(30)).min(pieces.len());
                let again = pieces[at..end].to_vec();
                pieces.splice(other..other, again);
            }
            4 => drop(pieces.drain(at..(at + random.below(20)).min(pieces.len()))),
            _ => pieces.insert(at, random.pick(&PIECES)),
        }
    }
    let mut bytes = pieces.concat().into_bytes();
    if random.below(32) == 0 {
        change_bytes(&mut bytes, random);
    }
    bytes
}
