//! Counts of `tandem bench soak`, and the judgement on them.

use std::collections::BTreeMap;
use std::time::Duration;

use http::StatusCode;
use serde::Serialize;

use super::SoakArgs;
use crate::cli::bench::client::{Completion, Failure};
use crate::cli::bench::report::{self, percentile_cells};
use crate::cli::bench::scrape::Blocks;
use crate::cli::bench::stats::Percentiles;
use crate::cli::terminal;

/// The wait after a failure that does not say how long: nobody is asked a thousand times a second for
/// what it refuses.
const DEFAULT_RETRY: Duration = Duration::from_secs(1);

/// What one model's requests came to.
#[derive(Clone, Debug, Default)]
pub(super) struct ModelTally {
    pub(super) ok: u64,
    pub(super) cancelled: u64,
    pub(super) num_output_tokens: u64,
    /// Milliseconds; one of each a whole answer.
    ttft_ms: Vec<f32>,
    total_ms: Vec<f32>,
}

impl ModelTally {
    pub(super) fn ok(&mut self, completion: &Completion) {
        self.ok += 1;
        self.num_output_tokens += completion.num_output_tokens;
        self.ttft_ms.push(1e3 * completion.ttft().as_secs_f32());
        self.total_ms.push(1e3 * completion.total.as_secs_f32());
    }
}

/// What the requests came to.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    /// One each of the models.
    pub(super) models: Vec<ModelTally>,
    /// Refusals by status; 5xx too.
    statuses: BTreeMap<u16, u64>,
    broken: u64,
    /// What the first fault said, by kind.
    messages: BTreeMap<String, String>,
}

impl Tally {
    pub(super) fn new(num_models: usize) -> Self {
        Tally {
            models: vec![ModelTally::default(); num_models],
            statuses: BTreeMap::new(),
            broken: 0,
            messages: BTreeMap::new(),
        }
    }

    /// Counts a failure, and gives the time to wait before the next request.
    pub(super) fn failure(&mut self, failure: &Failure) -> Duration {
        let Failure::Status { status, retry_after, body } = failure else {
            self.broken(failure.to_string());
            return DEFAULT_RETRY;
        };
        *self.statuses.entry(status.as_u16()).or_default() += 1;
        let is_busy = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(status);
        if !is_busy {
            self.messages.entry(status.as_u16().to_string()).or_insert_with(|| body.clone());
        }
        retry_after.unwrap_or(DEFAULT_RETRY)
    }

    pub(super) fn broken(&mut self, message: String) {
        self.broken += 1;
        self.messages.entry("broken".to_owned()).or_insert(message);
    }

    pub(super) fn merge(&mut self, other: Tally) {
        for (own, other) in self.models.iter_mut().zip(other.models) {
            own.ok += other.ok;
            own.cancelled += other.cancelled;
            own.num_output_tokens += other.num_output_tokens;
            own.ttft_ms.extend(other.ttft_ms);
            own.total_ms.extend(other.total_ms);
        }
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        self.broken += other.broken;
        for (kind, message) in other.messages {
            self.messages.entry(kind).or_insert(message);
        }
    }
}

/// The server's memory.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Memory {
    /// When a fifth of the time was over.
    after_warm_up_bytes: u64,
    at_end_bytes: u64,
    peak_bytes: u64,
    growth_bytes: i64,
}

impl Memory {
    /// From one reading a second.
    pub(super) fn of(samples: &[u64]) -> Option<Memory> {
        let after_warm_up_bytes = *samples.get(samples.len() / 5)?;
        let at_end_bytes = *samples.last()?;
        Some(Memory {
            after_warm_up_bytes,
            at_end_bytes,
            peak_bytes: *samples.iter().max()?,
            growth_bytes: at_end_bytes as i64 - after_warm_up_bytes as i64,
        })
    }
}

#[derive(Debug, Serialize)]
struct ModelRow {
    model: String,
    ok: u64,
    cancelled: u64,
    tokens_per_second: f64,
    ttft_ms: Option<Percentiles>,
    total_ms: Option<Percentiles>,
}

/// The whole run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    benchmark: &'static str,
    url: String,
    streams: u32,
    seconds: f64,
    cancel: f64,
    seed: u64,
    models: Vec<ModelRow>,
    ok: u64,
    cancelled: u64,
    /// Refusals by status.
    statuses: BTreeMap<u16, u64>,
    broken: u64,
    messages: BTreeMap<String, String>,
    tokens_per_second: f64,
    memory: Option<Memory>,
    blocks: Option<Blocks>,
    /// What was wrong; empty if nothing.
    pub(super) faults: Vec<String>,
}

impl Report {
    pub(super) fn new(
        args: &SoakArgs,
        models: &[String],
        tally: Tally,
        memory: Option<Memory>,
        blocks: anyhow::Result<Option<Blocks>>,
        elapsed: Duration,
    ) -> Self {
        let faults = faults(&tally, &blocks);
        let seconds = elapsed.as_secs_f64();
        let percentiles = |values: Vec<f32>| Percentiles::of(values.into_iter().map(f64::from).collect());
        let row = |(model, tally): (&String, ModelTally)| ModelRow {
            model: model.clone(),
            ok: tally.ok,
            cancelled: tally.cancelled,
            tokens_per_second: tally.num_output_tokens as f64 / seconds,
            ttft_ms: percentiles(tally.ttft_ms),
            total_ms: percentiles(tally.total_ms),
        };
        let rows: Vec<ModelRow> = models.iter().zip(tally.models).map(row).collect();
        Report {
            benchmark: "soak",
            url: args.url.clone(),
            streams: args.streams,
            seconds,
            cancel: args.cancel,
            seed: args.seed,
            ok: rows.iter().map(|row| row.ok).sum(),
            cancelled: rows.iter().map(|row| row.cancelled).sum(),
            tokens_per_second: rows.iter().map(|row| row.tokens_per_second).sum(),
            models: rows,
            statuses: tally.statuses,
            broken: tally.broken,
            messages: tally.messages,
            memory,
            blocks: blocks.ok().flatten(),
            faults,
        }
    }

    pub(super) fn print(&self) {
        const HEADER: [&str; 10] = [
            "model",
            "ok",
            "cancelled",
            "tokens/s",
            "TTFT ms p50",
            "p90",
            "p99",
            "total ms p50",
            "p90",
            "p99",
        ];
        let cells = |row: &ModelRow| {
            let mut cells = vec![row.model.clone(), row.ok.to_string(), row.cancelled.to_string()];
            cells.push(format!("{:.0}", row.tokens_per_second));
            cells.extend(percentile_cells(row.ttft_ms, 0));
            cells.extend(percentile_cells(row.total_ms, 0));
            cells
        };
        println!("{}", report::table(&HEADER, 1, self.models.iter().map(cells)));
        println!(
            "{} ok, {} cancelled, {}, {} broken; {:.0} tokens/s for {:.0} s",
            self.ok,
            self.cancelled,
            statuses(&self.statuses),
            self.broken,
            self.tokens_per_second,
            self.seconds
        );
        if let Some(memory) = &self.memory {
            println!(
                "memory: {} after a fifth of the time, {} at the end ({:+.1} MiB, {:+.1} %), {} at most",
                terminal::bytes(memory.after_warm_up_bytes),
                terminal::bytes(memory.at_end_bytes),
                memory.growth_bytes as f64 / f64::from(1 << 20),
                100.0 * memory.growth_bytes as f64 / memory.after_warm_up_bytes as f64,
                terminal::bytes(memory.peak_bytes)
            );
        }
        match &self.blocks {
            Some(blocks) => println!(
                "KV cache at rest: {} blocks = {} free + {} cached; {} sequences running, {} waiting",
                blocks.total, blocks.free, blocks.cached, blocks.running, blocks.waiting
            ),
            None => println!("KV cache: the server does not show it"),
        }
        if self.faults.is_empty() {
            println!("sound: no 5xx, no broken stream, no leak");
        } else {
            println!("NOT SOUND: {}", self.faults.join("; "));
        }
    }
}

/// `429 x 12, 503 x 0, other 4xx: 400 x 1, other 5xx: none`
fn statuses(counts: &BTreeMap<u16, u64>) -> String {
    let count = |status: u16| counts.get(&status).copied().unwrap_or(0);
    let others = |from: u16| {
        let of_kind = counts.range(from..from + 100).filter(|(status, _)| ![429, 503].contains(*status));
        let listed: Vec<String> = of_kind.map(|(status, count)| format!("{status} x {count}")).collect();
        if listed.is_empty() { "none".to_owned() } else { listed.join(" ") }
    };
    format!(
        "429 x {}, 503 x {}, other 4xx: {}, other 5xx: {}",
        count(429),
        count(503),
        others(400),
        others(500)
    )
}

/// What makes the run a failure.
fn faults(tally: &Tally, blocks: &anyhow::Result<Option<Blocks>>) -> Vec<String> {
    let mut faults = Vec::new();
    let said = |kind: &str| tally.messages.get(kind).map(|text| format!(" ({text})")).unwrap_or_default();
    for (status, count) in tally.statuses.range(500..) {
        faults.push(format!("{count} answers with status {status}{}", said(&status.to_string())));
    }
    if tally.broken > 0 {
        faults.push(format!("{} broken streams{}", tally.broken, said("broken")));
    }
    if tally.models.iter().all(|model| model.ok + model.cancelled == 0) {
        let why = tally.messages.values().next().map(|text| format!(" ({text})")).unwrap_or_default();
        faults.push(format!("no request succeeded{why}"));
    }
    match blocks {
        Err(error) => faults.push(format!("the server is gone at the end ({error:#})")),
        Ok(Some(blocks)) if blocks.running + blocks.waiting > 0 => {
            faults.push(format!("{} sequences are left", blocks.running + blocks.waiting));
        }
        Ok(Some(blocks)) if !blocks.are_whole() => {
            let missing = blocks.total as i64 - (blocks.free + blocks.cached) as i64;
            faults.push(format!("{missing} blocks of the KV cache leaked"));
        }
        Ok(_) => {}
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: Blocks = Blocks { total: 10, free: 6, cached: 4, running: 0, waiting: 0 };

    fn status(status: u16, retry_after: Option<u64>) -> Failure {
        let status = StatusCode::from_u16(status).expect("a status");
        Failure::Status { status, retry_after: retry_after.map(Duration::from_secs), body: "why".to_owned() }
    }

    fn sound() -> Tally {
        let mut tally = Tally::new(2);
        tally.models[1].ok(&Completion { num_output_tokens: 7, ..Completion::default() });
        tally
    }

    #[test]
    fn refusals_are_waited_out_and_are_no_faults() {
        let mut tally = sound();
        assert_eq!(tally.failure(&status(429, Some(3))), Duration::from_secs(3));
        assert_eq!(tally.failure(&status(429, None)), DEFAULT_RETRY);
        assert_eq!(tally.failure(&status(400, None)), DEFAULT_RETRY);
        assert_eq!(statuses(&tally.statuses), "429 x 2, 503 x 0, other 4xx: 400 x 1, other 5xx: none");
        assert_eq!(faults(&tally, &Ok(Some(WHOLE))), Vec::<String>::new());
    }

    #[test]
    fn server_errors_breaks_and_leaks_are_faults() {
        let mut tally = sound();
        tally.failure(&status(500, None));
        tally.failure(&Failure::Broken("cut".to_owned()));
        let found = faults(&tally, &Ok(Some(Blocks { cached: 1, ..WHOLE })));
        assert_eq!(
            found,
            ["1 answers with status 500 (why)", "1 broken streams (cut)", "3 blocks of the KV cache leaked"]
        );
        assert_eq!(faults(&sound(), &Ok(Some(Blocks { running: 2, ..WHOLE }))), ["2 sequences are left"]);
        assert_eq!(faults(&Tally::new(1), &Ok(None)), ["no request succeeded"]);
        let gone = Err(anyhow::anyhow!("refused"));
        assert_eq!(faults(&sound(), &gone), ["the server is gone at the end (refused)"]);
    }

    #[test]
    fn tallies_add_up() {
        let mut all = sound();
        let mut other = sound();
        other.models[0].cancelled = 2;
        other.failure(&status(429, None));
        all.merge(other.clone());
        all.merge(other);
        assert_eq!((all.models[1].ok, all.models[1].num_output_tokens, all.models[0].cancelled), (3, 21, 4));
        assert_eq!((all.models[1].total_ms.len(), all.statuses[&429]), (3, 2));
    }

    #[test]
    fn memory_growth_counts_from_the_end_of_the_warm_up() {
        let samples: Vec<u64> = [10, 50, 60, 61, 62, 90, 62, 62, 62, 63].to_vec();
        let memory = Memory::of(&samples).expect("samples");
        assert_eq!((memory.after_warm_up_bytes, memory.growth_bytes, memory.peak_bytes), (60, 3, 90));
        assert_eq!(Memory::of(&[]), None);
    }
}
