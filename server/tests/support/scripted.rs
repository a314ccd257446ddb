//! A model that says what the test wants: the real one but for its logits, which ask for the next
//! token of a script. Where the context ends with the script's beginning, the script goes on.

use std::sync::{Arc, Mutex};

use tandem_models::{DecoderConfig, ForwardBatch, Model, ModelError};

/// The tokens that answers consist of, the last of which ends them.
#[derive(Clone, Default)]
pub(crate) struct Script(Arc<Mutex<Vec<u32>>>);

impl Script {
    pub(crate) fn set(&self, tokens: Vec<u32>) {
        *self.0.lock().expect("no holder panics") = tokens;
    }
}

pub(crate) struct ScriptedModel {
    pub(crate) inner: Box<dyn Model>,
    pub(crate) script: Script,
    block_size: usize,
    /// The cache: a token for every slot.
    tokens: Vec<u32>,
    batch: ForwardBatch,
}

impl ScriptedModel {
    pub(crate) fn new(inner: Box<dyn Model>, script: Script) -> Self {
        ScriptedModel { inner, script, block_size: 0, tokens: Vec::new(), batch: ForwardBatch::new() }
    }

    fn context(&self, seq: usize, row: u32) -> Vec<u32> {
        let batch = &self.batch;
        let blocks = &batch.block_tables[batch.block_table_offsets[seq] as usize..];
        let slot = |position: usize| {
            blocks[position / self.block_size] as usize * self.block_size + position % self.block_size
        };
        (0..=batch.positions[row as usize] as usize).map(|position| self.tokens[slot(position)]).collect()
    }
}

impl Model for ScriptedModel {
    fn config(&self) -> &DecoderConfig {
        self.inner.config()
    }

    fn kv_bytes_per_token(&self) -> usize {
        self.inner.kv_bytes_per_token()
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize, block_size: usize) -> Result<(), ModelError> {
        self.tokens = vec![0; num_blocks * block_size];
        self.block_size = block_size;
        self.inner.allocate_kv_cache(num_blocks, block_size)
    }

    fn begin(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        self.batch.clone_from(batch);
        for (&token, &slot) in batch.token_ids.iter().zip(&batch.slot_mapping) {
            self.tokens[slot as usize] = token;
        }
        self.inner.begin(batch)
    }

    fn advance(&mut self) -> Result<bool, ModelError> {
        self.inner.advance()
    }

    fn finish(&mut self, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        self.inner.finish(logits)?;
        let script = self.script.0.lock().expect("no holder panics").clone();
        if script.is_empty() {
            return Ok(());
        }
        let vocab_size = self.inner.config().vocab_size;
        let batch = &self.batch;
        let seq_of =
            |row: u32| (0..batch.num_seqs()).find(|&seq| row < batch.cu_seqlens_q[seq + 1]).expect("a row");
        for (i, &row) in batch.logits_rows.iter().enumerate() {
            let context = self.context(seq_of(row), row);
            let said = (0..script.len()).rev().find(|&n| context.ends_with(&script[..n])).unwrap_or(0);
            logits[i * vocab_size..][script[said] as usize] = 1e4;
        }
        Ok(())
    }
}
