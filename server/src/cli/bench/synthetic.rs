//! Synthetic acceptance: a target that computes everything, then lets each draft token stand with a
//! fixed probability. So the whole deep path (draft passes, verification, KV cache, scheduler, HTTP) runs at
//! its real cost on random weights of a real shape, before the real ones are there.
//!
//! It is a [`Model`] around the target that benchmarks alone put there; server and engine know nothing of
//! it, and every report made with it begins by saying so. The coin of a draft token is a function of seed,
//! position, the token and the one before it: a pass that is run again decides the same.

use std::fmt;

use clap::Args;
use serde::Serialize;
use tandem_engine::Models;
use tandem_models::outputs::{Chosen, RowRoom, choose_in};
use tandem_models::{DecoderConfig, ForwardBatch, Model, ModelError, Outputs, Wanted};

/// The flag of the benchmarks that can do it.
#[derive(Args, Clone, Copy, Debug)]
pub(super) struct SyntheticArgs {
    /// For random weights (tandem synth): let each draft token stand with probability P, by a seeded coin and
    /// whatever the weights say. The answers are noise; the report says so in its first line
    #[arg(long, value_name = "P", value_parser = parse_probability)]
    synthetic_acceptance: Option<f64>,
}

impl SyntheticArgs {
    /// With the coin's seed; `None` if acceptance is to be real.
    pub(super) fn acceptance(self, seed: u64) -> Option<Synthetic> {
        self.synthetic_acceptance.map(|probability| Synthetic { probability, seed })
    }
}

fn parse_probability(text: &str) -> Result<f64, String> {
    let wanted = || "wanted a probability from 0 to 1, such as 0.8".to_owned();
    text.parse().ok().filter(|p| (0.0..=1.0).contains(p)).ok_or_else(wanted)
}

/// Draft tokens stand by chance; the first line of a report.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Synthetic {
    pub(super) probability: f64,
    pub(super) seed: u64,
}

impl fmt::Display for Synthetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Synthetic { probability, seed } = self;
        write!(
            f,
            "SYNTHETIC ACCEPTANCE {probability}: each draft token stands by a coin (seed {seed}), whatever the \
             weights say. The answers are noise; only the costs are real."
        )
    }
}

impl Synthetic {
    /// The pair with this kind of target.
    pub(super) fn adapt(self, models: Models) -> Models {
        let target =
            models.target.map(|real| -> Box<dyn Model> { Box::new(SyntheticTarget::new(real, self)) });
        Models { target, ..models }
    }

    /// Whether `token` stands at `position`, after `previous`.
    fn stands(self, position: u32, previous: u32, token: u32) -> bool {
        let words = [u64::from(position), u64::from(previous), u64::from(token)];
        let mixed = words.into_iter().fold(self.seed, |state, word| mix(state ^ word));
        // 53 bits, as many as an f64 in [0, 1) has.
        ((mixed >> 11) as f64) * (-53f64).exp2() < self.probability
    }
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014), after its increment.
fn mix(word: u64) -> u64 {
    let mut mixed = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ mixed >> 31
}

/// More than any logit, and far from the end of f32.
const DECISIVE: f32 = 1e6;

/// The target as [`Synthetic`] has it.
struct SyntheticTarget {
    real: Box<dyn Model>,
    synthetic: Synthetic,
    /// Of each row of logits of the pass under way: the draft token it judges, and how.
    verdicts: Vec<Option<(u32, bool)>>,
    /// The pass as it was asked for, and as the real model is asked: rows with a verdict whole.
    batch: ForwardBatch,
    asked: ForwardBatch,
    logits: Vec<f32>,
    chosen: Vec<Chosen>,
    top: Vec<(u32, f32)>,
    room: RowRoom,
}

impl SyntheticTarget {
    fn new(real: Box<dyn Model>, synthetic: Synthetic) -> Self {
        SyntheticTarget {
            real,
            synthetic,
            verdicts: Vec::new(),
            batch: ForwardBatch::new(),
            asked: ForwardBatch::new(),
            logits: Vec::new(),
            chosen: Vec::new(),
            top: Vec::new(),
            room: RowRoom::default(),
        }
    }
}

impl Model for SyntheticTarget {
    fn config(&self) -> &DecoderConfig {
        self.real.config()
    }

    fn kv_bytes_per_token(&self) -> usize {
        self.real.kv_bytes_per_token()
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize, block_size: usize) -> Result<(), ModelError> {
        self.real.allocate_kv_cache(num_blocks, block_size)
    }

    fn drafting_head(&mut self) -> Option<&mut dyn Model> {
        self.real.drafting_head()
    }

    fn begin(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        let mut ends = batch.cu_seqlens_q.iter().skip(1).copied().peekable();
        self.verdicts.clear();
        self.verdicts.extend(batch.logits_rows.iter().map(|&row| {
            while ends.next_if(|&end| end <= row).is_some() {}
            // A row is followed by a token of its own sequence only if that is a draft token.
            let next = row as usize + 1;
            (ends.peek().is_some_and(|&end| next < end as usize)).then(|| {
                let (previous, token) = (batch.token_ids[row as usize], batch.token_ids[next]);
                (token, self.synthetic.stands(batch.positions[next], previous, token))
            })
        }));
        self.batch.clone_from(batch);
        self.asked.clone_from(batch);
        for (asked, verdict) in self.asked.wanted.iter_mut().zip(&self.verdicts) {
            if verdict.is_some() {
                *asked = Wanted::Whole;
            }
        }
        self.real.begin(&self.asked)
    }

    fn advance(&mut self) -> Result<bool, ModelError> {
        self.real.advance()
    }

    fn finish(&mut self) -> Result<Outputs<'_>, ModelError> {
        let SyntheticTarget { real, verdicts, batch, asked, logits, chosen, top, room, .. } = self;
        let vocab_size = real.config().vocab_size;
        let outputs = real.finish()?;
        let (mut rows, mut tokens) = (outputs.logits.chunks_exact(vocab_size), outputs.chosen.iter());
        let mut tops = outputs.top;
        logits.clear();
        chosen.clear();
        top.clear();
        for ((wanted, asked), verdict) in batch.wanted.iter().zip(&asked.wanted).zip(verdicts) {
            if !asked.is_whole() {
                let Some(token) = tokens.next() else { continue };
                let num_top = token.report.map_or(0, |report| report.num_top as usize);
                chosen.push(*token);
                top.extend(tops.split_off(..num_top).unwrap_or_default());
                continue;
            }
            let start = logits.len();
            logits.extend(rows.next().unwrap_or_default());
            if let Some((token, stands)) = *verdict {
                logits[start + token as usize] += if stands { DECISIVE } else { -DECISIVE };
            }
            if let Wanted::Token(choice) = wanted {
                let tokens = &logits[start..][..vocab_size.min(batch.num_token_ids)];
                chosen.push(choose_in(tokens, choice, room));
                top.extend_from_slice(room.top());
                logits.truncate(start);
            }
        }
        Ok(Outputs { logits, chosen, top })
    }
}

#[cfg(test)]
mod tests {
    use tandem_models::outputs::{Choice, WholeRows};

    use super::*;

    #[test]
    fn coins_fall_as_often_as_they_should_and_the_same_way_again() {
        let share = |probability: f64, seed| {
            let synthetic = Synthetic { probability, seed };
            (0..20_000).filter(|&i| synthetic.stands(i, i * 7 % 1000, i * 13 % 50_000)).count() as f64 / 2e4
        };
        assert!((share(0.8, 1) - 0.8).abs() < 0.01, "{}", share(0.8, 1));
        assert!((share(0.3, 2) - 0.3).abs() < 0.01);
        assert_eq!((share(0.0, 1), share(1.0, 1)), (0.0, 1.0));
        let coin = |seed| (0..64).map(|i| Synthetic { probability: 0.5, seed }.stands(i, 3, 4)).collect();
        let coins: [Vec<bool>; 3] = [coin(1), coin(1), coin(2)];
        assert!(coins[0] == coins[1] && coins[0] != coins[2]);
    }

    /// A model that knows four tokens and likes the second.
    struct Flat(DecoderConfig, ForwardBatch, WholeRows);

    impl Model for Flat {
        fn config(&self) -> &DecoderConfig {
            &self.0
        }

        fn kv_bytes_per_token(&self) -> usize {
            4
        }

        fn allocate_kv_cache(&mut self, _: usize, _: usize) -> Result<(), ModelError> {
            Ok(())
        }

        fn begin(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
            self.1.clone_from(batch);
            Ok(())
        }

        fn advance(&mut self) -> Result<bool, ModelError> {
            Ok(false)
        }

        fn finish(&mut self) -> Result<Outputs<'_>, ModelError> {
            self.2.logits = [0.0, 1.0, 0.0, 0.0].repeat(self.1.wanted.len());
            Ok(self.2.outputs(&self.1.wanted, self.1.num_token_ids))
        }
    }

    #[test]
    fn only_rows_that_judge_a_draft_token_are_decided() {
        let config = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/draft");
        let mut config = tandem_models::Checkpoint::open(&config).expect("the demo pair is there").config;
        config.vocab_size = 4;
        for probability in [0.0, 1.0] {
            let target: Box<dyn Model> =
                Box::new(Flat(config.clone(), ForwardBatch::new(), WholeRows::default()));
            let models = Models { target: Some(target), draft: None };
            let mut target = Synthetic { probability, seed: 1 }.adapt(models).target.expect("a target");
            let mut batch = ForwardBatch::new();
            // A prompt, a plain decode, two draft tokens after a committed one.
            batch.push_sequence(&[3, 3, 3], 0, &[0], 16, 1);
            batch.push_sequence(&[2], 5, &[1], 16, 1);
            batch.push_sequence(&[3, 2, 0], 4, &[2], 16, 3);
            let mut logits = Vec::new();
            target.forward(&batch, &mut logits).expect("a pass");
            let raised = if probability == 1.0 { DECISIVE } else { -DECISIVE };
            let plain = [0.0, 1.0, 0.0, 0.0];
            let rows: Vec<&[f32]> = logits.chunks_exact(4).collect();
            assert_eq!(rows, [&plain, &plain, &[0.0, 1.0, raised, 0.0], &[raised, 1.0, 0.0, 0.0], &plain]);
            batch.wanted.fill(Wanted::Token(Choice::default()));
            batch.wanted[1] = Wanted::Whole;
            target.begin(&batch).expect("a pass");
            let outputs = target.finish().expect("a pass");
            let tokens: Vec<u32> = outputs.chosen.iter().map(|chosen| chosen.token).collect();
            let stands = probability == 1.0;
            assert_eq!(tokens, if stands { [1, 2, 0, 1] } else { [1, 1, 1, 1] });
            assert_eq!(outputs.logits, plain);
        }
    }

    #[test]
    fn the_first_line_cannot_be_overlooked() {
        let text = Synthetic { probability: 0.8, seed: 3 }.to_string();
        assert!(text.starts_with("SYNTHETIC ACCEPTANCE 0.8") && text.contains("noise"), "{text}");
        assert!(parse_probability("1.5").is_err() && parse_probability("x").is_err());
        assert_eq!(parse_probability("0.8"), Ok(0.8));
    }
}
