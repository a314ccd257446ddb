//! One model by itself and one sequence whose context is computed: what a pass costs, without a server.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use tandem_kernels::ThreadPool;
use tandem_kernels::kv::KvType;
use tandem_models::{BackendKind, Checkpoint, ForwardBatch, Model};

const BLOCK_SIZE: usize = 16;

/// A pass is repeated for this long, and at least [`LEAST_PASSES`] times.
const TIME_A_PASS: Duration = Duration::from_millis(300);
pub(super) const LEAST_PASSES: usize = 3;

/// Prompts are computed in pieces of this many tokens, as llama.cpp's default is.
const PREFILL_CHUNK: usize = 512;

/// See the file's header.
pub(super) struct Passes {
    model: Box<dyn Model>,
    context: usize,
    table: Vec<u32>,
    batch: ForwardBatch,
    logits: Vec<f32>,
}

impl Passes {
    /// Loads the model of a folder or a GGUF file, keys and values in f16, and computes a context, behind
    /// which there is room for passes over `most` tokens.
    ///
    /// # Errors
    /// If the model cannot be loaded, or has not so many positions.
    pub(super) fn load(
        dir: &Path,
        pool: Arc<ThreadPool>,
        context: usize,
        most: usize,
    ) -> anyhow::Result<Self> {
        let checkpoint = Checkpoint::open(dir)?;
        let mut model = tandem_models::decoder::load_with(&checkpoint, BackendKind::Cpu, KvType::F16, pool)?;
        let most_positions = model.config().max_position_embeddings;
        if context + most > most_positions {
            bail!(
                "a context of {context} and a pass of {most} tokens are more than the model's {most_positions} \
                 positions; choose a shorter context or shorter passes"
            );
        }
        let num_blocks = (context + most).div_ceil(BLOCK_SIZE);
        model.allocate_kv_cache(num_blocks, BLOCK_SIZE)?;
        let table = (0..num_blocks).map(|block| block as u32).collect();
        let mut passes = Passes { model, context, table, batch: ForwardBatch::new(), logits: Vec::new() };
        for start in (0..context).step_by(PREFILL_CHUNK) {
            passes.pass(start, PREFILL_CHUNK.min(context - start), 0)?;
        }
        Ok(passes)
    }

    fn pass(&mut self, start: usize, rows: usize, num_logits: usize) -> anyhow::Result<()> {
        let vocab_size = self.model.config().vocab_size;
        // Any tokens will do; neighbours differ, so that experts do.
        let tokens: Vec<u32> = (start..start + rows).map(|i| ((i * 7919 + 13) % vocab_size) as u32).collect();
        self.batch.clear();
        self.batch.push_sequence(&tokens, start, &self.table, BLOCK_SIZE, num_logits);
        Ok(self.model.forward(&self.batch, &mut self.logits)?)
    }

    /// Milliseconds of passes over `rows` tokens and the logits of the last `num_logits`.
    ///
    /// # Errors
    /// If a pass fails.
    pub(super) fn times_ms(&mut self, rows: usize, num_logits: usize) -> anyhow::Result<Vec<f64>> {
        self.pass(self.context, rows, num_logits)?;
        let begin = Instant::now();
        let mut times = Vec::new();
        while begin.elapsed() < TIME_A_PASS || times.len() < LEAST_PASSES {
            let pass = Instant::now();
            self.pass(self.context, rows, num_logits)?;
            times.push(pass.elapsed().as_secs_f64() * 1e3);
        }
        Ok(times)
    }
}
