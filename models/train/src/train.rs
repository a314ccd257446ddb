//! Pretraining: a corpus folder becomes a tokenizer and a model.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::corpus::Corpus;
use crate::evaluate::{EvalRow, bits_per_byte, eval_rows};
use crate::export::{Card, write_json, write_model, write_tokenizer};
use crate::folder::{RunFolder, TOKENIZER};
use crate::model::Decoder;
use crate::ops::HeadLoss;
use crate::random::{Purpose, stream};
use crate::run::{Task, drive, fingerprint};
use crate::sample::Sampler;
use crate::tokenizer::Text;
use crate::{RunOptions, TrainError, TrainOptions, TrainReport};

/// Trains a tokenizer (unless one is given) and a model on a corpus folder.
///
/// # Errors
/// [`TrainError`] naming the option, file or step at fault; the last good checkpoint stays.
pub fn train(options: &TrainOptions) -> Result<TrainReport, TrainError> {
    options.check()?;
    let run = &options.run;
    let folder = RunFolder::open(&options.out, run)?;
    let corpus = Corpus::read(&options.corpus)?;
    let text = match &options.tokenizer {
        _ if folder.resumes() => Text::read(&folder.dir().join(TOKENIZER))?,
        Some(path) => Text::read(path)?,
        None => Text::train(&corpus, options.shape.vocab_size)?,
    };
    let shape = crate::ModelShape { vocab_size: text.vocab_size(), ..options.shape.clone() };
    shape.check()?;
    write_tokenizer(&folder, &shape, &text)?;
    let decoder = Decoder::init(&shape, run.seed)?;
    let summary = corpus.summary();
    let eval = eval_rows(&corpus, &text, run.seq_len, run.eval_tokens)?;
    let sampler = Sampler::new(&corpus, &text, &options.mix);
    let mut task = Pretraining { run, sampler, eval };
    let outcome =
        drive(run, &folder, &decoder, &fingerprint(run, &shape, &options.mix, &summary), &mut task)?;
    let report = TrainReport {
        out: options.out.clone(),
        parameters: decoder.num_parameters(),
        steps: outcome.steps,
        tokens: outcome.steps * (run.seq_len * run.batch) as u64,
        corpus: summary,
        final_loss: outcome.loss,
        tokens_per_second: outcome.tokens_per_second,
        held_out_bits_per_byte: bits_per_byte(&decoder, &task.eval)?,
    };
    write_model(&folder, &decoder, &shape, &text, run.dtype)?;
    let card = Card {
        shape: &shape,
        parameters: report.parameters,
        corpus_dir: &options.corpus.dir,
        corpus: summary,
        steps: report.steps,
        tokens: report.tokens,
        bits_per_byte: report.held_out_bits_per_byte,
        target: None,
        pair: None,
        command_line: &run.command_line,
        has_chat: text.special.chat.is_some(),
    };
    card.write(&folder)?;
    write_json(&folder, "report.json", &report)?;
    folder.finish()?;
    Ok(report)
}

/// The rows of one step, `seq_len + 1` tokens each, as inputs and labels.
pub(crate) fn split_rows(rows: &[Vec<u32>]) -> (Vec<u32>, Vec<u32>) {
    let inputs = rows.iter().flat_map(|row| row[..row.len() - 1].iter().copied()).collect();
    let labels = rows.iter().flat_map(|row| row[1..].iter().copied()).collect();
    (inputs, labels)
}

/// The rows that the corpus gives for a step.
pub(crate) fn corpus_rows(
    sampler: &Sampler<'_>,
    run: &RunOptions,
    step: u64,
) -> Result<Vec<Vec<u32>>, TrainError> {
    (0..run.batch)
        .into_par_iter()
        .map(|row| sampler.row(&mut stream(run.seed, Purpose::Samples, step, row), run.seq_len + 1))
        .collect()
}

struct Pretraining<'a> {
    run: &'a RunOptions,
    sampler: Sampler<'a>,
    eval: Vec<EvalRow>,
}

impl Task for Pretraining<'_> {
    fn loss(&mut self, decoder: &Decoder, step: u64) -> Result<Tensor, TrainError> {
        let (inputs, labels) = split_rows(&corpus_rows(&self.sampler, self.run, step)?);
        let hidden = decoder.hidden(&inputs, self.run.seq_len)?;
        Ok(HeadLoss::cross_entropy(labels).apply(&hidden, &decoder.head)?)
    }

    fn evaluate(&mut self, decoder: &Decoder) -> Result<Option<String>, TrainError> {
        let bits = bits_per_byte(decoder, &self.eval)?;
        Ok(bits.map(|bits| format!("held-out {bits:.4} bits per byte")))
    }
}
