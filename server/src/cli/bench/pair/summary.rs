//! From samples to the table and the verdict of `tandem bench pair`.

use std::collections::HashMap;

use serde::Serialize;

use super::{Key, PairArgs, Sample, Setting, settings};
use crate::cli::bench::report;
use crate::cli::bench::stats::{Spread, median};

/// Answers shorter than this say more about the first token than about speed; they are compared and
/// not timed.
const MIN_TIMED_TOKENS: u64 = 16;

/// A prompt whose answer changed with speculation.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Mismatch {
    pub(super) prompt: String,
    pub(super) temperature: f32,
    pub(super) setting: String,
    pub(super) reference: String,
    pub(super) wanted: String,
    pub(super) found: String,
}

/// One setting at one temperature.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    setting: String,
    temperature: f32,
    num_samples: usize,
    tokens_per_second: Option<Spread>,
    ttft_ms: Option<Spread>,
    /// To deep without speculation, one value a prompt.
    ratio: Option<Spread>,
    /// Share of draft tokens accepted.
    acceptance: Option<f64>,
    tokens_per_verification: Option<f64>,
}

/// The rows for people.
pub(super) fn table(rows: &[Row]) -> String {
    const HEADER: [&str; 9] = [
        "T",
        "setting",
        "tokens/s",
        "min..max",
        "first ms",
        "ratio",
        "min..max",
        "accepted",
        "tokens/verif.",
    ];
    let spread = |value: Option<Spread>, digits: usize| match value {
        Some(s) => (format!("{:.digits$}", s.median), format!("{:.digits$}..{:.digits$}", s.min, s.max)),
        None => ("-".to_owned(), "-".to_owned()),
    };
    let cells = |row: &Row| {
        let (speed, speeds) = spread(row.tokens_per_second, 0);
        let (ratio, ratios) = spread(row.ratio, 2);
        vec![
            row.temperature.to_string(),
            row.setting.clone(),
            speed,
            speeds,
            spread(row.ttft_ms, 1).0,
            ratio,
            ratios,
            row.acceptance.map_or("-".to_owned(), |share| format!("{:.0} %", 100.0 * share)),
            report::number(row.tokens_per_verification, 2),
        ]
    };
    report::table(&HEADER, 2, rows.iter().map(cells))
}

/// The settings' rows, temperature by temperature.
pub(super) fn rows(args: &PairArgs, samples: &[Sample]) -> Vec<Row> {
    let mut speeds: HashMap<Key, Vec<f64>> = HashMap::new();
    for sample in samples.iter().filter(|sample| sample.num_output_tokens >= MIN_TIMED_TOKENS) {
        speeds.entry(sample.key).or_default().push(sample.tokens_per_second);
    }
    let medians: HashMap<Key, f64> = speeds.into_iter().map(|(key, speeds)| (key, median(speeds))).collect();
    let mut rows = Vec::new();
    for (temperature_index, &temperature) in args.temperatures.iter().enumerate() {
        for setting in settings(args) {
            let own = || {
                samples.iter().filter(|s| (s.key.setting, s.key.temperature) == (setting, temperature_index))
            };
            let ratios = medians
                .iter()
                .filter(|(key, _)| (key.setting, key.temperature) == (setting, temperature_index))
                .filter_map(|(key, speed)| {
                    Some(speed / medians.get(&Key { setting: Setting::DeepPlain, ..*key })?)
                });
            rows.push(row(setting, temperature, own, ratios.collect()));
        }
    }
    rows
}

fn row<'a, I: Iterator<Item = &'a Sample>>(
    setting: Setting,
    temperature: f32,
    samples: impl Fn() -> I,
    ratios: Vec<f64>,
) -> Row {
    let timed = || samples().filter(|sample| sample.num_output_tokens >= MIN_TIMED_TOKENS);
    let sum = |field: fn(&Sample) -> u64| samples().map(field).sum::<u64>();
    let accepted = sum(|sample| sample.num_accepted_tokens);
    let drafted = accepted + sum(|sample| sample.num_rejected_tokens);
    // The prefill gives the first token. Each verification after it gives the accepted draft tokens
    // and one of the target's own.
    let decoded = sum(|sample| sample.num_output_tokens.saturating_sub(1));
    let verifications = decoded.saturating_sub(accepted);
    let is_speculative = setting.is_deep() && drafted > 0;
    Row {
        setting: setting.name(),
        temperature,
        num_samples: timed().count(),
        tokens_per_second: Spread::of(timed().map(|sample| sample.tokens_per_second)),
        ttft_ms: Spread::of(timed().map(|sample| sample.ttft_ms)),
        ratio: Spread::of(ratios.into_iter()),
        acceptance: is_speculative.then(|| accepted as f64 / drafted as f64),
        tokens_per_verification: is_speculative.then(|| decoded as f64 / verifications.max(1) as f64),
    }
}

/// One line, and the first difference if there is one.
pub(super) fn verdict(num_compared: usize, mismatches: &[Mismatch]) -> String {
    let Some(first) = mismatches.first() else {
        return format!(
            "lossless: all {num_compared} deep answers are the same with and without speculation"
        );
    };
    format!(
        "NOT LOSSLESS: {} of {num_compared} deep answers differ. First: prompt {}, temperature {}, {:?} against \
         {:?}\n  wanted {:?}\n  found  {:?}",
        mismatches.len(),
        first.prompt,
        first.temperature,
        first.setting,
        first.reference,
        first.wanted,
        first.found
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{same_answer, sample};
    use super::*;
    use crate::cli::bench::client::Completion;
    use crate::cli::bench::prompts::BenchPrompt;

    fn completion(text: &str, tokens: u64, accepted: u64, rejected: u64, seconds: f64) -> Completion {
        Completion {
            text: text.to_owned(),
            finish_reason: "length".to_owned(),
            num_output_tokens: tokens,
            num_accepted_tokens: accepted,
            num_rejected_tokens: rejected,
            arrivals: vec![Duration::from_millis(10)],
            total: Duration::from_secs_f64(seconds),
            ..Completion::default()
        }
    }

    fn args() -> PairArgs {
        use clap::Parser as _;
        #[derive(clap::Parser)]
        struct Only {
            #[command(flatten)]
            args: PairArgs,
        }
        Only::parse_from(["pair", "--temperatures", "0", "--fixed", "4"]).args
    }

    #[test]
    fn ratios_compare_the_same_prompt() {
        let prompt = |id: &str| BenchPrompt { id: id.to_owned(), prompt: id.to_owned() };
        let mut samples = Vec::new();
        // Prompt 0 is easy and twice as fast with speculation; prompt 1 is slow and gains half.
        for (index, plain, speculative) in [(0, 1.0, 0.5), (1, 4.0, 8.0 / 3.0)] {
            for (setting, seconds) in [(Setting::DeepPlain, plain), (Setting::DeepAuto, speculative)] {
                let key = Key { setting, temperature: 0, prompt: index };
                let accepted = if setting == Setting::DeepAuto { 66 } else { 0 };
                samples.push(sample(key, 0.0, &prompt("p"), 0, &completion("t", 100, accepted, 22, seconds)));
            }
        }
        let rows = rows(&args(), &samples);
        let auto = rows.iter().find(|row| row.setting == "deep, auto").expect("a row");
        let ratio = auto.ratio.expect("a ratio");
        assert!((ratio.median - 1.75).abs() < 1e-9 && (ratio.min - 1.5).abs() < 1e-9, "{ratio:?}");
        assert_eq!(auto.acceptance, Some(0.75));
        assert_eq!(auto.tokens_per_verification, Some(3.0));
        let plain = rows.iter().find(|row| row.setting == "deep, no speculation").expect("a row");
        assert!((plain.ratio.expect("a ratio").median - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_different_text_count_or_end_is_a_mismatch() {
        let wanted = completion("same", 5, 0, 0, 1.0);
        assert!(same_answer(&wanted, &completion("same", 5, 3, 1, 9.0)));
        assert!(!same_answer(&wanted, &completion("other", 5, 0, 0, 1.0)));
        assert!(!same_answer(&wanted, &completion("same", 6, 0, 0, 1.0)));
        let stopped = Completion { finish_reason: "stop".to_owned(), ..wanted.clone() };
        assert!(!same_answer(&wanted, &stopped));
    }

    #[test]
    fn the_verdict_shows_the_first_difference() {
        assert!(verdict(8, &[]).starts_with("lossless: all 8"));
        let mismatch = Mismatch {
            prompt: "p1".to_owned(),
            temperature: 0.8,
            setting: "deep, auto".to_owned(),
            reference: "deep, no speculation".to_owned(),
            wanted: "a".to_owned(),
            found: "b".to_owned(),
        };
        let text = verdict(8, &[mismatch]);
        assert!(text.starts_with("NOT LOSSLESS: 1 of 8") && text.contains("p1"), "{text}");
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
