//! What every benchmark prints and writes alike: where it ran, a Markdown table, a progress bar, a
//! JSON file.

use std::fmt;
use std::path::Path;

use anyhow::Context as _;
use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::stats::Percentiles;
use super::synthetic::Synthetic;
use crate::cli::terminal;

/// Where a measurement was taken.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Machine {
    cpu: String,
    threads: usize,
    kernels: &'static str,
    tandem: &'static str,
}

impl Machine {
    /// This one, with so many threads that compute.
    pub(super) fn this(threads: usize) -> Self {
        Machine {
            cpu: terminal::cpu_model(),
            threads,
            kernels: tandem_kernels::isa::active().name(),
            tandem: env!("CARGO_PKG_VERSION"),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { cpu, threads, kernels, tandem } = self;
        write!(f, "{cpu}, {threads} threads, {kernels} kernels, tandem {tandem}")
    }
}

/// The first lines of a report: which benchmark, of what, and where.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Header {
    /// Said before anything else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) synthetic: Option<Synthetic>,
    pub(super) benchmark: &'static str,
    pub(super) machine: Machine,
    pub(super) target: String,
    pub(super) draft: String,
}

impl Header {
    pub(super) fn print(&self) {
        if let Some(synthetic) = self.synthetic {
            println!("{synthetic}");
        }
        println!("{} with draft {}", self.target, self.draft);
        println!("{}", self.machine);
    }
}

/// A table in Markdown, because such tables end up in documents. The first `num_names` columns are
/// words, the others numbers.
pub(super) fn table(header: &[&str], num_names: usize, rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(num_names) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// A number with so many digits after the point, or a dash.
pub(super) fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

/// The cells p50, p90, p99.
pub(super) fn percentile_cells(values: Option<Percentiles>, digits: usize) -> [String; 3] {
    [values.map(|v| v.p50), values.map(|v| v.p90), values.map(|v| v.p99)].map(|value| number(value, digits))
}

/// A bar on standard error that counts `unit`.
pub(super) fn progress_bar(length: usize, unit: &str) -> ProgressBar {
    let style =
        ProgressStyle::with_template(&format!("{{bar:30}} {{pos}}/{{len}} {unit}, {{eta}} left {{msg}}"))
            .expect("the template is well-formed: this is a bug");
    ProgressBar::with_draw_target(Some(length as u64), ProgressDrawTarget::stderr()).with_style(style)
}

/// Writes the report for programs.
///
/// # Errors
/// Names the file that cannot be written.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_markdown_and_absent_numbers_are_dashes() {
        let rows = [vec!["deep".to_owned(), number(Some(1.25), 1)], vec!["fast".to_owned(), number(None, 1)]];
        let text = table(&["setting", "tokens/s"], 1, rows.into_iter());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "| setting | tokens/s |");
        assert!(lines[1].starts_with("|---"), "{text}");
        assert_eq!(lines[2], "| deep    |      1.2 |");
        assert_eq!(lines[3], "| fast    |        - |");
        assert_eq!(percentile_cells(None, 1), ["-", "-", "-"]);
    }
}
