//! A target that computes everything and then says what it is told to.

use std::sync::{Arc, Mutex, PoisonError};

use tandem_engine::TokenId;
use tandem_models::outputs::Chosen;
use tandem_models::{DecoderConfig, ForwardBatch, Model, ModelError, Outputs, Wanted};

/// What a forced model has to say; shared with the one who tells it.
#[derive(Clone, Default)]
pub(super) struct Script(Arc<Mutex<Answer>>);

#[derive(Default)]
struct Answer {
    prompt_len: usize,
    tokens: Vec<TokenId>,
}

impl Script {
    /// The answer to the next prompt, which has `prompt_len` tokens.
    pub(super) fn set(&self, prompt_len: usize, answer: &[TokenId]) {
        let mut script = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        script.prompt_len = prompt_len;
        script.tokens.clear();
        script.tokens.extend_from_slice(answer);
    }
}

impl Answer {
    /// The token that follows `position`, which counts the prompt.
    fn token_after(&self, position: usize) -> Option<TokenId> {
        (position + 1).checked_sub(self.prompt_len).and_then(|index| self.tokens.get(index).copied())
    }
}

/// More than any logit, and far from the end of f32.
const RAISE: f32 = 1e4;

/// Passes everything to the real model as it is, so that a pass costs what it costs a server, and puts the answer's
/// token in each row: it is the one that was chosen, or its logit is raised. One sequence at a time, which is not
/// drawn.
pub(super) struct Forced {
    real: Box<dyn Model>,
    script: Script,
    /// Of the pass under way: whether each row is wanted whole, and the token that it is to give.
    rows: Vec<(bool, Option<TokenId>)>,
    logits: Vec<f32>,
    chosen: Vec<Chosen>,
}

impl Forced {
    pub(super) fn new(real: Box<dyn Model>, script: Script) -> Self {
        Forced { real, script, rows: Vec::new(), logits: Vec::new(), chosen: Vec::new() }
    }
}

impl Model for Forced {
    fn config(&self) -> &DecoderConfig {
        self.real.config()
    }

    fn kv_bytes_per_token(&self) -> usize {
        self.real.kv_bytes_per_token()
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize, block_size: usize) -> Result<(), ModelError> {
        self.real.allocate_kv_cache(num_blocks, block_size)
    }

    fn begin(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        let script = self.script.0.lock().unwrap_or_else(PoisonError::into_inner);
        let tokens = batch.logits_rows.iter().map(|&row| {
            let position = batch.positions[row as usize];
            script.token_after(position as usize)
        });
        self.rows.clear();
        self.rows.extend(batch.wanted.iter().map(|wanted| matches!(wanted, Wanted::Whole)).zip(tokens));
        self.real.begin(batch)
    }

    fn advance(&mut self) -> Result<bool, ModelError> {
        self.real.advance()
    }

    fn finish(&mut self) -> Result<Outputs<'_>, ModelError> {
        let Forced { rows, logits, chosen, .. } = self;
        let vocab_size = self.real.config().vocab_size;
        let mut outputs = self.real.finish()?;
        logits.clear();
        logits.extend_from_slice(outputs.logits);
        chosen.clear();
        chosen.extend_from_slice(outputs.chosen);
        let (mut whole_rows, mut chosen_rows) = (logits.chunks_exact_mut(vocab_size), chosen.iter_mut());
        for &mut (is_whole, token) in rows {
            if is_whole {
                let row = whole_rows.next().expect("logits of each: this is a bug");
                token.iter().for_each(|&token| row[token as usize] += RAISE);
            } else {
                let row = chosen_rows.next().expect("a token of each: this is a bug");
                row.token = token.unwrap_or(row.token);
            }
        }
        (outputs.logits, outputs.chosen) = (logits, chosen);
        Ok(outputs)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tandem_kernels::ThreadPool;
    use tandem_models::outputs::Choice;
    use tandem_models::{BackendKind, Checkpoint};

    use super::*;

    fn run<'a>(model: &'a mut dyn Model, batch: &ForwardBatch) -> Outputs<'a> {
        model.begin(batch).expect("a pass");
        while model.advance().expect("a layer") {}
        model.finish().expect("a pass")
    }

    #[test]
    fn rows_of_the_answer_are_forced_and_others_are_the_models_own() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/draft");
        let checkpoint = Checkpoint::open(&dir).expect("the demo pair is in the repository");
        let load = || {
            let pool = Arc::new(ThreadPool::new(1));
            let mut model = tandem_models::load(&checkpoint, BackendKind::Cpu, pool).expect("it loads");
            model.allocate_kv_cache(1, 16).expect("16 tokens");
            model
        };
        let (mut real, script) = (load(), Script::default());
        let mut forced = Forced::new(load(), script.clone());
        let mut batch = ForwardBatch::new();
        batch.push_sequence(&[1, 2, 3, 4, 5], 0, &[0], 16, 5);
        let (mut wanted, mut found) = (Vec::new(), Vec::new());
        real.forward(&batch, &mut wanted).expect("a pass");
        // Tokens 3 and 4 of the sequence are the answer: rows 2 and 3 speak of them.
        script.set(3, &[7, 9]);
        forced.forward(&batch, &mut found).expect("a pass");
        let vocab_size = real.config().vocab_size;
        wanted[2 * vocab_size + 7] += RAISE;
        wanted[3 * vocab_size + 9] += RAISE;
        assert!(wanted == found);
        // The same where only tokens are wanted, and of one row all.
        batch.wanted.fill(Wanted::Token(Choice::default()));
        batch.wanted[2] = Wanted::Whole;
        let tokens = |outputs: Outputs<'_>| outputs.chosen.iter().map(|row| row.token).collect::<Vec<_>>();
        let real = tokens(run(real.as_mut(), &batch));
        let outputs = run(&mut forced, &batch);
        assert!(outputs.logits == &wanted[2 * vocab_size..3 * vocab_size]);
        assert_eq!(tokens(outputs), [real[0], real[1], 9, real[3]]);
    }
}
