//! From answers to the table and the verdict of `tandem bench edits`.

use std::time::Duration;

use serde::Serialize;
use tandem_engine::Finished;

use super::{DRAFT_ONLY, NO_SPECULATION, WITH_PREDICTION, WITHOUT_PREDICTION};
use crate::cli::bench::report::{self, Header};

/// A prediction should save so many times the passes.
const AIM: f64 = 3.0;

/// All answers of one setting.
#[derive(Clone, Debug)]
pub(super) struct Total {
    setting: String,
    num_tokens: u64,
    num_passes: u64,
    num_draft_tokens: [u64; 3],
    num_accepted_tokens: [u64; 3],
    decode_time: Duration,
    num_wrong: usize,
}

impl Total {
    pub(super) fn new(setting: &str) -> Self {
        Total {
            setting: setting.to_owned(),
            num_tokens: 0,
            num_passes: 0,
            num_draft_tokens: [0; 3],
            num_accepted_tokens: [0; 3],
            decode_time: Duration::ZERO,
            num_wrong: 0,
        }
    }

    pub(super) fn add(&mut self, finished: &Finished, is_right: bool) {
        let usage = &finished.usage;
        self.num_tokens += u64::from(usage.num_output_tokens);
        // The pass that reads the end of the prompt gives the first token.
        self.num_passes += 1 + u64::from(usage.num_decode_steps);
        for source in 0..3 {
            self.num_draft_tokens[source] += u64::from(usage.num_draft_tokens[source]);
            self.num_accepted_tokens[source] += u64::from(usage.num_accepted_tokens[source]);
        }
        self.decode_time += usage.decode_time;
        self.num_wrong += usize::from(!is_right);
    }

    fn passes_per_token(&self) -> f64 {
        self.num_passes as f64 / self.num_tokens as f64
    }
}

/// One setting in numbers.
#[derive(Clone, Debug, Serialize)]
struct Row {
    setting: String,
    passes_per_token: f64,
    tokens_per_pass: f64,
    tokens_per_second: f64,
    num_tokens: u64,
    num_passes: u64,
    /// Offered to the target by draft, n-gram and prediction.
    num_draft_tokens: [u64; 3],
    num_accepted_tokens: [u64; 3],
}

/// The whole run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    header: Header,
    num_edits: usize,
    /// Edits that fitted the context.
    num_measured: usize,
    rows: Vec<Row>,
    /// Passes per token without a prediction (draft and n-gram) over those with one.
    saving_to_default: f64,
    /// Passes per token with the draft alone over those with a prediction.
    saving_to_draft_only: f64,
    /// Passes per token without speculation over those with a prediction.
    saving_to_no_speculation: f64,
    /// Answers that were not the edited file.
    pub(super) num_wrong: usize,
}

impl Report {
    pub(super) fn new(header: Header, num_edits: usize, num_measured: usize, totals: &[Total]) -> Self {
        let row = |total: &Total| Row {
            setting: total.setting.clone(),
            passes_per_token: total.passes_per_token(),
            tokens_per_pass: 1.0 / total.passes_per_token(),
            tokens_per_second: total.num_tokens as f64 / total.decode_time.as_secs_f64(),
            num_tokens: total.num_tokens,
            num_passes: total.num_passes,
            num_draft_tokens: total.num_draft_tokens,
            num_accepted_tokens: total.num_accepted_tokens,
        };
        let saving = |to: usize| totals[to].passes_per_token() / totals[WITH_PREDICTION].passes_per_token();
        Report {
            header,
            num_edits,
            num_measured,
            rows: totals.iter().map(row).collect(),
            saving_to_default: saving(WITHOUT_PREDICTION),
            saving_to_draft_only: saving(DRAFT_ONLY),
            saving_to_no_speculation: saving(NO_SPECULATION),
            num_wrong: totals.iter().map(|total| total.num_wrong).sum(),
        }
    }

    pub(super) fn print(&self) {
        const HEADER: [&str; 7] = [
            "proposals by",
            "passes/token",
            "tokens/pass",
            "tokens/s",
            "draft acc./off.",
            "n-gram acc./off.",
            "prediction acc./off.",
        ];
        let cells = |row: &Row| {
            let mut cells = vec![row.setting.clone()];
            cells.push(format!("{:.3}", row.passes_per_token));
            cells.push(format!("{:.2}", row.tokens_per_pass));
            cells.push(format!("{:.0}", row.tokens_per_second));
            let counts = row.num_accepted_tokens.iter().zip(&row.num_draft_tokens);
            cells.extend(counts.map(|(accepted, offered)| match offered {
                0 => "-".to_owned(),
                _ => format!("{accepted}/{offered}"),
            }));
            cells
        };
        println!("{}", report::table(&HEADER, 1, self.rows.iter().map(cells)));
        let skipped = match self.num_edits - self.num_measured {
            0 => String::new(),
            count => format!(" ({count} more do not fit the context)"),
        };
        println!(
            "{} edits{skipped}; passes of the target that give tokens, prefill apart",
            self.num_measured
        );
        println!("{}", self.verdict());
    }

    fn verdict(&self) -> String {
        let saving = |times: f64| {
            let judged = if times >= AIM { "met" } else { "NOT met" };
            format!("{times:.2}x ({judged})")
        };
        let mut text = format!(
            "with the file as prediction the target needs fewer passes per token, aim {AIM}x: than the draft \
             alone {}, than draft and n-gram (which find the file in the prompt) {}, than no speculation {}",
            saving(self.saving_to_draft_only),
            saving(self.saving_to_default),
            saving(self.saving_to_no_speculation)
        );
        if self.num_wrong > 0 {
            text = format!("NOT LOSSLESS: {} answers are not the edited file; {text}", self.num_wrong);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use tandem_engine::{FinishReason, Usage};

    use super::*;
    use crate::cli::bench::report::Machine;

    fn total(num_output_tokens: u32, num_decode_steps: u32, is_right: bool) -> Total {
        let usage = Usage {
            num_output_tokens,
            num_decode_steps,
            decode_time: Duration::from_secs(1),
            ..Usage::default()
        };
        let mut total = Total::new("setting");
        total.add(&Finished { reason: FinishReason::Length, usage }, is_right);
        total
    }

    fn report(with_is_right: bool) -> Report {
        let header = Header {
            synthetic: None,
            benchmark: "edits",
            machine: Machine::this(1),
            target: "target".to_owned(),
            draft: "draft".to_owned(),
        };
        let totals = [
            total(120, 119, true),
            total(120, 59, true),
            total(120, 39, true),
            total(120, 29, true),
            total(120, 9, with_is_right),
            total(120, 14, true),
        ];
        Report::new(header, 3, 2, &totals)
    }

    #[test]
    fn the_pass_that_gives_the_first_token_counts() {
        assert_eq!(total(10, 9, true).passes_per_token(), 1.0);
        assert_eq!(total(10, 4, true).passes_per_token(), 0.5);
    }

    #[test]
    fn the_verdict_names_both_comparisons() {
        let text = report(true).verdict();
        assert!(text.contains("the draft alone 6.00x (met)"), "{text}");
        assert!(text.contains("in the prompt) 3.00x (met), than no speculation 12.00x (met)"), "{text}");
        assert!(report(false).verdict().starts_with("NOT LOSSLESS: 1 "));
    }
}
