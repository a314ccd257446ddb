//! From text to values. `None` means "not such a value"; the caller knows the setting and says so.

use std::path::PathBuf;
use std::str::FromStr;

use tandem_engine::{DraftHead, DraftTokens};
use tandem_models::{BackendKind, FileType, KvType, RopeOverride};

use super::RawValue;

fn only(value: &RawValue) -> Option<&str> {
    match value.as_slice() {
        [text] => Some(text.trim()),
        _ => None,
    }
}

pub(super) fn text(value: &RawValue) -> Option<String> {
    only(value).filter(|text| !text.is_empty()).map(str::to_owned)
}

/// An empty value stands for "none", so that a stronger layer can take a model away again.
pub(super) fn optional_text(value: &RawValue) -> Option<Option<String>> {
    only(value).map(|text| (!text.is_empty()).then(|| text.to_owned()))
}

/// As with [`optional_text`].
pub(super) fn path(value: &RawValue) -> Option<Option<PathBuf>> {
    optional_text(value).map(|path| path.map(PathBuf::from))
}

pub(super) fn texts(value: &RawValue) -> Option<Vec<String>> {
    value.iter().map(|text| (!text.trim().is_empty()).then(|| text.trim().to_owned())).collect()
}

/// As with [`optional_text`].
pub(super) fn parsed<T: FromStr>(value: &RawValue) -> Option<Option<T>> {
    match optional_text(value)? {
        None => Some(None),
        Some(text) => text.parse().ok().map(Some),
    }
}

pub(super) fn number<T: FromStr + PartialOrd>(value: &RawValue, least: T, most: T) -> Option<T> {
    let number: T = only(value)?.parse().ok()?;
    (number >= least && number <= most).then_some(number)
}

pub(super) fn draft_tokens(value: &RawValue, most: u8) -> Option<DraftTokens> {
    match only(value)? {
        "auto" => Some(DraftTokens::Auto),
        _ => number(value, 0, most).map(DraftTokens::Fixed),
    }
}

pub(super) fn draft_head(value: &RawValue) -> Option<DraftHead> {
    match only(value)? {
        "auto" => Some(DraftHead::Auto),
        "all" => Some(DraftHead::Whole),
        _ => number(value, 1, usize::MAX).map(DraftHead::First),
    }
}

pub(super) fn backend(value: &RawValue) -> Option<BackendKind> {
    match only(value)? {
        "cpu" => Some(BackendKind::Cpu),
        "reference" => Some(BackendKind::Reference),
        _ => None,
    }
}

pub(super) fn kv_dtype(value: &RawValue) -> Option<KvType> {
    only(value)?.parse().ok()
}

/// `none` takes a weaker layer's choice away.
pub(super) fn quantize(value: &RawValue) -> Option<Option<FileType>> {
    match only(value)? {
        "none" => Some(None),
        name => FileType::parse(name).filter(|kind| kind.is_quantized()).map(Some),
    }
}

/// `file` takes a weaker layer's choice away.
pub(super) fn rope_scaling(value: &RawValue) -> Option<Option<RopeOverride>> {
    match only(value)? {
        "file" => Some(None),
        text => text.parse().ok().map(Some),
    }
}

/// `512MiB`, `2GiB`, `1.5GB`, `4g`, or a plain number of bytes; at least one byte.
///
/// `K`, `M`, `G`, `T` alone and with `iB` are powers of 1024, with `B` powers of 1000.
pub(super) fn size_bytes(value: &RawValue) -> Option<u64> {
    let text = only(value)?;
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start().to_ascii_lowercase();
    let factor: u64 = match unit.as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return None,
    };
    let number: f64 = number.parse().ok()?;
    let bytes = (number * factor as f64).round();
    // 2^53 bytes (8 PiB) is where f64 stops counting single bytes, and past any machine.
    (1.0..9_007_199_254_740_992.0).contains(&bytes).then_some(bytes as u64)
}

pub(super) fn boolean(value: &RawValue) -> Option<bool> {
    match only(value)? {
        "true" | "1" | "yes" | "on" => Some(true),
        "false" | "0" | "no" | "off" => Some(false),
        _ => None,
    }
}

pub(super) fn log_filter(value: &RawValue) -> Option<String> {
    let filter = text(value)?;
    tracing_subscriber::EnvFilter::try_new(&filter).ok()?;
    Some(filter)
}
