//! A model that stands still while a test holds its gate.

use std::sync::{Arc, Mutex};

use tandem_models::{DecoderConfig, ForwardBatch, Model, ModelError, Outputs};

pub(crate) struct GatedModel {
    pub(crate) inner: Box<dyn Model>,
    pub(crate) gate: Arc<Mutex<()>>,
}

impl Model for GatedModel {
    fn config(&self) -> &DecoderConfig {
        self.inner.config()
    }

    fn kv_bytes_per_token(&self) -> usize {
        self.inner.kv_bytes_per_token()
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize, block_size: usize) -> Result<(), ModelError> {
        self.inner.allocate_kv_cache(num_blocks, block_size)
    }

    fn begin(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        self.inner.begin(batch)
    }

    fn advance(&mut self) -> Result<bool, ModelError> {
        drop(self.gate.lock().expect("no holder panics"));
        self.inner.advance()
    }

    fn finish(&mut self) -> Result<Outputs<'_>, ModelError> {
        self.inner.finish()
    }
}
