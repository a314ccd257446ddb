//! From timed batches to the table and the verdict of `tandem bench policy`.

use serde::Serialize;

use super::PolicyArgs;
use crate::cli::bench::report::{self, Header};
use crate::cli::bench::stats::{Spread, median};

/// Auto should reach this part of the best fixed setting's speed.
const AIM: f64 = 0.97;

/// One setting in one round: all groups of prompts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Run {
    pub(super) num_tokens: u64,
    pub(super) seconds: f64,
}

impl Run {
    fn tokens_per_second(self) -> f64 {
        self.num_tokens as f64 / self.seconds
    }
}

/// One draft, temperature and batch size.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    draft: &'static str,
    pub(super) temperature: f32,
    pub(super) batch: u16,
    /// A run a setting: auto, the fixed ones, the first of them again.
    pub(super) rounds: Vec<Vec<Run>>,
    pub(super) num_mismatches: usize,
}

impl Cell {
    pub(super) fn new(draft: &'static str, temperature: f32, batch: u16) -> Self {
        Cell { draft, temperature, batch, rounds: Vec::new(), num_mismatches: 0 }
    }
}

/// One cell in numbers.
#[derive(Clone, Debug, Serialize)]
struct Row {
    draft: &'static str,
    temperature: f32,
    batch: u16,
    auto_tokens_per_second: f64,
    /// In the order of `fixed`.
    fixed_tokens_per_second: Vec<f64>,
    /// The fixed setting that auto compares worst with.
    best_fixed: u8,
    /// Auto to it, one value a round.
    ratio: Spread,
    /// The first fixed setting to itself.
    control: Spread,
}

/// The whole run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    header: Header,
    num_prompts: usize,
    rounds: u32,
    max_tokens: u32,
    fixed: Vec<u8>,
    rows: Vec<Row>,
    pub(super) num_mismatches: usize,
}

impl Report {
    pub(super) fn new(header: Header, args: &PolicyArgs, num_prompts: usize, cells: Vec<Cell>) -> Self {
        Report {
            header,
            num_prompts,
            rounds: args.rounds,
            max_tokens: args.max_tokens,
            fixed: args.fixed.clone(),
            rows: cells.iter().map(|cell| row(cell, &args.fixed)).collect(),
            num_mismatches: cells.iter().map(|cell| cell.num_mismatches).sum(),
        }
    }

    pub(super) fn print(&self) {
        let mut header: Vec<String> = ["draft", "T", "batch", "auto"].map(str::to_owned).to_vec();
        header.extend(self.fixed.iter().map(u8::to_string));
        header.extend(["best", "ratio", "min..max", "control", "min..max"].map(str::to_owned));
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        let cells = |row: &Row| {
            let mut cells = vec![row.draft.to_owned(), row.temperature.to_string(), row.batch.to_string()];
            cells.push(format!("{:.0}", row.auto_tokens_per_second));
            cells.extend(row.fixed_tokens_per_second.iter().map(|speed| format!("{speed:.0}")));
            cells.push(row.best_fixed.to_string());
            for ratio in [row.ratio, row.control] {
                cells.push(format!("{:.3}", ratio.median));
                cells.push(format!("{:.2}..{:.2}", ratio.min, ratio.max));
            }
            cells
        };
        println!("{}", report::table(&header, 1, self.rows.iter().map(cells)));
        println!(
            "output tokens/s of the whole batch, medians; {} prompts, {} rounds, up to {} tokens each",
            self.num_prompts, self.rounds, self.max_tokens
        );
        println!("control: {} drafted against itself, the same round", self.fixed[0]);
        println!("{}", verdict(&self.rows));
        match self.num_mismatches {
            0 => println!("lossless: every setting gave the same answers"),
            count => println!("NOT LOSSLESS: {count} answers differ between settings"),
        }
    }
}

fn row(cell: &Cell, fixed: &[u8]) -> Row {
    let speed =
        |setting: usize| median(cell.rounds.iter().map(|runs| runs[setting].tokens_per_second()).collect());
    // Within a round, so that what the machine does between rounds cancels out.
    let ratio = |a: usize, b: usize| {
        let ratios = cell.rounds.iter().map(|runs| runs[a].tokens_per_second() / runs[b].tokens_per_second());
        Spread::of(ratios).expect("there is at least one round: this is a bug")
    };
    let (best, auto) = (1..=fixed.len())
        .map(|setting| (setting, ratio(0, setting)))
        .min_by(|(_, a), (_, b)| a.median.total_cmp(&b.median))
        .expect("there is at least one fixed setting: this is a bug");
    Row {
        draft: cell.draft,
        temperature: cell.temperature,
        batch: cell.batch,
        auto_tokens_per_second: speed(0),
        fixed_tokens_per_second: (1..=fixed.len()).map(speed).collect(),
        best_fixed: fixed[best - 1],
        ratio: auto,
        control: ratio(1 + fixed.len(), 1),
    }
}

fn verdict(rows: &[Row]) -> String {
    let slower = rows.iter().filter(|row| row.ratio.median < AIM);
    let slower: Vec<String> = slower
        .map(|row| {
            let Row { draft, temperature, batch, best_fixed, ratio, .. } = row;
            format!(
                "{draft} draft, T {temperature}, batch {batch}: {:.3} of {best_fixed} drafted",
                ratio.median
            )
        })
        .collect();
    if slower.is_empty() {
        let least = rows.iter().map(|row| row.ratio.median).fold(f64::INFINITY, f64::min);
        format!("never slower: auto reaches at least {least:.3} of the best fixed setting (aim: {AIM})")
    } else {
        format!(
            "SLOWER than {AIM} of the best fixed setting in {} of {} rows: {}",
            slower.len(),
            rows.len(),
            slower.join("; ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(rounds: &[[f64; 3]]) -> Cell {
        let run = |&seconds: &f64| Run { num_tokens: 100, seconds };
        let with_control = |runs: &[f64; 3]| runs.iter().chain(&runs[1..2]).map(run).collect();
        let rounds = rounds.iter().map(with_control).collect();
        Cell { rounds, ..Cell::new("random", 0.8, 4) }
    }

    #[test]
    fn ratios_are_taken_within_rounds() {
        // The machine halves its speed after the first round; auto is always a tenth slower than 0 drafted.
        let cell = cell(&[[1.1, 1.0, 2.0], [2.2, 2.0, 4.0], [2.2, 2.0, 4.0]]);
        let row = row(&cell, &[0, 4]);
        assert_eq!(row.best_fixed, 0);
        assert_eq!(row.control.median, 1.0);
        assert!((row.ratio.median - 1.0 / 1.1).abs() < 1e-9, "{:?}", row.ratio);
        assert_eq!(row.fixed_tokens_per_second, [50.0, 25.0]);
        let text = verdict(&[row]);
        assert!(text.starts_with("SLOWER") && text.contains("batch 4: 0.909 of 0 drafted"), "{text}");
    }

    #[test]
    fn one_slow_round_does_not_make_auto_slower() {
        let cell = cell(&[[1.0, 1.01, 2.0], [5.0, 1.0, 2.0], [1.0, 1.0, 2.0]]);
        let text = verdict(&[row(&cell, &[0, 4])]);
        assert_eq!(text, "never slower: auto reaches at least 1.000 of the best fixed setting (aim: 0.97)");
    }
}
