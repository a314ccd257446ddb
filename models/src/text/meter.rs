//! What bounds a chat template beside fuel: the bytes of all values it makes, the bytes it prints, how
//! deep its values nest. One [`Meter`] lives for one rendering; see `bytecode.rs` for how values reach it.
//!
//! Bounds: whatever is made is charged to one budget that never grows back, so live memory cannot
//! exceed it by more than the one value in the making, whose size is checked before it is made where
//! it can exceed its inputs (`+ ~ * replace join indent list split format`), and is at most a few
//! times a limited string otherwise.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{ObjectRepr, Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// The cost of a list element or map entry, by which a list of many small things is charged.
const BYTES_PER_ITEM: usize = 32;
/// JSON from a client nests at most 128 deep; deeper values are refused before recursion hurts.
pub(super) const MAX_DEPTH: usize = 160;

/// The budget of one rendering.
#[derive(Debug)]
pub(super) struct Meter {
    /// Bytes of values that may still be made.
    memory: AtomicUsize,
    /// Bytes that may still be printed, into captures too.
    output: AtomicUsize,
    /// The longest string.
    max_string: usize,
}

impl Meter {
    pub(super) fn new(memory: usize, output: usize) -> Self {
        Meter { memory: memory.into(), output: output.into(), max_string: output }
    }

    /// Pays for `bytes` that are about to be made.
    pub(super) fn charge(&self, bytes: usize) -> Result<(), Error> {
        spend(&self.memory, bytes, "the template builds too much text")
    }

    /// Pays for a string of `len` bytes that is about to be made.
    pub(super) fn charge_string(&self, len: usize) -> Result<(), Error> {
        if len > self.max_string {
            return Err(too_large("the template builds a string that is too long"));
        }
        self.charge(len)
    }

    /// Pays for a list of `len` elements that is about to be made.
    pub(super) fn charge_items(&self, len: usize) -> Result<(), Error> {
        self.charge(len.saturating_mul(BYTES_PER_ITEM))
    }

    /// Pays for `bytes` of output.
    pub(super) fn charge_output(&self, bytes: usize) -> Result<(), Error> {
        spend(&self.output, bytes, "the template prints too much text")
    }

    /// Pays for a value that has been made, and checks how deep it nests.
    pub(super) fn charge_value(&self, value: &Value) -> Result<(), Error> {
        match value.as_str() {
            Some(text) => self.charge_string(text.len()),
            None => self.walk(value, 0, true),
        }
    }

    /// [`Meter::charge_value`] for the result of a call: a lazy sequence becomes a list.
    pub(super) fn charge_call(&self, value: Value) -> Result<Value, Error> {
        let is_lazy = value.as_object().is_some_and(|object| object.repr() == ObjectRepr::Iterable);
        if !is_lazy {
            return self.charge_value(&value).map(|()| value);
        }
        let mut items = vec![];
        for item in value.try_iter()? {
            self.charge_items(1)?;
            self.walk(&item, 1, false)?;
            items.push(item);
        }
        Ok(Value::from(items))
    }

    /// Checks a value that is to be stored in a namespace: no namespace may be within.
    pub(super) fn check_stored(&self, value: &Value) -> Result<(), Error> {
        self.walk(value, 0, false)
    }

    fn walk(&self, value: &Value, depth: usize, namespace_allowed: bool) -> Result<(), Error> {
        let Some(object) = value.as_object() else { return Ok(()) };
        if depth > MAX_DEPTH {
            return Err(too_large("the template nests values too deeply"));
        }
        match object.repr() {
            ObjectRepr::Map if !namespace_allowed && object.type_name().ends_with("::Namespace") => {
                Err(Error::new(ErrorKind::InvalidOperation, "a namespace cannot be stored in a namespace"))
            }
            ObjectRepr::Map => {
                for (_, item) in object.try_iter_pairs().into_iter().flatten() {
                    self.charge(BYTES_PER_ITEM)?;
                    self.walk(&item, depth + 1, false)?;
                }
                Ok(())
            }
            ObjectRepr::Seq | ObjectRepr::Iterable => {
                for item in object.try_iter().into_iter().flatten() {
                    self.charge(BYTES_PER_ITEM)?;
                    self.walk(&item, depth + 1, false)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A string that accepts no more than the meter still allows.
    pub(super) fn writer(&self) -> LimitedString<'_> {
        LimitedString { text: String::new(), meter: self, error: None }
    }

    /// `left + right`
    pub(super) fn add(&self, left: &Value, right: &Value) -> Result<Value, Error> {
        if let (Some(left), Some(right)) = (left.as_str(), right.as_str()) {
            return self.concat_strings(left, right);
        }
        if is_sequence(left) && is_sequence(right) {
            // Eager, where minijinja is lazy: 40 doublings of a lazy list are cheap until it is used.
            let mut items = vec![];
            for item in left.try_iter()?.chain(right.try_iter()?) {
                self.charge_items(1)?;
                items.push(item);
            }
            return Ok(Value::from(items));
        }
        match (as_integer(left), as_integer(right)) {
            (Some(left_int), Some(right_int)) => match left_int.checked_add(right_int) {
                Some(sum) => Ok(Value::from(sum)),
                None => Err(unsupported("+", left, right)),
            },
            _ => match (as_float(left), as_float(right)) {
                (Some(left), Some(right)) => Ok(Value::from(left + right)),
                _ => Err(unsupported("+", left, right)),
            },
        }
    }

    /// `left * right`
    pub(super) fn multiply(&self, left: &Value, right: &Value) -> Result<Value, Error> {
        let repeated = if as_integer(right).is_some() { (left, right) } else { (right, left) };
        if let (Some(text), Some(count)) = (repeated.0.as_str(), as_integer(repeated.1)) {
            let count = usize::try_from(count).unwrap_or(0);
            self.charge_string(text.len().saturating_mul(count))?;
            return Ok(Value::from(text.repeat(count)));
        }
        if let (true, Some(count)) = (is_sequence(repeated.0), as_integer(repeated.1)) {
            let items: Vec<Value> = repeated.0.try_iter()?.collect();
            let len = items.len().saturating_mul(usize::try_from(count).unwrap_or(0));
            self.charge_items(len)?;
            return Ok(Value::from(items.iter().cycle().take(len).cloned().collect::<Vec<_>>()));
        }
        match (as_integer(left), as_integer(right)) {
            (Some(left_int), Some(right_int)) => match left_int.checked_mul(right_int) {
                Some(product) => Ok(Value::from(product)),
                None => Err(unsupported("*", left, right)),
            },
            _ => match (as_float(left), as_float(right)) {
                (Some(left), Some(right)) => Ok(Value::from(left * right)),
                _ => Err(unsupported("*", left, right)),
            },
        }
    }

    /// `left ~ right`, both printed.
    pub(super) fn concat(&self, left: &Value, right: &Value) -> Result<Value, Error> {
        let mut writer = self.writer();
        super::python::print(left, &mut writer)?;
        super::python::print(right, &mut writer)?;
        writer.finish().map(Value::from)
    }

    fn concat_strings(&self, left: &str, right: &str) -> Result<Value, Error> {
        self.charge_string(left.len() + right.len())?;
        Ok(Value::from([left, right].concat()))
    }

    /// Every occurrence of `old` in `text` replaced, at most `count` of them.
    pub(super) fn replace(&self, text: &str, old: &str, new: &str, count: usize) -> Result<Value, Error> {
        let occurrences = text.matches(old).take(count).count();
        self.charge_string(text.len().saturating_add(occurrences.saturating_mul(new.len())))?;
        Ok(Value::from(text.replacen(old, new, count)))
    }

    /// The printed `items` with `separator` between them.
    pub(super) fn join(&self, items: &Value, separator: &str) -> Result<Value, Error> {
        let mut writer = self.writer();
        for (index, item) in items.try_iter()?.enumerate() {
            if index > 0 {
                writer.push(separator)?;
            }
            super::python::print(&item, &mut writer)?;
        }
        writer.finish().map(Value::from)
    }
}

fn spend(budget: &AtomicUsize, amount: usize, message: &'static str) -> Result<(), Error> {
    // One thread renders, so this need not be one operation; the atomic only makes the meter Sync.
    match budget.load(Ordering::Relaxed).checked_sub(amount) {
        Some(rest) => {
            budget.store(rest, Ordering::Relaxed);
            Ok(())
        }
        None => Err(too_large(message)),
    }
}

fn too_large(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn unsupported(operator: &str, left: &Value, right: &Value) -> Error {
    let message = format!(
        "{operator} does not go with {} and {}, or its result is too large",
        left.kind(),
        right.kind()
    );
    Error::new(ErrorKind::InvalidOperation, message)
}

fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

fn as_integer(value: &Value) -> Option<i64> {
    match value.kind() {
        ValueKind::Number if value.is_integer() => value.as_i64(),
        ValueKind::Bool => Some(i64::from(value.is_true())),
        _ => None,
    }
}

fn as_float(value: &Value) -> Option<f64> {
    if value.kind() == ValueKind::Number { f64::try_from(value.clone()).ok() } else { None }
}

/// See [`Meter::writer`].
pub(super) struct LimitedString<'a> {
    text: String,
    meter: &'a Meter,
    error: Option<Error>,
}

impl LimitedString<'_> {
    pub(super) fn push(&mut self, text: &str) -> Result<(), Error> {
        if self.text.len() + text.len() > self.meter.max_string {
            return Err(too_large("the template builds a string that is too long"));
        }
        self.meter.charge(text.len())?;
        self.text.push_str(text);
        Ok(())
    }

    /// Writes formatted arguments, which must not be of unbounded size before they get here.
    pub(super) fn push_fmt(&mut self, arguments: fmt::Arguments<'_>) -> Result<(), Error> {
        if self.write_fmt(arguments).is_err() {
            return Err(self.error.take().unwrap_or_else(|| too_large("a value cannot be printed")));
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<String, Error> {
        Ok(self.text)
    }
}

impl Write for LimitedString<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text).map_err(|error| {
            self.error = Some(error);
            fmt::Error
        })
    }
}
