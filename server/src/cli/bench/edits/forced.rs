//! A target that computes everything and then says what it is told to.

use std::sync::{Arc, Mutex, PoisonError};

use tandem_engine::TokenId;
use tandem_models::outputs::WholeRows;
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

/// More than any logit, and far from the end of f32.
const RAISE: f32 = 1e4;

/// Passes everything to the real model, and raises the logit of the answer's token in each row. One
/// sequence at a time.
pub(super) struct Forced {
    real: Box<dyn Model>,
    script: Script,
    /// The pass under way, as it was asked for, and as it is asked of the real model: all rows whole.
    batch: ForwardBatch,
    whole: ForwardBatch,
    rows: WholeRows,
}

impl Forced {
    pub(super) fn new(real: Box<dyn Model>, script: Script) -> Self {
        Forced {
            real,
            script,
            batch: ForwardBatch::new(),
            whole: ForwardBatch::new(),
            rows: WholeRows::default(),
        }
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
        self.batch.clone_from(batch);
        self.whole.clone_from(batch);
        self.whole.wanted.fill(Wanted::Whole);
        self.real.begin(&self.whole)
    }

    fn advance(&mut self) -> Result<bool, ModelError> {
        self.real.advance()
    }

    fn finish(&mut self) -> Result<Outputs<'_>, ModelError> {
        let Forced { batch, rows, .. } = self;
        rows.logits.clear();
        rows.logits.extend_from_slice(self.real.finish()?.logits);
        let vocab_size = self.real.config().vocab_size;
        let script = self.script.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (logits, &row) in rows.logits.chunks_exact_mut(vocab_size).zip(&batch.logits_rows) {
            // A row speaks of the token after its own.
            let index = (batch.positions[row as usize] as usize + 1).checked_sub(script.prompt_len);
            if let Some(&token) = index.and_then(|index| script.tokens.get(index)) {
                logits[token as usize] += RAISE;
            }
        }
        Ok(rows.outputs(&batch.wanted, batch.num_token_ids))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tandem_kernels::ThreadPool;
    use tandem_models::{BackendKind, Checkpoint};

    use super::*;

    #[test]
    fn rows_of_the_answer_are_raised_and_others_are_the_models_own() {
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
    }
}
