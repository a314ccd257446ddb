//! What a chat template can call. minijinja's own filters stay where they cannot make more than they
//! are given; those that can are replaced by metered ones, or removed where no template needs them.

use std::sync::{Arc, LazyLock};
use std::time::SystemTime;

use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, Output, State, filters};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::bytecode::{ADD, CHARGE, CHARGE_CALL, CHECK_LOOP, CHECK_STORED, CONCAT, MULTIPLY, ONE};
use super::meter::Meter;
use super::python::{self, JsonStyle};
use super::strftime::strftime;

/// Frames of loops, macros and blocks; a macro counts four.
const MAX_RECURSION: usize = 200;

/// Filters that can make much of little and are in no known chat template.
const REMOVED_FILTERS: [&str; 6] = ["batch", "slice", "zip", "chain", "pprint", "format"];
/// Filters that make a new string or list of about the size of their input. Charged within the call,
/// because `map` calls them for each element.
const CHARGED_FILTERS: [&str; 21] = [
    "upper",
    "lower",
    "title",
    "capitalize",
    "trim",
    "escape",
    "e",
    "safe",
    "split",
    "lines",
    "list",
    "sort",
    "unique",
    "reverse",
    "dictsort",
    "items",
    "groupby",
    "default",
    "d",
    "first",
    "last",
];
/// What `map` may apply: only filters that charge within, or make something small.
const MAPPABLE_FILTERS: [&str; 20] = [
    "upper",
    "lower",
    "title",
    "capitalize",
    "trim",
    "escape",
    "e",
    "safe",
    "replace",
    "string",
    "tojson",
    "join",
    "length",
    "count",
    "int",
    "float",
    "abs",
    "round",
    "first",
    "last",
];

/// Marks an error that `raise_exception` made.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refusal(pub(super) String);

/// minijinja as it comes, to call its filters from ours.
static PLAIN: LazyLock<Environment<'static>> = LazyLock::new(Environment::new);

/// The environment of one rendering.
pub(super) fn environment(meter: &Arc<Meter>, clock: fn() -> SystemTime) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_debug(false);
    env.set_recursion_limit(MAX_RECURSION);
    add_operators(&mut env, meter);
    add_filters(&mut env, meter);
    let printer = Arc::clone(meter);
    env.set_formatter(move |out: &mut Output<'_>, _: &mut State<'_, '_>, value: &Value| {
        let printed;
        let text = match value.as_str() {
            Some(text) => text,
            None => {
                printed = to_string(&printer, value)?;
                &printed
            }
        };
        printer.charge_output(text.len())?;
        out.write_str(text).map_err(Error::from)
    });
    let methods = Arc::clone(meter);
    env.set_unknown_method_callback(move |state, value, method, args| {
        call_method(&methods, state, value, method, args)
    });
    // As in Python, where text and dictionaries are sequences, and none is nothing of the kind.
    let is_sequence =
        |value: &Value| matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map);
    env.add_test("sequence", move |value: Value| is_sequence(&value));
    env.add_test("iterable", move |value: Value| {
        is_sequence(&value) || matches!(value.kind(), ValueKind::Iterable | ValueKind::Undefined)
    });
    env.remove_global("debug");
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Refusal(message)))
    });
    env.add_function("strftime_now", move |format: &str| {
        strftime(clock(), format).map_err(|unknown| invalid(format!("strftime_now does not know %{unknown}")))
    });
    env
}

fn add_operators(env: &mut Environment<'static>, meter: &Arc<Meter>) {
    let m = Arc::clone(meter);
    env.add_filter(ADD, move |left: Value, right: Value| m.add(&left, &right));
    let m = Arc::clone(meter);
    env.add_filter(CONCAT, move |left: Value, right: Value| m.concat(&left, &right));
    let m = Arc::clone(meter);
    env.add_filter(MULTIPLY, move |left: Value, right: Value| m.multiply(&left, &right));
    let m = Arc::clone(meter);
    env.add_filter(CHARGE, move |value: Value| m.charge_value(&value).map(|()| value));
    let m = Arc::clone(meter);
    env.add_filter(CHARGE_CALL, move |value: Value| m.charge_call(value));
    env.add_filter(CHECK_LOOP, |value: Value| match value.is_none() {
        true => Err(invalid("none is not iterable")),
        false => Ok(value),
    });
    env.add_global(ONE, Value::from(1));
    let m = Arc::clone(meter);
    env.add_filter(CHECK_STORED, move |value: Value| m.check_stored(&value).map(|()| value));
}

fn add_filters(env: &mut Environment<'static>, meter: &Arc<Meter>) {
    for name in REMOVED_FILTERS {
        env.remove_filter(name);
    }
    for name in CHARGED_FILTERS {
        let m = Arc::clone(meter);
        env.add_filter(name, move |args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            let input = args.first().and_then(Value::as_str);
            match (name, input) {
                ("split", Some(text)) => m.charge_items(pieces(text, args.get(1)))?,
                ("lines", Some(text)) => m.charge_items(pieces(text, Some(&Value::from("\n"))))?,
                ("list" | "sort" | "unique" | "reverse", Some(text)) => m.charge_items(text.len())?,
                _ => {}
            }
            let result = PLAIN.empty_state().apply_filter(name, &args)?;
            m.charge_value(&result)?;
            Ok(result)
        });
    }
    env.add_filter("map", |state: &mut State<'_, '_>, value: Value, args: Rest<ValueOrKwargs>| {
        let values = args.into_values();
        if let Some(name) = values.first().and_then(Value::as_str)
            && !MAPPABLE_FILTERS.contains(&name)
        {
            return Err(invalid(format!("map cannot apply {name}; it can {}", MAPPABLE_FILTERS.join(", "))));
        }
        filters::map(state, value, Rest(values.into_iter().map(ValueOrKwargs::from).collect()))
    });
    let m = Arc::clone(meter);
    env.add_filter("string", move |value: Value| match value.as_str() {
        Some(_) => Ok(value),
        None => to_string(&m, &value).map(Value::from),
    });
    let m = Arc::clone(meter);
    env.add_filter("replace", move |text: Value, old: &str, new: &str, count: Option<i64>| {
        m.replace(&to_string(&m, &text)?, old, new, limit(count))
    });
    let m = Arc::clone(meter);
    env.add_filter("join", move |items: Value, separator: Option<&str>| {
        m.join(&items, separator.unwrap_or_default())
    });
    let m = Arc::clone(meter);
    env.add_filter("indent", move |text: &str, args: Rest<ValueOrKwargs>| {
        let mut args = args.into_values();
        let width = args.iter().find_map(indent_width).unwrap_or(4);
        m.charge_string(text.len().saturating_add(width.saturating_mul(text.matches('\n').count() + 1)))?;
        args.insert(0, Value::from(text));
        PLAIN.empty_state().apply_filter("indent", &args)
    });
    let m = Arc::clone(meter);
    env.add_filter("tojson", move |value: Value, ensure_ascii: Option<bool>, kwargs: Kwargs| {
        let style = json_style(ensure_ascii, &kwargs)?;
        let mut writer = m.writer();
        python::json(&value, &style, &mut writer, 0)?;
        writer.finish().map(Value::from)
    });
}

/// Python's methods, by minijinja's compatibility layer where they cannot make much of little.
fn call_method(
    meter: &Meter,
    state: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        match (method, args) {
            ("replace", [old, new, count @ ..]) => {
                if let (Some(old), Some(new)) = (old.as_str(), new.as_str()) {
                    return meter.replace(text, old, new, limit(count.first().and_then(Value::as_i64)));
                }
            }
            ("join", [items]) => return meter.join(items, text),
            ("split", args) => meter.charge_items(pieces(text, args.first()))?,
            ("splitlines", _) => meter.charge_items(pieces(text, Some(&Value::from("\n"))))?,
            ("format", args) => check_format(meter, text, args)?,
            _ => {}
        }
    }
    unknown_method_callback(state, value, method, args)
}

/// `"...".format(...)` can pad to any width and print an argument many times.
fn check_format(meter: &Meter, text: &str, args: &[Value]) -> Result<(), Error> {
    let is_scalar = |value: &Value| {
        value.as_str().is_some()
            || matches!(value.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number)
    };
    if text.contains(':') || !args.iter().all(is_scalar) {
        return Err(invalid("format takes plain fields and strings or numbers here"));
    }
    let longest = args.iter().map(|arg| arg.as_str().map_or(32, str::len)).max().unwrap_or(0);
    meter.charge_string(text.len().saturating_add(text.matches('{').count().saturating_mul(longest)))
}

fn to_string(meter: &Meter, value: &Value) -> Result<String, Error> {
    let mut writer = meter.writer();
    python::print(value, &mut writer)?;
    writer.finish()
}

/// At most how many pieces `split` makes.
fn pieces(text: &str, separator: Option<&Value>) -> usize {
    match separator.and_then(Value::as_str) {
        Some(separator) if !separator.is_empty() => text.matches(separator).count() + 1,
        _ => text.len() / 2 + 1,
    }
}

/// Python's replacement count: negative or absent is all.
fn limit(count: Option<i64>) -> usize {
    count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX)
}

fn indent_width(value: &Value) -> Option<usize> {
    match value.is_kwargs() {
        true => value.get_attr("width").ok()?.as_usize(),
        false => value.as_usize().filter(|_| value.is_number()),
    }
}

fn json_style(ensure_ascii: Option<bool>, kwargs: &Kwargs) -> Result<JsonStyle, Error> {
    let indent = match kwargs.get::<Option<Value>>("indent")? {
        None => None,
        Some(value) => match (value.as_str(), value.as_usize()) {
            (Some(text), _) => Some(text.to_owned()),
            (None, Some(width)) if width <= 16 => Some(" ".repeat(width)),
            _ => return Err(invalid("tojson takes an indent from 0 to 16")),
        },
    };
    let separators = kwargs.get::<Option<Vec<String>>>("separators")?;
    let (item_separator, key_separator) = match separators.as_deref() {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("tojson takes two separators")),
    };
    let style = JsonStyle {
        indent,
        item_separator,
        key_separator,
        ensure_ascii: match ensure_ascii {
            Some(value) => value,
            None => kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        },
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    Ok(style)
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}
