//! Distillation: a draft learns what its target would say.

use candle_core::Tensor;
use rand::RngExt;
use tandem_models::Checkpoint;
use tandem_models::text::{FimTokens, Tokenizer};

use crate::corpus::Corpus;
use crate::evaluate::{EvalRow, compare, eval_rows};
use crate::export::{Card, copy_tokenizer, write_json, write_model};
use crate::folder::RunFolder;
use crate::generate::generate;
use crate::model::Decoder;
use crate::ops::{HeadLoss, Teacher};
use crate::random::{Purpose, stream};
use crate::run::{Task, drive, fingerprint};
use crate::sample::Sampler;
use crate::tokenizer::Text;
use crate::train::{corpus_rows, split_rows};
use crate::{DistillOptions, DistillReport, ModelShape, SampleMix, TrainError};

/// Steps whose target-written rows are generated together: decoding costs a pass over the target's
/// weights for each token, whatever the number of rows.
const POOL_STEPS: u64 = 16;

/// Trains a draft on the output distribution of a target.
///
/// # Errors
/// [`TrainError`] naming the option, file or step at fault; the last good checkpoint stays.
pub fn distill(options: &DistillOptions) -> Result<DistillReport, TrainError> {
    options.check()?;
    let run = &options.run;
    let checkpoint = Checkpoint::open(&options.target)?;
    let context = checkpoint.config.max_position_embeddings;
    if run.seq_len > context {
        let wanted = format!("at most the target's context of {context}");
        return Err(TrainError::Option { option: "seq_len", found: run.seq_len.to_string(), wanted });
    }
    let mut text = Text::read(&options.target)?;
    let mix = adopt_fim(&mut text, options)?;
    if text.vocab_size() > checkpoint.config.vocab_size {
        let (found, wanted) = (text.vocab_size(), checkpoint.config.vocab_size);
        return Err(TrainError::Tokenizer(format!(
            "has {found} entries; the target's embedding has {wanted} rows"
        )));
    }
    let folder = RunFolder::open(&options.out, run)?;
    let corpus = Corpus::read(&options.corpus)?;
    let target = Decoder::load(&checkpoint, run.seq_len)?;
    let shape = ModelShape {
        vocab_size: checkpoint.config.vocab_size,
        max_position_embeddings: context,
        ..options.shape.clone()
    };
    shape.check()?;
    copy_tokenizer(&folder, &options.target, &shape, &text)?;
    let draft = Decoder::init(&shape, run.seed)?;
    let summary = corpus.summary();
    let eval = eval_rows(&corpus, &text, run.seq_len, run.eval_tokens)?;
    let sampler = Sampler::new(&corpus, &text, &mix);
    let mut prints = fingerprint(run, &shape, &mix, &summary);
    prints.insert("target".into(), format!("{:?}", checkpoint.config).into());
    let weights = [options.kl_weight, options.ce_weight, options.from_outputs, options.output_temperature];
    prints.insert("distillation".into(), format!("{weights:?}").into());
    let mut task = Distillation { options, sampler, eval, target: &target, pool: None };
    let outcome = drive(run, &folder, &draft, &prints, &mut task)?;
    let report = DistillReport {
        out: options.out.clone(),
        target: options.target.clone(),
        parameters: draft.num_parameters(),
        steps: outcome.steps,
        tokens: outcome.steps * (run.seq_len * run.batch) as u64,
        corpus: summary,
        final_loss: outcome.loss,
        tokens_per_second: outcome.tokens_per_second,
        held_out: compare(&target, &draft, &task.eval)?,
    };
    write_model(&folder, &draft, &shape, &text, run.dtype)?;
    let card = Card {
        shape: &shape,
        parameters: report.parameters,
        corpus_dir: &options.corpus.dir,
        corpus: summary,
        steps: report.steps,
        tokens: report.tokens,
        bits_per_byte: report.held_out.map(|pair| pair.draft_bits_per_byte),
        target: Some(&options.target),
        pair: report.held_out,
        command_line: &run.command_line,
        has_chat: text.special.chat.is_some(),
    };
    card.write(&folder)?;
    write_json(&folder, "report.json", &report)?;
    folder.finish()?;
    Ok(report)
}

/// Takes over the target's own spelling of the fill-in-the-middle tokens, and leaves out the order
/// that it was not trained on.
fn adopt_fim(text: &mut Text, options: &DistillOptions) -> Result<SampleMix, TrainError> {
    let mut mix = options.mix.clone();
    let tokenizer = Tokenizer::from_dir(&options.target)?;
    let tokens = FimTokens::detect(&tokenizer);
    // Samples are laid out in no other orders than these.
    let known = tokens.as_ref().filter(|tokens| tokens.psm("", "").is_some());
    text.special.fim = known.and_then(|tokens| {
        let id = |token: &str| tokenizer.token_to_id(token);
        Some([id(&tokens.prefix)?, id(&tokens.middle)?, id(&tokens.suffix)?])
    });
    if tokens.is_some_and(|tokens| tokens.spm("", "").is_none()) {
        mix.spm_rate = 0.0;
    }
    Ok(mix)
}

struct Distillation<'a> {
    options: &'a DistillOptions,
    sampler: Sampler<'a>,
    eval: Vec<EvalRow>,
    target: &'a Decoder,
    pool: Option<Pool>,
}

/// Rows that the target wrote for a span of steps.
struct Pool {
    first_step: u64,
    /// (step, row in the batch, tokens)
    rows: Vec<(u64, usize, Vec<u32>)>,
}

impl Distillation<'_> {
    /// Which rows of which steps of a span the target writes: a draw per row, so that it does not
    /// matter at which step a run was resumed.
    fn places(&self, first_step: u64) -> Vec<(u64, usize)> {
        let run = &self.options.run;
        let all =
            (first_step..first_step + POOL_STEPS).flat_map(|step| (0..run.batch).map(move |row| (step, row)));
        all.filter(|&(step, row)| {
            stream(run.seed, Purpose::Outputs, step, row).random_bool(self.options.from_outputs)
        })
        .collect()
    }

    fn fill_pool(&mut self, first_step: u64) -> Result<(), TrainError> {
        let run = &self.options.run;
        let places = self.places(first_step);
        let mut rows = Vec::new();
        if !places.is_empty() {
            let mut shared = stream(run.seed, Purpose::Generation, first_step, usize::MAX);
            let prompt_len = shared.random_range(run.seq_len.div_ceil(16)..=run.seq_len / 2);
            let mut rngs: Vec<_> =
                places.iter().map(|&(step, row)| stream(run.seed, Purpose::Generation, step, row)).collect();
            let prompts = rngs
                .iter_mut()
                .map(|rng| self.sampler.prompt(rng, prompt_len))
                .collect::<Result<Vec<_>, _>>()?;
            // One token more than the context is a label only, so it is never run.
            let texts =
                generate(self.target, prompts, run.seq_len + 1, self.options.output_temperature, &mut rngs)?;
            rows = places.into_iter().zip(texts).map(|((step, row), text)| (step, row, text)).collect();
        }
        self.pool = Some(Pool { first_step, rows });
        Ok(())
    }

    fn rows(&mut self, step: u64) -> Result<Vec<Vec<u32>>, TrainError> {
        let mut rows = corpus_rows(&self.sampler, &self.options.run, step)?;
        if self.options.from_outputs > 0.0 {
            let first_step = step - step % POOL_STEPS;
            if self.pool.as_ref().is_none_or(|pool| pool.first_step != first_step) {
                self.fill_pool(first_step)?;
            }
            for (_, row, text) in self.pool.iter().flat_map(|pool| &pool.rows).filter(|entry| entry.0 == step)
            {
                rows[*row].clone_from(text);
            }
        }
        Ok(rows)
    }
}

impl Task for Distillation<'_> {
    fn loss(&mut self, decoder: &Decoder, step: u64) -> Result<Tensor, TrainError> {
        let (inputs, labels) = split_rows(&self.rows(step)?);
        let seq_len = self.options.run.seq_len;
        let teacher =
            Teacher { hidden: self.target.hidden(&inputs, seq_len)?, head: self.target.head.clone() };
        let hidden = decoder.hidden(&inputs, seq_len)?;
        let (kl, ce) = (self.options.kl_weight as f32, self.options.ce_weight as f32);
        Ok(HeadLoss::distillation(labels, ce, teacher, kl).apply(&hidden, &decoder.head)?)
    }

    fn evaluate(&mut self, decoder: &Decoder) -> Result<Option<String>, TrainError> {
        let pair = compare(self.target, decoder, &self.eval)?;
        Ok(pair.map(|pair| {
            format!(
                "held-out {:.4} bits per byte (target {:.4}), greedy agreement {:.1} %, mean accepted length {:.2}",
                pair.draft_bits_per_byte,
                pair.target_bits_per_byte,
                pair.greedy_agreement * 100.0,
                pair.mean_accepted_length
            )
        }))
    }
}
