//! The values of a GGUF file's metadata. Strings and arrays are ranges of the mapping, so a value
//! costs the same few bytes whatever it claims to hold; elements are decoded when they are read.

use std::ops::Range;

/// Type of a metadata value or of an array's elements. The numbers are the format's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    /// All types; the index of each is its number in a file.
    const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    pub(super) fn from_id(id: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(id).ok()?).copied()
    }

    pub(super) fn id(self) -> u32 {
        Self::ALL.iter().position(|kind| *kind == self).map_or(0, |index| index as u32)
    }

    /// Bytes of one value; `None` for those whose length the file states.
    pub(super) fn size_bytes(self) -> Option<usize> {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => Some(1),
            ValueType::U16 | ValueType::I16 => Some(2),
            ValueType::U32 | ValueType::I32 | ValueType::F32 => Some(4),
            ValueType::U64 | ValueType::I64 | ValueType::F64 => Some(8),
            ValueType::String | ValueType::Array => None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            ValueType::U8 => "u8",
            ValueType::I8 => "i8",
            ValueType::U16 => "u16",
            ValueType::I16 => "i16",
            ValueType::U32 => "u32",
            ValueType::I32 => "i32",
            ValueType::F32 => "f32",
            ValueType::Bool => "bool",
            ValueType::String => "string",
            ValueType::Array => "array",
            ValueType::U64 => "u64",
            ValueType::I64 => "i64",
            ValueType::F64 => "f64",
        }
    }
}

/// Where a value lies. Invariant: the range is within the mapping and holds exactly the value; of a
/// string it is the bytes without their length.
#[derive(Clone, Debug)]
pub(super) enum Stored {
    Scalar {
        kind: ValueType,
        bytes: Range<usize>,
    },
    String(Range<usize>),
    /// `bytes` holds `len` elements, each string with its length before it.
    Array {
        kind: ValueType,
        len: usize,
        bytes: Range<usize>,
    },
}

impl Stored {
    pub(super) fn read<'a>(&self, file: &'a [u8]) -> Value<'a> {
        match self {
            Stored::Scalar { kind, bytes } => scalar(*kind, &file[bytes.clone()]),
            Stored::String(bytes) => Value::String(&file[bytes.clone()]),
            Stored::Array { kind, len, bytes } => {
                Value::Array(Array { kind: *kind, len: *len, bytes: &file[bytes.clone()] })
            }
        }
    }
}

/// A metadata value. Integers and floats of all widths are one thing here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// An integer of any type; i128 holds both u64 and i64.
    Int(i128),
    /// f32 or f64.
    Float(f64),
    /// A bool.
    Bool(bool),
    /// A string, which the format wants in UTF-8.
    String(&'a [u8]),
    /// Values of one type.
    Array(Array<'a>),
}

/// An array of scalars or strings; the format's arrays of arrays are refused by the reader.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Array<'a> {
    kind: ValueType,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    pub fn kind(&self) -> ValueType {
        self.kind
    }

    /// The elements in order.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (kind, mut rest) = (self.kind, self.bytes);
        (0..self.len).map_while(move |_| match kind.size_bytes() {
            Some(size) => {
                let (value, after) = rest.split_at_checked(size)?;
                rest = after;
                Some(scalar(kind, value))
            }
            None => {
                let (len, after) = rest.split_first_chunk()?;
                let (value, after) = after.split_at_checked(u64::from_le_bytes(*len) as usize)?;
                rest = after;
                Some(Value::String(value))
            }
        })
    }
}

/// `bytes` is as long as `kind` says.
fn scalar<'a>(kind: ValueType, bytes: &[u8]) -> Value<'a> {
    // Widened little-endian bytes, and how far the sign bit is from the top.
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let unsigned = u64::from_le_bytes(wide);
    let spare = 64 - 8 * bytes.len() as u32;
    match kind {
        ValueType::U8 | ValueType::U16 | ValueType::U32 | ValueType::U64 => Value::Int(unsigned.into()),
        ValueType::I8 | ValueType::I16 | ValueType::I32 | ValueType::I64 => {
            Value::Int(((unsigned << spare) as i64 >> spare).into())
        }
        ValueType::F32 => Value::Float(f32::from_bits(unsigned as u32).into()),
        ValueType::F64 => Value::Float(f64::from_bits(unsigned)),
        ValueType::Bool => Value::Bool(unsigned != 0),
        ValueType::String | ValueType::Array => {
            unreachable!("strings and arrays are not scalars: this is a bug")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_keep_their_sign_and_value() {
        assert_eq!(scalar(ValueType::I8, &[0xFF]), Value::Int(-1));
        assert_eq!(scalar(ValueType::U8, &[0xFF]), Value::Int(255));
        assert_eq!(scalar(ValueType::I16, &(-300i16).to_le_bytes()), Value::Int(-300));
        assert_eq!(scalar(ValueType::I32, &i32::MIN.to_le_bytes()), Value::Int(i32::MIN.into()));
        assert_eq!(scalar(ValueType::U64, &u64::MAX.to_le_bytes()), Value::Int(u64::MAX.into()));
        assert_eq!(scalar(ValueType::I64, &(-2i64).to_le_bytes()), Value::Int(-2));
        assert_eq!(scalar(ValueType::F32, &0.5f32.to_le_bytes()), Value::Float(0.5));
        assert_eq!(scalar(ValueType::F64, &(-0.25f64).to_le_bytes()), Value::Float(-0.25));
        assert_eq!(scalar(ValueType::Bool, &[1]), Value::Bool(true));
    }

    #[test]
    fn ids_are_the_formats() {
        for (id, kind) in
            [(0, ValueType::U8), (8, ValueType::String), (9, ValueType::Array), (12, ValueType::F64)]
        {
            assert_eq!(ValueType::from_id(id), Some(kind));
            assert_eq!(kind.id(), id);
        }
        assert_eq!(ValueType::from_id(13), None);
    }
}
