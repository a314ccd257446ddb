//! From timed requests to the table and the verdict of `tandem bench isolation`.

use std::time::Duration;

use serde::Serialize;

use super::IsolationArgs;
use crate::cli::bench::client::Completion;
use crate::cli::bench::report::{self, Header, percentile_cells};
use crate::cli::bench::stats::Percentiles;

/// The loaded p99 of the time to first token should be at most so many times the idle one.
const AIM: f64 = 2.0;

/// The requests of one phase, all rounds together.
#[derive(Clone, Debug, Default)]
pub(super) struct Phase {
    ttft_ms: Vec<f64>,
    /// Between two pieces of text of one answer.
    itl_ms: Vec<f64>,
    pub(super) seconds: f64,
    pub(super) num_deep_tokens: f64,
    pub(super) num_prompt_tokens: f64,
}

impl Phase {
    pub(super) fn add(&mut self, completion: &Completion) {
        let ms = |time: Duration| 1e3 * time.as_secs_f64();
        self.ttft_ms.push(ms(completion.ttft()));
        self.itl_ms.extend(completion.arrivals.windows(2).map(|pair| ms(pair[1] - pair[0])));
    }
}

/// One phase in numbers.
#[derive(Clone, Debug, Serialize)]
struct Row {
    isolation: bool,
    loaded: bool,
    requests: usize,
    ttft_ms: Option<Percentiles>,
    /// Of the time to first token's p99 to the idle phase's of the same server.
    p99_ratio: Option<f64>,
    itl_ms: Option<Percentiles>,
    deep_tokens_per_second: f64,
    prompt_tokens_per_second: f64,
}

/// The whole run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    header: Header,
    requests: u32,
    rounds: u32,
    deep_streams: u32,
    deep_prompt_tokens: usize,
    fast_tokens: u32,
    rows: Vec<Row>,
}

impl Report {
    /// `phases` are idle and loaded with isolation, then perhaps the same without.
    pub(super) fn new(
        header: Header,
        args: &IsolationArgs,
        deep_prompt_tokens: usize,
        phases: &[[Phase; 2]],
    ) -> Self {
        Report {
            header,
            requests: args.requests,
            rounds: args.rounds,
            deep_streams: args.deep_streams,
            deep_prompt_tokens,
            fast_tokens: args.fast_tokens,
            rows: rows(phases),
        }
    }

    pub(super) fn print(&self) {
        const HEADER: [&str; 11] = [
            "isolation",
            "deep lane",
            "TTFT ms p50",
            "p90",
            "p99",
            "p99 to idle",
            "ITL ms p50",
            "p90",
            "p99",
            "deep tokens/s",
            "prompt tokens/s",
        ];
        let cells = |row: &Row| {
            let mut cells = vec![if row.isolation { "on" } else { "off" }.to_owned()];
            cells.push(if row.loaded { "loaded" } else { "idle" }.to_owned());
            cells.extend(percentile_cells(row.ttft_ms, 2));
            cells.push(report::number(row.p99_ratio, 2));
            cells.extend(percentile_cells(row.itl_ms, 2));
            cells.push(format!("{:.0}", row.deep_tokens_per_second));
            cells.push(format!("{:.0}", row.prompt_tokens_per_second));
            cells
        };
        println!("{}", report::table(&HEADER, 2, self.rows.iter().map(cells)));
        println!(
            "{} fast requests of at most {} tokens a phase, in {} rounds; loaded: {} deep streams and a deep prompt of \
             {} tokens in prefill",
            self.requests, self.fast_tokens, self.rounds, self.deep_streams, self.deep_prompt_tokens
        );
        println!("{}", verdict(&self.rows));
    }
}

fn rows(phases: &[[Phase; 2]]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for (index, [idle, loaded]) in phases.iter().enumerate() {
        let idle_ttft = Percentiles::of(idle.ttft_ms.clone());
        for (is_loaded, phase) in [(false, idle), (true, loaded)] {
            let ttft_ms = Percentiles::of(phase.ttft_ms.clone());
            let ratio = ttft_ms.zip(idle_ttft).map(|(own, idle)| own.p99 / idle.p99);
            rows.push(Row {
                isolation: index == 0,
                loaded: is_loaded,
                requests: phase.ttft_ms.len(),
                ttft_ms,
                p99_ratio: ratio.filter(|_| is_loaded),
                itl_ms: Percentiles::of(phase.itl_ms.clone()),
                deep_tokens_per_second: phase.num_deep_tokens / phase.seconds,
                prompt_tokens_per_second: phase.num_prompt_tokens / phase.seconds,
            });
        }
    }
    rows
}

fn verdict(rows: &[Row]) -> String {
    let loaded = |isolation| rows.iter().find(|row| row.loaded && row.isolation == isolation);
    let Some((on, ratio)) = loaded(true).and_then(|row| Some((row, row.p99_ratio?))) else {
        return "nothing was measured".to_owned();
    };
    let judged = if ratio <= AIM { "met" } else { "NOT met" };
    let mut text = format!("fast TTFT p99 under load: {ratio:.2}x idle (aim: at most {AIM}x: {judged})");
    if let Some((off, off_ratio)) = loaded(false).and_then(|row| Some((row, row.p99_ratio?))) {
        text.push_str(&format!(
            "; without isolation {off_ratio:.2}x; meanwhile deep answers run at {:.2} and prefill at {:.2} of their \
             speed without isolation",
            on.deep_tokens_per_second / off.deep_tokens_per_second,
            on.prompt_tokens_per_second / off.prompt_tokens_per_second
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(ttft_ms: f64, num_deep_tokens: f64) -> Phase {
        let num_prompt_tokens = 10.0 * ttft_ms.clamp(3.0, 6.0);
        let completion = Completion {
            arrivals: [1.0, 1.5, 2.5].map(|at| Duration::from_secs_f64(1e-3 * ttft_ms * at)).to_vec(),
            ..Completion::default()
        };
        let mut phase = Phase { seconds: 2.0, num_deep_tokens, num_prompt_tokens, ..Phase::default() };
        phase.add(&completion);
        phase
    }

    #[test]
    fn loaded_is_compared_with_the_idle_phase_of_its_own_server() {
        let phases = [[phase(1.0, 0.0), phase(1.5, 180.0)], [phase(2.0, 0.0), phase(10.0, 200.0)]];
        let rows = rows(&phases);
        assert_eq!(
            rows.iter().map(|row| row.p99_ratio.is_some()).collect::<Vec<_>>(),
            [false, true, false, true]
        );
        let itl = rows[0].itl_ms.expect("two gaps");
        assert!((itl.p50 - 0.5).abs() < 1e-6 && (itl.p99 - 1.0).abs() < 1e-6, "{itl:?}");
        assert_eq!(rows[1].deep_tokens_per_second, 90.0);
        let text = verdict(&rows);
        assert!(text.contains("1.50x idle") && text.contains(": met)"), "{text}");
        assert!(
            text.contains("without isolation 5.00x")
                && text.contains("answers run at 0.90 and prefill at 0.50"),
            "{text}"
        );
    }

    #[test]
    fn more_than_twice_is_not_met() {
        let text = verdict(&rows(&[[phase(1.0, 0.0), phase(2.1, 1.0)]]));
        assert!(text.contains("2.10x idle (aim: at most 2x: NOT met)"), "{text}");
    }
}
