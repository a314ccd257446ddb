//! A model that does no arithmetic: after any token it wants the next of a list.

use std::time::Duration;

use tandem_models::outputs::WholeRows;
use tandem_models::{DecoderConfig, ForwardBatch, Model, ModelError, Outputs, Tokenizer};

pub(super) struct ScriptedModel {
    config: DecoderConfig,
    /// Ids of tokens that are plain words.
    words: Vec<u32>,
    /// Time of a pass.
    interval: Duration,
    /// `[num_logits_rows]` of the pass that was begun: the token that each row asks for.
    wanted: Vec<u32>,
    batch: ForwardBatch,
    rows: WholeRows,
}

/// Tokens of the list.
const NUM_WORDS: usize = 64;

impl ScriptedModel {
    pub(super) fn new(config: DecoderConfig, tokenizer: &Tokenizer, interval: Duration) -> Self {
        let is_word = |id: &u32| {
            let text = tokenizer.decode(&[*id], false).unwrap_or_default();
            text.len() > 1 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b' ')
        };
        let words: Vec<u32> = (0..tokenizer.vocab_size() as u32).filter(is_word).take(NUM_WORDS).collect();
        assert!(!words.is_empty(), "the demo pair has words: this is a bug");
        ScriptedModel {
            config,
            words,
            interval,
            wanted: Vec::new(),
            batch: ForwardBatch::new(),
            rows: WholeRows::default(),
        }
    }
}

impl Model for ScriptedModel {
    fn config(&self) -> &DecoderConfig {
        &self.config
    }

    fn kv_bytes_per_token(&self) -> usize {
        1
    }

    fn allocate_kv_cache(&mut self, _num_blocks: usize, _block_size: usize) -> Result<(), ModelError> {
        Ok(())
    }

    fn begin(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        self.batch.clone_from(batch);
        self.wanted.clear();
        for &row in &batch.logits_rows {
            let position = batch.positions[row as usize] as usize;
            self.wanted.push(self.words[position % self.words.len()]);
        }
        Ok(())
    }

    fn advance(&mut self) -> Result<bool, ModelError> {
        Ok(false)
    }

    fn finish(&mut self) -> Result<Outputs<'_>, ModelError> {
        std::thread::sleep(self.interval);
        let logits = &mut self.rows.logits;
        let vocab_size = self.config.vocab_size;
        logits.clear();
        logits.resize(self.wanted.len() * vocab_size, 0.0);
        for (row, &id) in self.wanted.iter().enumerate() {
            logits[row * vocab_size + id as usize] = 1.0;
        }
        Ok(self.rows.outputs(&self.batch.wanted, self.batch.num_token_ids))
    }
}
