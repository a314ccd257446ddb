//! Summaries of samples, and the table they are shown in.

use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;

/// The middle and the ends of some numbers.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    /// `None` of no numbers.
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Option<Spread> {
        let values: Vec<f64> = values.collect();
        if values.is_empty() {
            return None;
        }
        let min = values.iter().copied().fold(f64::INFINITY, f64::min);
        let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Some(Spread { median: median(values), min, max })
    }
}

/// The middle value, or the mean of the two middle ones.
///
/// # Panics
/// If there is none.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

/// One setting at one temperature.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) setting: String,
    pub(super) temperature: f32,
    pub(super) num_samples: usize,
    pub(super) tokens_per_second: Option<Spread>,
    pub(super) ttft_ms: Option<Spread>,
    /// To deep without speculation, one value a prompt.
    pub(super) ratio: Option<Spread>,
    /// Share of draft tokens accepted.
    pub(super) acceptance: Option<f64>,
    pub(super) tokens_per_verification: Option<f64>,
}

/// The rows for people.
pub(super) fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    // Markdown, because such tables end up in documents.
    table.load_style(ASCII_MARKDOWN);
    table.set_header([
        "T",
        "setting",
        "tokens/s",
        "min..max",
        "first ms",
        "ratio",
        "min..max",
        "accepted",
        "tokens/verif.",
    ]);
    for row in rows {
        let spread = |value: Option<Spread>, digits: usize| match value {
            Some(s) => (format!("{:.digits$}", s.median), format!("{:.digits$}..{:.digits$}", s.min, s.max)),
            None => ("-".to_owned(), "-".to_owned()),
        };
        let (speed, speeds) = spread(row.tokens_per_second, 0);
        let (ratio, ratios) = spread(row.ratio, 2);
        table.add_row([
            format!("{}", row.temperature),
            row.setting.clone(),
            speed,
            speeds,
            spread(row.ttft_ms, 1).0,
            ratio,
            ratios,
            row.acceptance.map_or("-".to_owned(), |share| format!("{:.0} %", 100.0 * share)),
            row.tokens_per_verification.map_or("-".to_owned(), |tokens| format!("{tokens:.2}")),
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_one() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(vec![7.0]), 7.0);
        assert!(Spread::of(std::iter::empty()).is_none());
    }

    #[test]
    fn a_row_without_samples_shows_dashes() {
        let row = Row {
            setting: "deep, auto".to_owned(),
            temperature: 0.8,
            num_samples: 0,
            tokens_per_second: None,
            ttft_ms: None,
            ratio: None,
            acceptance: Some(0.714),
            tokens_per_verification: Some(2.5),
        };
        let text = table(&[row]);
        assert!(text.contains("deep, auto") && text.contains("71 %") && text.contains("2.50"), "{text}");
    }
}
