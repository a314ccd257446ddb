//! From rounds to the table of `tandem bench deep`.

use serde::Serialize;

use super::{DeepArgs, Round, Setting, settings};
use crate::cli::bench::report::{self, Header};
use crate::cli::bench::stats::Spread;

/// One answer, after its first token.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Run {
    pub(super) num_decoded: u64,
    pub(super) num_accepted: u64,
    pub(super) num_drafted: u64,
    pub(super) seconds: f64,
}

impl Run {
    fn tokens_per_second(&self) -> f64 {
        self.num_decoded as f64 / self.seconds
    }

    /// A step gives the draft tokens that stand and one of the target's own.
    fn tokens_per_step(&self) -> f64 {
        self.num_decoded as f64 / self.num_decoded.saturating_sub(self.num_accepted).max(1) as f64
    }
}

/// One way to decode, on either side.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    engine: &'static str,
    setting: String,
    tokens_per_second: Spread,
    /// To the same engine's plain decoding in the same round.
    to_plain: Option<Spread>,
    /// Tandem's speed over the peer's, in the same round and at the same setting.
    to_peer: Option<Spread>,
    acceptance: Option<f64>,
    tokens_per_step: Option<f64>,
    /// Milliseconds of a draft-and-verify step.
    step_ms: Option<Spread>,
}

/// What is printed and written.
#[derive(Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    header: Header,
    rounds: u32,
    max_tokens: u32,
    rows: Vec<Row>,
}

impl Report {
    pub(super) fn new(header: Header, args: &DeepArgs, rounds: &[Round]) -> Self {
        let mut rows: Vec<Row> = settings(args)
            .into_iter()
            .enumerate()
            .map(|(place, setting)| tandem_row(args, rounds, place, setting))
            .collect();
        rows.extend(peer_plain_row(rounds));
        for (index, &length) in args.fixed.iter().enumerate() {
            rows.extend(peer_row(args, rounds, index, length));
        }
        Report { header, rounds: args.rounds, max_tokens: args.max_tokens, rows }
    }

    pub(super) fn print(&self) {
        let header = [
            "engine",
            "setting",
            "tokens/s",
            "min..max",
            "to plain",
            "min..max",
            "tandem/peer",
            "min..max",
            "accepted",
            "tokens/step",
            "step ms",
        ];
        let pair = |spread: Option<Spread>, digits: usize| match spread {
            Some(s) => [format!("{:.digits$}", s.median), format!("{:.digits$}..{:.digits$}", s.min, s.max)],
            None => ["-".to_owned(), "-".to_owned()],
        };
        let rows = self.rows.iter().map(|row| {
            let mut cells = vec![row.engine.to_owned(), row.setting.clone()];
            cells.extend(pair(Some(row.tokens_per_second), 1));
            cells.extend(pair(row.to_plain, 2));
            cells.extend(pair(row.to_peer, 2));
            cells.push(row.acceptance.map_or("-".to_owned(), |share| format!("{:.0} %", 100.0 * share)));
            cells.push(report::number(row.tokens_per_step, 2));
            cells.push(report::number(row.step_ms.map(|spread| spread.median), 1));
            cells
        });
        println!("{}", report::table(&header, 2, rows));
        println!(
            "decoding after the first token, {} tokens an answer, {} rounds, one stream; medians; ratios within \
             a round",
            self.max_tokens, self.rounds
        );
        if self.rows.iter().any(|row| row.engine == PEER) {
            println!(
                "llama.cpp, drafted: the time of its own speculative steps (llama-speculative-simple) and the \
                 tokens a step of Tandem's answers at that length; plain: llama-bench"
            );
        }
    }
}

const PEER: &str = "llama.cpp";

fn spread(values: impl Iterator<Item = f64>) -> Spread {
    Spread::of(values).expect("there is at least one round: this is a bug")
}

fn tandem_row(args: &DeepArgs, rounds: &[Round], place: usize, setting: Setting) -> Row {
    let runs = || rounds.iter().map(|round| round.tandem[place]);
    let [accepted, drafted] = [|run: Run| run.num_accepted, |run: Run| run.num_drafted]
        .map(|field| runs().map(field).sum::<u64>() as f64);
    let peer = |round: &Round| {
        let ours = round.tandem[place].tokens_per_second();
        match setting {
            Setting::Plain => round.peer_plain.map(|theirs| ours / theirs),
            Setting::Fixed(length) => {
                let index = args.fixed.iter().position(|&fixed| fixed == length)?;
                let step = round.peer_steps.get(index)?;
                Some(ours * step / round.tandem[place].tokens_per_step())
            }
            Setting::Auto => None,
        }
    };
    let drafts = drafted > 0.0;
    Row {
        engine: "tandem",
        setting: setting.name(),
        tokens_per_second: spread(runs().map(|run| run.tokens_per_second())),
        to_plain: Some(spread(
            rounds.iter().map(|r| r.tandem[place].tokens_per_second() / r.tandem[0].tokens_per_second()),
        )),
        to_peer: Spread::of(rounds.iter().filter_map(peer)),
        acceptance: drafts.then(|| accepted / drafted),
        tokens_per_step: drafts.then(|| {
            let decoded = runs().map(|run| run.num_decoded).sum::<u64>() as f64;
            decoded / (decoded - accepted).max(1.0)
        }),
        step_ms: drafts
            .then(|| spread(runs().map(|run| 1e3 * run.tokens_per_step() / run.tokens_per_second()))),
    }
}

fn peer_plain_row(rounds: &[Round]) -> Option<Row> {
    Some(Row {
        engine: PEER,
        setting: Setting::Plain.name(),
        tokens_per_second: Spread::of(rounds.iter().filter_map(|round| round.peer_plain))?,
        to_plain: Spread::of(rounds.iter().filter_map(|round| round.peer_plain).map(|_| 1.0)),
        to_peer: None,
        acceptance: None,
        tokens_per_step: None,
        step_ms: None,
    })
}

/// The peer's steps with the tokens that a step of Tandem's brought in the same round.
fn peer_row(args: &DeepArgs, rounds: &[Round], index: usize, length: u8) -> Option<Row> {
    let place = settings(args).iter().position(|&setting| setting == Setting::Fixed(length))?;
    let composed = |round: &Round| Some(round.tandem[place].tokens_per_step() / round.peer_steps.get(index)?);
    let step_ms = |round: &Round| round.peer_steps.get(index).map(|seconds| 1e3 * seconds);
    let ours = tandem_row(args, rounds, place, Setting::Fixed(length));
    Some(Row {
        engine: PEER,
        setting: Setting::Fixed(length).name(),
        tokens_per_second: Spread::of(rounds.iter().filter_map(composed))?,
        to_plain: Spread::of(rounds.iter().filter_map(|round| Some(composed(round)? / round.peer_plain?))),
        to_peer: None,
        acceptance: ours.acceptance,
        tokens_per_step: ours.tokens_per_step,
        step_ms: Spread::of(rounds.iter().filter_map(step_ms)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> DeepArgs {
        use clap::Parser as _;
        #[derive(clap::Parser)]
        struct Only {
            #[command(flatten)]
            args: DeepArgs,
        }
        Only::parse_from(["deep", "--synthetic-acceptance", "0.8", "--fixed", "2,4"]).args
    }

    #[test]
    fn the_peers_speed_is_its_steps_times_tandems_tokens_a_step() {
        let run = |num_decoded, num_accepted, num_drafted, seconds| Run {
            num_decoded,
            num_accepted,
            num_drafted,
            seconds,
        };
        // Plain, auto, 2 drafted, 4 drafted.
        let tandem =
            vec![run(60, 0, 0, 6.0), run(60, 40, 50, 2.5), run(60, 36, 48, 3.0), run(60, 45, 60, 2.0)];
        let round = Round { tandem, peer_plain: Some(8.0), peer_steps: vec![0.2, 0.4] };
        let report = Report::new(header(), &args(), &[round]);
        let speeds: Vec<f64> = report.rows.iter().map(|row| row.tokens_per_second.median).collect();
        // 2 drafted: 60 tokens in 24 steps; 4 drafted: 60 in 15.
        assert_eq!(speeds, [10.0, 24.0, 20.0, 30.0, 8.0, 12.5, 10.0]);
        let to_peer: Vec<Option<f64>> = report.rows.iter().map(|row| row.to_peer.map(|s| s.median)).collect();
        assert_eq!(to_peer[..2], [Some(1.25), None]);
        assert!((to_peer[2].expect("a ratio") - 1.6).abs() < 1e-9);
        assert!((to_peer[3].expect("a ratio") - 3.0).abs() < 1e-9);
        assert_eq!(report.rows[3].to_plain.map(|s| s.median), Some(3.0));
        assert_eq!((report.rows[3].acceptance, report.rows[3].tokens_per_step), (Some(0.75), Some(4.0)));
    }

    #[test]
    fn a_report_of_synthetic_acceptance_says_so_first() {
        let round = Round {
            tandem: vec![Run { num_decoded: 1, seconds: 1.0, ..Run::default() }; 4],
            ..Round::default()
        };
        let report = Report::new(header(), &args(), &[round]);
        assert_eq!(report.rows.len(), 4, "no peer, no rows of it");
        let json = serde_json::to_string(&report).expect("JSON");
        assert!(json.starts_with(r#"{"synthetic":{"probability":0.8"#), "{json}");
    }

    fn header() -> Header {
        Header {
            synthetic: Some(crate::cli::bench::synthetic::Synthetic { probability: 0.8, seed: 1 }),
            benchmark: "deep",
            machine: crate::cli::bench::report::Machine::this(1),
            target: "target".to_owned(),
            draft: "draft".to_owned(),
        }
    }
}
